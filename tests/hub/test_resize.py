"""A resized folder, loaded by PEFT itself, computes W x + s B'A' x with the best B'A' of its rank; or it is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from lightning_lora import load_adapter, resize_adapter
from lightning_lora.hub.format.inspection import check_adapter
from tests.hub.models import build, by_peft, output, peft_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor"),  # PEFT warns of a bias of B that it wrote
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # of a shared block, PEFT writes one name
    pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side is legal but wasteful"),
]

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

QV = ["q_proj", "v_proj"]
KINDS = {
    "linears": {"target_modules": ["fc", "0"], "r": 6, "lora_bias": True, "bias": "lora_only"},
    "linears-rslora": {"target_modules": ["fc", "0", "2"], "r": 6, "use_rslora": True, "alpha_pattern": {"0": 5}},
    "linears-dora": {"target_modules": ["fc", "0"], "r": 6, "use_dora": True},
    "convolutions": {"target_modules": ["one", "two", "three"], "r": 4},
    "convolutions-dora": {"target_modules": ["two", "three"], "r": 4, "use_dora": True},
    "words": {"target_modules": ["embed", "fc"], "r": 4},
    "words-dora": {"target_modules": ["embed"], "r": 4, "use_dora": True},
    "shared": {"target_modules": ["fc"], "r": 4, "modules_to_save": ["head"]},
    "mixture": {"target_parameters": ["experts.up", "experts.down"], "target_modules": ["router"], "r": 4},
    "mixture-transposed": {"target_parameters": ["experts.down"], "target_modules": [], "r": 4},
    "attention": {"target_modules": ["attention", "inp"], "r": 4, "alpha_pattern": {"attention": 3}},
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "r": 6, "fan_in_fan_out": True},
    "llama": {"target_modules": QV, "r": 6, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    "llama-alora": {"target_modules": QV, "r": 6, "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
    "classifier": {"target_modules": ["query", "value"], "r": 6, "task_type": "SEQ_CLS"},
}


def written(name, tmp_path):
    """A model, an input, the adapted copy of the model by PEFT, and the folder that PEFT wrote from it."""
    kind = name if name == "mixture-transposed" else name.partition("-")[0]
    model, x = build(kind)
    torch.manual_seed(11)
    return model, x, peft_folder(model, tmp_path / "a", **KINDS[name]), tmp_path / "a"


def deltas(adapted):
    """PEFT's own dense update of each layer, before DoRA rescales it."""
    found = {}
    for name, module in adapted.named_modules():
        if not hasattr(module, "get_delta_weight") or "default" not in getattr(module, "r", {}):
            continue
        groups = getattr(module.base_layer, "groups", 1)
        if groups == 1:
            found[name] = module.get_delta_weight("default").detach().double()
        else:  # PEFT cannot merge it: each group by the formula
            A, B = (getattr(module, f"lora_{factor}")["default"].weight.detach().double() for factor in "AB")
            each = zip(A.flatten(1).chunk(groups), B.flatten(1).chunk(groups))
            found[name] = module.scaling["default"] * torch.stack([b @ a for a, b in each])
    return found


def blocks(delta, kind, name):
    """The dense update as a stack of the matrices that are low-rank."""
    is_stack = kind.startswith("mixture") and delta.dim() == 3
    return delta if is_stack or name.endswith("one") else delta.flatten(1)[None]


@pytest.mark.parametrize("name", KINDS)
def test_in_peft_each_update_is_the_best_of_the_new_rank_and_its_error_was_said(tmp_path, name):
    model, x, adapted, folder = written(name, tmp_path)
    report = resize_adapter(folder, tmp_path / "out", rank=2)
    check_adapter(tmp_path / "out")
    loaded = by_peft(model, tmp_path / "out")
    before, after = deltas(adapted), deltas(loaded)
    kind = name.partition("-")[0]
    errors, sizes = [], []
    for layer, delta in before.items():
        dense, now = (blocks(d, kind, layer) for d in (delta, after[layer]))
        S = torch.linalg.svdvals(dense)
        each = 1 if layer.endswith("one") else 2
        best = S[..., each:].norm()
        # The optimum, up to the rounding of the factors to float32.
        assert float((now - dense).norm()) == pytest.approx(float(best), abs=2e-6 * float(S.norm()))
        errors.append(float(best))
        sizes.append(float(S.norm()))
    said = [m.error * m.size for m in report.modules.values()]
    if "attention" not in name:  # PEFT's file holds half of an out_proj
        assert sorted(said) == pytest.approx(sorted(errors), abs=2e-6 * max(sizes))
    ours = copy.deepcopy(model)
    load_adapter(ours, tmp_path / "out")
    torch.testing.assert_close(output(ours.eval(), x), output(loaded, x), **CLOSE)


@pytest.mark.parametrize("name", KINDS)
def test_in_peft_a_padded_adapter_computes_the_same(tmp_path, name):
    model, x, adapted, folder = written(name, tmp_path)
    report = resize_adapter(folder, tmp_path / "out", rank=8)
    assert report.error == 0
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 8
    torch.testing.assert_close(output(by_peft(model, tmp_path / "out"), x), output(adapted, x), **CLOSE)


@pytest.mark.parametrize("aim", [{"energy": 0.9}, {"max_error": 0.3}])
@pytest.mark.parametrize("name", [name for name in KINDS if "dora" not in name])
def test_ranks_by_layer_keep_what_was_asked_for_in_peft(tmp_path, name, aim):
    model, x, adapted, folder = written(name, tmp_path)
    report = resize_adapter(folder, tmp_path / "out", **aim)
    assert report.largest_error <= (aim.get("max_error") or 0.1**0.5) + 1e-6
    assert sum(m.rank for m in report.modules.values()) < sum(m.rank_before for m in report.modules.values())
    loaded = by_peft(model, tmp_path / "out")
    before, after = deltas(adapted), deltas(loaded)
    off = sum(float((after[layer] - delta).norm()) ** 2 for layer, delta in before.items()) ** 0.5
    whole = sum(float(delta.norm()) ** 2 for delta in before.values()) ** 0.5
    if name != "attention":
        assert off / whole == pytest.approx(report.error, abs=2e-6)
    ours = copy.deepcopy(model)
    load_adapter(ours, tmp_path / "out")
    torch.testing.assert_close(output(ours.eval(), x), output(loaded, x), **CLOSE)
