"""Vocabularies that were resized or are tied: the embedding and the head that PEFT writes beside an adapter."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from lightning import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lightning_lora import (
    AdapterBank,
    adapter_state_dict,
    combine_adapters,
    export_adapter,
    inject,
    load_adapter,
    load_adapter_state_dict,
    merge,
    merged,
    push_adapter,
    remove,
    save_adapter,
)
from lightning_lora import LoRAConfig as Config
from lightning_lora.errors import AdapterFormatError, BaseMismatchError
from tests.hub.models import assert_same, edit_config, edit_tensors, llama, output, shake, state

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:.*embedding.*:UserWarning"),
]
IDS = torch.randint(1, 30, (2, 7), generator=torch.Generator().manual_seed(5))
# Two float32 forwards of the same 5 matmuls, summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def base(*, tied: bool = False, rows: int = 32, seed: int = 1) -> nn.Module:
    """A model whose first 32 rows are always the same; rows beyond are what resizing fills in, from `seed`."""
    torch.manual_seed(1)
    model = llama(tie_word_embeddings=tied)
    if rows != 32:
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows)
    return model


def by_peft(model: nn.Module, folder, *, save=None, **fields) -> torch.Tensor:
    """Adapt `model` with PEFT, move what it trains, save it; returns the outputs."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **fields})).eval()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(0.2 * torch.randn(p.shape))
        adapted.save_pretrained(folder, **(save or {}))
    return output(adapted, IDS)


def loaded_by_peft(model: nn.Module, folder) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return output(PeftModel.from_pretrained(model, folder).eval(), IDS)


ADAPTED = {
    "beside it": ["q_proj"],
    "and adapted": ["q_proj", "embed_tokens"],
    "and its head": ["q_proj", "lm_head"],
    "both": ["q_proj", "embed_tokens", "lm_head"],
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("targets", ADAPTED)
def test_tables_of_a_resized_vocabulary_are_loaded_where_that_is_asked_for(targets, tied, tmp_path):
    want = by_peft(
        base(tied=tied, rows=34, seed=2),
        tmp_path,
        save={"save_embedding_layers": True},
        target_modules=ADAPTED[targets],
    )
    model = base(tied=tied, rows=34, seed=3)
    before = state(model)
    with pytest.raises(AdapterFormatError, match=r"load_embedding_layers=True.*Nothing was changed"):
        load_adapter(model, tmp_path)
    assert_same(before, state(model))
    before = state(model)
    load_adapter(model, tmp_path, load_embedding_layers=True)
    torch.testing.assert_close(output(model, IDS), want, **CLOSE)
    assert not model.get_input_embeddings()._parameters["weight"].requires_grad
    remove(model)
    assert_same(before, state(model))


def test_a_base_that_was_not_resized_is_told_how(tmp_path):
    by_peft(base(rows=34), tmp_path, save={"save_embedding_layers": True})
    for options in ({}, {"load_embedding_layers": True}):
        model = base()
        before = state(model)
        with pytest.raises(AdapterFormatError, match=r"\(34, 16\).*\(32, 16\).*resize_token_embeddings\(34\)"):
            load_adapter(model, tmp_path, **options)
        assert_same(before, state(model))


def test_tables_are_saved_with_the_adapter_that_they_came_with(tmp_path):
    want = by_peft(base(rows=34, seed=2), tmp_path / "peft", save={"save_embedding_layers": True})
    model = base(rows=34, seed=3)
    load_adapter(model, tmp_path / "peft", load_embedding_layers=True)
    save_adapter(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("peft", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(t, ours[key]) for key, t in theirs.items())
    torch.testing.assert_close(loaded_by_peft(base(rows=34, seed=4), tmp_path / "ours"), want, **CLOSE)
    again = base(rows=34, seed=5)
    load_adapter(again, tmp_path / "ours", load_embedding_layers=True)
    torch.testing.assert_close(output(again, IDS), want, **CLOSE)
    # The same tables need no option, and another base is another base whatever its tables are.
    load_adapter(base(rows=34, seed=2), tmp_path / "ours")
    other = base(rows=34)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(BaseMismatchError):
        load_adapter(other, tmp_path / "ours", load_embedding_layers=True)


def test_tables_are_in_the_state_dict_and_in_a_merged_model(tmp_path):
    want = by_peft(base(rows=34, seed=2), tmp_path, save={"save_embedding_layers": True})
    model, other = base(rows=34, seed=3), base(rows=34, seed=3)
    load_adapter(model, tmp_path, load_embedding_layers=True)
    load_adapter(other, tmp_path, load_embedding_layers=True)
    shake(other)
    load_adapter_state_dict(other, adapter_state_dict(model))
    torch.testing.assert_close(output(other, IDS), want, **CLOSE)
    with merged(model):
        torch.testing.assert_close(output(model, IDS), want, **CLOSE)
    merge(model)
    torch.testing.assert_close(output(model, IDS), want, **CLOSE)


def test_tables_are_loaded_into_a_model_inside_of_a_lightning_module(tmp_path):
    want = by_peft(base(rows=34, seed=2), tmp_path, save={"save_embedding_layers": True})

    class Task(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = base(rows=34, seed=3)

    task = Task()
    load_adapter(task, tmp_path, load_embedding_layers=True)
    torch.testing.assert_close(output(task.model, IDS), want, **CLOSE)
    save_adapter(task, tmp_path / "again")
    torch.testing.assert_close(loaded_by_peft(base(rows=34), tmp_path / "again"), want, **CLOSE)


def test_tables_that_are_not_finite_or_of_a_bank_are_refused(tmp_path):
    by_peft(base(rows=34, seed=2), tmp_path, save={"save_embedding_layers": True})
    with pytest.raises(AdapterFormatError, match=r"load_adapter\(\.\.\., load_embedding_layers=True\)"):
        AdapterBank(base(rows=34, seed=3)).add("it", tmp_path)
    edit_tensors(tmp_path, lambda t: t["base_model.model.lm_head.weight"].fill_(float("nan")))
    with pytest.raises(AdapterFormatError, match=r"lm_head\.weight holds values that are not finite"):
        load_adapter(base(rows=34), tmp_path, load_embedding_layers=True)


def test_halves_of_a_tied_base_that_were_trained_apart_say_how_to_untie_them(tmp_path):
    want = by_peft(base(tied=True), tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    model = base(tied=True)
    with pytest.raises(AdapterFormatError, match=r"trained apart.*Untie them first: ") as raised:
        load_adapter(model, tmp_path)
    how = str(raised.value).partition("Untie them first: ")[2].partition(". Nothing")[0]
    assignment, setting = how.split(", and in transformers ")
    exec(f"{assignment}; {setting}", {"torch": torch, "model": model})
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, IDS), want, **CLOSE)


TYING = {
    "saved": {"modules_to_save": ["embed_tokens"]},
    "head saved": {"modules_to_save": ["lm_head"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
    "head adapted": {"target_modules": ["q_proj", "lm_head"]},
    "both adapted": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "adapted by an expression": {"target_modules": r".*(q_proj|embed_tokens)"},
    "tokens": {"trainable_token_indices": [3, 5]},
    "nothing of it": {},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", TYING)
def test_ensure_weight_tying_loads_as_peft_loads_it(case, tied, tmp_path):
    want = by_peft(base(tied=tied), tmp_path, ensure_weight_tying=True, **copy.deepcopy(TYING[case]))
    model = base(tied=tied)
    before = state(model)
    load_adapter(model, tmp_path)
    torch.testing.assert_close(output(model, IDS), want, **CLOSE)
    save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(loaded_by_peft(base(tied=tied), tmp_path / "ours"), want, **CLOSE)
    remove(model)
    assert_same(before, state(model))


def test_an_export_and_a_combination_keep_both_tied_layers(tmp_path):
    want = by_peft(base(tied=True), tmp_path / "it", ensure_weight_tying=True, **TYING["head adapted"])
    export_adapter(tmp_path / "it", tmp_path / "peft", consumer="peft")
    export_adapter(tmp_path / "it", tmp_path / "vllm", consumer="vllm")
    combine_adapters([tmp_path / "it"], tmp_path / "combined", weights=[1.0])
    for name in ("peft", "vllm", "combined"):
        model = base(tied=True)
        load_adapter(model, tmp_path / name)
        torch.testing.assert_close(output(model, IDS), want, **CLOSE)
        torch.testing.assert_close(loaded_by_peft(base(tied=True), tmp_path / name), want, **CLOSE)


def test_what_was_trained_whole_in_tied_layers_is_pushed_and_a_weight_of_the_base_is_not(tmp_path):
    by_peft(base(tied=True), tmp_path, ensure_weight_tying=True, modules_to_save=["embed_tokens"])
    assert "lm_head.weight" in " ".join(load_file(tmp_path / "adapter_model.safetensors"))
    push_adapter(tmp_path, "user/name", dry_run=True)
    edit_tensors(tmp_path, lambda t: t["base_model.model.lm_head.weight"].add_(1))
    with pytest.raises(AdapterFormatError, match=r"lm_head\.weight"):
        push_adapter(tmp_path, "user/name", dry_run=True)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_proj"])
def test_the_config_of_a_merged_model_says_whether_its_weights_are_tied(target, tmp_path):
    model = base(tied=True)
    inject(model, Config(rank=2, target_modules=[target]))
    shake(model)
    want = output(model, IDS)
    stays = target == "q_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with merged(model):
            assert model.config.tie_word_embeddings is stays
            model.save_pretrained(tmp_path / "inside")
        assert model.config.tie_word_embeddings is True
        assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
        merge(model)
    assert model.config.tie_word_embeddings is stays
    model.save_pretrained(tmp_path / "after")
    for name in ("inside", "after"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is stays
        again = type(model).from_pretrained(tmp_path / name).eval()
        torch.testing.assert_close(output(again, IDS), want, **CLOSE)


def test_only_embeddings_and_heads_are_loaded_and_other_weights_of_the_base_are_compared(tmp_path):
    by_peft(base(rows=34), tmp_path, save={"save_embedding_layers": True})
    key = "base_model.model.model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda t: t.update({key: torch.zeros(24, 16)}))
    model = base(rows=34)
    before = state(model)
    with pytest.raises(AdapterFormatError, match=r"up_proj\.weight is a weight of the base") as raised:
        load_adapter(model, tmp_path, load_embedding_layers=True)
    assert "load_embedding_layers=True" not in str(raised.value)
    assert_same(before, state(model))


def test_a_field_that_is_no_boolean_is_still_refused(tmp_path):
    by_peft(base(), tmp_path)
    edit_config(tmp_path, ensure_weight_tying="yes")
    with pytest.raises(AdapterFormatError, match="ensure_weight_tying is 'yes'"):
        load_adapter(base(), tmp_path)
