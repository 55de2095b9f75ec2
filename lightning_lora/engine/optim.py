"""Fits optimizers to an adapted model, so that they train exactly what is trainable; and LoRA+."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.checked import number
from lightning_lora.engine.layers import adapters, pairs
from lightning_lora.engine.shown import base_parameter
from lightning_lora.engine.torch_private import calls_hooks
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import TrainingError, listed


@dataclass(frozen=True)
class OptimizerReport:
    """The changes that `fit_optimizers` made, as numbers of tensors."""

    trained: int
    dropped: int
    """Frozen tensors that were removed."""
    replaced: int
    """Frozen weights that were replaced, in their group, by their layer's A and B."""
    added: int
    """Trainable tensors that were in no optimizer and joined the first group."""

    def __str__(self) -> str:
        done = [f"{self.trained} tensors are trained"]
        done += [f"{self.dropped} frozen ones were taken out of the optimizer"] if self.dropped else []
        done += [f"{self.replaced} frozen ones were replaced by their layer's A and B"] if self.replaced else []
        done += [f"{self.added} that were in no group joined the first"] if self.added else []
        return "; ".join(done)


def fit_optimizers(optimizers: Sequence[Optimizer], model: nn.Module) -> OptimizerReport:
    """Make `optimizers` train exactly what is trainable in `model`, in place. Groups, their order and their settings
    stay, so schedulers that were made on them stay right.

    Frozen parameters are removed. An optimizer that was made before injection holds only frozen ones: there A and B
    take the place of their layer's frozen weight, in its group. Trainable parameters in no group join the first group,
    with a warning, if there is one optimizer. Raises TrainingError if there are several, so that it is not clear which
    one should train them, or none.
    """
    for given in (
        group["params"] for optimizer in optimizers for one in with_inner(optimizer) for group in one.param_groups
    ):
        given[:] = map(base_parameter, given)  # configure_optimizers may have read `layer.weight`
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
        # Some optimizers (Adagrad) make the state of all their parameters at construction.
        made_state = bool(optimizer.state)
        joined: list[nn.Parameter] = []
        seen: set[int] = set()
        waiting = dict(orphans)
        for one in with_inner(optimizer):  # an outer optimizer and its inner one mostly share their groups
            replace_hooks(one)
            groups = [group for group in one.param_groups if id(group) not in seen]
            seen.update(map(id, groups))
            left = dict(waiting)
            for group in groups:
                kept: list[nn.Parameter] = []
                for p in group["params"]:
                    if id(p) in trainable or id(p) not in names:  # parameters of other models are left alone
                        kept.append(p)
                        continue
                    one.state.pop(p, None)
                    inherited = [heir for heir in heirs.get(id(p), ()) if left.pop(id(heir), None) is not None]
                    kept += inherited
                    if one is optimizer:
                        replaced, dropped = replaced + bool(inherited), dropped + (not inherited)
                        joined += inherited
                _set_params(group, kept, names)
            if one is optimizer:
                orphans = left
        if len(optimizers) == 1 and orphans:
            warnings.warn(
                f"The optimizer was not given {listed(names[key] for key in orphans)}: they join its first group. "
                "To choose another group, give the optimizer all parameters with requires_grad.",
                stacklevel=2,
            )
            firsts = {id(one.param_groups[0]): one.param_groups[0] for one in with_inner(optimizer)}
            for group in firsts.values():
                _set_params(group, [*group["params"], *orphans.values()], names)
            joined += orphans.values()
        if made_state and joined:
            if len(with_inner(optimizer)) > 1:
                raise TrainingError(
                    f"{type(optimizer).__name__} made the state of its parameters before the model was adapted. Make "
                    "it in configure_optimizers, which is called after that."
                )
            optimizer.state.update(type(optimizer)(joined, **optimizer.defaults).state)
    trained = sum(id(p) in trainable for o in optimizers for group in o.param_groups for p in group["params"])
    return OptimizerReport(trained=trained, dropped=dropped, replaced=replaced, added=len(orphans))


def lora_plus(optimizer: Optimizer, model: nn.Module, ratio: float) -> LoRAPlus:
    """Train every B with `ratio` times the learning rate of its group (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    While a step runs, B has a group of its own, as if the optimizer had been made with it. Numbers that the optimizer
    keeps in its groups (a count of steps, a sum of weights) are then kept for B separately. Between steps a group is as
    the user made it, so every scheduler, the learning-rate finder and the optimizer's state dict see one learning rate
    per group. Numbers of B that differ are stored in the group under "lora_plus", for the state dict. Who wants to read
    B's rate as well does so within `shown()` of what is returned.

    If an optimizer holds another one (SAM, Lookahead), the groups of both are split. Raises ConfigError for a ratio
    that is not a finite number above 0. Raises TrainingError for an optimizer that would not use such groups: LBFGS,
    and one that keeps lists of its parameters, sets its learning rate by itself, or takes steps without torch's hooks.
    """
    number("lora_plus_ratio", ratio, above=0)
    optimizers = with_inner(optimizer)
    factors_a, factors_b = ({id(getattr(pair, name)) for pair in pairs(model)} for name in "AB")
    advice = (
        "To get the same without it, leave lora_plus_ratio out, and give the optimizer the parameters called lora_B in "
        f"a group of their own, with {ratio:g} times the learning rate of the others."
    )
    for one in optimizers:
        if isinstance(one, LBFGS):
            raise TrainingError(
                "lora_plus_ratio cannot be used with LBFGS, which has one learning rate for all parameters."
            )
        check_hooks(one, f"lora_plus_ratio cannot be used with it. {advice}")
        for name, value in vars(one).items():
            if name not in ("state", "param_groups", "defaults") and lists_tensors(value):
                raise TrainingError(
                    f"lora_plus_ratio cannot be used with {type(one).__name__}: it keeps a list of tensors beside its "
                    f"groups ({name}), so a group that is made for a step would not reach them. {advice}"
                )
        for group in one.param_groups:
            if any(id(p) in factors_b for p in group["params"]):
                _check_rate(one, group, advice)
    return LoRAPlus(optimizers, factors_a, factors_b, float(ratio))


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """`optimizer` and the optimizers that it holds (as SAM and Lookahead do), the innermost last."""
    found = [optimizer]
    for one in found:
        for value in vars(one).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            found += [inner for inner in held if isinstance(inner, Optimizer) and inner not in found]
    return found


def replace_hooks(optimizer: Optimizer, kind: str | None = None, *handles: RemovableHandle) -> None:
    """Remove the hooks of `kind` that we put on `optimizer` before (all of ours if `kind` is None), and note `handles`
    in their place. A module may return the same optimizer in each of its runs."""
    noted: dict[str, tuple[RemovableHandle, ...]] = vars(optimizer).setdefault("lora_hooks", {})
    for handle in [h for name, of_kind in noted.items() if kind in (None, name) for h in of_kind]:
        handle.remove()
    vars(optimizer)["lora_hooks"] = {} if kind is None else {**noted, kind: handles}


def check_hooks(optimizer: Optimizer, consequence: str) -> None:
    """Raise TrainingError, whose message ends in `consequence`, for an optimizer whose steps do not call hooks."""
    if not calls_hooks(optimizer):
        raise TrainingError(
            f"{type(optimizer).__name__} does not call the hooks of torch's optimizers around its step (it was made "
            f"without Optimizer.__init__), so {consequence}"
        )


def lists_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) or lists_tensors(v) for v in value)


def _check_rate(optimizer: Optimizer, group: dict[str, Any], advice: str) -> None:
    if group.get("lr") is None or group.get("relative_step"):
        relative = ", relative_step=True" if group.get("relative_step") else ""
        raise TrainingError(
            f"lora_plus_ratio multiplies a learning rate, and {type(optimizer).__name__} sets its own (a group has "
            f"lr={group.get('lr')}{relative}). Give it one (lr=..., relative_step=False). {advice}"
        )


_OWN = "lora_plus"
"""The key of a group under which B's own numbers lie, if they differ after a step: name -> (the group's, B's)."""
_RATES = ("lr", "initial_lr")
"""The numbers that are multiplied by `ratio` for B. Schedulers set the second; some optimizers divide by it."""


@dataclass
class _Half:
    """A group that is split: `host`, the user's group, keeps A and all else; `twin` has B."""

    host: dict[str, Any]
    params: list[Tensor]
    twin: dict[str, Any]
    given: dict[str, Any]
    """The rates that the twin was given, to find out whether the step has changed them."""
    kept: frozenset[str]
    """The rates among them that an earlier step has changed for B, and that the user has not changed since."""
    is_alone: bool
    """True if the group holds B alone: the twin then takes its place."""


class LoRAPlus:
    """Splits each group into A's and B's while a step runs, and joins it again after."""

    def __init__(self, optimizers: list[Optimizer], factors_a: set[int], factors_b: set[int], ratio: float) -> None:
        self.optimizers, self.factors_a, self.factors_b, self.ratio = optimizers, factors_a, factors_b, ratio
        self.running: Optimizer | None = None
        """The optimizer whose step is running with split groups (the outermost one)."""
        self.halves: list[_Half] = []
        for optimizer in optimizers:
            handles = [
                optimizer.register_step_pre_hook(self.before_step),
                optimizer.register_step_post_hook(self.after_step),
            ]
            # A step that raised leaves the groups split. They are joined before a state dict is made or loaded.
            with suppress(AttributeError):  # one made without Optimizer.__init__ has no place for them
                handles += [
                    optimizer.register_state_dict_pre_hook(lambda _: self.join()),
                    optimizer.register_load_state_dict_pre_hook(lambda *_: self.join()),
                ]
            replace_hooks(optimizer, "lora_plus", *handles)

    def before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.running is not None and self.running is not optimizer:
            return None  # it runs inside the step of an outer optimizer
        self.join()
        _, *positional = args  # torch passes the optimizer itself as the first argument of its step
        closure: Callable[[], Any] | None = positional[0] if positional else kwargs.get("closure")
        if closure is None:
            self.split(optimizer)
            return None

        def closure_then_split() -> Any:
            # Lightning runs training_step inside the closure: it must see the groups as they are.
            self.join()
            loss = closure()
            self.split(optimizer)
            return loss

        if positional:
            return (optimizer, closure_then_split, *positional[1:]), kwargs
        return args, {**kwargs, "closure": closure_then_split}

    def after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.running is optimizer:
            self.join()

    def split(self, optimizer: Optimizer) -> None:
        if self.running is not None:
            return
        self.running = optimizer
        parts: dict[int, list[dict[str, Any]]] = {}  # optimizers may share groups, in one list or in several
        for groups in {id(one.param_groups): one.param_groups for one in self.optimizers}.values():
            for group in groups:
                if id(group) not in parts:
                    parts[id(group)] = self.parts(group)
            groups[:] = [part for group in groups for part in parts[id(group)]]

    def parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        params = group["params"]
        bs = [p for p in params if id(p) in self.factors_b]
        if not bs:
            return [group]
        own, twin = self.twin(group, bs)
        given = {key: twin[key] for key in _RATES if key in twin}
        half = _Half(group, params, twin, given, frozenset(own).intersection(_RATES), len(bs) == len(params))
        self.halves.append(half)
        if half.is_alone:
            return [twin]
        group["params"] = [p for p in params if id(p) not in self.factors_b]
        return [group, twin]

    def twin(self, group: dict[str, Any], bs: list[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The numbers that are B's own already, and B's group."""
        own = {key: b for key, (a, b) in group.get(_OWN, {}).items() if key in group and same(group[key], a)}
        shared = {key: copied(group[key]) for key in group.keys() - own.keys() - {"params", _OWN}}
        rates = {key: shared[key] * self.ratio for key in _RATES if shared.get(key) is not None}
        return own, {**shared, **rates, **own, "params": bs}

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Meanwhile the optimizers have B's groups beside those of the rest, named, for whoever reads their rates."""
        self.join()
        lists = {id(one.param_groups): one.param_groups for one in self.optimizers}.values()
        before = [(groups, list(groups)) for groups in lists]
        for groups, theirs in before:
            names = [g.get("name", f"pg{i}" if len(theirs) > 1 else "") for i, g in enumerate(theirs, start=1)]
            groups[:] = [part for name, group in zip(names, theirs) for part in self.named(group, name)]
        try:
            yield
        finally:
            for groups, theirs in before:
                groups[:] = theirs

    def named(self, group: dict[str, Any], name: str) -> list[dict[str, Any]]:
        bs = [p for p in group["params"] if id(p) in self.factors_b]
        rest = [p for p in group["params"] if id(p) not in self.factors_b]
        if not bs:
            return [{**group, "name": name} if name else group]
        kind = "lora_A" if all(id(p) in self.factors_a for p in rest) else "others"
        parts = [(kind, {**group, "params": rest})] if rest else []
        parts.append(("lora_B", self.twin(group, bs)[1]))
        return [{**part, "name": f"{name}/{kind}" if name else kind} for kind, part in parts]

    def join(self) -> None:
        self.running = None
        hosts = {id(half.twin): [half.host] if half.is_alone else [] for half in self.halves}
        for groups in {id(one.param_groups): one.param_groups for one in self.optimizers}.values() if hosts else ():
            groups[:] = [part for group in groups for part in hosts.get(id(group), [group])]
        for half in self.halves:
            half.host["params"] = half.params
            self.note(half)
        self.halves = []

    def note(self, half: _Half) -> None:
        """Store in the user's group the numbers that the step has written into B's group."""
        host, own = half.host, {}
        for key, value in half.twin.items():
            is_rate = key in half.given
            if key in ("params", "param_names") or (is_rate and key not in half.kept and value is half.given[key]):
                continue
            if half.is_alone:
                host[key] = value / self.ratio if is_rate else value
            elif key not in host or is_rate or not same(host[key], value):
                own[key] = (copied(host.get(key)), value)
        host.pop(_OWN, None)
        if own:
            host[_OWN] = own


def same(a: Any, b: Any) -> bool:
    """True if two values of a group are equal: numbers, tensors, or lists and dicts of them."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def copied(value: Any) -> Any:
    """A copy of `value` for another group, so that a change in place does not reach both."""
    return copy.deepcopy(value) if isinstance(value, (list, dict, set)) else value


def _heirs(model: nn.Module, orphans: dict[int, nn.Parameter]) -> dict[int, list[nn.Parameter]]:
    """id(frozen parameter of an adapted layer) -> the layer's A and B that no optimizer holds."""
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
