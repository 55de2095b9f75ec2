"""A repaired folder, against a dense SVD, and PEFT's own reading of it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, inject, pairs, remove, repair_adapter, save_adapter
from lightning_lora.engine.intruders import intruder_dimensions
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, ConfigError
from lightning_lora.format.inspection import check_adapter
from tests.hub.models import build, by_peft, output, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
]


class Two(nn.Module):
    """Its weights have the singular values 12 to 1, along the axes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        for layer in (self.first, self.second):
            layer.weight.data.copy_(torch.diag(torch.arange(12.0, 0, -1)))

    def forward(self, x):
        return self.norm(self.second(torch.tanh(self.first(x))))


PLANTED = torch.full((12,), 12**-0.5)


def planted(tmp_path, size=60.0, **config):
    """A base, and an adapter whose update of `first` has a direction that no axis resembles, beside a small one."""
    model = Two()
    config = {"rank": 2, "alpha": 4, "target_modules": ["first", "second"], "modules_to_save": ["norm"], **config}
    inject(model, LoRAConfig(**config))
    own = {pair.name: pair for pair in pairs(model)}
    axis = torch.eye(12)[3]
    with torch.no_grad():
        for pair in own.values():
            pair.A.copy_(torch.stack([PLANTED, axis]))
            pair.B.copy_(torch.stack([0 * PLANTED, 0.1 * axis]).T)
        own["first"].B[:, 0] = size / pair.spec.scale * PLANTED
        model.norm.weight.add_(0.5)
    return model, save_adapter(model, tmp_path / "a", base_model="user/base")


def update(folder, name):
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    A, B = (tensors[f"base_model.model.{name}.lora_{factor}.weight"].double() for factor in "AB")
    return config["lora_alpha"] / config["r"] * B @ A


@pytest.mark.parametrize("strength", [0.0, 0.25])
def test_a_planted_intruder_is_found_and_the_update_is_scaled_along_it_alone(tmp_path, strength):
    model, folder = planted(tmp_path)
    remove(model)
    report = repair_adapter(folder, tmp_path / "out", model=model, strength=strength, count=3)
    check_adapter(tmp_path / "out")
    W, dense = model.first.weight.detach().double(), update(folder, "first")
    U, S, _ = torch.linalg.svd(W + dense)
    is_one = U[:, :3].abs().amax(0) < 0.5  # the axes are W's singular vectors
    u = U[:, :3][:, is_one]
    assert is_one.tolist() == [True, False, False]
    expected = dense - (1 - strength) * u @ u.T @ dense
    # An SVD in float32, and factors in float32.
    torch.testing.assert_close(update(tmp_path / "out", "first"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(update(tmp_path / "out", "second"), update(folder, "second"), rtol=0, atol=0)

    first, second = report.modules["first"], report.modules["second"]
    assert (first.intruders, second.intruders, report.intruders) == (1, 0, 1)
    assert first.of_base[0] == pytest.approx(float((u.T @ W).norm() / S[0]), rel=1e-4)
    for s in (1.0, strength):
        now = dense - (1 - s) * u @ u.T @ dense
        assert first.left[s] == intruder_dimensions(W, W + now, count=3) == report.left(s)
        assert first.sizes[s] == pytest.approx(float(now.norm()), rel=1e-4)
    whole, after = ([update(f, n) for n in ("first", "second")] for f in (folder, tmp_path / "out"))
    kept = float(torch.stack(after).norm() / torch.stack(whole).norm())
    assert report.kept(strength) == pytest.approx(kept, rel=1e-5)
    assert report.kept(1.0) == 1
    assert report.left(0.0) == 0


def test_all_else_in_the_folder_is_carried_over_and_peft_loads_it(tmp_path):
    model, folder = planted(tmp_path)
    remove(model)
    repair_adapter(folder, tmp_path / "out", model=model)
    before, after = (load_file(place / "adapter_model.safetensors") for place in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == ["base_model.model.first.lora_B.weight"]
    configs = [json.loads((place / "adapter_config.json").read_text()) for place in (folder, tmp_path / "out")]
    assert configs[0] == configs[1]
    assert "scaled by 0.5" in (tmp_path / "out/README.md").read_text()
    peft = by_peft(model, tmp_path / "out")
    delta = peft.base_model.model.first.get_delta_weight("default")
    torch.testing.assert_close(delta.double(), update(tmp_path / "out", "first"), rtol=1e-5, atol=1e-5)


def test_where_there_is_no_intruder_nothing_is_written(tmp_path):
    model, folder = planted(tmp_path, size=1e-3)
    remove(model)
    calls = []
    report = repair_adapter(folder, tmp_path / "out", model=model, measure=calls.append)
    assert report.intruders == 0
    assert report.folder is None
    assert "nothing was written" in str(report)
    assert not (tmp_path / "out").exists()
    assert calls == []


def test_what_is_measured_at_each_strength_joins_the_curve(tmp_path):
    model, folder = planted(tmp_path)
    remove(model)
    seen = {}

    def measure(place):
        seen[place] = float(update(place, "first").norm())
        return {"size": seen[place]}

    report = repair_adapter(folder, tmp_path / "out", model=model, strength=0.3, strengths=[0], measure=measure)
    assert list(report.metrics) == [1.0, 0.3, 0.0]
    for s, metrics in report.metrics.items():
        assert metrics["size"] == pytest.approx(report.modules["first"].sizes[s], rel=1e-6)
    assert [place.exists() for place in seen] == [True, False, False]
    lines = str(report).splitlines()
    assert lines[0] == "1 intruder dimension in 2 modules"
    assert lines[2].split() == [
        "module",
        "number",
        "intruders",
        "left",
        "at",
        "0.3",
        "share",
        "that",
        "the",
        "base",
        "has",
    ]
    head = next(i for i, line in enumerate(lines) if line.startswith("strength"))
    assert [line.split()[0] for line in lines[head + 2 : head + 5]] == ["1", "0.3", "0"]
    assert lines[head + 3].endswith("written")


def fails(place):
    raise ConfigError("no such data")


def test_what_cannot_be_is_an_error_and_nothing_is_written(tmp_path):
    model, folder = planted(tmp_path)
    remove(model)
    given = {"model": model}
    for wrong, message in [
        ({"strength": 1}, "would leave the adapter as it is"),
        ({"strength": 1.5}, "strength is a share from 0 to 1"),
        ({"strengths": [-1]}, "strengths is a finite number of at least 0"),
        ({"count": 0}, "count is a whole number"),
        ({"threshold": 0}, "threshold is a finite number above 0"),
        ({"measure": fails}, "no such data"),
    ]:
        with pytest.raises(ConfigError, match=message):
            repair_adapter(folder, tmp_path / "out", **given, **wrong)
    with pytest.raises(ConfigError, match="would replace the adapter itself"):
        repair_adapter(folder, folder, **given)
    other = Two()
    other.first.weight.data.add_(1.0)
    with pytest.raises(BaseMismatchError):
        repair_adapter(folder, tmp_path / "out", model=other)
    with pytest.raises(AdapterFormatError, match=r"has no weight 'first\.weight'"):
        repair_adapter(folder, tmp_path / "out", model=nn.Sequential(nn.Linear(2, 2)), check_base=False)
    dora = planted(tmp_path / "dora", use_dora=True)[1]
    with pytest.raises(AdapterFormatError, match="is a DoRA"):
        repair_adapter(dora, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["convolutions", "words", "gpt2"])
def test_each_layout_of_a_weight_is_repaired_as_the_dense_weight(tmp_path, kind):
    model, x = build(kind)
    targets = {"convolutions": ["one", "two", "three"], "words": ["embed", "fc"], "gpt2": ["c_attn", "c_fc"]}[kind]
    inject(model, LoRAConfig(rank=2, alpha=40, target_modules=targets))
    shake(model)
    folder = save_adapter(model, tmp_path / "a")
    own = {pair.name: pair for pair in pairs(model)}
    dense = {
        name: (pair.module.matrix(pair.module, pair.module.dense_weight()), pair.module.delta_weight())
        for name, pair in own.items()
    }
    dense = {name: (W.detach().double(), pair) for (name, (W, pair)) in dense.items()}
    changes = {n: own[n].module.matrix(own[n].module, d).detach().double() for n, (_, d) in dense.items()}
    remove(model)
    report = repair_adapter(folder, tmp_path / "out", model=model, strength=0.0, threshold=0.9)
    assert report.intruders > 0
    assert len(report.modules) >= 2
    after = by_peft(model, tmp_path / "out")
    for name in report.modules:
        W, dW = dense[name][0], changes[name]
        base, U = (torch.linalg.svd(M, full_matrices=False).U for M in (W, W + dW))
        u = U[:, :10][:, (base.T @ U[:, :10]).abs().amax(0) < 0.9]
        expected = dW - u @ u.T @ dW
        layer = after.get_submodule(f"base_model.model.{name}")
        now = layer.get_delta_weight("default").detach().double()
        now = now.T if kind == "gpt2" or name == "embed" else now.flatten(1)
        now = now if now.shape == expected.shape else now.T
        torch.testing.assert_close(now, expected, rtol=1e-3, atol=1e-4 * float(dW.abs().max()))
    assert output(after, x).isfinite().all()
