"""What is packed, what is not and why; and the parts: batches, random numbers, waves."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict, UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import MultiLoRACallback, adapter_state_dict, load_adapter
from lightning_lora.errors import TrainingError
from lightning_lora.training.many import waves
from lightning_lora.training.many.batches import repeated, rows_of
from lightning_lora.training.many.draws import common_draws
from lightning_lora.training.many.waves import Waves
from tests.training.lit import trainer

from .modules import LR, Kind, Lit, cross_entropy, drawn, mlp, rows

ADAPTERS: dict[str, Any] = {
    "a": {"rank": 4, "seed": 1, "target_modules": ["0", "3"]},
    "b": {"rank": 2, "alpha": 8, "seed": 2, "lr": 2 * LR, "target_modules": ["0", "3"]},
    "c": {"rank": 4, "seed": 3, "target_modules": ["0"]},
}


def trained(kind: Kind, tmp_path: Path, wave: int | None, **settings: Any) -> tuple[MultiLoRACallback, list[Tensor]]:
    """A run, and the tensors of all adapters after it."""
    seed_everything(0, verbose=False)
    callback = MultiLoRACallback(ADAPTERS, wave=wave)
    trainer(callback, default_root_dir=tmp_path, max_epochs=1, **settings).fit(Lit(kind))
    found = []
    for folder in callback.adapter_folders.values():
        fresh = Lit(kind)
        load_adapter(fresh, folder)
        found += list(adapter_state_dict(fresh).values())
    return callback, found


def off(mine: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, in units of the rate: AdamW moves by about one rate a step."""
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs)) / LR


# Losses and nets in which rows meet, or are not for themselves: one forward each, with a reason.


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x)
        return (y - y.mean(0)) / (y.std(0) + 1e-3)


def variance(net: nn.Module, batch: Any) -> Tensor:
    y = net(batch[0])
    return F.cross_entropy(y, batch[1]) + 0.05 * F.relu(1 - y.var(0).sqrt()).mean()


def mean_and_sum(net: nn.Module, batch: Any) -> Tensor:
    y = net(batch[0])
    return F.cross_entropy(y, batch[1]) + 0.01 * y.square().sum()


def numpy_mixup(net: nn.Module, batch: Any) -> Tensor:
    order = torch.from_numpy(np.random.RandomState(3).permutation(len(batch[0])))
    return cross_entropy(net, (0.7 * batch[0] + 0.3 * batch[0][order], batch[1]))


def hardest(net: nn.Module, batch: Any) -> Tensor:
    """Batch-hard triplets."""
    y = net(batch[0])
    apart = (y[:, None] - y[None]).square().sum(-1)
    same = batch[1][:, None] == batch[1][None]
    return F.relu((apart * same).amax(1) - apart.masked_fill(same, 1e9).amin(1) + 1).mean()


class Opaque:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


class Positions(nn.Module):
    """One of its layers is called without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Sequential(nn.Linear(2, 16))
        self.rest = mlp()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rest(x + self.table(torch.ones(5, 2)).mean(0))
        return y


class Penalized(nn.Module):
    """Asks for a gradient inside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = mlp()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y: Tensor = self.inside(x.clone().requires_grad_())
            (slope,) = torch.autograd.grad(y.square().sum(), self.inside[0].lora_A, create_graph=True)
        return y + slope.square().sum()


UNPACKED: dict[str, tuple[Kind, str]] = {
    "normalised by the batch": (Kind(Normed, cross_entropy, drawn(2, rows)), "differ|meet"),
    "variance over the batch": (Kind(mlp, variance, drawn(2, rows)), "differ|meet"),
    "a mean and a sum": (Kind(mlp, mean_and_sum, drawn(2, rows)), "differ"),
    "mixed rows by numpy": (Kind(mlp, numpy_mixup, drawn(2, rows)), "differ"),
    "hardest of the batch": (Kind(mlp, hardest, drawn(2, rows)), "differ|meet"),
    "a gradient of a gradient": (Kind(Penalized, cross_entropy, drawn(2, rows)), "raises"),
    "an unknown object": (
        Kind(mlp, lambda net, b: cross_entropy(net, (b.x, b.y)), lambda: [Opaque(*b) for b in drawn(2, rows)()]),
        "no tensors with rows",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNPACKED)
def test_what_does_not_pack_trains_in_one_forward_each_and_says_why(case: str, tmp_path: Path) -> None:
    kind, reason = UNPACKED[case]
    callback, found = trained(kind, tmp_path, wave=None)
    assert callback.wave == 1
    assert callback.reason is not None
    assert re.search(reason, callback.reason)
    _, asked = trained(kind, tmp_path / "asked", wave=1)
    assert all(torch.equal(a, b) for a, b in zip(found, asked))
    with pytest.raises(TrainingError, match="wave=2 is not possible"):
        trained(kind, tmp_path / "refused", wave=2)


def test_a_layer_that_is_called_without_rows_is_named(tmp_path: Path) -> None:
    kind = Kind(Positions, cross_entropy, drawn(2, rows))
    seed_everything(0, verbose=False)
    callback = MultiLoRACallback({"a": {"rank": 2, "seed": 1}, "b": {"rank": 2, "seed": 2}})
    trainer(callback, default_root_dir=tmp_path, max_epochs=1).fit(Lit(kind))
    assert callback.reason is not None
    assert "'net.table.0' got an input of shape (5, 2)" in callback.reason


# What packs.


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.inside, self.reentrant = nn.Linear(16, 16), mlp(), reentrant
        self.first.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inside, self.first(x).requires_grad_(), use_reentrant=self.reentrant)
        return y


def mixup(net: nn.Module, batch: Any) -> Tensor:
    order = torch.randperm(len(batch[0]))
    return cross_entropy(net, (0.7 * batch[0] + 0.3 * batch[0][order], batch[1]))


def by_size(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1], reduction="sum") / batch[2]


def with_table(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]) + batch[2].sum(), batch[1]) + batch[2].sum() * net(batch[0]).mean()


def with_noise_for_all(net: nn.Module, batch: Any) -> Tensor:
    """Draws 24 numbers, which are for no rows: there are eight."""
    return cross_entropy(net, (batch[0] + 0.1 * torch.randn(24).mean(), batch[1]))


PACKED = {
    "checkpointed": Kind(lambda: Checkpointed(False), cross_entropy, drawn(4, rows)),
    "checkpointed, reentrant": Kind(lambda: Checkpointed(True), cross_entropy, drawn(4, rows)),
    "mixed rows": Kind(mlp, mixup, drawn(4, rows)),
    "a sum by a number of the batch": Kind(mlp, by_size, lambda: [(*b, 8) for b in drawn(4, rows)()]),
    "batches of other sizes": Kind(
        mlp, cross_entropy, lambda: [(x[:n], y[:n]) for n, (x, y) in zip((8, 5, 1, 7), drawn(4, rows)())]
    ),
    "a table of as many rows as a batch": Kind(
        mlp,
        with_table,
        lambda: [(x[:n], y[:n], torch.ones(3) / 9) for n, (x, y) in zip((8, 8, 3, 8), drawn(4, rows)())],
    ),
}  # fmt: skip


@pytest.mark.parametrize("wave", [2, 3])
@pytest.mark.parametrize("case", PACKED)
def test_a_packed_step_is_that_of_each_alone(case: str, wave: int, tmp_path: Path) -> None:
    callback, found = trained(PACKED[case], tmp_path, wave=wave)
    assert (callback.wave, callback.reason) == (wave, None)
    _, alone = trained(PACKED[case], tmp_path / "alone", wave=1)
    # 2^-23 relative to each sum of a gradient; AdamW may enlarge it where a gradient is small beside its sums.
    assert off(found, alone) < 2e-3


def test_random_numbers_of_which_it_is_not_known_whether_they_are_for_the_rows_are_refused(tmp_path: Path) -> None:
    kind = Kind(lambda: mlp().apply(without_dropout), with_noise_for_all, drawn(3, rows))
    _, found = trained(kind, tmp_path, wave=2)
    _, alone = trained(kind, tmp_path / "alone", wave=1)
    assert off(found, alone) < 2e-3
    with pytest.raises(TrainingError, match="not known whether they are drawn for the rows"):
        trained(kind, tmp_path / "refused", wave=3)


def without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def test_adapters_with_data_of_their_own_train_on_it(tmp_path: Path) -> None:
    # No dropout: three loaders draw more seeds than one.
    kind = Kind(lambda: mlp().requires_grad_().apply(without_dropout), cross_entropy, drawn(3, rows))

    class Several(Lit):
        def train_dataloader(self) -> Any:
            data = drawn(9, rows)()
            each = {n: DataLoader(data[3 * i : 3 * i + 3], batch_size=None) for i, n in enumerate("abc")}
            return CombinedLoader(each, "min_size")

    class One(Lit):
        def train_dataloader(self) -> Any:
            return DataLoader(drawn(9, rows)()[3:6], batch_size=None)

    def run(module: Lit, folder: str, adapters: Any) -> dict[str, Tensor]:
        seed_everything(0, verbose=False)
        callback = MultiLoRACallback(adapters)
        trainer(callback, default_root_dir=tmp_path / folder, max_epochs=1).fit(module)
        fresh = Lit(kind)
        load_adapter(fresh, callback.adapter_folders["b"])
        if len(adapters) > 1:
            assert "data of its own" in (callback.reason or "")
        return adapter_state_dict(fresh)

    several, one = run(Several(kind), "several", ADAPTERS), run(One(kind), "one", {"b": ADAPTERS["b"]})
    assert all(torch.equal(several[key], one[key]) for key in one)


# Batches.

X, Y = torch.arange(24.0).view(6, 4), torch.arange(6)


@dataclasses.dataclass(frozen=True)
class Data:
    x: Tensor
    name: str = "n"


class Named(NamedTuple):
    x: Tensor
    epoch: int


BATCHES: dict[str, tuple[Any, Callable[[Any], Any], Any]] = {
    "tensor": (X, lambda b: b, 6),
    "tuple": ((X, Y), lambda b: b[0], 6),
    "dict": ({"x": X, "s": "text", "n": 3, "t": torch.tensor(2.0), "none": None}, lambda b: b["x"], 6),
    "ordered": (OrderedDict(x=X), lambda b: b["x"], 6),
    "mapping": (UserDict(x=X), lambda b: b["x"], 6),
    "dataclass": (Data(X), lambda b: b.x, 6),
    "named tuple": (Named(X, 7), lambda b: b.x, 6),
    "nested": ([[X, X], {"a": (Y,)}], lambda b: b[0][1], 6),
    "numpy": ({"x": X, "w": X.numpy()}, lambda b: torch.from_numpy(b["w"]), 6),
    "a table of another size": ({"x": X, "y": Y, "w": torch.ones(4)}, lambda b: b["x"], 6),
    "boxes of each row": ({"x": X, "boxes": [torch.ones(3, 4)] * 6}, lambda b: b["x"], 6),
}


@pytest.mark.parametrize("case", BATCHES)
def test_a_batch_is_repeated_along_its_rows_and_the_rest_is_left(case: str) -> None:
    batch, of, count = BATCHES[case]
    assert rows_of(batch) == count
    new = repeated(batch, 3, count)
    assert type(new) is type(batch)
    assert torch.equal(of(new), of(batch).repeat(3, 1))
    if case == "dict":
        assert {k: new[k] for k in ("s", "n", "none")} == {"s": "text", "n": 3, "none": None}
        assert new["t"] == 2
    if case == "a table of another size":
        assert len(new["w"]) == 4
    if case == "boxes of each row":
        assert len(new["boxes"]) == 18


def test_a_batch_without_tensors_has_no_rows() -> None:
    assert rows_of({"text": ["a", "b"], "n": torch.tensor(3)}) is None


# Random numbers.

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "module": lambda x: nn.Dropout(0.3)(x),
    "dropout2d": lambda x: F.dropout2d(x[:, :, None, None].expand(-1, -1, 2, 2), 0.5),
    "in place": lambda x: F.dropout(x.clone(), 0.5, True, True),
    "rand": lambda x: torch.rand(len(x), 2),
    "randn of a size": lambda x: torch.randn((len(x), 2)),
    "randn_like": lambda x: torch.randn_like(x),
    "randint": lambda x: torch.randint(0, 9, (len(x),)),
    "randint of a keyword": lambda x: torch.randint(9, size=(len(x), 2)),
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(len(x), 1, 2, 2)] * 3, dropout_p=0.5),
}  # fmt: skip


@pytest.mark.parametrize("draw", DRAWS)
def test_what_is_drawn_for_copies_is_what_each_would_draw_alone(draw: str) -> None:
    x = torch.arange(1.0, 13).view(3, 4)
    torch.manual_seed(0)
    alone = DRAWS[draw](x)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    with common_draws(4, 3, []):
        together = DRAWS[draw](x.repeat(4, 1))
    assert torch.equal(together, alone.repeat(4, *[1] * (alone.dim() - 1)))
    assert torch.equal(torch.get_rng_state(), after)
    assert F.dropout.__name__ == "dropout"  # torch's own again


def test_a_permutation_stays_inside_of_each_copy_and_other_sizes_are_drawn_as_ever() -> None:
    torch.manual_seed(0)
    alone = torch.randperm(3)
    torch.manual_seed(0)
    with common_draws(2, 3, []):
        assert torch.equal(torch.randperm(6), torch.cat([alone, alone + 3]))
        assert len(torch.rand(5)) == 5
        assert F.dropout(torch.ones(7, 2), 0.5, False).eq(1).all()


# Waves.


@pytest.mark.parametrize(("taken", "chosen"), [({1: 3.0, 4: 2.0, 8: 1.0}, 8), ({1: 1.0, 4: 1.1, 8: 2.0}, 1)])
def test_the_fastest_size_is_chosen_after_each_was_tried(
    taken: dict[int, float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(waves.time, "perf_counter", lambda: now[0])
    sizes, tried = Waves(8, 100), []
    while sizes.chosen is None:
        with sizes.step(torch.device("cpu"), 10) as size:
            now[0] += taken[size]
            tried.append(size)
    assert sizes.chosen == chosen
    assert sorted(tried) == sorted([1, 4, 8] * waves.TIMES)
    assert f"{taken[4] / taken[1]:.2f} in waves of 4" in str(sizes)


def test_sizes_that_exceed_the_memory_are_not_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Waves(8, 5)._plan.count(8) == 0
    assert Waves(8, 1).chosen == 1
    monkeypatch.setattr(waves, "free_bytes", lambda device: 2)
    with pytest.raises(TrainingError, match=r"wave=3 needs about .* and 1 adapters fit"):
        trained(PACKED["mixed rows"], tmp_path, wave=3)
    callback, _ = trained(PACKED["mixed rows"], tmp_path, wave=None)
    assert callback.wave == 1


def test_several_adapters_train_at_whichever_size_is_the_fastest(tmp_path: Path) -> None:
    kind = Kind(mlp, cross_entropy, drawn(12, rows))
    callback, found = trained(kind, tmp_path, wave=None)
    assert callback.wave in (1, 3)
    assert callback.reason is None
    _, alone = trained(kind, tmp_path / "alone", wave=1)
    assert off(found, alone) < 2e-3
