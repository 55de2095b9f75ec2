"""A model source loads what it names, and says clearly what it cannot."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.errors import ConfigError, MissingExtraError
from lightning_lora.recipes import models
from lightning_lora.recipes.models import QUANTIZATIONS, ModelSource


def test_a_folder_is_loaded_and_remembered_by_its_absolute_path(llama, monkeypatch):
    folder = llama.location
    monkeypatch.chdir(folder)
    source = ModelSource("../" + folder.rsplit("/", 1)[1])
    model = source.load("AutoModelForCausalLM")
    assert isinstance(model, LlamaForCausalLM)
    assert source.location == model.name_or_path == model.config._name_or_path == folder


def test_a_hub_id_is_remembered_as_it_is():
    assert ModelSource("some/model", revision="abc").location == "some/model"


def test_the_embedded_base_is_no_id_on_the_hub(tmp_path):
    model = ModelSource().load("AutoModelForCausalLM")
    inject(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    folder = save_adapter(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert "base_model" not in (folder / "README.md").read_text()


def test_the_dtype_is_the_saved_one_unless_another_is_asked_for(llama):
    assert llama.load("AutoModelForCausalLM").dtype == torch.float32
    half = ModelSource(llama.name, dtype="bfloat16").load("AutoModelForCausalLM")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_attention_implementation_is_the_one_asked_for(llama):
    model = ModelSource(llama.name, attn_implementation="eager").load("AutoModelForCausalLM")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_all_linear_layers_but_the_head_are_quantized_as_asked(llama, quantization):
    bnb = pytest.importorskip("bitsandbytes")
    model = ModelSource(llama.name, quantization=quantization).load("AutoModelForCausalLM")
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert type(linear.pop("lm_head")) is torch.nn.Linear
    for layer in linear.values():
        if quantization == "int8":
            assert isinstance(layer, bnb.nn.Linear8bitLt)
            continue
        state = layer.weight.quant_state
        assert (state.quant_type, "-dq" if state.nested else "") == (quantization[:3], quantization[3:])
        assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_quantization_names_the_extra_that_it_needs(monkeypatch, package):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*lightning-lora\[quantized\]"):
        ModelSource(quantization="nf4")


def test_a_skeleton_has_the_modules_but_no_weights(bert):
    skeleton = bert.skeleton("AutoModelForSequenceClassification")
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert hasattr(skeleton, "classifier")


def test_a_tokenizer_can_always_pad(llama):
    assert llama.tokenizer().pad_token_id is not None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": ""}, "empty"),
        ({"quantization": "nf4-qd"}, "Did you mean nf4-dq"),
        ({"name": "./nowhere"}, "There is no folder"),
        ({"dtype": "bfloat"}, "Did you mean bfloat16"),
        ({"name": "embedded", "revision": "main"}, "not on the Hub"),
    ],
)
def test_settings_that_cannot_be_fail_on_construction(settings, said):
    with pytest.raises(ConfigError, match=said):
        ModelSource(**settings)


def test_a_folder_that_is_no_model_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"has no config\.json.*notes\.txt"):
        ModelSource(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is an adapter, not a model"):
        ModelSource(str(tmp_path))
    with pytest.raises(ConfigError, match=r"is a file"):
        ModelSource(str(tmp_path / "notes.txt"))


def test_an_unreachable_hub_id_says_what_to_try():
    with pytest.raises(ConfigError, match=r"cannot load 'nobody/nothing'.*model.name=embedded"):
        ModelSource("nobody/nothing").load("AutoModelForCausalLM")


def test_a_model_of_another_kind_is_refused(vit, llama):
    with pytest.raises(ConfigError, match=r"Is it a model of that kind"):
        vit.load("AutoModelForCausalLM")
    with pytest.raises(ConfigError, match=r"AutoImageProcessor cannot load"):
        llama.image_processor()
    with pytest.raises(ConfigError, match=r"has no AutoModelForNothing"):
        llama.load("AutoModelForNothing")


def test_only_what_is_random_and_no_new_head_is_warned_of(llama, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = llama.load("AutoModelForSequenceClassification", new_head=True, num_labels=2)
    assert model.score.out_features == 2
    with pytest.warns(
        UserWarning, match=r"LlamaForSequenceClassification lacks score\.weight: these weights are random"
    ):
        llama.load("AutoModelForSequenceClassification")
    assert "LOAD REPORT" not in caplog.text


def test_truncated_weights_are_refused(llama, tmp_path):
    for name in ("config.json", "model.safetensors"):
        content = (tmp_path.__class__(llama.location) / name).read_bytes()
        (tmp_path / name).write_bytes(content if name.endswith("json") else content[:100])
    with pytest.raises(ConfigError, match=r"cannot load"):
        ModelSource(str(tmp_path)).load("AutoModelForCausalLM")
