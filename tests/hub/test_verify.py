"""verify_adapter: every way to apply an adapter that is right is accepted, and every one that is not is named."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cases import CASES, IDS, Case
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    disabled,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
    verify_adapter,
)
from lightning_lora.engine import adapters
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError
from tests.snapshot import assert_same, snapshot
from tests.tiny_transformers import llama

RANK, ALPHA = 4, 12.0
HALF = (torch.bfloat16, torch.float16)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Merging:UserWarning"),
    pytest.mark.filterwarnings("ignore:PEFT (cannot load|loads) this adapter:UserWarning"),
    pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = llama().eval()
    with torch.no_grad():  # numbers that bfloat16 and float16 hold as well, so that the bases are the same
        for p in model.parameters():
            p.copy_(p.bfloat16().half())
    return model.to(dtype)


def give_factors(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Factors with which |s B A| / |W| is about `size` in each layer, as far as a matrix of W's shape allows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters(model):
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator))
            weight = layer._parameters["weight"].float()
            layer.lora_B.mul_(size * weight.norm() / layer.delta_weight().norm())


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("verify") / "adapter")


def saved(folder: Path, seed: int = 1, size: float = 0.3, **config: Any) -> Path:
    model = base()
    inject(model, LoRAConfig(**{"rank": RANK, "alpha": ALPHA, **config}))
    give_factors(model, seed, size)
    return save_adapter(model, folder)


def loaded(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = base(dtype)
    load_adapter(model, folder, **options)
    return model


def by_peft(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return peft.PeftModel.from_pretrained(base(dtype), str(folder), **options)


class Lit(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


# Ways that are right.


def cast_with_factors(folder: Path, dtype: torch.dtype) -> nn.Module:
    model = loaded(folder)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def of_8_bits(folder: Path) -> nn.Module:
    """The base's weights are rounded as int8 would; what the adapter adds is the same."""
    model = base()
    with torch.no_grad():
        for p in model.parameters():
            step = p.abs().amax() / 127
            p.copy_((p / step).round() * step)
    load_adapter(model, folder, check_base=False)
    return model


def with_dropout(folder: Path) -> nn.Module:
    model = base()
    inject(model, LoRAConfig(rank=RANK, alpha=ALPHA, dropout=0.5))
    give_factors(model)
    return model.train()


def in_a_lightning_module(folder: Path) -> nn.Module:
    module = Lit(base())
    load_adapter(module, folder)
    return module


RIGHT: dict[str, Callable[[Path], Any]] = {
    "float32": loaded,
    "bfloat16": lambda f: loaded(f, torch.bfloat16),
    "float16": lambda f: loaded(f, torch.float16),
    "float64": lambda f: loaded(f).double(),
    "bfloat16, factors too": lambda f: cast_with_factors(f, torch.bfloat16),
    "float16, factors too": lambda f: cast_with_factors(f, torch.float16),
    "a base of 8 bits": of_8_bits,
    "in training, with dropout": with_dropout,
    "in a LightningModule": in_a_lightning_module,
    "PEFT": by_peft,
    "PEFT, bfloat16": lambda f: by_peft(f, torch.bfloat16),
    "PEFT, bfloat16, factors too": lambda f: by_peft(f, torch.bfloat16, autocast_adapter_dtype=False),
    "PEFT, float16": lambda f: by_peft(f, torch.float16),
    "PEFT in a LightningModule": lambda f: Lit(by_peft(f)),
    "PEFT, trainable": lambda f: by_peft(f, is_trainable=True).train(),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_what_is_right_is_accepted(make, folder):
    model = make(folder)
    before = snapshot(model)
    report = verify_adapter(model, folder, check_base=make is not of_8_bits)
    assert report.verdict == "same", str(report)
    assert report.ok
    assert not report.not_checked
    assert len(report.modules) == 21
    assert report.share > 0.98
    assert_same(snapshot(model), before)
    report.raise_for_verdict()


def merged_by_us(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = loaded(folder, dtype)
    merge(model)
    return model


MERGED: dict[str, Callable[[Path], Any]] = {
    "float32": merged_by_us,
    "bfloat16": lambda f: merged_by_us(f, torch.bfloat16),
    "float16": lambda f: merged_by_us(f, torch.float16),
    "in float32, then cast": lambda f: merged_by_us(f).bfloat16(),
    "PEFT": lambda f: by_peft(f).merge_and_unload(),
    "PEFT, bfloat16": lambda f: by_peft(f, torch.bfloat16).merge_and_unload(),
    "PEFT, bfloat16, factors too": lambda f: by_peft(
        f, torch.bfloat16, autocast_adapter_dtype=False
    ).merge_and_unload(),
    "PEFT, float16": lambda f: by_peft(f, torch.float16).merge_and_unload(),
    "PEFT, merged in place": lambda f: merged_in_place(f),
    "not merged": loaded,
}


def merged_in_place(folder: Path) -> Any:
    model = by_peft(folder)
    model.merge_adapter()
    return model


@pytest.mark.parametrize("make", MERGED.values(), ids=MERGED)
def test_a_merged_model_is_compared_with_its_base(make, folder, tmp_path):
    model = make(folder)
    base().save_pretrained(tmp_path / "base")
    for its_base in (base(), Lit(base()), tmp_path / "base"):
        report = verify_adapter(model, folder, base=its_base)
        assert report.verdict == "same", str(report)
        assert report.share > 0.98
        assert not report.not_checked


def test_inside_merged_the_base_is_asked_for(folder):
    model = loaded(folder)
    with merged(model):
        with pytest.raises(AdapterStateError, match="no adapter that could be left out"):
            verify_adapter(model, folder)
        assert verify_adapter(model, folder, base=base()).ok
    assert verify_adapter(model, folder).ok


def test_a_bank_that_uses_the_adapter_is_right_and_one_that_uses_another_is_not(folder, tmp_path):
    other = saved(tmp_path / "other", seed=2)
    bank = AdapterBank(base())
    for name, path in {"a": folder, "b": other}.items():
        bank.add(name, path)
    for name, verdict in {"a": "same", "b": "another adapter", None: "not applied"}.items():
        with bank.use(name):
            assert verify_adapter(bank.model, folder).verdict == verdict


# Ways that are not.


def scaled(factor: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = loaded(folder, dtype)
        with torch.no_grad():
            for _, layer in adapters(model):
                layer.lora_B.mul_(factor)
        return model

    return make


def changed(change: Callable[[str, Any], None], dtype: torch.dtype = torch.float32) -> Callable[[Path], nn.Module]:
    """`change` is called with the name and the layer of each adapted layer."""

    def make(folder: Path) -> nn.Module:
        model = loaded(folder, dtype)
        with torch.no_grad():
            for name, layer in adapters(model):
                change(name, layer)
        return model

    return make


def only(keep: Callable[[str], bool], factor: str = "lora_B") -> Callable[[Path], nn.Module]:
    return changed(lambda name, layer: None if keep(name) else getattr(layer, factor).zero_())


def permuted(pairs: list[tuple[str, str]]) -> Callable[[Path], nn.Module]:
    """The factors of two kinds of projections, swapped as a converter with a wrong name would."""

    def make(folder: Path) -> nn.Module:
        model = loaded(folder)
        layers = dict(adapters(model))
        with torch.no_grad():
            for one, two in pairs:
                for name in [n for n in layers if n.endswith(one)]:
                    a, b = layers[name], layers[name.replace(one, two)]
                    for factor in ("lora_A", "lora_B"):
                        x, y = getattr(a, factor), getattr(b, factor)
                        kept = x.clone()
                        x.copy_(y)
                        y.copy_(kept)
        return model

    return make


def injected_anew(seed: int = 7, **config: Any) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = base()
        inject(model, LoRAConfig(**{"rank": RANK, "alpha": ALPHA, **config}))
        give_factors(model, seed)
        return model

    return make


def from_edited(edit: Callable[[Path], None], load: Callable[[Path], Any] = by_peft) -> Callable[[Path], Any]:
    """Load, by PEFT, a copy of the folder that was edited as tools or people do."""

    def make(folder: Path) -> Any:
        import shutil
        import tempfile

        other = Path(tempfile.mkdtemp()) / "edited"
        shutil.copytree(folder, other)
        edit(other)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of keys that are missing
            return load(other)

    return make


def rewrite(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({k: t.contiguous() for k, t in change(load_file(file)).items()}, file)

    return edit


def config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def merged_with(change: Callable[[Path], nn.Module]) -> Callable[[Path], nn.Module]:
    def make(folder: Path) -> nn.Module:
        model = change(folder)
        merge(model)
        return model

    return make


def switched_off(folder: Path) -> Any:
    model = by_peft(folder)
    model.base_model.disable_adapter_layers()
    return model


def two_at_once(folder: Path) -> Any:
    model = by_peft(folder)
    model.load_adapter(str(folder), "again")
    model.base_model.set_adapter(["default", "again"])
    return model


def plain(folder: Path) -> nn.Module:
    return base()


def with_a_rank_less(name: str, layer: Any) -> None:
    layer.lora_B[:, -1] = 0


def with_half_of_the_outputs(name: str, layer: Any) -> None:
    layer.lora_B[len(layer.lora_B) // 2 :] = 0


def transposed(name: str, layer: Any) -> None:
    if name.endswith(("q_proj", "o_proj")):
        A, B = layer.lora_A.clone(), layer.lora_B.clone()
        layer.lora_A.copy_(B.T)
        layer.lora_B.copy_(A.T)


def reversed_layers(folder: Path) -> nn.Module:
    model = loaded(folder)
    state = {name: (m.lora_A.clone(), m.lora_B.clone()) for name, m in adapters(model)}
    with torch.no_grad():
        for name, layer in adapters(model):
            other = name.replace(f"layers.{layer_of(name)}.", f"layers.{(layer_of(name) + 1) % 3}.")
            layer.lora_A.copy_(state[other][0])
            layer.lora_B.copy_(state[other][1])
    return model


def not_a_number(name: str, layer: Any) -> None:
    layer.lora_B[0, 0] = math.nan


def noisy(name: str, layer: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    layer.lora_A.add_(0.1 * layer.lora_A.std() * torch.randn(layer.lora_A.shape, generator=generator))


WRONG: dict[str, tuple[Callable[[Path], Any], str, bool]] = {
    # name: how to make the model, the verdict, whether the base is given
    "x 2": (scaled(2), "another scale", False),
    "x 2, in bfloat16": (scaled(2, torch.bfloat16), "another scale", False),
    "x 0.5": (scaled(0.5), "another scale", False),
    "x 1.25, in float16": (scaled(1.25, torch.float16), "another scale", False),
    "x 0.9, in bfloat16": (scaled(0.9, torch.bfloat16), "another scale", False),
    "x 1.02": (scaled(1.02), "another scale", False),
    "subtracted": (scaled(-1), "another scale", False),
    "rsLoRA though it is not": (scaled(math.sqrt(RANK)), "another scale", False),
    "alpha left out": (scaled(RANK / ALPHA), "another scale", False),
    "not divided by the rank": (scaled(RANK), "another scale", False),
    "alpha of one layer": (
        changed(lambda n, m: n.endswith("0.mlp.up_proj") and m.lora_B.mul_(2)),
        "another scale",
        False,
    ),
    "B is zero": (scaled(0), "not applied", False),
    "A is zero": (only(lambda n: False, "lora_A"), "not applied", False),
    "PEFT, switched off": (switched_off, "not applied", False),
    "not merged at all": (plain, "not applied", True),
    "q_proj alone": (only(lambda n: n.endswith("q_proj")), "part missing", False),
    "no k_proj": (only(lambda n: not n.endswith("k_proj")), "part missing", False),
    "attention alone": (only(lambda n: "self_attn" in n), "part missing", False),
    "half of the layers": (only(lambda n: layer_of(n) < 1), "part missing", False),
    "one module missing": (only(lambda n: not n.endswith("1.mlp.down_proj")), "part missing", False),
    "half of the outputs": (changed(with_half_of_the_outputs), "part missing", False),
    "the last module not adapted": (
        injected_anew(1, exclude_modules=["layers.2.mlp.down_proj"]),
        "part missing",
        False,
    ),
    "a rank missing": (changed(with_a_rank_less), "another adapter", False),
    "gate_proj and up_proj swapped": (permuted([("gate_proj", "up_proj")]), "another adapter", False),
    "k_proj and v_proj swapped": (permuted([("k_proj", "v_proj")]), "another adapter", False),
    "layers shifted by one": (reversed_layers, "another adapter", False),
    "A and B transposed": (changed(transposed), "another adapter", False),
    "another seed": (injected_anew(), "another adapter", False),
    "another seed, other targets": (injected_anew(target_modules=["q_proj"]), "another adapter", False),
    "another rank": (injected_anew(rank=2), "another adapter", False),
    "trained on for a little": (changed(noisy), "another adapter", False),
    "not a number": (changed(not_a_number), "another adapter", False),
    "not a number, in bfloat16": (changed(not_a_number, torch.bfloat16), "another adapter", False),
    "PEFT, alpha edited": (from_edited(config(lora_alpha=24)), "another scale", False),
    "PEFT, rsLoRA edited": (from_edited(config(use_rslora=True)), "another scale", False),
    "PEFT, keys without their prefix": (
        from_edited(
            rewrite(lambda t: {k.replace("base_model.model.model.", "base_model.model."): v for k, v in t.items()})
        ),
        "not applied",
        False,
    ),
    "PEFT, keys of one half": (
        from_edited(rewrite(lambda t: {k: v for k, v in t.items() if "layers.0" in k})),
        "part missing",
        False,
    ),
    "PEFT, q_proj alone": (from_edited(config(target_modules=["q_proj"])), "part missing", False),
    "PEFT, B rounded to 4 bits": (
        from_edited(rewrite(lambda t: {k: (v / v.abs().max() * 7).round() * v.abs().max() / 7 for k, v in t.items()})),
        "another adapter",
        False,
    ),
    "PEFT, added twice": (two_at_once, "another scale", False),
    "merged x 2": (merged_with(scaled(2)), "another scale", True),
    "merged x 0.9 in bfloat16": (merged_with(scaled(0.9, torch.bfloat16)), "another scale", True),
    "merged in half of the layers": (merged_with(only(lambda n: layer_of(n) < 1)), "part missing", True),
    "merged with another seed": (merged_with(injected_anew()), "another adapter", True),
    "merged, projections swapped": (merged_with(permuted([("gate_proj", "up_proj")])), "another adapter", True),
}


@pytest.mark.parametrize(("make", "verdict", "needs_base"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(make, verdict, needs_base, folder):
    report = verify_adapter(make(folder), folder, base=base() if needs_base else None)
    assert report.verdict == verdict, str(report)
    assert not report.ok
    with pytest.raises(AdapterStateError, match="does not apply the adapter"):
        report.raise_for_verdict()


# What the precision does.


@pytest.mark.parametrize("dtype", HALF)
def test_a_weak_update_that_merging_rounds_away_is_swallowed_and_not_another_scale(dtype, tmp_path):
    # A number of a weight is moved where the update is above half of its rounding, of 2^-8 in bfloat16: by updates of
    # a 500th of the weight few are, whose median share is then far below one half.
    size = 0.5 * torch.finfo(dtype).eps / 2
    weak = saved(tmp_path / "weak", size=size)
    model = merged_by_us(weak, dtype)
    report = verify_adapter(model, weak, base=base(dtype))
    assert report.verdict == "swallowed by the precision", str(report)
    assert report.share < 0.9
    exact = {
        name: (p.detach().double() - q.detach().double()).flatten()
        for (name, p), q in zip(model.named_parameters(), base().parameters())
    }
    wanted = {
        name: (p.detach().double() - q.detach().double()).flatten()
        for (name, p), q in zip(merged_by_us(weak).named_parameters(), base().parameters())
    }
    for m in report.modules:
        left, want = exact[f"{m.name}.weight"], wanted[f"{m.name}.weight"]
        assert m.share == pytest.approx(float(left @ want / (want @ want)), abs=1e-3)  # the numbers of float32's merge
    assert verify_adapter(merged_by_us(weak), weak, base=base()).ok  # nothing is lost in float32
    assert not verify_adapter(base(dtype), weak, base=base(dtype)).ok


def test_live_in_half_precision_less_is_lost_than_merged(tmp_path):
    weak = saved(tmp_path / "weak", size=0.02)
    live = verify_adapter(loaded(weak, torch.bfloat16), weak)
    assert live.ok, str(live)
    assert {m.verdict for m in verify_adapter(loaded(weak), weak).modules} == {"same"}


# Layers of every kind.


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Merged, a convolution with groups")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_kind_of_layer_is_checked_adapted_and_merged(case: Case, dtype, tmp_path):
    model = case.adapted()
    where = save_adapter(model, tmp_path / "adapter")
    own = {n: t.clone() for n, t in model.state_dict().items()}
    model.to(dtype)
    assert verify_adapter(model, where).verdict == "same"
    its_base = case.model().to(dtype)
    load_adapter(again := case.model().to(dtype), where)
    merge(again)
    report = verify_adapter(again, where, base=its_base)
    assert report.verdict == "same", str(report)
    factors = [n for n in own if n.rpartition(".")[2].startswith(("lora_B", "lora_tokens")) and "bias" not in n]
    if "alora_invocation_tokens" not in case.config and factors:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in factors:
                    p.mul_(2)
        assert not verify_adapter(model, where).ok
    assert not verify_adapter(its_base, where, base=its_base).ok


def test_the_tensors_that_were_trained_whole_are_compared(tmp_path):
    model = base()
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]))
    give_factors(model)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
        model.model.norm.weight.add_(0.1)
    where = save_adapter(model, tmp_path / "adapter")
    assert verify_adapter(model, where).ok
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    wrong = verify_adapter(model, where)
    assert {m.name: m.verdict for m in wrong.modules if m.verdict != "same"} == {"lm_head.weight": "another adapter"}
    theirs = by_peft(where)
    assert verify_adapter(theirs, where).ok
    with torch.no_grad():
        theirs.base_model.model.model.norm.modules_to_save["default"].weight.copy_(base().model.norm.weight)
    wrong = verify_adapter(theirs, where)
    assert {m.name: m.verdict for m in wrong.modules if m.verdict != "same"} == {"model.norm.weight": "not applied"}
    assert wrong.verdict == "part missing"


@pytest.mark.parametrize(
    "more", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["embed_tokens", "q_proj"]}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_peft_computes_the_same_with_variants(more, dtype, tmp_path):
    where = saved(tmp_path / "adapter", **more)
    report = verify_adapter(by_peft(where, dtype), where)
    assert report.verdict == "same", str(report)
    assert not report.not_checked
    assert verify_adapter(by_peft(where).merge_and_unload(), where, base=base()).ok


# Models and arguments that cannot be checked.


def test_a_model_without_an_adapter_needs_its_base(folder):
    with pytest.raises(AdapterStateError, match=r"Give the base as base=.*load_adapter"):
        verify_adapter(base(), folder)


def test_an_adapter_of_another_base_is_an_error(folder):
    model = base()
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    load_adapter(model, folder, check_base=False)
    with pytest.raises(BaseMismatchError, match="another base"):
        verify_adapter(model, folder)
    assert verify_adapter(model, folder, check_base=False).ok


def test_an_adapter_that_does_not_fit_is_an_error_and_changes_nothing(folder, tmp_path):
    torch.manual_seed(0)
    model = llama(layers=1)
    inject(model, LoRAConfig(rank=2))
    before = snapshot(model)
    with pytest.raises(AdapterFormatError, match="unexpected"):
        verify_adapter(model, folder)
    with pytest.raises(AdapterFormatError, match="no folder"):
        verify_adapter(model, tmp_path / "nothing")
    assert_same(snapshot(model), before)


def test_switched_off_is_not_applied(folder):
    model = loaded(folder)
    with disabled(model):
        assert verify_adapter(model, folder).verdict == "not applied"
    assert verify_adapter(model, folder).ok


def test_an_untrained_adapter_proves_nothing(tmp_path):
    model = base()
    inject(model, LoRAConfig(rank=2))
    where = save_adapter(model, tmp_path / "fresh")
    report = verify_adapter(model, where)
    assert report.verdict == "not checked"
    assert not report.ok
    assert set(report.not_checked.values()) == {"its update is zero"}
    with pytest.raises(AdapterStateError, match="Nothing shows that the adapter in"):
        report.raise_for_verdict()


def test_experts_in_peft_are_listed_as_not_checked(tmp_path):
    case = next(case for case in CASES if case.name == "experts-transposed")
    where = save_adapter(case.adapted(), tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(case.model(), str(where))
    report = verify_adapter(theirs, where)
    assert not report.ok
    assert "forward of a larger module" in str(report)
    assert verify_adapter(theirs.merge_and_unload(), where, base=case.model()).ok


class Own(nn.Module):
    """A LoRA as people write it by themselves."""

    def __init__(self, layer: nn.Linear, A: Tensor, B: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.down, self.up, self.scale = layer, nn.Parameter(A), nn.Parameter(B), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.down.T @ self.up.T)


@pytest.mark.parametrize(("scale", "verdict"), [(ALPHA / RANK, "same"), (1.0, "another scale"), (0.0, "not applied")])
def test_layers_of_an_unknown_library_are_checked_against_the_base_as_a_module(folder, scale, verdict):
    model = base()
    for name, layer in list(adapters(loaded(folder))):
        parent, _, child = name.rpartition(".")
        own = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, Own(own, layer.lora_A.detach(), layer.lora_B.detach(), scale))
    report = verify_adapter(model, folder, base=base())
    assert report.verdict == verdict
    assert len(report.modules) == 21


def test_an_adapter_that_the_files_do_not_have_is_named(folder, tmp_path):
    other = saved(tmp_path / "other", target_modules=["q_proj"])
    report = verify_adapter(loaded(folder), other)
    assert report.verdict == "another adapter"
    assert "it has an adapter, and the files have none for it" in str(report)


def test_loading_can_verify_and_a_load_that_does_not_verify_leaves_the_base(folder, tmp_path):
    model = base(torch.bfloat16)
    load_adapter(model, folder, verify=True)
    assert len(list(adapters(model))) == 21
    fresh = base()
    inject(fresh, LoRAConfig(rank=2))
    untrained = save_adapter(fresh, tmp_path / "untrained")
    model = base()
    before = snapshot(model)
    with pytest.raises(AdapterStateError, match="its update is zero"):
        load_adapter(model, untrained, verify=True)
    assert_same(snapshot(model), before)


# What a stranger's model may be.


def small(**config: Any) -> nn.Module:
    """Two layers of float32 weights, with a bias, adapted as `config` says."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    if config:
        inject(model, LoRAConfig(**{"rank": RANK, "target_modules": ["0", "1"], **config}))
        give_factors(model)
    return model


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("alpha", [1e-4, 0.01, 10])
def test_a_base_may_be_rounded_before_the_merge_or_the_merged_weight_after_it(dtype, alpha, tmp_path):
    model = small(alpha=RANK)
    for _, layer in adapters(model):
        layer.lora_B.data.mul_(alpha)
    folder = save_adapter(model, tmp_path / "a")
    before, after = small().to(dtype), small()
    for merged_model in (before, after):
        load_adapter(merged_model, folder)
        merge(merged_model)
    for merged_model in (before, after.to(dtype), before.float(), after.float()):
        verdict = verify_adapter(merged_model, folder, base=small()).verdict
        assert verdict in ("same", "swallowed by the precision")
    twice = small().to(dtype)
    load_adapter(twice, folder)
    for _, layer in adapters(twice):
        layer.lora_B.data.mul_(2)
    merge(twice)
    assert verify_adapter(twice, folder, base=small()).verdict != "same"
    report = verify_adapter(after.to(dtype), folder, base=small().to(dtype))  # a base that lost its digits
    assert report.ok or any(word in str(report) for word in ("is base= what it was merged into", "swallowed")), report


def test_biases_that_were_trained_do_not_count_as_the_layer_s_update(tmp_path):
    model = small(bias="all")
    with torch.no_grad():
        for layer in model:
            layer.bias.add_(1)
    folder = save_adapter(model, tmp_path / "a")
    assert verify_adapter(model, folder, base=small()).verdict == "same"
    assert verify_adapter(peft.PeftModel.from_pretrained(small(), folder), folder, base=small()).verdict == "same"
    with torch.no_grad():
        model[0].bias.sub_(1)
    report = verify_adapter(model, folder, base=small())
    assert [row.name for row in report.modules if row.verdict != "same"] == ["0.bias"]


def test_the_rows_of_tokens_that_peft_trains_are_compared(tmp_path):
    made = peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 1]))
    with torch.no_grad():
        for p in (p for p in made.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape))
    made.save_pretrained(tmp_path)
    for dtype in (torch.float32, *HALF):
        assert verify_adapter(by_peft(tmp_path, dtype), tmp_path).verdict == "same"
    model = by_peft(tmp_path)
    rows = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
    rows.data[0] += 1
    assert [m.name for m in verify_adapter(model, tmp_path).modules if m.verdict != "same"] == ["model.embed_tokens"]
    model.base_model.disable_adapter_layers()
    assert verify_adapter(model, tmp_path).verdict == "not applied"


def test_an_activated_lora_is_measured_where_it_acts_and_has_to_act_from_its_tokens_on(tmp_path):
    folder = saved(tmp_path / "a", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[3, 4])
    model = base()
    load_adapter(model, folder, verify=True)
    assert verify_adapter(model.bfloat16(), folder).verdict == "same"
    for _, layer in adapters(model):
        layer.lora_B.data.mul_(2)
    assert verify_adapter(model, folder).verdict == "another scale"
    for tokens, why in (([4, 3], "its invocation tokens are [4, 3]"), (None, "it acts at every position")):
        fields = {"target_modules": ["q_proj", "v_proj"], "alora_invocation_tokens": tokens}
        report = verify_adapter(injected_anew(1, **fields)(folder), folder)
        assert report.verdict == "another adapter"
        assert why in str(report)
    merge(model := injected_anew(1, target_modules=["q_proj", "v_proj"])(folder))
    assert verify_adapter(model, folder, base=base()).verdict == "another adapter"
    assert verify_adapter(base(), folder, base=base()).verdict == "not applied"


def test_a_weight_of_4_bits_is_seen_through_its_noise_and_another_update_is_more_than_noise(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def in_4_bits(model: nn.Module) -> nn.Module:
        made = nn.Sequential(*(bnb.nn.Linear4bit(m.in_features, m.out_features, quant_type="nf4") for m in model))
        for own, m in zip(made, model):
            own.weight = bnb.nn.Params4bit(m.weight.data.clone(), requires_grad=False, quant_type="nf4")
            own.bias = m.bias
        return made.to("cpu")

    def with_merged(*folders: Path, scale: float = 1.0) -> nn.Module:
        model = small()
        for folder in folders:
            load_adapter(model, folder, check_base=False)
            for _, layer in adapters(model):
                layer.lora_B.data.mul_(scale)
            merge(model)
        return in_4_bits(model)

    folder = save_adapter(small(alpha=RANK), tmp_path / "a")
    other = small(alpha=RANK)
    give_factors(other, seed=9)
    second = save_adapter(other, tmp_path / "b")
    for model, verdict in (
        (with_merged(folder), "same"),
        (with_merged(folder, scale=2), "another scale"),
        (with_merged(), "not applied"),
        (with_merged(second), "another adapter"),
        (with_merged(folder, second), "another adapter"),
    ):
        assert verify_adapter(model, folder, base=small()).verdict == verdict
