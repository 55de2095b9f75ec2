"""Whatever writes a checkpoint: no base weight in it, and an adapter folder beside it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, adapter_state_dict, load_adapter, merge, remove
from lightning_lora.errors import AdapterFormatError

from .lit import STYLES, BuiltInConfigureModel, Lit, net, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # PEFT's use of it
    pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode at the start of training"),  # a frozen norm
]

KEYS = {"net.0.lora_A", "net.0.lora_B", "net.3.lora_A", "net.3.lora_B"}
SHAPES = {(2, 8), (32, 2), (2, 32)}


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor anywhere in `value`, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{path}/{i}")


def read(path: str | Path) -> dict[str, Any]:
    """The checkpoint, once it is sure that no weight of the base is in it."""
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == KEYS
    known = {tuple(p.shape) for p in net().parameters()}
    for name, tensor in tensors(checkpoint):
        assert tuple(tensor.shape) not in known - SHAPES, f"{name} is shaped as a weight of the base"
        assert tensor.untyped_storage().nbytes() <= 20_000, name
    return checkpoint


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"))


MODES: dict[str, tuple[dict[str, Any], int]] = {
    "every_n_epochs": ({"every_n_epochs": 1, "save_top_k": -1}, 3),
    "every_n_train_steps": ({"every_n_train_steps": 4, "save_top_k": -1}, 3),
    "train_time_interval": ({"train_time_interval": timedelta(microseconds=1), "save_top_k": -1}, 15),
    "save_last": ({"save_last": True}, 2),
    "save_last as a link": ({"save_last": "link"}, 2),
    "save_last alone": ({"save_last": True, "save_top_k": 0}, 1),
    "save_top_k": ({"monitor": "val_loss", "save_top_k": 2}, 2),
    "save_on_train_epoch_end": ({"save_on_train_epoch_end": True, "save_top_k": -1}, 3),
    "save_weights_only": ({"save_weights_only": True, "every_n_epochs": 1, "save_top_k": -1}, 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_holds_no_base_weight_and_has_its_folder(mode: str, tmp_path: Path) -> None:
    settings, count = MODES[mode]
    trainer(LoRACallback(rank=2), ModelCheckpoint(tmp_path, **settings), max_epochs=3).fit(Lit())
    paths = checkpoints(tmp_path)
    assert len(paths) == count
    for path in paths:
        checkpoint = read(path)
        if not path.is_symlink():
            module = Lit()
            load_adapter(module, path.with_name(f"{path.stem}-adapter"))
            saved = checkpoint["state_dict"]
            assert all(torch.equal(v, saved[k]) for k, v in adapter_state_dict(module).items())
    links = [path for path in paths if path.is_symlink()]
    others = {p.name for p in tmp_path.iterdir()} - {p.name for p in paths}
    assert others == {f"{p.stem}-adapter" for p in paths if p not in links}, "the folder goes with its checkpoint"


@pytest.mark.parametrize("style", STYLES)
def test_the_trainers_own_save_writes_no_base_weight_during_and_after_any_run(style: type[Lit], tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "during.ckpt")

    module = style()
    run = trainer(Saves(), LoRACallback(rank=2), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "after.ckpt")
    run.save_checkpoint(tmp_path / "alone.ckpt", weights_only=True)
    run.test(module, verbose=False)
    run.save_checkpoint(tmp_path / "tested.ckpt")
    untrained = trainer(LoRACallback(rank=2))
    untrained.validate(style(), verbose=False)
    untrained.save_checkpoint(tmp_path / "validated.ckpt")
    for name in ("during", "after", "alone", "tested", "validated"):
        saved = read(tmp_path / f"{name}.ckpt")["state_dict"]
        same = [torch.equal(v, saved[k]) for k, v in adapter_state_dict(module).items()]
        assert all(same) == (name != "validated")


class Fails(Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3:
            raise ValueError("stop")


# Lightning's, where an OnExceptionCheckpoint is there: it looks for what that saved before.
@pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint")
@pytest.mark.parametrize("kind", ["OnExceptionCheckpoint", "save_on_exception"])
def test_what_is_saved_on_an_exception_holds_no_base_weight_and_resumes(kind: str, tmp_path: Path) -> None:
    saver: Callback = OnExceptionCheckpoint(tmp_path)
    if kind == "save_on_exception":
        saver = ModelCheckpoint(tmp_path, save_on_exception=True)
    run = trainer(LoRACallback(rank=2), saver, Fails(), max_epochs=1)
    with pytest.raises(ValueError, match="stop"):
        run.fit(Lit())
    (path,) = checkpoints(tmp_path)
    assert read(path)["global_step"] == 3
    run.save_checkpoint(tmp_path / "later.ckpt")
    read(tmp_path / "later.ckpt")
    module = Lit()
    again = trainer(LoRACallback(rank=2), max_epochs=1)
    again.fit(module, ckpt_path=str(path))
    assert again.global_step == 5
    assert len(module.losses) == 2


@pytest.mark.parametrize("average", ["ema", "swa", "ema weights only"])
def test_an_averaged_models_checkpoint_holds_no_base_weight_and_its_folder_the_average(
    average: str, tmp_path: Path
) -> None:
    averaging = (
        StochasticWeightAveraging(1e-3, swa_epoch_start=1) if average == "swa" else EMAWeightAveraging(decay=0.5)
    )
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, save_weights_only="only" in average)
    module = Lit()
    run = trainer(LoRACallback(rank=2), averaging, saver, max_epochs=3)
    run.fit(module)
    run.save_checkpoint(tmp_path / "after.ckpt")
    for path in checkpoints(tmp_path):
        saved = read(path)
        loaded = Lit()
        load_adapter(loaded, path.with_name(f"{path.stem}-adapter"))
        assert all(torch.equal(v, saved["state_dict"][k]) for k, v in adapter_state_dict(loaded).items())
        if average == "ema" and path.stem != "after":
            assert not torch.equal(saved["state_dict"]["net.0.lora_B"], saved["current_model_state"]["net.0.lora_B"])
    after = read(tmp_path / "after.ckpt")["state_dict"]
    assert all(torch.equal(v, after[k]) for k, v in adapter_state_dict(module).items())


def test_the_size_of_a_checkpoint_does_not_depend_on_the_base(tmp_path: Path) -> None:
    class Deep(Lit):
        def build(self, seed: int) -> None:
            super().build(seed)
            self.frozen = nn.ModuleList(nn.Linear(512, 512) for _ in range(8))

    sizes = {}
    for style in (Lit, Deep):
        run = trainer(LoRACallback(rank=2, target_modules=["net.0", "net.3"]), max_epochs=1)
        run.fit(style())
        run.save_checkpoint(path := tmp_path / f"{style.__name__}.ckpt")
        sizes[style] = os.path.getsize(path)
    assert abs(sizes[Deep] - sizes[Lit]) < 1000


def test_without_save_adapter_there_is_no_folder_and_a_users_own_one_stays(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2, save_adapter=False), ModelCheckpoint(tmp_path), max_epochs=2)
    run.fit(Lit())
    (path,) = tmp_path.iterdir()
    kept = tmp_path / f"{path.stem}-adapter"
    kept.mkdir()
    (kept / "adapter_config.json").write_text("mine")
    run.strategy.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_folder_that_is_not_an_adapters_is_not_removed_with_a_checkpoint(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    (tmp_path / "x-adapter").mkdir()
    (tmp_path / "x-adapter" / "notes.txt").write_text("mine")
    (tmp_path / "x.ckpt").write_bytes(b"")
    run.strategy.remove_checkpoint(tmp_path / "x.ckpt")
    assert [p.name for p in tmp_path.iterdir()] == ["x-adapter"]


@pytest.mark.parametrize("style", STYLES)
def test_peft_gives_the_same_outputs_from_the_folder_of_a_plain_net(style: type[Lit], tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, monitor="val_loss")
    module = style()
    trainer(LoRACallback(rank=2), saver, max_epochs=2).fit(module)
    trainer(LoRACallback(rank=2)).validate(module, ckpt_path=saver.best_model_path, verbose=False)
    folder = saver.best_model_path.removesuffix(".ckpt") + "-adapter"
    theirs = peft.PeftModel.from_pretrained(net(), folder).eval()
    x = torch.randn(6, 8)
    # The same operations in another order: a few ulps of float32.
    torch.testing.assert_close(theirs(x), module.eval()(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("averaged", [False, True])
def test_peft_gives_the_same_outputs_from_the_folder_of_a_language_model(averaged: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    torch.manual_seed(1)
    base = LlamaForCausalLM(config)
    weights = {k: v.clone() for k, v in base.state_dict().items()}

    class LM(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = base

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    tokens = torch.randint(0, 32, (8, 12))
    callbacks = [LoRACallback(rank=2), *([EMAWeightAveraging(decay=0.5)] if averaged else [])]
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4)
    module = LM()
    trainer(*callbacks, saver, max_epochs=2).fit(module, torch.utils.data.DataLoader(tokens, batch_size=2))
    saved = torch.load(saver.best_model_path, weights_only=True)["state_dict"]
    folder = saver.best_model_path.removesuffix(".ckpt") + "-adapter"
    for name, value in saved.items():
        module.get_parameter(name).data.copy_(value)
    ours = module.eval().model(input_ids=tokens).logits
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(weights)
    theirs = peft.PeftModel.from_pretrained(plain, folder).eval()(input_ids=tokens).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_the_learning_rate_finder_saves_leaves_no_folder(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=5, early_stop_threshold=None)
    run = trainer(LoRACallback(rank=2), finder, max_epochs=1, default_root_dir=tmp_path)
    run.fit(Lit())
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_written_in_the_background_holds_no_base_weight_and_resumes(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer(LoRACallback(rank=2), saver, max_epochs=1, plugins=[AsyncCheckpointIO()]).fit(module := Lit())
    paths = checkpoints(tmp_path)
    assert [read(path)["global_step"] for path in paths] == [2, 4]
    assert len(list(tmp_path.iterdir())) == 4
    resumed = Lit()
    trainer(LoRACallback(rank=2), max_epochs=1).fit(resumed, ckpt_path=str(paths[0]))
    assert [a.item() for a in resumed.losses] == [a.item() for a in module.losses[2:]]


@pytest.mark.parametrize("undo", [merge, remove])
def test_once_the_adapters_are_gone_the_trainer_saves_the_whole_model(undo: Any, tmp_path: Path) -> None:
    module = BuiltInConfigureModel()
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module)
    undo(module)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    assert set(torch.load(tmp_path / "whole.ckpt")["state_dict"]) == {f"net.{k}" for k in net().state_dict()}
    assert [p.name for p in tmp_path.iterdir()] == ["whole.ckpt"]


class WithNorm(Lit):
    def build(self, seed: int) -> None:
        base = net(seed)
        self.net = nn.Sequential(base[0], nn.BatchNorm1d(32), base[1], base[3], base[5])  # type: ignore[assignment]

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize(
    ("fields", "saved"),
    [
        ({"modules_to_save": ["net.4"]}, {"net.4.weight", "net.4.bias"}),
        (
            {"modules_to_save": ["net.1"]},
            {f"net.1.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")},
        ),
        ({"bias": "all"}, {f"net.{i}.bias" for i in (0, 1, 3, 4)}),
        ({"bias": "lora_only"}, {"net.0.bias", "net.3.bias"}),
    ],
)
def test_what_is_trained_whole_is_saved_and_restored(fields: dict[str, Any], saved: set[str], tmp_path: Path) -> None:
    module, base = WithNorm(), WithNorm()
    run = trainer(LoRACallback(rank=2, target_modules=["net.0", "net.3"], **fields), max_epochs=2)
    run.fit(module)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint["state_dict"]) == KEYS | saved
    again = WithNorm()
    trainer(LoRACallback(rank=2, target_modules=["net.0", "net.3"], **fields)).test(
        again, ckpt_path=path, verbose=False
    )
    x = torch.randn(5, 8)
    assert torch.equal(again.eval()(x), module.eval()(x))
    folder = WithNorm()
    load_adapter(folder, tmp_path / "x-adapter")
    assert torch.equal(folder.eval()(x), module(x))
    remove(again)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_folder_that_was_damaged_does_not_load(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    run.save_checkpoint(tmp_path / "x.ckpt")
    tensors = tmp_path / "x-adapter" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(AdapterFormatError):
        load_adapter(Lit(), tmp_path / "x-adapter")


@pytest.mark.parametrize("saver", [{"save_top_k": 1}, {"save_top_k": 1, "monitor": "val_loss"}, {"save_last": True}])
def test_going_on_in_another_remote_folder_keeps_the_checkpoints_of_the_first(saver: Any, tmp_path: Path) -> None:
    def fit(folder: str, epochs: int, ckpt: str | None = None) -> ModelCheckpoint:
        callback = ModelCheckpoint(f"memory://{tmp_path.name}/{folder}", every_n_epochs=1, **saver)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No adapter folder was written beside")
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            trainer(LoRACallback(rank=2), callback, max_epochs=epochs).fit(Lit(), ckpt_path=ckpt)
        return callback

    files = fsspec.filesystem("memory")
    first = fit("first", 2)
    before = set(files.ls(f"/{tmp_path.name}/first", detail=False))
    for path in {first.best_model_path, first.last_model_path} - {""}:
        second = fit("second", 4, path)
        assert set(files.ls(f"/{tmp_path.name}/first", detail=False)) == before
        # What the run saved itself goes, as it does in a local folder.
        left = files.ls(f"/{tmp_path.name}/second", detail=False)
        assert len(left) == len({second.best_model_path, second.last_model_path} - {""})
        files.rm(f"/{tmp_path.name}/second", recursive=True)
        again = fit("first", 4, path)
        assert files.exists(again.best_model_path)
        files.rm(f"/{tmp_path.name}/first", recursive=True)
        first = fit("first", 2)
