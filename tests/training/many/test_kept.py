"""What a step changes beside gradients: its batch, attributes of the module, metrics. Each adapter has its own."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric

from lightning_lora import MultiLoRACallback, adapter_state_dict, load_adapter
from lightning_lora.errors import TrainingError
from tests.training.lit import trainer

from .modules import KINDS, LR, Kind, Lit, drawn, mlp, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor"),
]


def still(module: nn.Module) -> nn.Module:
    """Without dropout."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return module


class Plain(Lit):
    """SGD, which shows the size of a gradient."""

    def __init__(self) -> None:
        kind = Kind(lambda: still(mlp()), KINDS["convolutions"].loss, drawn(5, rows))
        super().__init__(kind)
        self.begins()

    def begins(self) -> None: ...

    def training_step(self, batch: Any, index: int) -> Any:
        return self.loss(batch)

    def loss(self, batch: Any) -> Tensor:
        return self.kind.loss(self.net, batch)

    def configure_optimizers(self) -> Any:
        return SGD([p for p in self.parameters() if p.requires_grad], lr=20 * LR)


class Pops(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader([{"x": x, "y": y} for x, y in self.kind.batches()], batch_size=None)

    def loss(self, batch: Any) -> Tensor:
        y = batch.pop("y")
        return super().loss((batch["x"], y))


class Normalises(Plain):
    def train_dataloader(self) -> Any:
        return DataLoader(self.kind.batches(), batch_size=None, collate_fn=lambda b: (b[0].clone(), b[1]))

    def loss(self, batch: Any) -> Tensor:
        batch[0].mul_(1.5).add_(0.1)
        return super().loss(batch)


class Generator(Plain):
    def begins(self) -> None:
        self.own = torch.Generator().manual_seed(3)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] + torch.empty(16).normal_(generator=self.own), batch[1]))


class OfNumpy(Plain):
    def begins(self) -> None:
        self.own = {"draws": np.random.default_rng(3)}

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] + torch.from_numpy(self.own["draws"].normal(size=16)).float(), batch[1]))


class Meter:
    def __init__(self) -> None:
        self.mean = torch.ones(())
        self.steps = [0]


class Averages(Plain):
    def begins(self) -> None:
        self.meter = Meter()

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.meter.mean.mul_(0.9).add_(loss.detach())
        self.meter.steps[0] += 1
        return loss * self.meter.mean / self.meter.steps[0]


class OfPython(Plain):
    """A counter, beside objects that are not the module's alone."""

    def begins(self) -> None:
        self.state = SimpleNamespace(steps=0)
        self.logger_, self.lock, self.folder = logging.getLogger("of a module"), threading.Lock(), Path("somewhere")

    def loss(self, batch: Any) -> Tensor:
        self.state.steps += 1
        with self.lock:
            self.logger_.debug("step %d", self.state.steps)
        return super().loss(batch) / self.state.steps


class Queue(Plain):
    def loss(self, batch: Any) -> Tensor:
        y = self.net(batch[0])
        loss = F.cross_entropy(y, batch[1])
        if hasattr(self, "last"):
            loss = loss + (y.mean(0) - self.last).square().sum()
        self.last = y.detach().mean(0)
        return loss


class Backward(Plain):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * 3).backward()  # type: ignore[no-untyped-call]


class AfterBackward(Plain):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.mul_(0.1)


class Hooks(Plain):
    def configure_optimizers(self) -> Any:
        for p in self.parameters():
            if p.requires_grad:
                p.register_hook(lambda g: g * 0.1)
        return super().configure_optimizers()


class LeavesOut(Plain):
    def training_step(self, batch: Any, index: int) -> Any:
        return None if index in (0, 3) else self.loss(batch)


ADAPTERS: dict[str, Any] = {"a": {"rank": 4, "seed": 1}, "b": {"rank": 2, "alpha": 8, "seed": 2}}


def trained(cls: type[Plain], tmp_path: Path, *names: str, wave: int | None = 1, **settings: Any) -> Any:
    """The adapters' tensors after a run of those that are named, and their metrics."""
    seed_everything(0, verbose=False)
    callback = MultiLoRACallback({name: ADAPTERS[name] for name in names}, wave=wave)
    trainer(callback, default_root_dir=tmp_path, **{"max_epochs": 1, **settings}).fit(cls())
    found = {}
    for name, folder in callback.adapter_folders.items():
        fresh = Plain()
        load_adapter(fresh, folder)
        found[name] = adapter_state_dict(fresh)
    return found, callback


KEEPS = {
    "labels are taken out": (Pops, None),
    "a batch is normalised in place": (Normalises, None),
    "a generator of torch": (Generator, None),
    "a generator of numpy": (OfNumpy, None),
    "averages": (Averages, "differ"),
    "a counter, a logger, a lock": (OfPython, None),
    "the last output": (Queue, "the module keeps 'Queue.last'"),
    "a backward of its own": (Backward, None),
    "gradients that are changed after backward": (AfterBackward, None),
    "hooks of parameters": (Hooks, None),
    "batches that are left out": (LeavesOut, None),
}


@pytest.mark.parametrize("case", KEEPS)
def test_a_step_that_changes_something_else_trains_each_adapter_as_alone(case: str, tmp_path: Path) -> None:
    cls, reason = KEEPS[case]
    found, _ = trained(cls, tmp_path, "a", "b")
    for name, mine in found.items():
        alone = trained(cls, tmp_path / name, name)[0][name]
        assert [key for key in alone if not torch.equal(alone[key], mine[key])] == []
    if reason is not None:
        with pytest.raises(TrainingError, match=f"wave=2 is not possible.*{reason}"):
            trained(cls, tmp_path / "packed", "a", "b", wave=2)
        return
    packed, callback = trained(cls, tmp_path / "packed", "a", "b", wave=2)
    assert callback.wave == 2
    for name, mine in found.items():
        for key in mine:
            # Both add the same products in another order; SGD takes steps in proportion to the gradient.
            assert torch.allclose(packed[name][key], mine[key], rtol=0, atol=1e-5 * float(mine[key].abs().max()))


class Best(Plain):
    """Keeps the best value of all validations, in a metric and in a number."""

    def begins(self) -> None:
        self.highest, self.lowest = MaxMetric(), 1e9

    def on_train_start(self) -> None:
        self.highest.reset()  # the sanity check counts for nothing

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)

    def on_validation_epoch_end(self) -> None:
        now = self.loss(self.kind.batches()[0])
        self.highest(now)
        self.lowest = min(self.lowest, float(now))
        self.log("highest", self.highest.compute())
        self.log("lowest", self.lowest)


def test_what_is_kept_from_one_validation_to_the_next_is_kept_for_each_adapter(tmp_path: Path) -> None:
    _, together = trained(Best, tmp_path, "a", "b", max_epochs=3)
    for name in ADAPTERS:
        _, alone = trained(Best, tmp_path / name, name, max_epochs=3)
        assert together.metrics[name] == alone.metrics[name]
    assert together.metrics["a"] != together.metrics["b"]


def test_a_resumed_run_goes_on_from_the_metrics_of_each_adapter(tmp_path: Path) -> None:
    every = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    runs = []
    for path in (None, tmp_path / "epoch=1.ckpt"):
        seed_everything(0, verbose=False)
        callback = MultiLoRACallback(ADAPTERS, wave=1)
        trainer(callback, every, default_root_dir=tmp_path, max_epochs=4).fit(Best(), ckpt_path=path)
        runs.append({name: own["highest"] for name, own in callback.metrics.items()})
        every = ModelCheckpoint(tmp_path / "again")
    assert runs[0] == runs[1]
    assert runs[0]["a"] != runs[0]["b"]


# What is refused.


class Takes(Plain):
    def on_train_start(self) -> None:
        self.more = iter(self.kind.batches())

    def loss(self, batch: Any) -> Tensor:
        return super().loss(next(self.more))


class AsksForTheLoader(Plain):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return self.loss(next(dataloader_iter)[0])


class Decays(Plain):
    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                if p.requires_grad:
                    p.mul_(0.9)


class Later(Plain):
    """From the third step on, rows meet in the loss."""

    def loss(self, batch: Any) -> Tensor:
        y = self.net(batch[0])
        return F.cross_entropy(y, batch[1]) + (y.var(0).sum() if self.global_step >= 2 else 0)


class Halves(Plain):
    """What a step of each leaves differs, and a hook goes on from that of the first."""

    def begins(self) -> None:
        self.sum = 0.0

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.sum += float(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.sum /= 2


class DrawsLater(Plain):
    def loss(self, batch: Any) -> Tensor:
        if self.global_step >= 2:
            order = torch.from_numpy(np.random.permutation(len(batch[0])))
            batch = (batch[0] + batch[0][order], batch[1])
        return super().loss(batch)


REFUSED: dict[str, tuple[type[Plain], int, str]] = {
    "an iterator": (Takes, 1, "Takes.more is an iterator"),
    "the loader's iterator": (AsksForTheLoader, 1, "dataloader_iter"),
    "weights that a hook changes": (Decays, 1, "something else has changed weights"),
    "rows that meet later": (Later, 2, "the loss has a part that began since"),
    "a hook that changes what is kept": (Halves, 1, "'Halves.sum' is another with each adapter"),
    "numbers of numpy, later": (DrawsLater, 2, "draws random numbers from numpy"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_adapters_is_refused(case: str, tmp_path: Path) -> None:
    cls, wave, message = REFUSED[case]
    with pytest.raises(TrainingError, match=message):
        trained(cls, tmp_path, "a", "b", wave=wave)
