from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import TrainingError
from lightning_lora.training.run_state import random_state, set_random_state

from .lit import Lit, data, trainer

EPOCHS, STEPS = 3, 5

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),  # torchdata's own
]


class Augmented(Dataset):  # type: ignore[type-arg]
    """Draws random numbers of every kind for each item, as augmentations do."""

    def __init__(self) -> None:
        self.rows = data()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        return x + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from data()


class Resumed(Lit):
    """Dropout, a schedule by step, and hooks that draw random numbers."""

    kind = "plain"

    def train_dataloader(self) -> Any:
        if self.kind == "stateful":
            return StatefulDataLoader(Augmented(), batch_size=8, shuffle=True)
        if self.kind == "stream":
            return DataLoader(Stream(), batch_size=8)
        workers = 2 if self.kind == "workers" else 0
        return DataLoader(Augmented(), batch_size=8, shuffle=True, num_workers=workers, drop_last=True)

    def on_train_start(self) -> None:
        torch.rand(3)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        schedule = OneCycleLR(optimizer, 1e-2, total_steps=2 * EPOCHS * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, kind: str = "plain", ckpt: str | None = None, seed: int = 1, **settings: Any) -> Resumed:
    pl.seed_everything(seed, verbose=False)
    module = Resumed()
    module.kind = kind
    every = settings.pop("checkpoints", {"every_n_train_steps": 1})
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **every)
    run = trainer(LoRACallback(rank=2, dropout=0.1), saver, max_epochs=EPOCHS, **settings)
    run.fit(module, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module


def assert_same_end(whole: Resumed, resumed: Resumed, step: int) -> None:
    rest = whole.losses[step:]
    assert [a.item() for a in resumed.losses] == [a.item() for a in rest]
    for name, tensor in adapter_state_dict(whole).items():
        assert torch.equal(tensor, adapter_state_dict(resumed)[name])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("plain", {}),
        ("plain", {"precision": "bf16-mixed"}),
        ("plain", {"precision": "bf16-true"}),
        ("plain", {"val_check_interval": 2}),
        ("plain", {"limit_val_batches": 0}),
        ("plain", {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 2}),
        ("stateful", {}),
        ("workers", {}),
    ],
)
def test_resuming_after_any_step_gives_the_run_that_was_not_interrupted(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", kind, **settings)
    assert len(whole.losses) == EPOCHS * STEPS
    # With workers each resumed run starts processes: the first step, mid-epoch, the last of an epoch, the one after.
    steps = (2, 5, 6) if kind == "workers" else range(1, EPOCHS * STEPS)
    for step in steps:
        resumed = fit(tmp_path / f"{step}", kind, str(tmp_path / "whole" / f"step={step}.ckpt"), seed=7, **settings)
        assert_same_end(whole, resumed, step)


@pytest.mark.parametrize("kind", ["plain", "stateful"])
@pytest.mark.parametrize("checkpoints", [{"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_resuming_at_an_epochs_end_gives_the_run_that_was_not_interrupted(
    kind: str, checkpoints: dict[str, Any], tmp_path: Path
) -> None:
    whole = fit(tmp_path / "whole", kind, checkpoints=checkpoints)
    for step in (5, 10):
        path = str(tmp_path / "whole" / f"step={step}.ckpt")
        assert_same_end(whole, fit(tmp_path / f"{step}", kind, path, seed=7, checkpoints=checkpoints), step)


def test_how_often_checkpoints_are_saved_does_not_change_the_run(tmp_path: Path) -> None:
    often, rarely = fit(tmp_path / "often"), fit(tmp_path / "rarely", checkpoints={"every_n_epochs": 2})
    assert_same_end(often, rarely, 0)


def test_a_stream_that_cannot_go_back_to_its_place_is_said(tmp_path: Path) -> None:
    fit(tmp_path / "whole", "stream")
    with pytest.warns(UserWarning, match="IterableDataset has no position to go back to"):
        fit(tmp_path / "again", "stream", str(tmp_path / "whole" / "step=2.ckpt"))


def test_a_checkpoint_can_be_resumed_with_accumulated_gradients(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", accumulate_grad_batches=2, checkpoints={"every_n_train_steps": 2})
    path = str(tmp_path / "whole" / "step=2.ckpt")
    again = fit(tmp_path / "2", ckpt=path, seed=7, accumulate_grad_batches=2, checkpoints={"every_n_train_steps": 2})
    assert_same_end(whole, again, 4)


# What no checkpoint of Lightning's holds, and where a run cannot be the same.


def saved_state(path: Path) -> dict[str, Any]:
    return torch.load(path)["callbacks"]["LoRACallback"]["random"]["ranks"][0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_checkpoint_holds_the_gradients_of_an_open_window_and_of_no_other(precision: str, tmp_path: Path) -> None:
    class Saves(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            index = trainer.fit_loop.total_batch_idx
            gradients[index] = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            trainer.save_checkpoint(tmp_path / f"{index}.ckpt")

    gradients: dict[int, dict[str, Tensor]] = {}
    run = trainer(LoRACallback(rank=2), Saves(), max_epochs=2, accumulate_grad_batches=3, precision=precision)
    run.fit(Resumed())
    for index in range(10):
        closed = index % 5 in (2, 4)  # an epoch's last batch ends its window
        saved = saved_state(tmp_path / f"{index}.ckpt")["gradients"]
        expected = {} if closed else gradients[index]
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_resumed_run_does_not_save_the_step_again_at_which_it_was_saved(tmp_path: Path) -> None:
    saver = {"every_n_train_steps": 2}
    fit(tmp_path, checkpoints=saver, accumulate_grad_batches=2)
    names = {path.name for path in tmp_path.glob("*.ckpt")}
    (tmp_path / "step=4.ckpt").rename(tmp_path / "from.ckpt")
    fit(tmp_path, ckpt=str(tmp_path / "from.ckpt"), checkpoints=saver, accumulate_grad_batches=2)
    assert {path.name for path in tmp_path.glob("*.ckpt")} & {"step=4.ckpt", "step=4-v1.ckpt"} == set()
    assert names - {"step=4.ckpt"} <= {path.name for path in tmp_path.glob("*.ckpt")}


def test_the_last_checkpoint_of_a_resumed_run_is_that_of_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    """It is saved with each that is among the best. In this run, the first epoch's is the best."""

    def left(ckpt: Path | None = None, epochs: int = EPOCHS) -> dict[str, int]:
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="epoch", mode="min", save_last=True)
        pl.seed_everything(1, verbose=False)
        trainer(LoRACallback(rank=2), saver, max_epochs=epochs).fit(Resumed(), ckpt_path=ckpt)
        return {path.name: torch.load(path)["global_step"] for path in tmp_path.glob("*.ckpt")}

    whole = left()
    shutil.rmtree(tmp_path)
    left(epochs=1)
    assert left(ckpt=tmp_path / "last.ckpt") == whole == {"epoch=0.ckpt": STEPS, "last.ckpt": STEPS}


def test_an_epochs_last_batch_that_was_saved_before_the_validation_is_validated_after_resuming(tmp_path: Path) -> None:
    class Notes(Callback):
        def on_validation_end(self, trainer: pl.Trainer, *_: Any) -> None:
            values.append((trainer.global_step, trainer.callback_metrics["val_loss"].item()))

        def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            values.append((trainer.global_step, "epoch"))

    def run(ckpt: str | None) -> list[Any]:
        values.clear()
        pl.seed_everything(1 if ckpt is None else 7, verbose=False)
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=STEPS)
        callbacks = [LoRACallback(rank=2), Notes(), saver]
        trainer(*callbacks, max_epochs=2, num_sanity_val_steps=0).fit(Resumed(), ckpt_path=ckpt)
        return values.copy()

    values: list[Any] = []
    whole = run(None)
    assert [step for step, _ in whole] == [5, 5, 10, 10]
    (tmp_path / "step=5.ckpt").rename(tmp_path / "from.ckpt")
    assert run(str(tmp_path / "from.ckpt")) == whole


class ByHand(Resumed):
    """Two steps in a batch, between which something may happen."""

    fails_at = -1

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        for _ in range(2):
            loss = self.loss(batch)
            self.optimizers().zero_grad()
            self.manual_backward(loss)
            self.optimizers().step()
            if self.trainer.fit_loop.total_batch_idx == self.fails_at:
                raise ValueError("stop")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint")
def test_a_checkpoint_from_the_middle_of_a_batch_that_has_changed_weights_is_said_to_be_inexact(tmp_path: Path) -> None:
    module = ByHand()
    module.fails_at = 7
    with pytest.raises(ValueError, match="stop"):
        trainer(LoRACallback(rank=2), OnExceptionCheckpoint(tmp_path), max_epochs=2).fit(module)
    with pytest.warns(UserWarning, match="in the middle of batch 2 of epoch 1, in which weights or schedules"):
        trainer(LoRACallback(rank=2), max_epochs=2).fit(ByHand(), ckpt_path=tmp_path / "on_exception.ckpt")


class Ends(Resumed):
    """Is ended once its hook has done its work, and writes into checkpoints what nobody else can read."""

    ends_in = ""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.ends_in == "on_train_batch_end":
            raise KeyError("stop")

    def on_after_backward(self) -> None:
        if self.ends_in == "on_after_backward":
            raise KeyError("stop")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = 1


@pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint")
@pytest.mark.parametrize(
    ("hook", "said"),
    [
        ("on_train_batch_end", "ended in on_train_batch_end of the LightningModule, which is called again for batch 0"),
        ("on_after_backward", "in the middle of batch 0 of epoch 0.*What on_save_checkpoint of Ends wrote"),
    ],
)
def test_what_may_be_done_twice_after_an_exception_is_said(hook: str, said: str, tmp_path: Path) -> None:
    module = Ends()
    module.ends_in = hook
    with pytest.raises(KeyError, match="stop"):
        trainer(LoRACallback(rank=2), OnExceptionCheckpoint(tmp_path), max_epochs=2).fit(module)
    with pytest.warns(UserWarning, match=said):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Ends(), ckpt_path=tmp_path / "on_exception.ckpt")


@pytest.mark.filterwarnings("ignore:.*ckpt_path=None.*was called without a model", "ignore:.*no last checkpoint")
def test_a_run_that_sigterm_ended_steps_its_schedules_as_often_as_one_that_it_did_not(tmp_path: Path) -> None:
    class Plateau(Resumed):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=9.0)
            return [optimizer], [{"scheduler": schedule, "interval": "step", "monitor": "loss"}]

    class Ended(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer._signal_connector.received_sigterm = trainer.global_step == 3

    def run(*callbacks: Callback) -> pl.Trainer:
        pl.seed_everything(1, verbose=False)
        return trainer(LoRACallback(rank=2), *callbacks, max_epochs=2)

    whole, resumed = Plateau(), Plateau()
    run().fit(whole)
    with pytest.raises(SIGTERMException):
        run(Ended(), OnExceptionCheckpoint(tmp_path)).fit(Plateau())
    run().fit(resumed, ckpt_path=tmp_path / "on_exception.ckpt")
    assert_same_end(whole, resumed, 3)


class OwnGenerator(Augmented):
    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows[index]
        return x + torch.randn((), generator=self.noise), y


def test_a_generator_that_lives_in_persistent_workers_is_said_to_be_out_of_reach(tmp_path: Path) -> None:
    def loader() -> Any:
        return DataLoader(OwnGenerator(), batch_size=8, num_workers=1, persistent_workers=True)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(Resumed(), loader())
    with pytest.warns(UserWarning, match=r"train loader 0.dataset.noise is copied into each .* persistent workers"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Resumed(), loader(), ckpt_path=tmp_path / "step=3.ckpt")


def test_data_that_a_sampler_orders_by_another_seed_is_refused(tmp_path: Path) -> None:
    def loader(seed: int) -> Any:
        sampler = DistributedSampler(data(), num_replicas=1, rank=0, seed=seed)  # type: ignore[var-annotated]
        return DataLoader(data(), batch_size=8, sampler=sampler)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    whole = Resumed()
    trainer(LoRACallback(rank=2), saver, max_epochs=2).fit(whole, loader(4))
    resumed = Resumed()
    for step in (3, 9):
        trainer(LoRACallback(rank=2), max_epochs=2).fit(resumed, loader(4), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same_end(whole, resumed, step)
        resumed.losses.clear()
        with pytest.raises(TrainingError, match=r"with seed 4, this run draws it with 5 .*seed_everything\(4\)"):
            trainer(LoRACallback(rank=2), max_epochs=2).fit(
                Resumed(), loader(5), ckpt_path=tmp_path / f"step={step}.ckpt"
            )


def test_a_generator_that_the_resumed_run_does_not_have_is_said(tmp_path: Path) -> None:
    def loader(generator: torch.Generator | None) -> Any:
        return DataLoader(data(), batch_size=8, shuffle=True, generator=generator)

    saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(Resumed(), loader(torch.Generator()))
    with pytest.warns(UserWarning, match="holds the state of train loader 0.sampler.generator"):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Resumed(), loader(None), ckpt_path=tmp_path / "step=3.ckpt")


def test_a_checkpoint_of_an_earlier_version_says_that_it_does_not_tell_the_place(tmp_path: Path) -> None:
    fit(tmp_path, checkpoints={"every_n_train_steps": 3})
    checkpoint = torch.load(tmp_path / "step=3.ckpt")
    earlier = {"epoch_start": None, "restarts": {}, "now": saved_state(tmp_path / "step=3.ckpt")["random"]}
    checkpoint["callbacks"]["LoRACallback"]["random"] = {"ranks": [earlier]}
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    with pytest.warns(UserWarning, match="saved by an earlier version of lightning_lora"):
        fit(tmp_path / "resumed", ckpt=str(tmp_path / "earlier.ckpt"))


def test_numpys_generator_is_put_back_whatever_it_was_asked_for() -> None:
    for draws in range(4):
        np.random.seed(draws)
        np.random.randn(draws)  # of normal numbers two are made at a time, and one is kept
        state = random_state()
        expected = np.random.randn(3)
        random_state()
        set_random_state(state)
        assert (np.random.randn(3) == expected).all()


@pytest.mark.filterwarnings("ignore:Not exactly the run that was interrupted")
def test_data_that_ends_before_the_place_of_the_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, checkpoints={"every_n_train_steps": 4})
    run = trainer(LoRACallback(rank=2, dropout=0.1), max_epochs=EPOCHS)
    with pytest.raises(TrainingError, match="saved after batch 4 of epoch 0, and this run's data ends after batch 2"):
        run.fit(Resumed(), DataLoader(data(16), batch_size=8), ckpt_path=tmp_path / "step=4.ckpt")


def test_another_number_of_batches_than_the_checkpoints_is_said(tmp_path: Path) -> None:
    fit(tmp_path, checkpoints={"every_n_train_steps": 3})
    run = trainer(LoRACallback(rank=2, dropout=0.1), max_epochs=EPOCHS)
    with pytest.warns(UserWarning, match="its epochs had 5 batches, this run's have 10"):
        run.fit(Resumed(), DataLoader(data(), batch_size=4), ckpt_path=tmp_path / "step=3.ckpt")
