"""More of test_loading: precisions, files of other kinds, and modules with settings and hooks of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, load_from_checkpoint, remove
from lightning_lora.errors import AdapterFormatError, CheckpointError
from lightning_lora.training.checkpoint import METADATA

from .lit import BuiltInConfigureModel, Lit, OverridesSetup, net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed from")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Lit())
    run.save_checkpoint(tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint)
    torch.save(checkpoint, path)
    return path


def assert_refused(path: Path, error: type[Exception], match: str) -> None:
    """By the Trainer for every entry point, and by load_from_checkpoint; the model is as it was."""
    for entry in ("fit", "validate", "predict"):
        module = Lit()
        run = trainer(LoRACallback(rank=2), max_epochs=2)
        run.validate(module, verbose=False)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(error, match=match):
            getattr(run, entry)(module, ckpt_path=path)
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    with pytest.raises(error, match=match):
        load_from_checkpoint(Lit, path)


PRECISIONS = ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"]


@pytest.mark.parametrize("first", PRECISIONS)
@pytest.mark.parametrize("then", PRECISIONS)
def test_the_base_is_known_again_in_another_precision(first: Any, then: Any, tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1, precision=first)
    run.fit(Lit())
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    module = Lit()
    trainer(LoRACallback(rank=2), max_epochs=2, precision=then).fit(module, ckpt_path=path)
    assert len(module.losses) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_base_is_known_again_where_it_was_loaded_in_another_dtype(dtype: torch.dtype, saved: Path) -> None:
    class Cast(Lit):
        def build(self, seed: int) -> None:
            super().build(seed)
            self.to(dtype)

    loaded = load_from_checkpoint(Cast, saved)
    assert loaded.net[0].weight.dtype is dtype
    assert torch.equal(loaded.net[0].lora_B.float(), torch.load(saved)["state_dict"]["net.0.lora_B"])


def test_a_checkpoint_of_a_newer_version_is_refused(saved: Path) -> None:
    def newer(checkpoint: dict[str, Any]) -> None:
        checkpoint[METADATA]["format"] = 99

    assert_refused(edited(saved, newer), CheckpointError, "newer version of lightning_lora")


@pytest.mark.parametrize(
    "content", [b"garbage " * 100, b"\x80\x02garbage", b"PK\x03\x04" + b"x" * 200, b'{"json": 1}', bytes(500), b"\n"]
)
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_file_of_something_else_is_named(content: bytes, weights_only: bool | None, tmp_path: Path) -> None:
    path = tmp_path / "broken.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.ckpt is not a whole checkpoint"):
        trainer(LoRACallback(rank=2)).test(Lit(), ckpt_path=path, verbose=False, weights_only=weights_only)
    with pytest.raises(CheckpointError, match=r"broken\.ckpt is not a whole checkpoint"):
        load_from_checkpoint(Lit, path, weights_only=weights_only)


def test_what_holds_no_state_dict_is_refused(tmp_path: Path) -> None:
    torch.save(net().state_dict(), path := tmp_path / "x.ckpt")
    assert_refused(path, CheckpointError, r"holds no adapter \(its weights are 0\.weight")
    torch.save([1, 2], path)
    assert_refused(path, CheckpointError, "holds a list, not a checkpoint")
    assert_refused(tmp_path, CheckpointError, r"is a folder of checkpoints\. Give one of them: .*x\.ckpt")
    (inside := tmp_path / "run" / "checkpoints").mkdir(parents=True)  # as the command line leaves it
    path.rename(inside / path.name)
    assert_refused(inside.parent, CheckpointError, r"is a folder of checkpoints\. Give one of them: .*x\.ckpt")


class Opaque:
    """What torch does not load with weights_only=True."""


def test_what_torch_refuses_to_unpickle_is_named_with_the_ways_out(saved: Path) -> None:
    edited(saved, lambda checkpoint: checkpoint.update(extra=Opaque()))
    for load in (
        lambda: load_from_checkpoint(Lit, saved),
        lambda: trainer(LoRACallback(rank=2)).test(Lit(), ckpt_path=saved),
    ):
        with pytest.raises(CheckpointError, match=r"objects of .*Opaque.*add_safe_globals.*weights_only=False"):
            load()
    module = load_from_checkpoint(Lit, saved, weights_only=False)
    assert bool(module.net[0].lora_B.abs().sum() > 0)


# Without a Trainer.


class WithSettings(Lit):
    """Keeps what it was constructed with, and what it was given beside."""

    def __init__(self, sizes: dict[str, int], seed: int = 0, note: str = "") -> None:
        super().__init__(seed)
        self.save_hyperparameters()
        self.note = note

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["remembered"] = 7

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.remembered = checkpoint["remembered"]


@pytest.mark.parametrize("style", [Lit, BuiltInConfigureModel, OverridesSetup])
@pytest.mark.parametrize("weights_only", [None, True, False])
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["net.5"], "bias": "lora_only"}])
def test_a_module_is_loaded_without_a_trainer(
    style: type[Lit], weights_only: bool | None, fields: Any, tmp_path: Path
) -> None:
    module = style(seed=3)
    run = trainer(LoRACallback(rank=2, dropout=0.1, **fields), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(style, path, weights_only=weights_only)
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert loaded.hparams.seed == 3
    trainer(LoRACallback(rank=2, dropout=0.1, **fields), max_epochs=1).fit(loaded.train())  # goes on training
    remove(loaded)
    assert all(torch.equal(a, b) for a, b in zip(loaded.net.state_dict().values(), net(3).state_dict().values()))


def test_settings_and_hooks_of_the_module_are_heard(tmp_path: Path) -> None:
    module = WithSettings({"a": 1}, note="mine")
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    loaded = load_from_checkpoint(WithSettings, str(path), note="other", map_location="cpu")
    assert (loaded.hparams.sizes, loaded.note, loaded.remembered) == ({"a": 1}, "other", 7)
    (tmp_path / "hparams.yaml").write_text("sizes: {b: 2}\nnote: from the file\n")
    loaded = load_from_checkpoint(WithSettings, path, hparams_file=tmp_path / "hparams.yaml")
    assert (loaded.hparams.sizes, loaded.note) == ({"b": 2}, "from the file")


class Other(Lit):
    def build(self, seed: int) -> None:
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))


def test_another_class_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"missing: body\.0\.lora_A.*unexpected: net\.0\.lora_A"):
        load_from_checkpoint(Other, saved)


class Wrapping(Lit):
    """Is given its network, and keeps it among its settings, as `save_hyperparameters()` does."""

    def __init__(self, backbone: nn.Module, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()
        self.net = backbone  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance of `nn.Module`")
def test_a_network_among_the_settings_is_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module := Wrapping(net(), lr=0.1))
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"lr": 0.1, "seed": 0}
    assert set(module.hparams) == {"lr", "seed", "backbone"}
    loaded = load_from_checkpoint(Wrapping, path, backbone=net())
    x = torch.randn(4, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    with pytest.raises(CheckpointError, match=r"given as 'backbone'.*load_from_checkpoint\(Wrapping, path, backbone="):
        load_from_checkpoint(Wrapping, path)
