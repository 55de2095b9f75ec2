"""Real PEFT reads what we write and we read what it writes, with the same outputs."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_adapter, remove, save_adapter
from lightning_lora.engine.inits import INITS, Factors, Init
from lightning_lora.errors import AdapterFormatError
from lightning_lora.hub.adapters import save_tensors
from tests.hub.models import assert_same, build, by_peft, edit_config, output, peft_folder, shake, state

# PEFT asks transformers 5 for an attribute that is deprecated there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*missing adapter keys.*base_model.model.blocks.1:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
    # PEFT takes its own lora_B.bias for a broken matrix.
    pytest.mark.filterwarnings("ignore:.*have invalid shape.*lora_B.bias:UserWarning"),
]

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

OURS = {
    "linears": ("linears", {}),
    "linears-patterns": (
        "linears",
        {
            "target_modules": ["0", "2", "fc"],
            "rank_pattern": {"fc": 3, "block.*": 1},
            "alpha_pattern": {"block.0": 3.5},
        },
    ),
    "linears-bias-all": ("linears", {"bias": "all"}),
    "linears-bias-lora-only": ("linears", {"bias": "lora_only", "target_modules": ["fc"]}),
    "linears-head": ("linears", {"target_modules": ["fc"], "modules_to_save": ["head"], "bias": "all"}),
    "linears-rslora": ("linears", {"use_rslora": True, "alpha": 2.5, "rank_pattern": {"fc": 3}}),
    "linears-dora": ("linears", {"use_dora": True, "use_rslora": True}),
    "linears-lora-bias": ("linears", {"lora_bias": True, "bias": "all"}),
    "linears-rank-dropout": ("linears", {"freeze_a": True, "rank_dropout": 0.25, "module_dropout": 0.125}),
    "convolutions-dora": ("convolutions", {"target_modules": ["two", "three"], "use_dora": True}),
    "convolutions-lora-bias": ("convolutions", {"target_modules": ["one", "two", "three"], "lora_bias": True}),
    "words-dora": ("words", {"target_modules": ["embed", "fc"], "use_dora": True}),
    "shared-dora": ("shared", {"use_dora": True}),
    "gpt2-dora": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "wpe"]}),
    "gpt2-lora-bias": ("gpt2", {"lora_bias": True}),
    "llama-dora": ("llama", {"use_dora": True, "rank_pattern": {"q_proj": 3}, "modules_to_save": ["lm_head"]}),
    "linears-excluded": ("linears", {"target_modules": r".*(0|2|fc)", "exclude_modules": ["0"]}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "three"], "rank": 2}),
    "words": ("words", {"target_modules": ["embed", "fc"], "rank": 2}),
    "shared": ("shared", {"rank": 2}),
    "gpt2": ("gpt2", {}),
    "gpt2-embedding": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "llama": ("llama", {}),
    "llama-regex": ("llama", {"target_modules": r".*\.1\.self_attn\.[qv]_proj"}),
    "llama-layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "llama-overlapping": (
        "llama",
        {"rank_pattern": {"model.layers.0.*": 2, ".*proj": 5, "self_attn.q_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    ),
    "llama-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "classifier": ("classifier", {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
    "classifier-bias": ("classifier", {"bias": "all", "modules_to_save": ["classifier"]}),
}

THEIRS = {
    "linears": ("linears", {"target_modules": ["0", "fc"]}),
    "linears-all-linear": ("linears", {"target_modules": "all-linear"}),
    "linears-gaussian": ("linears", {"target_modules": ["fc"], "init_lora_weights": "gaussian"}),
    "linears-bias-all": ("linears", {"target_modules": ["fc"], "bias": "all", "modules_to_save": ["head"]}),
    "linears-bias-lora-only": ("linears", {"target_modules": ["fc", "2"], "bias": "lora_only"}),
    "linears-unmatched": ("linears", {"target_modules": ["fc", "q_proj"], "rank_pattern": {"k_proj": 3}}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "three"], "r": 2, "lora_alpha": 3}),
    "words": ("words", {"target_modules": ["embed"], "r": 2}),
    "shared": ("shared", {"target_modules": ["fc"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "llama": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "llama-regex": ("llama", {"target_modules": r".*\.[01]\..*[qv]_proj", "exclude_modules": r".*\.0\..*q_proj"}),
    "llama-layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "llama-no-bias": ("llama", {"target_modules": ["q_proj"], "bias": "all"}),
    "llama-rslora": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "rank_pattern": {"^model.layers.0.*": 3}},
    ),
    "llama-head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "classifier": ("classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "linears-dora": ("linears", {"target_modules": ["0", "fc"], "use_dora": True}),
    "linears-lora-bias": ("linears", {"target_modules": ["0", "fc"], "lora_bias": True, "bias": "lora_only"}),
    "convolutions-dora": ("convolutions", {"target_modules": ["two", "three", "head"], "use_dora": True}),
    "convolutions-lora-bias": ("convolutions", {"target_modules": ["one", "two", "three"], "lora_bias": True}),
    "words-dora": ("words", {"target_modules": ["embed"], "use_dora": True}),
    "gpt2-dora": ("gpt2", {"target_modules": ["c_attn", "wte"], "use_dora": True, "fan_in_fan_out": True}),
    "llama-dora": ("llama", {"target_modules": "all-linear", "use_dora": True, "use_rslora": True}),
}


@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_save(case, tmp_path):
    kind, fields = OURS[case]
    base, x = build(kind)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**{"rank": 2, **fields}))
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", ".*ConvNd layer with groups", UserWarning)
        # PEFT writes one name of a shared block and asks for both; its own files get this warning as well.
        warnings.filterwarnings("ignore", ".*missing adapter keys.*'base_model.model.blocks.1", UserWarning)
        loaded = by_peft(base, folder)
    expected = output(model, x)
    assert not torch.allclose(expected, output(base, x), **CLOSE)
    torch.testing.assert_close(output(loaded, x), expected, **CLOSE)


@pytest.mark.parametrize("case", OURS)
def test_we_load_what_we_save(case, tmp_path):
    kind, fields = OURS[case]
    base, x = build(kind)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**{"rank": 2, **fields}))
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    assert torch.equal(output(loaded, x), output(model, x))
    again = save_adapter(loaded, tmp_path / "again")
    assert (again / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()
    remove(loaded)
    assert_same(state(base), state(loaded))


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("case", THEIRS)
def test_we_load_what_peft_saves(case, tmp_path):
    kind, fields = THEIRS[case]
    base, x = build(kind)
    adapted = peft_folder(base, tmp_path, **fields)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    expected = output(adapted, x)
    assert not torch.allclose(expected, output(base, x), **CLOSE)
    torch.testing.assert_close(output(model, x), expected, **CLOSE)


@pytest.mark.parametrize("case", THEIRS)
def test_peft_loads_what_we_saved_of_its_own_adapter(case, tmp_path):
    kind, fields = THEIRS[case]
    base, x = build(kind)
    peft_folder(base, tmp_path / "theirs", **fields)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    folder = save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(output(by_peft(base, folder), x), output(model, x), **CLOSE)


def _ones(rank: int, d_in: int, d_out: int) -> Factors:
    return Factors(A=torch.ones(rank, d_in), B=torch.full((d_out, rank), 0.25))


STARTED = {
    "linears": ("linears", {"rank": 3, "rank_pattern": {"fc": 2}, "alpha_pattern": {"fc": 5}}),
    "linears-rslora": ("linears", {"rank": 3, "use_rslora": True}),
    "linears-dora": ("linears", {"use_dora": True}),
    "convolutions": ("convolutions", {"target_modules": ["two", "three"]}),
    "words": ("words", {"target_modules": ["embed", "fc"]}),
    "gpt2": ("gpt2", {}),
}


@pytest.mark.parametrize("case", STARTED)
def test_an_adapter_that_did_not_start_at_zero_is_written_as_a_plain_one_for_the_same_base(case, tmp_path, monkeypatch):
    monkeypatch.setitem(INITS, "ones", Init(_ones, frozenset(("rank", "d_in", "d_out"))))
    kind, fields = STARTED[case]
    base, x = build(kind)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**{"rank": 2, "init": "ones", **fields}))
    torch.testing.assert_close(output(model, x), output(base, x), **CLOSE)
    checkpoint = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    fresh = save_adapter(model, tmp_path / "fresh")
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    expected = output(model, x)
    assert not torch.allclose(expected, output(base, x), **CLOSE)
    torch.testing.assert_close(output(by_peft(base, folder), x), expected, **CLOSE)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    assert not any("lora_A0" in name for name in adapter_state_dict(loaded))
    torch.testing.assert_close(output(loaded, x), expected, **CLOSE)
    # Of a checkpoint's tensors, which are others than the live ones, the same.
    again = save_tensors(model, tmp_path / "again", checkpoint, None)
    assert_same(*({"tensors": load_file(f / "adapter_model.safetensors")} for f in (fresh, again)))


def test_what_peft_has_no_field_for_comes_back_from_the_metadata(tmp_path):
    base, _ = build("linears")
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2, freeze_a=True, rank_dropout=0.25, module_dropout=0.125))
    folder = save_adapter(model, tmp_path / "adapter")
    load_adapter(base, folder)
    layer = base.fc
    assert (layer.lora.rank_dropout, layer.lora.module_dropout) == (0.25, 0.125)
    assert (layer.lora_A.requires_grad, layer.lora_B.requires_grad) == (False, True)


@pytest.mark.parametrize("own", [{"rank_dropout": 2}, {"rank": 5}, {"freeze_a": "yes"}, [1], "x"])
def test_metadata_that_cannot_be_is_refused(own, tmp_path):
    model, _ = build("linears")
    inject(model, LoRAConfig(rank=2))
    folder = save_adapter(model, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "lightning_lora": json.dumps({"config": own})})
    remove(model)
    before = state(model)
    with pytest.raises(AdapterFormatError, match="metadata"):
        load_adapter(model, folder)
    assert_same(before, state(model))


def test_loading_draws_no_random_numbers(tmp_path):
    base, _ = build("words")
    peft_folder(base, tmp_path, target_modules=["embed", "fc"], use_dora=True)
    before = torch.random.get_rng_state()
    load_adapter(base, tmp_path)
    assert torch.random.get_rng_state().equal(before)


def test_the_config_has_exactly_the_fields_of_the_installed_peft(tmp_path):
    model, _ = build("linears")
    inject(model, LoRAConfig(rank=2))
    folder = save_adapter(model, tmp_path / "adapter")
    text = (folder / "adapter_config.json").read_text()
    written = json.loads(text)
    assert set(written) == set(LoraConfig(target_modules=["fc"]).to_dict())
    assert text == json.dumps(written, indent=2, sort_keys=True) + "\n"


def test_transformers_loads_what_we_save(tmp_path):
    base, x = build("llama")
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2))
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    base.load_adapter(str(folder))
    torch.testing.assert_close(output(base, x), output(model, x), **CLOSE)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embedding_weights_that_peft_saves_as_well_are_accepted_where_they_are_the_models_own(tmp_path):
    base, x = build("llama")
    fields = {"target_modules": ["embed_tokens", "q_proj"]}
    adapted = peft_folder(base, tmp_path, save={"save_embedding_layers": "auto"}, **fields)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, x), output(adapted, x), **CLOSE)


def test_the_config_of_an_old_peft_lacks_fields_and_loads_with_its_defaults(tmp_path):
    base, x = build("linears")
    adapted = peft_folder(base, tmp_path, target_modules=["fc"], r=8)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["fc"]}')
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, x), output(adapted, x), **CLOSE)


def test_initial_weights_in_the_file_leave_the_base_alone(tmp_path):
    base, _ = build("linears")
    peft_folder(base, tmp_path, target_modules=["fc"])
    edit_config(tmp_path, init_lora_weights="eva")
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path)
    assert torch.equal(model.fc._parameters["weight"], base.fc.weight)


def test_attention_output_is_saved_with_a_warning_that_peft_ignores_it(tmp_path):
    base = torch.nn.MultiheadAttention(8, 2)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2, target_modules=["out_proj"]))
    shake(model)
    with pytest.warns(UserWarning, match="out_proj"):
        folder = save_adapter(model, tmp_path / "adapter")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    x = torch.randn(3, 2, 8)
    assert torch.equal(loaded(x, x, x)[0], model(x, x, x)[0])
