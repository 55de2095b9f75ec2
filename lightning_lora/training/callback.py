"""LoRA in any Lightning Trainer: `Trainer(callbacks=[LoRACallback(rank=8, alpha=16)])`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import Unpack

from lightning_lora.checked import number, whole
from lightning_lora.engine import InjectionReport, LoRAConfig, inject, injections
from lightning_lora.engine.config import Bias
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers import pairs
from lightning_lora.errors import AdapterStateError, TargetError
from lightning_lora.training.checkpoint import accept_adapters
from lightning_lora.training.lightning_private import trainer_being_made
from lightning_lora.training.loggers import Settings, log_adapters, log_run, optimizer_settings, show_both_rates
from lightning_lora.training.loops import watch_loops
from lightning_lora.training.push import HubPush
from lightning_lora.training.pushing import Pushing
from lightning_lora.training.rank_schedule import RankSchedule
from lightning_lora.training.run_state import watch_buffers
from lightning_lora.training.starting import (
    AbsentError,
    AdapterToGoOnFrom,
    FurtherFields,
    adapt_before_launch,
    adapted_as_in,
    adapters_present,
    call_after,
    check_adapted_before_launch,
    given_fields,
)
from lightning_lora.training.strategy import AdapterPolicy, adapter_folder, attach, has_adapters, shards
from lightning_lora.training.watches import BaseWatch, TrainedWatch, adapt_averages, check_averages

if TYPE_CHECKING:
    from lightning_lora.training.push_queue import Job

# Precision plugins that replace layers of a model by their own.
_REPLACES_LAYERS = (BitsandbytesPrecision, TransformerEnginePrecision)


class LoRACallback(Callback):
    """Adapt a LightningModule without a change to its code: train only A and B, save only A and B.

    Give a LoRAConfig as `config`, or its fields by name: `LoRACallback(rank=8, alpha=16)`. The model is adapted once
    its layers are built, whether in `__init__`, `setup` or `configure_model`, for fit, validate, test and predict
    alike. Optimizers then hold only trainable parameters. Checkpoints hold the adapter, optimizer, loops and random
    state, and no weight of the base. A resumed run goes on as if it had not been interrupted.

    Raises ConfigError for a field with an invalid value. While the Trainer sets up, raises TargetError where the config
    does not fit the model, AdapterStateError where the model has other adapters already, and TrainingError under a
    strategy or optimizer with which adapters would not train.
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        subfolder: str | None = None,
        ignore_fields: Collection[str] = (),
        rank: int | None = None,
        alpha: float | None = None,
        dropout: float | None = None,
        target_modules: str | list[str] | None = "all-linear",
        exclude_modules: str | list[str] | None = None,
        modules_to_save: list[str] | None = None,
        bias: Bias | None = None,
        use_rslora: bool | None = None,
        use_dora: bool | None = None,
        init: str | None = None,
        lora_plus_ratio: float | None = None,
        product_decay: float | None = None,
        rank_schedule: Mapping[int, int] | None = None,
        push: HubPush | None = None,
        save_adapter: bool = True,
        check_base: bool = True,
        init_batches: int = 16,
        **config_fields: Unpack[FurtherFields],
    ) -> None:
        """
        Args:
            config: What to adapt, and how.
            adapter: Start from this adapter, with a fresh optimizer: a folder in PEFT's format, or
                "user/repo@revision" on the Hub. A config or fields given besides must agree with its own.
            subfolder, ignore_fields: Of `adapter`, as in `load_adapter`.
            rank, alpha, dropout, target_modules, exclude_modules, modules_to_save, bias, use_rslora, use_dora, init:
                The fields of a LoRAConfig that are set most often, instead of `config`; None leaves a field unset.
            lora_plus_ratio: The learning rate of every B as a multiple of its group's (LoRA+, arXiv:2402.12354).
            product_decay: Weight decay on the update s B A: after each step, A and B take one more down the gradient of
                1/2 ||s B A||^2, by the learning rate times this.
            rank_schedule: Global step -> the rank of all adapters from there on: `{500: 16, 1000: 8}` (see `resize`).
            push: Push to the Hub while training goes on: `HubPush("user/my-adapter")`.
            save_adapter: Write an adapter folder beside each checkpoint: `best-adapter/` beside `best.ckpt`.
            check_base: Refuse a checkpoint that was trained on another base.
            init_batches: Batches on which an `init` from data ("eva", "corda", "lora_ga") is measured in a new run.
            config_fields: The other fields of a LoRAConfig, instead of `config`.
        """
        spelled = {
            "rank": rank, "alpha": alpha, "dropout": dropout, "exclude_modules": exclude_modules, "bias": bias,
            "modules_to_save": modules_to_save, "use_rslora": use_rslora, "use_dora": use_dora, "init": init,
        }  # fmt: skip
        given = given_fields(config, spelled, target_modules, config_fields, from_file=adapter is not None)
        if lora_plus_ratio is not None:
            number("lora_plus_ratio", lora_plus_ratio, above=0)
        if product_decay is not None:
            number("product_decay", product_decay, above=0)
        whole("init_batches", init_batches)
        self._origin = None if adapter is None else AdapterToGoOnFrom(adapter, config, given, subfolder, ignore_fields)
        self.config = config if config is not None or adapter is not None else LoRAConfig(**given)
        """None until the config of `adapter` has been read, where only `adapter` was given."""
        self.report: InjectionReport | None = None
        """The report of what was adapted; None before."""
        self._policy = AdapterPolicy(
            lora_plus_ratio=lora_plus_ratio,
            product_decay=product_decay,
            save_adapter=save_adapter,
            check_base=check_base,
            push=Pushing(push) if push is not None else None,
            init_batches=init_batches,
        )
        self._resume = self._policy.resume
        self._trained: TrainedWatch | None = None
        self._first_step = 0
        self._goes_on: str | None = None
        self._was_launched = self._is_as_loaded = False
        self._absent: Exception | None = None
        self._savers: list[Any] = []
        self._optimizer_settings: dict[str, Any] | None = None
        self.settings_of_run: Settings = {}
        """Further settings for the loggers, beside those of the adapter, the optimizer and the data."""
        self._ranks = RankSchedule(rank_schedule)
        if self._origin is not None or rank_schedule is not None:
            self._policy.adapt_as_in = self._adapt_as_in

    def __repr__(self) -> str:
        adapted = "" if self.report is None else f", {self.report!r}"
        origin = self._origin if self.config is None else None
        return f"LoRACallback({self.config if origin is None else f'adapter={origin.adapter!r}'}{adapted})"

    @property
    def adapter_folder(self) -> Path | None:
        """The adapter folder beside the best checkpoint of the run; where no checkpoint is known to be the best, the
        folder that was written last; None where there is no folder."""
        best = (getattr(saver, "best_model_path", "") for saver in self._savers)
        folders = [adapter_folder(path) for path in best if path]
        return next((f for f in (*folders, self._policy.folder) if f is not None and f.is_dir()), None)

    @property
    def pushed(self) -> list[Any]:
        """The commits of this run on the Hub so far, as huggingface_hub's `CommitInfo`, the last one at the end."""
        return [] if self._policy.push is None else self._policy.push.pushed

    @property
    def unpushed(self) -> list[Job]:
        """The pushes of this run that did not reach the Hub, known once the run has ended. Each has its `step`, its
        `error`, and its `source`, the adapter folder."""
        return [] if self._policy.push is None else list(self._policy.push.unpushed)

    @property
    def state_key(self) -> str:
        adapt_before_launch(trainer_being_made())  # its constructor asks for this key, and offers no hook
        return super().state_key

    # Adapting the model.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._resume.setup(stage)
        self._policy.only_launched = False
        self._absent = None
        self._savers = list(trainer.checkpoint_callbacks)
        self._policy.folder = None
        self._optimizer_settings = None
        self._policy.bases.clear()  # another module, or other base weights, may come with this run
        self._policy.watch = None
        self._goes_on = None
        if self._policy.push is not None and stage == "fit":
            self._policy.push.check(trainer)
        check_adapted_before_launch(trainer)
        attach(trainer.strategy, self._policy)
        log_adapters(trainer)
        # Layers may be built by the module's own hooks, which run after this one: adapt after the last of them.
        hooks = ("setup",) if shards(trainer.strategy) else ("configure_model", "setup")  # configure_model shards it
        last = next((h for h in hooks if is_overridden(h, pl_module)), None)
        if last is None:
            self._adapt(trainer, pl_module)
        else:
            call_after(pl_module, last, lambda: self._adapt(trainer, pl_module))

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not has_adapters(pl_module):
            if isinstance(trainer.precision_plugin, _REPLACES_LAYERS):
                trainer.precision_plugin.convert_module(pl_module)  # later, it would replace what was adapted
            self._inject(pl_module, trainer)
        else:
            self._go_on(trainer, pl_module)
        if self._absent is None:
            self._is_adapted(trainer, pl_module)

    def _adapt_as_in(self, checkpoint: Mapping[str, Any], pl_module: LightningModule) -> None:
        """Adapt the module as a checkpoint says that will be loaded, and not as the adapter that the run began with."""
        self._is_as_loaded = False
        if (report := adapted_as_in(checkpoint, pl_module)) is not None:
            self._absent, self.report = None, report
            ((_, injection),) = injections(pl_module)
            self.config = injection.config
            self._is_adapted(pl_module.trainer, pl_module)

    def _is_adapted(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accept_adapters(pl_module)
        self._trained = TrainedWatch(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            adapt_averages(trainer, pl_module)
            self._ranks.check(trainer, pl_module)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the adapters that the module has already, from an earlier run, from inject or from load_adapter."""
        if self.config is None or (self.report is None and self._origin is not None):
            raise AdapterStateError(
                f"{type(pl_module).__name__} has adapters already, and adapter= would load others. Call "
                "lightning_lora.remove on it first; or leave adapter= out, to go on from those that it has."
            )
        root, report = adapters_present(pl_module, self.config)
        is_new, self.report = self.report is None, report
        if self._was_launched:
            self._was_launched = False
            return  # adapted by this very callback, in the process that launched this one
        is_fresh = not shards(trainer.strategy) and all(pair.is_fresh for pair in pairs(pl_module))
        if not is_new and (is_fresh or self._is_as_loaded):
            return
        size = f"{len(report.modules)} modules, rank {self.config.rank}"
        what = f"{type(pl_module).__name__} has adapters already ({size})"
        how = "training goes on from them. To start anew, call lightning_lora.remove"
        self._goes_on = f"{what}, as inject left them." if is_fresh else f"{what}: {how}({root}) before you fit."

    def _inject(self, pl_module: LightningModule, trainer: Trainer) -> None:
        if self._origin is not None:
            try:
                self.report = self._origin.load(pl_module, trainer, check_base=self._policy.check_base)
            except AbsentError as absent:
                if shards(trainer.strategy):  # which loads a checkpoint after the weights were sharded
                    raise absent.args[0] from None
                self._absent = absent.args[0]
                return
            ((_, injection),) = injections(pl_module)
            self.config = injection.config
            self._is_as_loaded = True
            rank_zero_info(f"Training goes on from {self._origin.adapter}.\n{self.report}")
            return
        assert self.config is not None
        # A start that takes time to compute waits for data and device, and until it is known that no checkpoint brings
        # it. On sharded weights every start waits: all processes take what the first one draws.
        later = INITS[self.config.init].computes or shards(trainer.strategy)
        try:
            self.report = inject(pl_module, self.config, start=not later)
        except TargetError as error:
            if not shards(trainer.strategy):
                raise
            raise TargetError(
                f"{error} Under {type(trainer.strategy).__name__} the layers must be there before "
                "configure_model, which shards them: build them in __init__ or setup."
            ) from None
        rank_zero_info(str(self.report))

    def before_launch(self, trainer: Trainer) -> None:
        """In the process that launches others (ddp_spawn, ddp_fork): adapt the module that they will copy."""
        self._savers = list(trainer.checkpoint_callbacks)  # Lightning notes in them which one is the best
        attach(trainer.strategy, self._policy)  # for what this process saves after the run, even one that failed
        pl_module = trainer.strategy.lightning_module
        if pl_module is None or has_adapters(pl_module):
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        try:
            self._inject(pl_module, trainer)
            self._was_launched = True
        except TargetError:
            if not is_overridden("setup", pl_module):
                raise
            # Its layers are built in setup(), which only the children run; they adapt it then.

    def launch_failed(self) -> None:
        """In the launching process, after one of those that it launched has failed."""
        self._policy.only_launched = True

    def after_launch(self, trainer: Trainer) -> None:
        """Back in the launching process: the module has its trained adapters, and the Trainer saves only those."""
        self._was_launched = self._policy.only_launched = False
        pl_module = trainer.strategy.lightning_module
        if pl_module is None or not has_adapters(pl_module):
            rank_zero_warn(
                "The model is built in setup(), which runs in the launched processes only, so the trained adapters did "
                "not come back to this one. Load them from the checkpoint, or build the model in __init__."
            )

    # Checks when a run starts: the adapter is there, and takes part in training.

    def _check_present(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._absent is not None:  # and no checkpoint was loaded
            raise self._absent

    on_validation_start = on_test_start = on_predict_start = _check_present

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_present(trainer, pl_module)
        assert self._trained is not None
        self._trained.start(trainer, pl_module)
        if self._policy.push is not None:
            self._policy.push.start(trainer, pl_module)
        check_averages(pl_module)
        watch_buffers(pl_module)
        if not shards(trainer.strategy):  # there each process sees only a part of the weights
            self._policy.watch = BaseWatch(pl_module, is_error=self._policy.check_base)
        comes_later = trainer.ckpt_path is not None and shards(trainer.strategy)
        if self._optimizer_settings is None and not comes_later:  # else those of the checkpoint hold
            self._optimizer_settings = optimizer_settings(trainer)
        self._log_settings(trainer, pl_module)
        if self._policy.lora_plus_ratio is not None:
            show_both_rates(trainer)

    def _log_settings(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.config is not None
        rates = {"lora_plus_ratio": self._policy.lora_plus_ratio, "product_decay": self._policy.product_decay}
        log_run(trainer, pl_module, self.config, self._optimizer_settings, self.settings_of_run, **rates)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._trained is not None:
            self._trained.after_backward()

    # Exact resumption.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        watch_loops(trainer, self._resume)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_on is not None and trainer.ckpt_path is None:  # a checkpoint would have brought all of them
            rank_zero_info(self._goes_on)
        self._goes_on = None
        self._is_as_loaded = False
        self._first_step = trainer.global_step
        watch_loops(trainer, self._resume)
        self._resume.on_train_start(trainer, self)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume.on_train_epoch_start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._trained is not None:
            self._trained.before_batch(trainer, pl_module)
        self.config, self.report = self._ranks.before_batch(trainer, pl_module) or (self.config, self.report)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trained is not None:
            self._trained.after_batch(pl_module)
        if self._policy.watch is not None:
            self._policy.watch.after_batch(pl_module, trainer.global_step > self._first_step)
        self._ranks.after_batch(trainer, pl_module)
        self._resume.on_train_batch_end()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._resume.on_before_backward(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._policy.push is not None:
            self._policy.push.record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._policy.watch is not None:
            self._policy.watch.check(pl_module)

    def on_exception(self, *_: Any) -> None:
        self._policy.sigterm.begin()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._policy.push is not None and stage == "fit":  # after all hooks that may still change weights
            self._policy.push.finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._resume.state_dict(), "optimizer": self._optimizer_settings}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._resume.on_save_checkpoint(checkpoint)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume.load_state_dict(state_dict["random"])
        # Checkpoints of earlier versions lack this entry: their rate is not known before the optimizer is loaded.
        self._optimizer_settings = state_dict.get("optimizer", {"lr": None})
