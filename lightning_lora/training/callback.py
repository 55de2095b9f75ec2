"""LoRA in any Lightning Trainer: `Trainer(callbacks=[LoRACallback(rank=8, alpha=16)])`."""

from __future__ import annotations

import functools
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import Unpack

from lightning_lora.engine import InjectionReport, LoRAConfig, inject, injections
from lightning_lora.engine.config import Bias, FurtherFields, check_is_config
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers import pairs
from lightning_lora.engine.optim import check_ratio
from lightning_lora.engine.peft_names import unknown_name
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.product_decay import check_strength
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import ConfigError, TargetError, TrainingError, listed
from lightning_lora.training.base_watch import BaseWatch
from lightning_lora.training.buffers import watch_buffers
from lightning_lora.training.checkpoint import accept_adapters
from lightning_lora.training.launch import adapt_before_launch
from lightning_lora.training.present import adapters_present
from lightning_lora.training.push import HubPush
from lightning_lora.training.pushing import Pushing
from lightning_lora.training.randomness import ExactResume
from lightning_lora.training.strategy import (
    AdapterPolicy,
    attach,
    check_only_adapters,
    has_adapters,
    shards,
    unfrozen,
)

# They put layers of their own in the place of a model's.
_REPLACES_LAYERS = (BitsandbytesPrecision, TransformerEnginePrecision)

_SETTINGS = ("lora_plus_ratio", "product_decay", "push", "save_adapter", "check_base", "init_batches")


class LoRACallback(Callback):
    """Adapt a LightningModule that its owner did not have to change: train A and B alone, save A and B alone.

    `config` is a LoRAConfig, or its fields are given by name: `LoRACallback(rank=8, alpha=16)`. The model is adapted
    once its layers are there, whether they are built in `__init__`, `setup` or `configure_model`, for fit as for
    validate, test and predict. Optimizers then hold what is trainable, and no more; checkpoints hold the adapter,
    optimizer, loops and random state, and no base weight; a resumed run goes on as if it had not been interrupted.

    Raises ConfigError for a field that cannot be; while the Trainer sets up, TargetError where the config does not fit
    the model, AdapterStateError where the model has other adapters already, and TrainingError under a strategy or
    optimizer with which adapters would not train.
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        *,
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
        push: HubPush | None = None,
        save_adapter: bool = True,
        check_base: bool = True,
        init_batches: int = 16,
        **config_fields: Unpack[FurtherFields],
    ) -> None:
        """
        Args:
            config: What to adapt, and how.
            rank, alpha, dropout, target_modules, exclude_modules, modules_to_save, bias, use_rslora, use_dora, init:
                The fields of a LoRAConfig that are set most, instead of `config`; None leaves one as it is there.
            lora_plus_ratio: The learning rate of every B as a multiple of its group's (LoRA+, arXiv:2402.12354).
            product_decay: Weight decay on the update s B A as a whole, beside the optimizer's own on A and B: each step
                is followed by one down the gradient of 1/2 ||s B A||^2, of the learning rate times this.
            push: Push to the Hub while training goes on: `HubPush("user/my-adapter")`.
            save_adapter: Write an adapter folder in PEFT's format beside each checkpoint: `best-adapter/` beside
                `best.ckpt`.
            check_base: Refuse a checkpoint that was trained on another base.
            init_batches: How many batches of the training data an `init` that starts from data ("eva", "corda",
                "lora_ga") is measured on, when training starts; a resumed run measures nothing.
            config_fields: The other fields of a LoRAConfig, instead of `config`.
        """
        spelled = {
            "rank": rank, "alpha": alpha, "dropout": dropout, "exclude_modules": exclude_modules, "bias": bias,
            "modules_to_save": modules_to_save, "use_rslora": use_rslora, "use_dora": use_dora, "init": init,
        }  # fmt: skip
        given: dict[str, Any] = {name: value for name, value in spelled.items() if value is not None}
        given.update(config_fields)
        if target_modules != "all-linear":  # None is a value there, beside target_parameters
            given["target_modules"] = target_modules
        if config is not None and given:
            raise ConfigError(f"Give either a LoRAConfig or its fields, not both: {listed(given)}.")
        if config is not None:
            check_is_config(config)
        known = LoRAConfig.__dataclass_fields__
        for name in config_fields:
            if name not in known:
                raise ConfigError(f"LoRACallback has no setting {name!r}. {unknown_name(name, [*known, *_SETTINGS])}")
        if lora_plus_ratio is not None:
            check_ratio(lora_plus_ratio)
        if product_decay is not None:
            check_strength(product_decay)
        if isinstance(init_batches, bool) or not isinstance(init_batches, int) or init_batches < 1:
            raise ConfigError(f"init_batches is a whole number from 1 on, not {init_batches!r}.")
        self.config = config or LoRAConfig(**given)
        self.report: InjectionReport | None = None
        """What was adapted, once it was."""
        self._policy = AdapterPolicy(
            lora_plus_ratio=lora_plus_ratio,
            product_decay=product_decay,
            save_adapter=save_adapter,
            check_base=check_base,
            push=Pushing(push) if push is not None else None,
            init_batches=init_batches,
        )
        self._resume = ExactResume()
        self._awaits_gradient: dict[str, Any] | None = None
        self._heard_backward = False
        self._held = 0
        self._first_step = 0
        self._goes_on: str | None = None
        adapt_before_launch()

    def __repr__(self) -> str:
        adapted = "" if self.report is None else f", {self.report!r}"
        return f"LoRACallback({self.config!r}{adapted})"

    # Adapting the model.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._policy.bases.clear()  # another module, or other base weights, may come with this run
        self._policy.watch = None
        self._goes_on = None
        if self._policy.push is not None and stage == "fit":
            self._policy.push.check(trainer)
        attach(trainer.strategy, self._policy)
        # Layers may be built by the module's own hooks, which run after this one: adapt after the last of them.
        hooks = ("setup",) if shards(trainer.strategy) else ("configure_model", "setup")  # configure_model shards it
        last = next((h for h in hooks if is_overridden(h, pl_module)), None)
        if last is None:
            self._adapt(trainer, pl_module)
        else:
            self._adapt_after(last, trainer, pl_module)

    def _adapt_after(self, hook: str, trainer: Trainer, pl_module: LightningModule) -> None:
        original = getattr(pl_module, hook)
        had_own = hook in pl_module.__dict__  # LightningCLI, for one, puts hooks on the instance

        @functools.wraps(original)  # Lightning asks of the function underneath whether the hook is overridden
        def hook_then_adapt(*args: Any, **kwargs: Any) -> Any:
            if had_own:
                pl_module.__dict__[hook] = original
            else:
                pl_module.__dict__.pop(hook, None)
            result = original(*args, **kwargs)
            self._adapt(trainer, pl_module)
            return result

        pl_module.__dict__[hook] = hook_then_adapt

    def _adapt(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not has_adapters(pl_module):
            if isinstance(trainer.precision_plugin, _REPLACES_LAYERS):
                trainer.precision_plugin.convert_module(pl_module)  # later, it would replace what was adapted
            self._inject(pl_module, trainer.strategy)
        else:
            self._go_on(trainer, pl_module)
        accept_adapters(pl_module)
        if trainer.state.fn == TrainerFn.FITTING:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
                    self._adapt_average(callback, trainer, pl_module)

    def _go_on(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the adapters that the module has already: those of a run before, or of inject or load_adapter."""
        root, report = adapters_present(pl_module, with_plain_names(self.config, Tree.of(pl_module)))
        is_new, self.report = self.report is None, report
        is_fresh = not shards(trainer.strategy) and all(pair.is_fresh for pair in pairs(pl_module))
        if is_fresh and not is_new:
            return  # adapted by this very callback, in the process that launched this one
        size = f"{len(report.modules)} modules, rank {self.config.rank}"
        what = f"{type(pl_module).__name__} has adapters already ({size})"
        how = "training goes on from them. To start anew, call lightning_lora.remove"
        self._goes_on = f"{what}, as inject left them." if is_fresh else f"{what}: {how}({root}) before you fit."

    def _adapt_average(self, callback: Callback, trainer: Trainer, pl_module: LightningModule) -> None:
        frozen = [name for _, injection in injections(pl_module) for name in injection.frozen_norms]
        if frozen and isinstance(callback, StochasticWeightAveraging):
            raise TrainingError(
                "StochasticWeightAveraging estimates the statistics of batch norms anew, and those of "
                f"{listed(frozen)} are frozen with the base: it would reset them. Use WeightAveraging or "
                "EMAWeightAveraging, or name the norms in modules_to_save."
            )
        # Averaging copies the module in its own setup: a copy without adapters would not match.
        average = getattr(callback, "_average_model", None)
        if average is not None and not has_adapters(average):
            callback.setup(trainer, pl_module, "fit")

    def _inject(self, pl_module: LightningModule, strategy: Strategy) -> None:
        # What takes time to compute waits until it is known that no checkpoint brings it, and for data and device.
        # And on sharded weights all processes start with what the first one draws.
        later = INITS[self.config.init].computes or shards(strategy)
        try:
            self.report = inject(pl_module, self.config, start=not later)
        except TargetError as error:
            if not shards(strategy):
                raise
            raise TargetError(
                f"{error} Under {type(strategy).__name__} the layers must be there before "
                "configure_model, which shards them: build them in __init__ or setup."
            ) from None
        rank_zero_info(str(self.report))

    def before_launch(self, trainer: Trainer) -> None:
        """In the process that launches others (ddp_spawn, ddp_fork): adapt the module that they will copy."""
        attach(trainer.strategy, self._policy)  # for what this process saves after the run, even one that failed
        pl_module = trainer.strategy.lightning_module
        if pl_module is None or has_adapters(pl_module):
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        try:
            self._inject(pl_module, trainer.strategy)
        except TargetError:
            if not is_overridden("setup", pl_module):
                raise
            # Its layers are built in setup(), which only the children run; they adapt it then.

    def after_launch(self, trainer: Trainer) -> None:
        """Back in that process: the module has its trained adapters, and the Trainer saves no more than them."""
        pl_module = trainer.strategy.lightning_module
        if pl_module is None or not has_adapters(pl_module):
            rank_zero_warn(
                "The model is built in setup(), which runs in the launched processes only, so the trained adapters did "
                "not come back to this one. Load them from the checkpoint, or build the model in __init__."
            )

    # Said when training starts: an adapter that takes no part in it.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._policy.push is not None:
            self._policy.push.start(trainer, pl_module)
        watch_buffers(pl_module)
        if not shards(trainer.strategy):  # of whose weights each process sees a part
            self._policy.watch = BaseWatch(pl_module, is_error=self._policy.check_base)
        self._awaits_gradient = {pair.name: pair for pair in pairs(pl_module)}
        self._heard_backward = False
        self._held = 0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._heard_backward = True
        if self._awaits_gradient:
            waiting = self._awaits_gradient.items()
            self._awaits_gradient = {name: p for name, p in waiting if p.A.grad is None and p.B.grad is None}

    def _report_unused(self, pl_module: LightningModule) -> None:
        unused, self._awaits_gradient = self._awaits_gradient, None
        if unused:
            rank_zero_warn(
                f"{len(unused)} adapters received no gradient in the first batch: {listed(unused)}. Their layers are "
                "not called, or their outputs do not reach the loss, so they will not train. Leave them out with "
                "exclude_modules if that is meant."
            )
        if awake := unfrozen(pl_module):
            rank_zero_warn(
                f"{listed(awake)} was frozen, and requires grad again: something unfroze it when training started. No "
                "optimizer holds it, so it does not train, but its gradients take time and memory."
            )

    # Exact resumption.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_on is not None and trainer.ckpt_path is None:  # which would have brought all of them
            rank_zero_info(self._goes_on)
        self._goes_on = None
        self._first_step = trainer.global_step
        self._resume.on_train_start(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume.on_train_epoch_start(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._resume.on_train_batch_start(trainer)
        held = sum(len(group["params"]) for optimizer in trainer.optimizers for group in optimizer.param_groups)
        if held != self._held:
            check_only_adapters(trainer.optimizers, pl_module)
            self._held = held

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._awaits_gradient is not None and self._heard_backward:  # not so where a training_step returned None
            self._report_unused(pl_module)
        if self._policy.watch is not None:
            self._policy.watch.after_batch(pl_module, trainer.global_step > self._first_step)
        self._resume.on_train_batch_end(trainer, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._resume.on_train_epoch_end()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._resume.on_validation_end()
            if self._policy.push is not None:
                self._policy.push.record(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._policy.watch is not None:
            self._policy.watch.check(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._policy.push is not None:
            self._policy.push.finish(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"random": self._resume.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume.load_state_dict(state_dict["random"])
