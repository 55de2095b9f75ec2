"""Real PEFT reads what we write and we read what it writes, with the same outputs."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig

from lightning_lora import LoRAConfig, inject, load_adapter, remove, save_adapter
from tests.hub.models import assert_same, build, by_peft, edit_config, output, peft_folder, shake, state

# PEFT asks transformers 5 for an attribute that is deprecated there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*ConvNd layer with groups:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*missing adapter keys.*base_model.model.blocks.1:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
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
