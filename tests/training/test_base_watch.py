"""A base that is written to while an adapter trains on it: said after the first step, since nothing would load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from lightning_lora import LoRACallback, adapter_state_dict
from lightning_lora.errors import TrainingError
from lightning_lora.training.checkpoint import load_from_checkpoint

from .lit import Lit, net, trainer


class Words(Lit):
    """The first layer looks rows up whose norm is cut in every forward."""

    max_norm: float | None = 0.5

    def build(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net, self.words = net(seed), nn.Embedding(32, 8, max_norm=self.max_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.words((x[:, 0] * 8).long().abs().clamp(max=31)))


class Codebook(Lit):
    """A codebook that follows its inputs, written past torch's count."""

    def build(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net, self.codes = net(seed), nn.Parameter(torch.randn(16, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.codes.data[0].lerp_(batch[0].mean(0), 0.5)
        return super().training_step(batch, batch_idx)


class Clipped(Lit):
    """Weights are clipped after each batch, by a hook that runs after every callback's."""

    limit = 0.1

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-self.limit, self.limit)


class ClippedInStep(Lit):
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.net[3].weight.data.clamp_(-0.01, 0.01)


class ByHand(Clipped):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Replaced(Lit):
    def on_train_batch_end(self, *args: Any) -> None:
        self.net[5].weight = nn.Parameter(self.net[5].weight.detach() + 1, requires_grad=False)


def run(module: Lit, *callbacks: Any, folder: Path | None = None, **settings: Any) -> Lit:
    pl.seed_everything(1, verbose=False)
    saving = {} if folder is None else {"default_root_dir": folder, "enable_checkpointing": True}
    trainer(*callbacks, **{"max_epochs": 2, **saving, **settings}).fit(module)
    return module


WRITES: dict[str, tuple[Callable[[], Lit], str, int]] = {
    "max_norm": (Words, r"words\.weight of Words", 1),
    "a codebook": (Codebook, "codes of Codebook", 1),
    "clipping after the batch": (Clipped, r"net\.0\.weight.*, net\.3\.weight", 2),
    "clipping in the step": (ClippedInStep, r"net\.3\.weight of ClippedInStep", 1),
    "manual optimization": (ByHand, r"net\.0\.weight", 2),
    "another parameter": (Replaced, r"net\.5\.weight of Replaced", 2),
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("name", WRITES)
def test_a_base_that_is_written_to_is_an_error_in_the_first_batches(name: str, accumulated: int) -> None:
    make, message, soonest = WRITES[name]
    if name == "manual optimization" and accumulated > 1:
        return
    seen: list[int] = []

    class Counts(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(args[-1])

    with pytest.raises(TrainingError, match=rf"{message}.* changed while the adapter trains.*modules_to_save"):
        run(make(), Counts(), LoRACallback(rank=2), accumulate_grad_batches=accumulated)
    assert len(seen) == soonest + (accumulated - 1 if name == "clipping in the step" else 0)


def test_pruning_at_the_end_of_an_epoch_is_an_error_before_anything_is_saved(tmp_path: Path) -> None:
    prunes = ModelPruning(
        "l1_unstructured", amount=0.5, parameter_names=["weight"], use_lottery_ticket_hypothesis=False
    )
    module = Lit()
    prunes._parameters_to_prune = [(module.net[5], "weight")]
    with pytest.raises(TrainingError, match=r"net\.5\.weight"):
        run(module, LoRACallback(rank=2), prunes, folder=tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_module_that_writes_its_weights_can_be_saved_with_the_adapter(tmp_path: Path) -> None:
    module = run(Words(), LoRACallback(rank=2, modules_to_save=["words"]), folder=tmp_path)
    (path,) = tmp_path.rglob("*.ckpt")
    again = load_from_checkpoint(Words, path)
    assert torch.equal(again.words.weight, module.words.weight)


def test_without_check_base_it_is_said_once_and_fits_the_base_as_it_is_then(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"words\.weight of Words changed while the adapter trains") as said:
        module = run(Words(), LoRACallback(rank=2, check_base=False), folder=tmp_path, max_epochs=3)
    assert sum("changed while" in str(w.message) for w in said) == 1
    (path,) = tmp_path.rglob("*.ckpt")

    class Same(Words):
        def build(self, seed: int) -> None:
            super().build(seed)
            self.words.load_state_dict(module.words.state_dict())

    load_from_checkpoint(Same, path)


QUIET: dict[str, Callable[[], tuple[Lit, list[Any]]]] = {
    "nothing": lambda: (Lit(), []),
    "clipping that changes nothing": lambda: (type("Wide", (Clipped,), {"limit": 10.0})(), []),
    "rows that are short enough": lambda: (type("Short", (Words,), {"max_norm": 100.0})(), []),
    "averaging": lambda: (Lit(), [WeightAveraging()]),
    "a moving average": lambda: (Lit(), [EMAWeightAveraging(decay=0.5)]),
    "stochastic averaging": lambda: (Lit(), [StochasticWeightAveraging(1e-2, swa_epoch_start=1)]),
}


@pytest.mark.filterwarnings("ignore:.*swa")
@pytest.mark.parametrize("name", QUIET)
def test_what_leaves_the_base_as_it_is_says_nothing(name: str, tmp_path: Path) -> None:
    module, callbacks = QUIET[name]()
    run(module, LoRACallback(rank=2), *callbacks, folder=tmp_path, max_epochs=3)
    assert list(tmp_path.rglob("*.ckpt"))


class WithAverage(Lit):
    """An average of its weights, made with the module or where training starts."""

    is_early = True

    def build(self, seed: int) -> None:
        self.net = net(seed)
        self.kept: list[AveragedModel] = []
        if self.is_early:
            self.average = AveragedModel(self.net).requires_grad_(False)

    def on_fit_start(self) -> None:
        if not self.is_early:
            self.kept.append(AveragedModel(self.net))

    def on_train_batch_end(self, *args: Any) -> None:
        average = self.average if self.is_early else self.kept[0]
        average.update_parameters(self.net)


class WithLateAverage(WithAverage):
    is_early = False


def test_an_average_that_was_made_before_the_adapters_is_refused_and_one_made_after_them_has_them() -> None:
    with pytest.raises(TrainingError, match=r"average of WithAverage averages weights .AveragedModel."):
        run(WithAverage(), LoRACallback(rank=2))
    module: Any = run(WithLateAverage(), LoRACallback(rank=2))
    averaged, trained = adapter_state_dict(module.kept[0]), adapter_state_dict(module.net)
    assert averaged.keys() == trained.keys()
    assert any(t.any() and not torch.equal(t, trained[name]) for name, t in averaged.items() if name.endswith("lora_B"))
