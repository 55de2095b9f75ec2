"""AdapterMonitor says what a dense SVD says, names what does not train, and changes nothing."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cases import CASES, IDS, Case
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_lora import (
    AdapterMonitor,
    LoRACallback,
    LoRAConfig,
    MultiLoRACallback,
    adapter_state_dict,
    inject,
    pairs,
)
from lightning_lora.engine import effective_rank, stable_rank
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.training.monitor import _spectra

from . import sharded_run
from .ddp_run import Shared
from .lit import Lit, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python's, of forking with threads
LAYERS = ["net.0", "net.3", "net.5"]


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Gradients(pl.Callback):
    """Keeps the gradients of the last step, as an optimizer sees them."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.squares = {
            f"{name}/{pair.name}": float(p.grad.double().square().sum())
            for pair in pairs(pl_module)
            for name, p in (("A", pair.A), ("B", pair.B))
        }


def run(folder: Path, module: Any, *callbacks: pl.Callback, ckpt_path: Path | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    settings = {"max_epochs": 2, "limit_val_batches": 0, **settings}
    logger = CSVLogger(folder, name="", version="")
    one = trainer(LoRACallback(rank=3, target_modules=LAYERS), *callbacks, logger=logger, **settings)
    one.fit(module, ckpt_path=ckpt_path)
    return one


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows that the monitor wrote, without what others log."""
    return [row for row in rows_of(folder) if "lora/effective_rank" in row]


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_last_look_says_what_a_dense_svd_and_the_gradients_say(tmp_path):
    module, kept = Lit(), Gradients()
    run(tmp_path, module, kept, AdapterMonitor(every_n_steps=5))
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [4, 9]  # ten steps, counted from 0 as Lightning counts its own rows
    last, total = rows[-1], sum(kept.squares.values())
    # float32 factors, whose singular values are exact to a few units in the last place of the largest one.
    close = {"rel": 1e-4}
    sizes = {}
    for pair in pairs(module.requires_grad_(False)):
        dense = torch.linalg.svdvals(pair.module.delta_weight().double())[:3]
        energy = dense.square() / dense.square().sum()
        sizes[pair.name] = float(dense.norm()), float(pair.module.dense_weight().double().norm())
        expected = {
            "effective_rank": effective_rank(dense),
            "stable_rank": stable_rank(dense),
            "energy_top_quarter": float(energy[0]),
            "energy_last_quarter": float(energy[-1]),
            "relative_norm": sizes[pair.name][0] / sizes[pair.name][1],
            "gradient_share_A": kept.squares[f"A/{pair.name}"] / total,
            "gradient_share_B": kept.squares[f"B/{pair.name}"] / total,
            "is_zero": 0.0,
        }
        assert {name: last[f"lora/{name}/{pair.name}"] for name in expected} == pytest.approx(expected, **close)
    changes, weights = (sum(size[i] ** 2 for size in sizes.values()) ** 0.5 for i in (0, 1))
    assert last["lora/relative_norm"] == pytest.approx(changes / weights, **close)
    ranks = [last[f"lora/effective_rank/{name}"] for name in LAYERS]
    assert last["lora/effective_rank"] == pytest.approx(sum(ranks) / 3, **close)
    assert last["lora/gradient_share_A"] + last["lora/gradient_share_B"] == pytest.approx(1)
    assert last["lora/is_zero"] == 0


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Lit, {}),
        (Lit, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (Lit, {"precision": "bf16-true"}),
        (Lit, {"plugins": scaler}),
        (Manual, {}),
    ],
    ids=["plain", "accumulated", "bf16-true", "scaler", "manual"],
)
def test_a_run_with_a_monitor_is_the_run_without_one(kind, settings, tmp_path):
    ends = {}
    for name, callbacks in {"with": [AdapterMonitor(every_n_steps=1)], "without": []}.items():
        module = kind()
        made = {key: value() if callable(value) else value for key, value in settings.items()}
        one = run(tmp_path / name, module, *callbacks, **made)
        ends[name] = adapter_state_dict(module), torch.get_rng_state(), one.global_step
        if callbacks:
            rows = logged(tmp_path / name)
            assert len(rows) == one.global_step
            assert rows[-1]["lora/gradient_share_A"] + rows[-1]["lora/gradient_share_B"] == pytest.approx(1)
            assert float(one.callback_metrics["effective_rank"]) == pytest.approx(rows[-1]["lora/effective_rank"])
    assert all(torch.equal(t, ends["without"][0][name]) for name, t in ends["with"][0].items())
    assert torch.equal(ends["with"][1], ends["without"][1])
    assert ends["with"][2] == ends["without"][2]


class Odd(Lit):
    """Its last layer is not called, and the second one has a learning rate of zero."""

    rate = 1e-2

    def forward(self, x: Any) -> Any:
        return self.net[:-1](x)[:, :3]

    def configure_optimizers(self) -> Any:
        groups = {True: [], False: []}
        for name, p in self.named_parameters():
            groups["net.3" in name].append(p)
        return torch.optim.AdamW([{"params": groups[False]}, {"params": groups[True], "lr": 0.0}], lr=self.rate)


def said(folder: Path, module: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(folder, module, AdapterMonitor(every_n_steps=2))
    return [str(w.message) for w in caught if "AdapterMonitor" in str(w.message)]


def test_each_adapter_of_several_is_looked_at_as_in_its_own_run(tmp_path):
    configs = {"r2": {"rank": 2, "lr": 1e-2, "seed": 1}, "r4": {"rank": 4, "lr": 1e-1, "seed": 2}}
    found = {}
    for name, given in {**{name: {name: one} for name, one in configs.items()}, "both": configs}.items():
        torch.manual_seed(0)
        logger = CSVLogger(tmp_path / name, name="", version="")
        several = MultiLoRACallback(given, wave=1, save_adapter=False)
        trainer(several, AdapterMonitor(every_n_steps=2), max_epochs=1, logger=logger).fit(Lit())
        found[name] = [row for row in rows_of(tmp_path / name) if any("effective_rank" in key for key in row)]
    assert len(found["both"]) == 2
    for both, *own in zip(found["both"], found["r2"], found["r4"], strict=True):
        looks = {key: value for row in (both, *own) for key, value in row.items() if key.startswith("lora/")}
        assert {key: both[key] for key in looks} == pytest.approx(looks)
        assert both["lora/gradient_share_A/r4"] + both["lora/gradient_share_B/r4"] == pytest.approx(1)
        assert both["lora/relative_norm/r2"] != pytest.approx(both["lora/relative_norm/r4"])


class Alternating(Lit):
    """Two optimizers, each with its own layers; after the step of each, its gradients are gone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        self.squares = {p.name: [float(f.grad.double().square().sum()) for f in (p.A, p.B)] for p in pairs(self)}
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[:3].parameters(), 0.1), torch.optim.SGD(self.net[3:].parameters(), 0.1)]


def test_each_of_several_optimizers_has_its_gradients_in_the_shares(tmp_path):
    module = Alternating()
    run(tmp_path, module, AdapterMonitor(every_n_steps=4))
    last, total = logged(tmp_path)[-1], sum(map(sum, module.squares.values()))
    for name, squares in module.squares.items():
        shares = [last[f"lora/gradient_share_{side}/{name}"] for side in ("A", "B")]
        assert shares == pytest.approx([square / total for square in squares], rel=1e-5)


def test_what_does_not_train_is_named_once(tmp_path):
    (message,) = said(tmp_path, Odd())
    assert "at step 2" in message
    assert "1 adapters have had no gradient since training began, so they do not train: net.5." in message
    assert "1 updates are still zero although gradients arrive: net.3." in message
    assert logged(tmp_path)[-1]["lora/is_zero"] == 2


def test_a_rate_that_has_not_begun_to_rise_is_no_warning(tmp_path):
    class Still(Odd):
        rate = 0.0

    assert said(tmp_path, Still()) == []
    assert logged(tmp_path)[-1]["lora/is_zero"] == 3


def test_a_run_that_diverged_is_shown_and_goes_on(tmp_path):
    class Diverges(Lit):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("nan") if batch_idx == 2 else 1.0)

    run(tmp_path, Diverges(), AdapterMonitor(every_n_steps=1), max_epochs=1)
    with (tmp_path / "metrics.csv").open() as file:
        assert [row["lora/effective_rank"] == "nan" for row in csv.DictReader(file)] == [False, False, True, True, True]


def test_single_layers_can_be_left_out_of_the_log(tmp_path):
    run(tmp_path, Lit(), AdapterMonitor(every_n_steps=5, by_layer=False))
    assert not [name for name in logged(tmp_path)[0] if name.count("/") > 1]


def test_what_is_wrong_is_an_error_before_training(tmp_path):
    with pytest.raises(ConfigError, match="every_n_steps is a whole number from 1 on, not 0"):
        AdapterMonitor(every_n_steps=0)
    with pytest.raises(AdapterStateError, match="Lit has no adapters"):
        trainer(AdapterMonitor(), max_steps=1).fit(Lit(), loader(8))


def test_pissa_is_zero_at_its_start_and_no_longer_after_a_step():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    inject(model, LoRAConfig(rank=2, init="pissa", target_modules=["0", "1"]))
    own = list(pairs(model))
    assert _spectra(own)["norm"].tolist() == [0, 0]  # not a rounding error: B - B0 and A - A0 are zero
    with torch.no_grad():
        own[0].A.add_(1e-4)
    norm, other = _spectra(own)["norm"].tolist()
    assert norm == pytest.approx(float(own[0].module.delta_weight().detach().norm()), rel=1e-3)
    assert other == 0


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_numbers_are_right_for_every_kind_of_layer(case: Case):
    own = list(pairs(case.adapted()))
    found = _spectra(own)
    for place, pair in enumerate(own):
        S = pair.singular_values()
        assert float(found["effective_rank"][place]) == pytest.approx(effective_rank(S), rel=1e-4)
        assert float(found["norm"][place]) == pytest.approx(float(S.norm()), rel=1e-5)


def test_two_processes_log_once_what_one_process_logs(tmp_path):
    for name, settings in {"one": {}, "two": {"strategy": "ddp_fork", "devices": 2}}.items():
        pl.seed_everything(3, verbose=False)
        run(tmp_path / name, Shared(), AdapterMonitor(every_n_steps=5), use_distributed_sampler=False, **settings)
    # Sums over two processes are added in another order: a few units in the last place of float32 over ten steps.
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-6)


def test_a_sharded_model_is_gathered_to_be_looked_at():
    sharded_run.together(_looks_at_shards)


def _looks_at_shards(rank: int) -> None:
    looks = [_look(sharded_run.adapted()), _look(sharded_run.shard(sharded_run.adapted()))]
    # Gradients are summed over two processes, in another order.
    assert looks[1] == pytest.approx(looks[0], rel=1e-4)


def _look(model: nn.Module) -> dict[str, float]:
    """What the monitor logs of `model` after one batch, without a Trainer."""
    taken: dict[str, float] = {}
    logger = SimpleNamespace(log_metrics=lambda metrics, step: taken.update(metrics))
    loops = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=0))
    one: Any = SimpleNamespace(global_step=0, loggers=[logger], fit_loop=loops, strategy=None, optimizers=[None])
    module: Any = model
    module.log = lambda *args, **kwargs: None
    monitor = AdapterMonitor(every_n_steps=1)
    monitor.on_train_start(one, module)
    model(sharded_run.batch(0)).square().mean().backward()
    monitor.on_before_optimizer_step(one, module, torch.optim.SGD(model.parameters(), lr=0.1))
    monitor.on_train_batch_end(one, module, None, None, 0)
    return taken


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")  # the saver is left out
def test_a_run_that_goes_on_logs_what_it_would_have_logged(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=5, save_top_k=-1)
    run(tmp_path / "whole", Lit(), AdapterMonitor(every_n_steps=2), saver)
    run(tmp_path / "rest", Lit(), AdapterMonitor(every_n_steps=2), ckpt_path=tmp_path / "saved/step=5.ckpt")
    assert logged(tmp_path / "rest") == [row for row in logged(tmp_path / "whole") if row["step"] > 4]
