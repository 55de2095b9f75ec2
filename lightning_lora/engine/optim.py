"""Optimizers over an adapted model: no frozen parameter in them, no trainable one missing; LoRA+."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.engine.layers import adapters, pairs
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import ConfigError, TrainingError, listed


@dataclass(frozen=True)
class OptimizerReport:
    """What `fit_optimizers` found and did; counts are of tensors."""

    trained: int
    dropped: int
    """Frozen tensors taken out."""
    replaced: int
    """Frozen weights whose place in a group their layer's A and B took."""
    added: int
    """Trainable tensors that were in no optimizer and joined the first group."""

    def __str__(self) -> str:
        done = [f"{self.trained} tensors are trained"]
        done += [f"{self.dropped} frozen ones were taken out of the optimizer"] if self.dropped else []
        done += [f"{self.replaced} frozen ones made place for their layer's A and B"] if self.replaced else []
        done += [f"{self.added} that were in no group joined the first"] if self.added else []
        return "; ".join(done)


def fit_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> OptimizerReport:
    """Make `optimizers` train exactly what is trainable in `model`, in place; groups, their order and their settings
    stay, so schedulers made on them stay right.

    Frozen parameters go. An optimizer that was made before injection holds only frozen ones: a frozen weight then makes
    place for its layer's A and B, which inherit its group. Trainable parameters in no group join the first group of a
    lone optimizer, with a warning. Raises TrainingError where several optimizers leave it open which one should train
    them, or where there is none.
    """
    names = {id(p): name for name, p in reversed(Tree.of(model).parameters)}
    trainable = {id(p): p for p in model.parameters() if p.requires_grad}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    orphans = {key: p for key, p in trainable.items() if key not in held}
    heirs = _heirs(model, orphans)
    if orphans.keys() - _reachable(optimizers, heirs) and len(optimizers) != 1:
        missing = listed(names[key] for key in orphans)
        raise TrainingError(
            f"No optimizer trains {missing}. "
            + (
                "configure_optimizers returned none. "
                if not optimizers
                else f"configure_optimizers returned {len(optimizers)}, and it is not clear which one should. "
            )
            + "Return an optimizer that is given these parameters, for example those with requires_grad."
        )

    dropped = replaced = 0
    for optimizer in optimizers:
        # Some optimizers (Adagrad) make the state of all parameters when they are constructed.
        made_state = bool(optimizer.state)
        joined: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            kept: list[nn.Parameter] = []
            for p in group["params"]:
                if id(p) in trainable or id(p) not in names:  # what is not this model's is not ours to judge
                    kept.append(p)
                    continue
                optimizer.state.pop(p, None)
                inherited = [heir for heir in heirs.get(id(p), ()) if orphans.pop(id(heir), None) is not None]
                replaced, dropped = replaced + bool(inherited), dropped + (not inherited)
                joined += inherited
                kept += inherited
            _set_params(group, kept, names)
        if len(optimizers) == 1 and orphans:
            warnings.warn(
                f"The optimizer was not given {listed(names[key] for key in orphans)}: they join its first group. "
                "Give it all parameters with requires_grad to choose otherwise.",
                stacklevel=2,
            )
            group = optimizer.param_groups[0]
            _set_params(group, [*group["params"], *orphans.values()], names)
            joined += orphans.values()
        if made_state and joined:
            optimizer.state.update(type(optimizer)(joined, **optimizer.defaults).state)
    trained = sum(id(p) in trainable for o in optimizers for group in o.param_groups for p in group["params"])
    return OptimizerReport(trained=trained, dropped=dropped, replaced=replaced, added=len(orphans))


def lora_plus(optimizer: Optimizer, model: nn.Module, ratio: float) -> None:
    """Train every B with `ratio` times the learning rate of its group (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    The factor is applied around each step only: between steps a group is as the user made it, so every scheduler, the
    learning-rate finder and the optimizer's state dict see one learning rate per group. Raises ConfigError for a ratio
    that is not a finite number above 0, TrainingError for LBFGS, which cannot have groups.
    """
    check_ratio(ratio)
    if isinstance(optimizer, LBFGS):
        raise TrainingError(
            "lora_plus_ratio cannot be used with LBFGS, which has one learning rate for all parameters."
        )
    _LoRAPlus(optimizer, {id(pair.B) for pair in pairs(model)}, float(ratio))


def check_ratio(ratio: object) -> None:
    """Raise ConfigError unless `ratio` can be LoRA+'s."""
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not math.isfinite(ratio) or ratio <= 0:
        raise ConfigError(f"lora_plus_ratio is a finite number above 0, not {ratio!r}.")


class _LoRAPlus:
    """Splits each group into A's and B's while a step runs, and joins it again after."""

    def __init__(self, optimizer: Optimizer, factors_b: set[int], ratio: float) -> None:
        self.factors_b, self.ratio = factors_b, ratio
        self.hosts: list[tuple[dict[str, Any], list[Tensor]]] = []
        self.twins: list[dict[str, Any]] = []
        optimizer.register_step_pre_hook(self.before_step)
        optimizer.register_step_post_hook(lambda optimizer, args, kwargs: self.join(optimizer))
        # A step that raised leaves the groups split; a checkpoint must not hold them so.
        optimizer.register_state_dict_pre_hook(self.join)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.join(optimizer)
        _, *positional = args  # torch passes the optimizer itself as the first argument of its step
        closure: Callable[[], Any] | None = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            self.split(optimizer)
            return None

        def closure_then_split() -> Any:
            # Lightning runs training_step inside the closure: it must see the groups as they are.
            self.join(optimizer)
            loss = closure()
            self.split(optimizer)
            return loss

        if positional:
            return (optimizer, closure_then_split, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_split}

    def split(self, optimizer: Optimizer) -> None:
        groups = []
        for group in optimizer.param_groups:
            groups.append(group)
            params = group["params"]
            bs = [p for p in params if id(p) in self.factors_b]
            if not bs:
                continue
            self.hosts.append((group, params))
            group["params"] = [p for p in params if id(p) not in self.factors_b]
            self.twins.append({**group, "params": bs, "lr": group["lr"] * self.ratio})
            groups.append(self.twins[-1])
        optimizer.param_groups[:] = groups

    def join(self, optimizer: Optimizer) -> None:
        if not self.hosts:
            return
        twins = {id(twin) for twin in self.twins}
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if id(group) not in twins]
        for group, params in self.hosts:
            group["params"] = params
        self.hosts, self.twins = [], []


def _heirs(model: nn.Module, orphans: dict[int, nn.Parameter]) -> dict[int, list[nn.Parameter]]:
    """For each frozen parameter of an adapted layer, the layer's A and B that no optimizer holds."""
    heirs: dict[int, list[nn.Parameter]] = {}
    for _, module in adapters(model):
        tensors = (getattr(module, name) for name in module.lora_names)
        own = [p for p in tensors if id(p) in orphans]
        ours = {id(getattr(module, name)) for name in module.lora_names}
        for p in module.parameters(recurse=False):
            if own and not p.requires_grad and id(p) not in ours:
                heirs.setdefault(id(p), []).extend(own)
    return heirs


def _reachable(optimizers: Iterable[Optimizer], heirs: dict[int, list[nn.Parameter]]) -> set[int]:
    """The parameters that an optimizer gets because it holds a frozen weight of their layer."""
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return {id(heir) for p in held for heir in heirs.get(id(p), ())}


def _set_params(group: dict[str, Any], params: list[nn.Parameter], names: dict[int, str]) -> None:
    group["params"][:] = params  # in place: LBFGS keeps a reference to this very list
    if "param_names" in group:
        group["param_names"] = [names.get(id(p), "") for p in params]
