"""Folders: complete or not at all, strict on reading, and names that are relative to the base."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from safetensors import safe_open
from torch import nn

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    combine_adapters,
    export_adapter,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_lora import files as atomic
from lightning_lora.engine.state import describe_base
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, CheckpointError, ConfigError
from lightning_lora.hub import adapter_root
from lightning_lora.hub import adapters as files
from lightning_lora.hub.adapters import save_tensors
from tests.hub.models import (
    Linears,
    assert_same,
    build,
    by_peft,
    edit_config,
    edit_tensors,
    output,
    peft_folder,
    shake,
    state,
    trained,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
A = "base_model.model.fc.lora_A.weight"
B = "base_model.model.fc.lora_B.weight"


class Task(LightningModule):
    """What a user's LightningModule looks like: one model, a loss without parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
        self.model = model

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return self(batch).sum()

    def configure_optimizers(self):
        return None


@pytest.fixture
def adapted():
    model, _ = build("linears")
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    shake(model)
    return model


@pytest.fixture
def folder(adapted, tmp_path):
    return save_adapter(adapted, tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["linears", "llama", "classifier"])
@pytest.mark.parametrize("to_wrapper", [True, False])
@pytest.mark.parametrize("from_wrapper", [True, False])
def test_an_adapter_moves_between_a_base_and_the_lightning_module_around_it(kind, from_wrapper, to_wrapper, tmp_path):
    base, x = build(kind)
    fields = {"modules_to_save": ["classifier"], "bias": "all"} if kind == "classifier" else {}
    source = Task(copy.deepcopy(base)) if from_wrapper else copy.deepcopy(base)
    inject(source, LoRAConfig(rank=2, rank_pattern={".*(fc|q_proj|query)": 3}, **fields))
    shake(source)
    folder = save_adapter(source, tmp_path / "adapter")
    torch.testing.assert_close(output(by_peft(base, folder), x), output(source, x), **CLOSE)
    target = Task(copy.deepcopy(base)) if to_wrapper else copy.deepcopy(base)
    load_adapter(target, folder)
    assert torch.equal(output(target, x), output(source, x))
    again = save_adapter(target, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        _same_content(folder / name, again / name)


def _same_content(first: Path, second: Path) -> None:
    if first.suffix == ".json":
        assert first.read_text() == second.read_text()
    else:
        with safe_open(first, "pt") as one, safe_open(second, "pt") as two:
            assert list(one.keys()) == list(two.keys())
            assert all(torch.equal(one.get_tensor(k), two.get_tensor(k)) for k in one.keys())  # noqa: SIM118


def test_the_root_of_a_lightning_module_with_two_models_is_the_module_itself():
    task = Task(Linears())
    task.other = nn.Linear(3, 3)
    inject(task, LoRAConfig(rank=2, target_modules=["other", "fc"]))
    assert adapter_root(task) == ("", task)


def test_an_adapter_outside_of_the_transformers_model_keeps_the_whole_names(tmp_path):
    base, x = build("llama")
    task = Task(base)
    task.extra = nn.Linear(4, 4)
    fresh = copy.deepcopy(task)
    inject(task, LoRAConfig(rank=2, target_modules=["extra", "q_proj"]))
    shake(task)
    load_adapter(fresh, save_adapter(task, tmp_path / "adapter"))
    assert trained(fresh).keys() == trained(task).keys()
    assert torch.equal(output(fresh, x), output(task, x))


def test_saving_a_part_of_what_was_adapted_is_refused(tmp_path):
    task = Task(Linears())
    inject(task, LoRAConfig(rank=2))
    with pytest.raises(AdapterStateError, match="part of a larger module"):
        save_adapter(task.model, tmp_path / "adapter")


def test_saving_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterStateError, match="inject"):
        save_adapter(Linears(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_tied_weights_that_are_trained_whole_are_written_under_every_name(tmp_path):
    base, x = build("gpt2")
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(rank=2, target_modules=["c_attn"], modules_to_save=["wte", "lm_head"]))
    shake(model)
    folder = save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(output(by_peft(base, folder), x), output(model, x), **CLOSE)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    assert torch.equal(output(loaded, x), output(model, x))


# What is written.


def test_the_card_and_the_config_never_name_a_local_path(tmp_path):
    model, _ = build("llama")
    model.config._name_or_path = str(tmp_path)
    inject(model, LoRAConfig(rank=2))
    for base_model in (None, str(tmp_path), "./outputs/base"):
        folder = save_adapter(model, tmp_path / "adapter", base_model=base_model)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] is None
        assert str(tmp_path) not in (folder / "README.md").read_text()


def test_the_base_is_named_where_it_comes_from_the_hub(tmp_path, adapted):
    folder = save_adapter(adapted, tmp_path / "a", base_model="user/base", revision="abc", task_type="CAUSAL_LM")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert [config[k] for k in ("base_model_name_or_path", "revision", "task_type")] == [
        "user/base",
        "abc",
        "CAUSAL_LM",
    ]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\nbase_model: user/base\n")


def test_a_task_type_under_which_peft_wants_a_head_that_was_not_trained_is_left_out(tmp_path):
    model, _ = build("classifier")
    inject(model, LoRAConfig(rank=2, target_modules=["query"]))
    folder = save_adapter(model, tmp_path / "adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] is None
    with pytest.raises(ConfigError, match="classifier"):
        save_adapter(model, tmp_path / "other", task_type="SEQ_CLS")
    with pytest.raises(ConfigError, match="CAUSAL_LM"):
        save_adapter(model, tmp_path / "other", task_type="CAUSAL_LMM")


def test_metadata_goes_into_the_header_of_the_tensors(tmp_path, adapted):
    folder = save_adapter(adapted, tmp_path / "adapter", metadata={"step": "7"})
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata()["step"] == "7"
        assert file.metadata()["format"] == "pt"
    with pytest.raises(ConfigError, match="format"):
        save_adapter(adapted, folder, metadata={"format": "tf"})


def test_a_base_that_is_known_is_not_read_again(tmp_path, adapted, monkeypatch):
    first = save_adapter(adapted, tmp_path / "first")
    known = describe_base(adapted, adapter_root(adapted)[1])
    monkeypatch.setattr(files, "describe_base", None)
    second = save_tensors(adapted, tmp_path / "second", None, known)
    assert _note(first) == _note(second)
    assert _note(second)["base_fingerprint"] == known["base_fingerprint"]


def _note(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        note: dict[str, Any] = json.loads(file.metadata()["lightning_lora"])
        del note["checksum"]  # of a file whose metadata are in any order
        return note


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("where", "broken"), [(atomic, "_write"), (atomic, "flush"), (atomic, "_exchange")])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_folder_as_it_was(adapted, folder, monkeypatch, where, broken, error):
    before = _listing(folder.parent)
    shake(adapted)

    def fail(*args):
        raise error

    monkeypatch.setattr(where, broken, fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt)):
        save_adapter(adapted, folder)
    assert _listing(folder.parent) == before
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def test_a_folder_is_replaced_as_a_whole_where_the_system_cannot_exchange(adapted, folder, monkeypatch):
    monkeypatch.setattr(atomic, "_exchanged_at_once", lambda *_: False)
    before = trained(adapted)
    shake(adapted)
    save_adapter(adapted, folder)
    fresh, _ = build("linears")
    load_adapter(fresh, folder)
    assert not torch.equal(trained(fresh)["fc.lora_A"], before["fc.lora_A"])
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def test_other_files_in_the_folder_survive(adapted, folder):
    (folder / "notes.txt").write_text("mine")
    shake(adapted)
    save_adapter(adapted, folder)
    assert (folder / "notes.txt").read_text() == "mine"
    fresh, x = build("linears")
    load_adapter(fresh, folder)
    assert torch.equal(output(fresh, x), output(adapted, x))
    assert sorted(os.listdir(folder.parent)) == [folder.name]


def test_a_folder_that_cannot_be_made_is_a_clear_error(adapted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_adapter(adapted, tmp_path / "file")
    with pytest.raises(CheckpointError, match="could not be written"):
        save_adapter(adapted, tmp_path / "file" / "adapter")
    assert os.listdir(tmp_path) == ["file"]


def test_parents_are_made_and_a_link_stays_a_link(adapted, tmp_path):
    folder = save_adapter(adapted, tmp_path / "a" / "b" / "adapter")
    (tmp_path / "link").symlink_to(folder)
    save_adapter(adapted, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(list(folder.iterdir())) == 3


# Read strictly: each of these leaves the model as it was.


def refused(folder: Path, match: str, error: type[Exception] = AdapterFormatError, kind: str = "linears") -> None:
    model, _ = build(kind)
    model.head.weight.requires_grad_(False)
    before = state(model)
    with pytest.raises(error, match=match):
        load_adapter(model, folder)
    assert_same(before, state(model))


TENSORS = {
    "missing": (lambda t: t.pop(B), rf"missing: {re.escape(B)}"),
    "unexpected": (
        lambda t: t.update({"base_model.model.gate.lora_A.weight": torch.zeros(2, 8)}),
        "unexpected: .*gate",
    ),
    "unadapted": (lambda t: t.update({A.replace("fc", "head"): torch.zeros(2, 8)}), "unexpected: .*head"),
    "shape": (lambda t: t.update({A: torch.zeros(3, 8)}), r"shape \(3, 8\) where the model has \(2, 8\)"),
    "infinite": (lambda t: t[A].fill_(float("inf")), "not finite"),
    "nan": (lambda t: t[B][0].fill_(float("nan")), f"{re.escape(B)} holds values that are not finite"),
    "integers": (lambda t: t.update({A: t[A].long()}), "kind of number"),
    "base": (lambda t: t.update({"base_model.model.fc.base_layer.weight": torch.zeros(8, 8)}), "weight of the base"),
    "prefix": (lambda t: [t.update({k.removeprefix("base_model."): t.pop(k)}) for k in list(t)], "missing"),
    "empty": (lambda t: t.clear(), "no tensor"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(case, folder):
    change, match = TENSORS[case]
    edit_tensors(folder, change)
    refused(folder, match)


CONFIGS = {
    "another-method": ({"peft_type": "LOHA"}, "LOHA"),
    "no-method": ({"peft_type": ...}, "peft_type"),
    "dora": ({"use_dora": True}, "missing.*lora_magnitude_vector"),
    "lora-bias": ({"lora_bias": True}, "missing.*lora_B.bias"),
    "parameters": ({"target_parameters": ["experts.w"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "alora": ({"alora_invocation_tokens": [-1]}, "alora_invocation_tokens are the ids"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    "unknown": ({"lora_alfa": 3}, "unknown field 'lora_alfa'.*'lora_alpha'"),
    "no-targets": ({"target_modules": None}, "target_modules"),
    "other-targets": ({"target_modules": ["fcc"]}, "fcc.*fc"),
    "rank-zero": ({"r": 0}, "rank is a whole number"),
    "rank-text": ({"r": "2"}, "rank"),
    "rank-other": ({"r": 3}, "shape"),
    "alpha-nan": ({"lora_alpha": float("nan")}, "alpha is a finite number"),
    "dropout": ({"lora_dropout": 1.5}, "dropout"),
    "bias": ({"bias": "some"}, "bias is one of"),
    "rslora-text": ({"use_rslora": "yes"}, "use_rslora"),
    "pattern-list": ({"rank_pattern": [1]}, "rank_pattern"),
    "bad-regex": ({"target_modules": "(fc"}, "regular expression"),
    "mode-text": ({"inference_mode": "false"}, "inference_mode"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_honoured_is_refused_by_field(case, folder):
    changes, match = CONFIGS[case]
    edit_config(folder, **changes)
    refused(folder, match)


@pytest.mark.parametrize("size", [0, 5, 100, -4])
def test_a_truncated_tensor_file_is_a_clear_error(size, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "cut short")


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "\xff"])
def test_a_config_that_is_not_one_is_a_clear_error(text, folder):
    (folder / "adapter_config.json").write_text(text, encoding="latin-1")
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["pytorch_lora_weights.safetensors"], "diffusers"),
        (["adapter_config.json", "adapter_model.bin"], "pickle"),
        (["lit_model.pth.lora"], "LitGPT"),
        (["adapter_0.pt"], "torchtune"),
        (["config.json", "model.safetensors"], "whole model"),
        (["notes.txt"], "It holds: notes.txt"),
        ([], "nothing"),
    ],
)
def test_a_foreign_layout_is_named(names, match, tmp_path):
    for name in names:
        (tmp_path / name).write_text("{}")
    refused(tmp_path, match)


def test_what_is_not_a_folder_is_a_clear_error(folder):
    refused(folder / "nowhere", "no folder")
    refused(folder / "adapter_config.json", "is a file")


def test_an_adapted_model_is_refused(adapted, folder):
    with pytest.raises(AdapterStateError, match="already"):
        load_adapter(adapted, folder)


def test_another_base_is_refused_unless_asked_for(folder):
    torch.manual_seed(2)
    model = Linears()
    before = state(model)
    with pytest.raises(BaseMismatchError, match="check_base=False"):
        load_adapter(model, folder)
    assert_same(before, state(model))
    load_adapter(model, folder, check_base=False)


def test_the_same_base_in_bfloat16_is_the_same_base(folder):
    model, _ = build("linears")
    load_adapter(model.to(torch.bfloat16), folder)
    assert model.fc.lora_A.dtype == torch.float32


def test_the_same_base_in_float16_is_not_taken_for_another(folder):
    model, _ = build("linears")
    load_adapter(model.to(torch.float16), folder)


def test_keys_that_still_carry_the_adapters_name_load(tmp_path):
    base, x = build("linears")
    adapted = peft_folder(base, tmp_path, target_modules=["fc"])
    edit_tensors(tmp_path, lambda t: [t.update({k.replace(".weight", ".default.weight"): t.pop(k)}) for k in list(t)])
    load_adapter(base, tmp_path)
    torch.testing.assert_close(output(base, x), output(adapted, x), **CLOSE)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_embeddings_that_were_resized_for_the_adapter_are_named(tmp_path):
    base, _ = build("llama")
    base.config.vocab_size = 32
    grown = copy.deepcopy(base)
    with torch.no_grad():
        grown.model.embed_tokens.weight.add_(1)
    peft_folder(grown, tmp_path, save={"save_embedding_layers": True}, target_modules=["q_proj"])
    with pytest.raises(AdapterFormatError, match=r"embed_tokens\.weight is a weight of the base"):
        load_adapter(base, tmp_path)


def _flipped(content: bytes, bit: int) -> bytes:
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


@pytest.mark.parametrize("written_by", ["save", "export", "combine"])
@pytest.mark.parametrize("read_by", ["load_adapter", "bank", "combine"])
def test_a_flipped_bit_in_a_folder_of_ours_is_an_error_or_changes_nothing(written_by, read_by, tmp_path):
    folder, combined = tmp_path / "adapter", tmp_path / "combined"
    model, x = build("linears")
    config = {"target_modules": ["fc", "block.0"], "alpha_pattern": {"fc": 3.0}, "use_rslora": True}
    inject(model, LoRAConfig(rank=2, **config))
    shake(model)
    save_adapter(model, folder)
    if written_by == "export":
        export_adapter(folder, tmp_path / "exported", consumer="peft")
        folder = tmp_path / "exported"
    elif written_by == "combine":
        combine_adapters([folder], tmp_path / "half", weights=[0.5])
        folder = tmp_path / "half"

    def read() -> torch.Tensor:
        base, _ = build("linears")
        if read_by == "bank":
            bank = AdapterBank(base, 1, max_rank=4)
            bank.add("x", folder)
            with bank.use("x"):
                return output(base, x)
        source = folder
        if read_by == "combine":
            combine_adapters([folder], source := combined, weights=[1.0])
        load_adapter(base, source)
        return output(base, x)

    right, refused, draw = read(), 0, random.Random(3)
    for file in (folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        content = file.read_bytes()
        alpha = content.find(b'"lora_alpha": ') + 14  # 16: a digit that turns is another number still
        for bit in [alpha * 8, *(draw.randrange(len(content) * 8) for _ in range(25))]:
            file.write_bytes(_flipped(content, bit))
            try:
                assert torch.equal(read(), right), (file.name, bit)
            except (AdapterFormatError, BaseMismatchError):
                refused += 1
        file.write_bytes(content)
    assert refused > 26  # more than half of all bits


def test_a_config_of_another_adapter_is_not_taken_for_the_one_of_these_tensors(folder, adapted, tmp_path):
    other, x = build("linears")
    inject(other, LoRAConfig(rank=2, alpha=8, target_modules=["fc"]))
    shutil.copy(save_adapter(other, tmp_path / "other") / "adapter_config.json", folder)
    with pytest.raises(AdapterFormatError, match=r"it says lora_alpha=8(\.0)? and not 16"):
        load_adapter(build("linears")[0], folder)
    # What says where it comes from, and how it is trained on, may be edited.
    edit_config(save_adapter(adapted, folder), base_model_name_or_path="me/base", lora_dropout=0.1, task_type=None)
    load_adapter(again := build("linears")[0], folder)
    assert torch.equal(output(again, x), output(adapted, x))


def test_tensors_that_another_program_wrote_into_a_folder_of_ours_are_read(folder, adapted):
    edit_tensors(folder, lambda tensors: tensors[B].mul_(2))
    load_adapter(base := build("linears")[0], folder)
    assert torch.equal(trained(base)["fc.lora_B"], 2 * trained(adapted)["fc.lora_B"])
