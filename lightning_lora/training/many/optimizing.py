"""Each adapter of a pack takes its steps as if it were alone: with its own parameters and its own learning rate.

One optimizer, the user's, holds the parameters of all adapters, so its schedulers and its state dict are the user's,
too. For a step of one adapter, each of its groups has the parameters of that adapter alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.optim import LBFGS, Optimizer

from lightning_lora.engine.optim import copied, lists_tensors, same, with_inner
from lightning_lora.errors import TrainingError
from lightning_lora.training.many.pack import Member

OWN = "lora_many"
"""The key of a group for the numbers that steps have changed for one adapter: adapter -> name -> (the group's, its)."""
LISTS = ("params", "param_names")
_Group = dict[str, Any]
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def check_divisible(optimizers: list[Optimizer]) -> None:
    """Raise TrainingError for an optimizer whose step cannot be taken for a part of its parameters."""
    for one in (inner for optimizer in optimizers for inner in with_inner(optimizer)):
        kept = [n for n, v in vars(one).items() if n not in ("state", "param_groups", "defaults") and lists_tensors(v)]
        if isinstance(one, LBFGS) or kept:
            raise TrainingError(
                f"{type(one).__name__} keeps a list of its parameters beside its groups ({', '.join(kept)}), so it "
                "cannot step for one adapter of several. Use another optimizer, or train each adapter in a run of its "
                "own with LoRACallback."
            )


def rate_factors(optimizers: list[Optimizer], members: Mapping[str, Member]) -> dict[str, float]:
    """Adapter -> its learning rate, divided by the one that the first optimizer's schedule begins with (or, of a cycle
    of rates, the highest). Raises TrainingError where the optimizer has none."""
    group: dict[str, Any] = next((group for one in optimizers for group in one.param_groups), {})
    rate = group.get("max_lr", group.get("initial_lr", group.get("lr", 0.0)))
    own = [name for name, member in members.items() if member.lr is not None]
    if own and (not rate or group.get("relative_step")):
        raise TrainingError(
            f"{own[0]!r} has a learning rate of its own, and {type(optimizers[0]).__name__} has none to compare it "
            f"with (lr={rate}). Give the optimizer one (lr=..., relative_step=False)."
        )
    return {n: 1.0 if m.lr is None else m.lr / float(rate) for n, m in members.items()}


class Owned:
    """The groups of optimizers, and which parameters in them belong to which adapter: read once for all adapters, of
    which each may have thousands."""

    def __init__(self, optimizers: list[Optimizer], owners: Mapping[int, str]) -> None:
        lists = {id(one.param_groups): one.param_groups for outer in optimizers for one in with_inner(outer)}.values()
        self.before = [(groups, list(groups)) for groups in lists]
        self.groups = {id(group): group for _, theirs in self.before for group in theirs}  # some are shared
        self._of: dict[tuple[int, str, str | None], list[Any]] = {}
        for group in self.groups.values():
            for key in LISTS:
                for value, p in zip(group.get(key, ()), group["params"]):
                    self._of.setdefault((id(group), key, owners.get(id(p))), []).append(value)

    def lists(self, group: _Group, name: str) -> _Group:
        """The part of the adapter `name` of what `group` lists."""
        return {key: list(self._of.get((id(group), key, name), ())) for key in LISTS if key in group}


@contextmanager
def only(name: str, owned: Owned) -> Iterator[None]:
    """Inside, the optimizers have the parameters of the adapter `name` alone. What is set in their groups stays."""
    with _parts(name, owned) as parts:
        yield
        for host, part, given in parts:
            host.update({key: value for key, value in part.items() if key not in LISTS and value is not given.get(key)})


@contextmanager
def stepping(name: str, owned: Owned, factor: float) -> Iterator[None]:
    """Inside, the optimizer has the parameters of the adapter `name` alone, with its learning rate, which is `factor`
    times that of the group. Numbers that the step writes into a group are kept for that adapter."""
    with _parts(name, owned) as parts:
        for host, part, given in parts:
            if factor != 1:
                part.update({key: part[key] * factor for key in _RATES if part.get(key) is not None})
            own = host.get(OWN, {}).get(name, {})
            part.update({key: value for key, (then, value) in own.items() if same(host.get(key), then)})
            part.pop(OWN, None)
            given.update({key: copied(value) for key, value in part.items() if key not in LISTS})
        yield
        for host, part, given in parts:
            known = host.get(OWN, {}).get(name, {})
            own = {
                key: known[key] if key in known and same(value, known[key][1]) else (copied(host.get(key)), value)
                for key, value in part.items()
                if key not in LISTS and (key in known or not same(value, given.get(key)))
            }
            if own or known:
                host[OWN] = {**host.get(OWN, {}), name: own}


@contextmanager
def _parts(name: str, owned: Owned) -> Iterator[list[tuple[_Group, _Group, _Group]]]:
    """Inside, each group is replaced by its part of the adapter `name`. Gives the group, its part, and what the part
    was given."""
    parts = {key: _part(group, owned.lists(group, name)) for key, group in owned.groups.items()}
    try:
        for groups, theirs in owned.before:
            groups[:] = [parts[id(group)][1] for group in theirs]
        yield list(parts.values())
    finally:
        for groups, theirs in owned.before:
            groups[:] = theirs


def _part(group: _Group, lists: _Group) -> tuple[_Group, _Group, _Group]:
    part = {key: copied(value) for key, value in group.items() if key not in (*LISTS, OWN)}
    if OWN in group:
        part[OWN] = group[OWN]
    given = dict(part)
    return group, {**part, **lists}, given


class KnownLoss:
    """The closure of a step whose loss is known: the gradients of all adapters have been computed."""

    def __init__(self, loss: Any, optimizer: Optimizer) -> None:
        self._loss, self._optimizer, self._is_asked = loss, optimizer, False

    def __call__(self) -> Any:
        if self._is_asked:
            raise TrainingError(
                f"{type(self._optimizer).__name__} asks for the loss several times in a step, and the gradients of "
                "several adapters are computed once. Use another optimizer, or train each adapter in a run of its own "
                "with LoRACallback."
            )
        self._is_asked = True
        return self._loss
