"""A resized folder, loaded by PEFT itself, computes W x + s B'A' x with the best B'A' of its rank; or it is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, resize_adapter, save_adapter
from lightning_lora.engine import injection_of
from lightning_lora.errors import AdapterFormatError, ConfigError
from lightning_lora.format.folder import open_tensors
from lightning_lora.format.inspection import check_adapter
from tests.hub.models import build, by_peft, edit_config, output, peft_folder, shake

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


def test_all_else_in_a_folder_is_carried_over(tmp_path):
    model, x = build("words")
    fields = {"target_modules": ["fc"], "trainable_token_indices": {"embed": [3, 5]}, "freeze_a": True, "dropout": 0.1}
    inject(model, LoRAConfig(rank=4, alpha=6, init="pissa", **fields))
    shake(model)
    folder = save_adapter(model, tmp_path / "a", base_model="user/base", metadata={"step": "7"})
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card + "\nMy own words.\n")
    with open_tensors(folder) as file:
        before = file.header
    resize_adapter(folder, tmp_path / "out", rank=8)  # PiSSA is saved with twice its rank
    with open_tensors(tmp_path / "out") as file:
        after = file.header
    assert {**after.note, "checksum": 0} == {
        **before.note,
        "checksum": 0,
        "said_by_config": after.note["said_by_config"],
        "resized": {"to": "rank 8", "version": after.note["version"]},
    }
    assert after.others == {"step": "7"}
    text = (tmp_path / "out/README.md").read_text()
    assert "My own words." in text
    assert "| resized to | rank 8 |" in text
    same = build("words")[0]
    load_adapter(same, tmp_path / "out")
    torch.testing.assert_close(output(same, x), output(model.eval(), x), **CLOSE)
    assert injection_of(same).config.freeze_a

    resize_adapter(folder, tmp_path / "cut", rank=2)
    ours = build("words")[0]
    load_adapter(ours, tmp_path / "cut")
    tensors = [load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path / "cut")]
    (key,) = [key for key in tensors[0] if "token" in key]
    assert torch.equal(tensors[0][key], tensors[1][key])


def test_with_its_base_the_error_of_a_dora_is_that_of_its_weight(tmp_path):
    model, _, adapted, folder = written("linears-dora", tmp_path)
    report = resize_adapter(folder, tmp_path / "out", rank=2, base=model)
    merged = [one.merge_and_unload() for one in (adapted, by_peft(model, tmp_path / "out"))]
    for name, m in report.modules.items():
        before, after, base = (one.get_submodule(name).weight.detach().double() for one in (*merged, model))
        expected = (after - before).norm() / (before - base).norm()
        assert m.error == pytest.approx(float(expected), rel=1e-4)
    bounded = resize_adapter(folder, tmp_path / "out", max_error=0.2, base=model)
    assert 0 < bounded.largest_error <= 0.2
    assert "before it is rescaled" in str(resize_adapter(folder, tmp_path / "out", rank=2))
    with pytest.raises(ConfigError, match="pass base="):
        resize_adapter(folder, tmp_path / "other", max_error=0.2)
    assert not (tmp_path / "other").exists()


def test_the_rounding_of_half_precision_counts_as_error(tmp_path):
    _, _, _, folder = written("linears-rslora", tmp_path)
    said = [resize_adapter(folder, tmp_path / name, rank=2, dtype=name) for name in ("float32", "bfloat16")]
    assert said[0].error < said[1].error
    wide = resize_adapter(folder, tmp_path / "wide", max_error=1e-3)
    with pytest.raises(ConfigError, match=r"max_error=0.001 cannot be kept.*dtype='float32'"):
        resize_adapter(folder, tmp_path / "narrow", max_error=1e-3, dtype="bfloat16")
    assert wide.largest_error <= 1e-3
    assert not (tmp_path / "narrow").exists()


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_factors_that_are_too_large_for_the_new_dtype_are_refused(tmp_path, rank):
    model = nn.Sequential(nn.Linear(6, 6))
    inject(model, LoRAConfig(rank=3, target_modules=["0"]))
    with torch.no_grad():
        model[0].lora_A.copy_(torch.eye(6)[:3] * 1e4)
        model[0].lora_B.copy_(torch.eye(6)[:, :3] * 1e6)
    folder = save_adapter(model, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"'0' would hold values that are not finite.*Take float32"):
        resize_adapter(folder, tmp_path / "out", rank=rank, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_told_or_had_is_refused_and_nothing_is_written(tmp_path):
    _, _, _, folder = written("mixture", tmp_path)

    def refused(error, match, **aim):
        with pytest.raises(error, match=match):
            resize_adapter(folder, tmp_path / "out", **aim)
        assert not (tmp_path / "out").exists()

    refused(ConfigError, "Give one of rank, energy and max_error", rank=2, energy=0.5)
    with pytest.raises(ConfigError, match="would replace the adapter itself"):
        resize_adapter(folder, folder, rank=2)
    edit_config(folder, alpha_pattern={"experts.up": 3})
    refused(AdapterFormatError, "cannot be told from the file.*call resize there", rank=2)
    edit_config(folder, alpha_pattern={}, r=3)
    refused(AdapterFormatError, "does not fit|cannot be told", rank=2)
