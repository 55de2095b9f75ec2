"""An inspection says what dense matrices say, names what is odd, and writes a page that everybody can read."""

from __future__ import annotations

import copy
import doctest
import math
import re
import shutil
import subprocess
from pathlib import Path

import peft
import pytest
import torch
from cases import CASES, IDS, Case
from safetensors.torch import load_file, save_file
from snapshot import assert_same, snapshot
from torch import nn

import lightning_lora.analysis.inspect
import lightning_lora.engine.low_rank
from lightning_lora import InspectionReport, LoRAConfig, inject, inspect_adapter, pairs, save_adapter
from lightning_lora.engine import effective_rank, stable_rank
from lightning_lora.engine.intruders import intruder_dimensions
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, CheckpointError, ConfigError
from lightning_lora.page import heat_map, line_chart, number
from tests.hub.models import Convolutions, Linears, Words, shake
from tests.page.strict import Strict

CLOSE = {"rel": 1e-5}  # factors in float32, sums in float64


class Net(nn.Module):
    """Two layers of two kinds, as a language model names them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(12, 10, bias=False), "v": nn.Linear(12, 8)}) for _ in range(2)
        )


def adapted(seed: int = 0, model: nn.Module | None = None, **config) -> nn.Module:
    model = Net() if model is None else model
    torch.manual_seed(seed)
    inject(model, LoRAConfig(**{"rank": 3, "alpha": 6, **config}))
    shake(model)
    return model


def saved(folder: Path, *given, **config) -> tuple[Path, nn.Module]:
    model = adapted(*given, **config)
    return save_adapter(model, folder), model


@pytest.mark.parametrize("module", [lightning_lora.analysis.inspect, lightning_lora.engine.low_rank])
def test_the_examples_in_the_docstrings_print_what_they_say(module):
    done = doctest.testmod(module)
    assert done.attempted
    assert done.failed == 0


def test_every_number_is_that_of_the_dense_matrices(tmp_path):
    one, model = saved(tmp_path / "one")
    two, other = saved(tmp_path / "two", 1, rank=4, alpha=4)
    report = inspect_adapter(one, model=Net(), other=two)
    assert list(report.layers) == [pair.name for pair in pairs(model)]
    for pair, second in zip(pairs(model), pairs(other), strict=True):
        layer = report.layers[pair.name]
        dW, dV, W = (
            t.detach().double()
            for t in (pair.module.delta_weight(), second.module.delta_weight(), pair.module.own("weight"))
        )
        U, S, Vh = (t[..., :3] if t.ndim == 1 else t for t in torch.linalg.svd(dW, full_matrices=False))
        U, Vh = U[:, :3], Vh[:3]
        assert layer.shape == tuple(dW.shape)
        assert layer.singular_values == pytest.approx(S.tolist(), **CLOSE)
        assert layer.norm == pytest.approx(float(dW.norm()), **CLOSE)
        assert layer.effective_rank == pytest.approx(effective_rank(S), **CLOSE)
        assert layer.stable_rank == pytest.approx(stable_rank(S), **CLOSE)
        assert layer.energy_top_quarter == pytest.approx(float(S[0] ** 2 / S.square().sum()), **CLOSE)
        assert layer.energy_last_quarter == pytest.approx(float(S[-1] ** 2 / S.square().sum()), **CLOSE)
        strength = float((U.T @ W @ Vh.T).norm())
        assert layer.relative_norm == pytest.approx(float(dW.norm() / W.norm()), **CLOSE)
        assert layer.amplification == pytest.approx(float(dW.norm()) / strength, **CLOSE)
        by_chance = 3 * float(W.norm()) / math.sqrt(W.numel())
        assert layer.alignment == pytest.approx(strength / by_chance, **CLOSE)
        assert layer.base.kept == 1
        assert layer.base.intruders == intruder_dimensions(W, W + dW)
        cosine = torch.cosine_similarity(dW.flatten(), dV.flatten(), dim=0)
        assert layer.other.cosine == pytest.approx(float(cosine), rel=1e-4, abs=1e-6)
        U2, _, Vh2 = torch.linalg.svd(dV, full_matrices=False)
        for i in (1, 2, 3):
            assert layer.other.inputs[i - 1] == pytest.approx(float((Vh[:i] @ Vh2[:i].T).norm() ** 2 / i), rel=1e-4)
            assert layer.other.outputs[i - 1] == pytest.approx(
                float((U[:, :i].T @ U2[:, :i]).norm() ** 2 / i), rel=1e-4
            )
    assert report.odd == ()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_model_of_every_kind_of_layer_can_be_inspected(case: Case):
    model = case.adapted()
    report = inspect_adapter(model, intruder_limit=0)
    assert list(report.layers) == [pair.name for pair in pairs(model)]
    for pair in pairs(model):
        layer = report.layers[pair.name]
        assert layer.norm == pytest.approx(float(pair.singular_values().norm()), **CLOSE)
        if layer.base is not None:
            assert layer.base.norm == pytest.approx(
                float(pair.module.dense_weight(pair.parameter).detach().norm()), **CLOSE
            )


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(Linears, ["block.0", "fc"]), (Convolutions, ["one", "two", "three"]), (Words, ["embed", "fc"])],
)
def test_a_folder_says_what_the_model_says_that_it_was_saved_from(kind, targets, tmp_path):
    torch.manual_seed(0)
    base = kind()
    model = kind()
    model.load_state_dict(base.state_dict())
    folder, model = saved(tmp_path / "a", 0, model, rank=2, target_modules=targets)
    one, two = inspect_adapter(folder, model=base), inspect_adapter(model)
    assert set(one.layers) == set(two.layers)
    for name, layer in one.layers.items():
        assert layer.singular_values == pytest.approx(two.layers[name].singular_values, rel=1e-4, abs=1e-6)
        if layer.base is not None:
            assert layer.base.strength == pytest.approx(two.layers[name].base.strength, rel=1e-4)


def test_files_of_the_base_say_what_the_module_says(tmp_path):
    folder, _ = saved(tmp_path / "a")
    save_file({f"model.{name}": t for name, t in Net().state_dict().items()}, tmp_path / "model.safetensors")
    from_file = inspect_adapter(folder, model=tmp_path / "model.safetensors")
    from_module = inspect_adapter(folder, model=Net())
    assert from_file.layers == from_module.layers


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (Net, {"target_modules": ["q"], "modules_to_save": ["v"]}),
        (Net, {"target_modules": ["q", "v"], "bias": "all"}),
        (Words, {"target_modules": ["fc"], "trainable_token_indices": [1, 2]}),
    ],
)
def test_the_base_of_an_adapter_that_trains_some_of_its_weights_is_known_as_such(kind, config, tmp_path):
    base = kind()
    folder = save_adapter(adapted(model=copy.deepcopy(base), **config), tmp_path / "adapter")
    before = snapshot(base)
    assert next(iter(inspect_adapter(folder, model=base).layers.values())).base is not None
    assert_same(snapshot(base), before)
    with torch.no_grad():
        next(base.parameters()).mul_(1.5)
    with pytest.raises(BaseMismatchError):
        inspect_adapter(folder, model=base)


def test_a_model_is_compared_with_a_folder_and_with_its_base_by_the_folder_s_names(tmp_path):
    folder, model = saved(tmp_path / "a")
    for own in (inspect_adapter(model, other=folder), inspect_adapter(model, model=Net(), other=folder)):
        assert all(layer.other.cosine == pytest.approx(1) for layer in own.layers.values())
        assert all(layer.base is not None for layer in own.layers.values())
    with pytest.raises(AdapterFormatError, match=r"has no weight 'layers.0.q.weight'"):
        inspect_adapter(model, model=Linears())


def test_what_is_odd_is_named(tmp_path):
    torch.manual_seed(0)
    base = Net().bfloat16()
    model = adapted(0, Net().bfloat16(), rank=4)
    own = {pair.name: pair for pair in pairs(model)}
    with torch.no_grad():
        own["layers.0.q"].B.zero_()
        own["layers.1.q"].B[:, 3] = 0
        own["layers.1.v"].B.mul_(1e-4)
    report = inspect_adapter(save_adapter(model, tmp_path / "a"), model=base)
    zero, unused, lost = report.odd
    assert zero.startswith("1 of 4 updates are zero")
    assert "layers.0.q" in zero
    assert unused.endswith("layers.1.q (3 of 4)")
    assert lost.startswith("1 of 4 updates are partly lost when they are merged into the base's bfloat16")
    assert "layers.1.v 0." in lost
    layer = report.layers["layers.1.v"]
    W = base.layers[1]["v"].weight.detach().float()
    dW = own["layers.1.v"].module.delta_weight().detach()
    left = (W + dW).bfloat16().float() - W
    assert layer.base.kept == pytest.approx(float((left * dW).sum() / dW.square().sum()), rel=1e-3)
    assert "odd: 1 of 4 updates are zero" in str(report)
    empty = report.layers["layers.0.q"]
    assert (empty.norm, empty.effective_rank, empty.amplification, empty.base.intruders) == (0, 0, None, 0)
    report.write_page(tmp_path / "page.html")  # zeros are drawn too


def test_variants_that_cannot_be_rewritten_can_be_looked_at(tmp_path):
    for config, note in (
        ({"use_dora": True}, "DoRA: what is shown is s B A"),
        ({"lora_bias": True}, "the biases of B"),
        ({"modules_to_save": ["v"], "target_modules": ["q"]}, "4 tensors were trained whole"),
    ):
        folder, _ = saved(tmp_path / "a", **config)
        assert note in str(inspect_adapter(folder))
    words = nn.Sequential(nn.Embedding(9, 12), Net().layers[0]["q"])
    folder, _ = saved(tmp_path / "b", 0, words, target_modules=["1"], trainable_token_indices={"0": [1, 5]})
    assert list(inspect_adapter(folder).layers) == ["1"]
    assert "single rows for tokens" in str(inspect_adapter(folder))


def test_what_cannot_be_inspected_is_an_error(tmp_path):
    folder, _ = saved(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    key = next(iter(tensors))

    def broken(name: str, tensors) -> Path:
        shutil.copytree(folder, tmp_path / name)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        return tmp_path / name

    with pytest.raises(AdapterFormatError, match=f"not finite, in {re.escape(key)}"):
        inspect_adapter(broken("nan", {**tensors, key: tensors[key] * torch.nan}))
    with pytest.raises(AdapterFormatError, match=f"missing: {re.escape(key)}"):
        inspect_adapter(broken("lacks", {name: t for name, t in tensors.items() if name != key}))
    diverged = adapted()
    with torch.no_grad():
        next(pairs(diverged)).A[0, 0] = torch.nan
    with pytest.raises(AdapterFormatError, match=r"'layers.0.q' holds values that are not finite"):
        inspect_adapter(diverged)
    with pytest.raises(AdapterFormatError, match="There is no folder"):
        inspect_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterFormatError, match=r"has no weight 'layers.0.q.weight'"):
        inspect_adapter(folder, model=Linears(), check_base=False)
    wide = Net()
    wide.layers[0]["q"] = nn.Linear(11, 10)
    with pytest.raises(AdapterFormatError, match=r"is not the \(10, 12\) floating-point weight"):
        inspect_adapter(folder, model=wide, check_base=False)
    with pytest.raises(BaseMismatchError):
        inspect_adapter(folder, model=Net(1))
    inspect_adapter(folder, model=Net(1), check_base=False)
    other, _ = saved(tmp_path / "other", 0, Net(1))
    with pytest.raises(BaseMismatchError, match="a and other were trained on different bases"):
        inspect_adapter(folder, other=other)
    assert inspect_adapter(folder, other=other, check_base=False).layers["layers.0.q"].other is not None
    with pytest.raises(AdapterStateError, match="has no adapters"):
        inspect_adapter(Net())
    with pytest.raises(AdapterStateError, match="has adapters of PEFT, and none of this package"):
        inspect_adapter(peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["q"])))
    with pytest.raises(ConfigError, match="A path is a str or a Path"):
        inspect_adapter(folder, model=3)
    with pytest.raises(ConfigError, match="is a folder, an id on the Hub or a model"):
        inspect_adapter(3)
    with pytest.raises(ConfigError, match="intruder_limit"):
        inspect_adapter(folder, intruder_limit=-1)


def test_an_adapter_on_the_hub_is_pulled_first(hub, tmp_path):
    folder, _ = saved(tmp_path / "a")
    hub.create_repo("user/adapter", files={path.name: path.read_bytes() for path in folder.iterdir()})
    report = inspect_adapter("user/adapter@main", other=folder)
    assert (report.adapter, report.other) == ("user/adapter@main", "a")
    assert all(layer.other.cosine == pytest.approx(1) for layer in report.layers.values())


# The page.


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> InspectionReport:
    folder = tmp_path_factory.mktemp("adapters")
    one, _ = saved(folder / "<one> & 'first'")
    two, _ = saved(folder / "two", 1, rank=4)
    return inspect_adapter(one, model=Net(), other=two)


CURVES = {"train_loss": [(0, 2.0), (10, 1.0)], "val_loss": [(5, float("nan"))], "lora/effective_rank": [(9, 2.5)]}


def test_a_page_is_whole_and_refers_to_nothing_outside(report, tmp_path):
    text = report.write_page(tmp_path / "page.html", curves=CURVES).read_text("utf-8")
    page = Strict(text)
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert len(page.ids) == len(set(page.ids))
    assert page.named
    assert set(page.named) < set(page.ids), "each figure has a title and a description"
    assert set(page.links) == {f"#s{i}" for i in range(1, len(page.links) + 1)} < {f"#{name}" for name in page.ids}
    assert page.scrolling == page.reachable > 5
    assert "Adapter &lt;one&gt; &amp; &#x27;first&#x27;" in text
    for heading in (
        "What is odd",
        "Amplification",
        "Intruder dimensions",
        "Cosine of the two updates",
        "Loss",
        "Directions that were used",
    ):
        assert heading in text


def test_a_page_that_cannot_be_written_leaves_what_was_there(report, tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"):
        report.write_page(tmp_path / "no" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_charts_take_what_measurements_can_be():
    odd = [float("nan"), float("inf"), -1.0, 0.0, 1e-9, 1e9]
    for points in ([], [(0, 0)], [(1, v) for v in odd], [(v, 1) for v in odd], [(i, 0.1 * i) for i in range(100)]):
        for log in (False, True):
            svg = line_chart({"a": points}, title="t", x="x", y="y", log_x=log, log_y=log)
            Strict(svg)
            assert not re.search(r'="[^"]*(nan|inf)', svg)
    for values in ([], [[None]], [odd], [[0.5, 0.5]]):
        columns = [str(i) for i in range(6)]
        svg = heat_map(
            values, rows=["<a>"] * len(values), columns=columns, title="t", x="x", low=-1 if values else None
        )
        Strict(svg)
        assert not re.search(r'="[^"]*(nan|inf)', svg)
    assert [number(v) for v in (0, 1234567.0, 12345.6, 0.00012345, 1e-7, -2.5, 100)] == [
        "0", "1.23e6", "12,346", "0.000123", "1e-7", "-2.5", "100",
    ]  # fmt: skip


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH to draw the page")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_draws_the_page_light_and_dark(report, tmp_path, dark):
    path = report.write_page(tmp_path / "page.html", curves=CURVES)
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,2400",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    Image = pytest.importorskip("PIL.Image")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour: count for count, colour in picture.getcolors(1 << 24)}
    paper = (0x15, 0x18, 0x1C) if dark else (0xFD, 0xFD, 0xFB)
    assert max(colours, key=colours.__getitem__) == paper, "the page has the reader's setting"
    line = (0x6D, 0xB3, 0xEE) if dark else (0x1F, 0x6F, 0xB0)
    assert colours.get(line, 0) > 100, "the lines of a chart are there"
