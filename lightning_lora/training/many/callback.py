"""Several adapters in one run: `Trainer(callbacks=[MultiLoRACallback({"r4": {"rank": 4}, "r16": {"rank": 16}})])`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_lora.checked import flag, one_of, whole
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers import pairs
from lightning_lora.engine.several import Several
from lightning_lora.errors import AdapterStateError, ConfigError, LightningLoRAError, TrainingError
from lightning_lora.hub.address import local_path
from lightning_lora.training.callback import LoRACallback
from lightning_lora.training.loggers import adapter_settings, data_settings, log_settings
from lightning_lora.training.many.pack import Pack, members
from lightning_lora.training.many.page import page_of
from lightning_lora.training.many.rounds import evaluate_each, stop_each
from lightning_lora.training.many.steps import Steps
from lightning_lora.training.many.strategy import attach_pack, check_strategy
from lightning_lora.training.watches import averaging


class MultiLoRACallback(LoRACallback):
    """Train several adapters in one run, on one frozen base: each as a run of its own with LoRACallback would.

    The LightningModule does not change. In each step, its training_step runs for each adapter on the same batch, with
    the same random numbers. Each adapter has its own learning rate, gradient clipping, validation metrics
    (`val_loss/r4`), training loss (`train_loss/r4`), and folder in PEFT's format; an EarlyStopping of the Trainer
    judges each adapter by its own metrics, and stops that one alone. Under a metric's own name (`val_loss`) lies the
    mean over the adapters, by which a ModelCheckpoint chooses. One checkpoint holds all; a resumed run goes on exactly.

    The schedule is the user's, for all adapters: an adapter's rate is at each step the group's, times its `lr` divided
    by the rate that the schedule begins with. on_after_backward and on_before_optimizer_step are called for each
    adapter in turn, the latter with an optimizer that holds that one alone. Elsewhere the module has the first one, and
    a hook that changes weights there ends the run with an error. What the module keeps in attributes is kept for each
    adapter, where it differs. All draw their dropout from the same random numbers, those of the first: an adapter with
    another `dropout` than the first has other masks than alone. Whether adapters may share a forward is found out on
    the first batch and looked at again from time to time: a loss in which rows meet later ends the run with an error.
    With a step that decides by its loss (`if loss < 1: ...`), set `wave=1`: a shared forward has the mean of several.

    Example:
        >>> from lightning_lora import LoRAConfig, MultiLoRACallback
        >>> several = MultiLoRACallback({"r4": {"rank": 4, "lr": 1e-3, "seed": 1}, "r16": LoRAConfig(rank=16)})
        >>> several.names
        ('r4', 'r16')
    """

    def __init__(
        self,
        adapters: Mapping[str, LoRAConfig | Mapping[str, Any]],
        *,
        wave: int | None = None,
        log_every_n_steps: int = 50,
        save_adapter: bool = True,
        check_base: bool = True,
    ) -> None:
        """
        Args:
            adapters: Name -> a LoRAConfig, or a dict of its fields with `lr` (the adapter's learning rate; without it,
                the optimizer's) and `seed` (from which A is drawn; without it, from the run's own random numbers).
            wave: The number of adapters in one forward; None: chosen in the first steps; 1: one forward for each.
            log_every_n_steps: Log each adapter's own training loss every so many steps.
            save_adapter: Write an adapter folder for each, in PEFT's format: `best-adapters/r4` beside `best.ckpt`, and
                `adapters/r4` when the run ends.
            check_base: Refuse a checkpoint that was trained on another base.

        Raises:
            ConfigError: A name or a field is invalid.
            TargetError: While the Trainer sets up: a config does not fit the model.
            TrainingError: While the Trainer sets up: the run cannot train several adapters.
        """
        self._members = members(adapters)
        if wave is not None:
            whole("wave", wave)
        self._wave, self._every = wave, whole("log_every_n_steps", log_every_n_steps)
        first = next(iter(self._members.values())).config
        super().__init__(
            first, save_adapter=flag("save_adapter", save_adapter), check_base=flag("check_base", check_base)
        )
        self._pack: Pack | None = None
        self._steps: Steps | None = None
        self._loaded: dict[str, Any] = {}
        self._final: dict[str, Path] = {}

    def __repr__(self) -> str:
        return f"MultiLoRACallback({list(self._members)})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters, in the order in which they were given."""
        return tuple(self._members)

    @property
    def metrics(self) -> dict[str, dict[str, float]]:
        """Adapter -> metric -> its latest value in validation."""
        return {} if self._pack is None else {name: dict(own) for name, own in self._pack.metrics.items()}

    @property
    def reason(self) -> str | None:
        """Why the adapters train in one forward each, as a sentence, where that was not asked for; None where it was,
        or where they share forwards."""
        return None if self._steps is None else self._steps.reason

    @property
    def wave(self) -> int | None:
        """The number of adapters in one forward; None until it is chosen."""
        return None if self._steps is None or self._steps.waves is None else self._steps.waves.chosen

    @property
    def stopped(self) -> tuple[str, ...]:
        """The adapters that were stopped early."""
        return () if self._pack is None else tuple(n for n in self._members if n not in self._pack.active)

    @property
    def adapter_folders(self) -> dict[str, Path]:
        """Adapter -> its folder: beside the best checkpoint, where one is known to be the best; else as the run ended,
        or as it was written last."""
        best = self.adapter_folder
        return dict(self._final) if best is None else {n: best / n for n in self._members if (best / n).is_dir()}

    def write_page(self, path: str | os.PathLike[str], *, monitor: str | None = None, mode: str = "min") -> Path:
        """Write what the validations found as one HTML file that needs no network: a table of the adapters, a metric
        against each setting in which they differ and against their parameters, and its curves.

        Args:
            path: The file; one that is there is replaced.
            monitor: The metric, as the module logs it; by default the first that is a loss.
            mode: "min" or "max": which values of the metric are the best.

        Returns:
            The path of the file.

        Raises:
            ConfigError: No validation has ended, it gave no such metric, or the mode is another one.
            CheckpointError: The file cannot be written; one that was there is as it was.

        Example:
            >>> from lightning_lora import MultiLoRACallback
            >>> several = MultiLoRACallback({"r4": {"rank": 4}, "r16": {"rank": 16}})
            >>> several.write_page("adapters.html")
            Traceback (most recent call last):
                ...
            lightning_lora.errors.ConfigError: There is nothing to show yet: no validation of this run has ended.
        """
        one_of("mode", mode, ("min", "max"))
        return page_of(self._pack, monitor, mode).write(local_path(path))

    def stop(self, name: str) -> None:
        """Stop training the adapter `name`: it stays as it is. The run ends when all have stopped.

        Raises:
            ConfigError: The run has no such adapter.
        """
        if self._pack is None:
            raise ConfigError(f"{name!r} does not train yet: call stop while the run goes on.")
        if self._pack.check(name) in self._pack.active:
            self._pack.active.remove(name)
        if not self._pack.active:
            self._steps_of_run().trainer.should_stop = True

    def _steps_of_run(self) -> Steps:
        assert self._steps is not None
        return self._steps

    # Adapting the model.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy)
        for callback in averaging(trainer):
            what = type(callback).__name__
            raise TrainingError(f"{what} averages the weights of one adapter: MultiLoRACallback cannot run with it.")
        if trainer.state.fn == TrainerFn.PREDICTING:
            raise TrainingError(
                "predict has one output for each batch, and MultiLoRACallback has several adapters: load one with "
                "load_adapter(model, callback.adapter_folders[name]), and predict without this callback."
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise TrainingError(
                "training_step asks for the loader's iterator (dataloader_iter), of which each adapter would take "
                "other batches: let it take a batch, or train each adapter in a run of its own with LoRACallback."
            )
        super().setup(trainer, pl_module, stage)

    def _inject(self, pl_module: LightningModule, trainer: Trainer) -> None:
        several = Several(pl_module)
        self._pack = Pack(self._members, several, list(self._members))
        random = torch.get_rng_state()
        try:
            for name, member in self._members.items():
                if member.seed is None:
                    torch.set_rng_state(random)
                with self._pack.seeded(name):
                    several.add(name, member.config, start=not INITS[member.config.init].computes)
        except LightningLoRAError as error:
            several.use(None)
            raise type(error)(f"Adapter {name!r}: {error}") from error
        several.use(next(iter(self._members)))
        self.report = several.reports[several.names[0]]
        for name, report in several.reports.items():
            rank_zero_info(f"{name}: {report}")

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pack is None or self._pack.several.model is not pl_module:
            raise AdapterStateError(
                f"{type(pl_module).__name__} has adapters already, and MultiLoRACallback trains its own: call "
                "lightning_lora.remove on it first."
            )
        for name in self._members:
            with self._pack.several.using(name):
                is_fresh = all(pair.is_fresh for pair in pairs(pl_module))
            if not is_fresh:
                self._goes_on = f"{type(pl_module).__name__} has trained adapters already: training goes on from them."

    def _is_adapted(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._is_adapted(trainer, pl_module)
        assert self._pack is not None
        self._steps = Steps(self._pack, trainer, log_every_n_steps=self._every, wave=self._wave)
        attach_pack(trainer.strategy, self._pack, self._steps)
        for loop in (trainer.validate_loop, trainer.test_loop):
            evaluate_each(loop, self._pack)
        if trainer.state.fn == TrainerFn.FITTING:
            self._pack.active[:] = list(self._members)
            self._pack.history.clear()
            self._final = {}
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EarlyStopping):
                    stop_each(callback, self._pack)

    # While training goes on.

    def _log_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        each = {
            f"lora/{name}": adapter_settings(member.config, lr=member.lr, seed=member.seed)
            for name, member in self._members.items()
        }
        run = {"optimizer": self._optimizer_settings or {"lr": None}, "data": data_settings(trainer, pl_module)}
        log_settings(trainer, pl_module, self.settings_of_run, each, run)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._pack is not None
        if self._loaded:
            stopped = self._loaded["stopped"]
            self._pack.active[:] = [name for name in self._members if name not in stopped]
            self._pack.metrics = {name: dict(own) for name, own in self._loaded["metrics"].items()}
            self._pack.history = list(self._loaded["history"])
            self._steps_of_run().known = self._loaded["wave"]
            if self._loaded["kept"]:
                self._pack.kept.load_state_dict(self._loaded["kept"], pl_module.device)
            self._loaded = {}
        with self._pack.several.all_shown():  # an exact resumption needs the gradients of all
            super().on_train_start(trainer, pl_module)
        evaluate_each(trainer.fit_loop.epoch_loop.val_loop, self._pack)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self._policy.save_adapter:
            strategy: Any = trainer.strategy
            folder = Path(trainer.log_dir or trainer.default_root_dir) / "adapters"
            strategy.write_adapters(folder, {"step": str(trainer.global_step), "epoch": str(trainer.current_epoch)})
            self._final = {name: folder / name for name in self._members}

    def state_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"stopped": list(self.stopped), "metrics": self.metrics, "wave": self.wave}
        own |= {"kept": {}, "history": []}
        if self._pack is not None:
            own |= {"kept": self._pack.kept.state_dict(), "history": list(self._pack.history)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._loaded = {key: state_dict[key] for key in ("stopped", "metrics", "wave", "kept", "history")}
