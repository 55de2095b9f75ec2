"""Gives the pairs of an adapted model another rank, also in the middle of a training run.

Growing adds zeros to sums, which changes no output but for rounding; a cut loses what the report says. Parameters stay
the same objects, of another shape: optimizers, schedulers and hooks that hold them go on with them.

A pair becomes A' = P A, B' = B Q. Its gradients are dA' = Q^T dA and dB' = dB P^T, since dA = s B^T G and dB = s G A^T
for a gradient G of the weight. So what an optimizer has gathered from gradients moves by the transposed map of the
other factor: m_A' = Q^T m_A, m_B' = m_B P^T, exactly; and the squares, v_A' = (Q^T)^2 v_A, v_B' = v_B (P^T)^2, as if
their entries were not correlated. The count of steps stays. (To start the moments at zero again costs more at high
learning rates, and to keep m without v makes a run diverge.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from lightning_lora.engine.change import Change, changes_of
from lightning_lora.engine.config import LoRAConfig, exact_pattern, usual
from lightning_lora.engine.cut import (
    Aim,
    ResizeReport,
    check_limit,
)
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers import DoRA, Pair, pairs
from lightning_lora.engine.optim import with_inner
from lightning_lora.engine.present import Injection, check_as_injected, check_some_of_ours, injections
from lightning_lora.engine.report import InjectionReport
from lightning_lora.engine.tree import Tree, name_in
from lightning_lora.engine.weights import check_unsharded
from lightning_lora.errors import AdapterStateError, TrainingError, listed


def resize(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> ResizeReport:
    """Give the adapters of `model` another rank, in place. Give one of `rank`, `energy` and `max_error`.

    A pair that grows gets new rows of A as the init draws them, and zeros in B (an embedding: the other way round), so
    the model computes the same as before (a library may add up products of two sizes in another order, which changes
    the last bits). A pair that is cut becomes the best approximation of its update
    of that rank. Scales stay as they are, so alphas follow the ranks. The config in the record of `inject` has the new
    ranks: what is saved, merged and resumed afterwards is right.

    DoRA keeps its magnitudes, and with them the norms of its adapted weights; a cut changes their directions. An
    initialiser with a frozen start (PiSSA) has none any more where all pairs are cut: the update includes it then.

    Args:
        model: What `inject` was called on, or what holds it. No forward may be waiting for its backward pass.
        rank: The new rank of every pair, also of those that had another.
        energy: In (0, 1]: cut each pair to the smallest rank that keeps this share of the sum of the squared singular
            values of its update. The update of an untrained pair is zero, for which one rank is enough.
        max_error: Cut each pair to the smallest rank with at most this relative error of its update (Frobenius norm).
        optimizer: The optimizer, or the optimizers, that train the adapters. Their moments are carried over. One that
            is not given would raise in its next step, since its moments have the old shapes.

    Returns:
        For each pair the ranks and the error, and the error of all together; `str()` is a table.

    Raises:
        ConfigError: An argument is invalid, a convolution's groups do not divide the rank, or rounding does not allow
            `max_error`.
        AdapterStateError: The model has no adapters, is only a part of what was adapted, is merged, sharded, wrapped by
            DDP, on the meta device, or holds values that are not finite.
        TrainingError: An optimizer keeps state that cannot be carried over (LBFGS, Rprop, 8-bit optimizers).

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, resize
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> _ = inject(model, LoRAConfig(rank=2, alpha=4, target_modules=["0"]))
        >>> print(resize(model, rank=3))
        resized to rank 3
        module  number  rank    largest error
        ------  ------  ------  -------------
        0            1  2 -> 3           none
        1 module; 14 -> 21 parameters; error: none
        >>> model[0].lora.rank, model[0].lora.scale
        (3, 2.0)
    """
    aim = Aim.of(rank, energy, max_error)
    parts = _parts(model)
    given = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    with torch.no_grad():
        changes = {name: changes_of(injection.config, own, aim) for name, (injection, own) in parts.items()}
        modules = {
            name_in(name, change.pair.name): change.report() for name, of_part in changes.items() for change in of_part
        }
        check_limit(aim, modules, "Allow more, or keep the factors in float32 (adapter_dtype='float32').")
        every = [change for of_part in changes.values() for change in of_part]
        configs = {name: _config(injection.config, changes[name]) for name, (injection, _) in parts.items()}
        carried = [moved for outer in given for one in with_inner(outer) for moved in _carried(one, every)]
        # Nothing below can fail for a reason in the model or the arguments.
        for change in every:
            change.apply()
        for state, key, value in carried:
            state[key] = value
        for name, (injection, _) in parts.items():
            for change in changes[name] if INITS[configs[name].init].gives != "Factors" else ():
                change.drop_start()
            injection.config = configs[name]
            assert injection.report is not None, "inject leaves it"
            injection.report = _report(injection.report, changes[name])
    return ResizeReport(modules, aim.said, tuple(_notes(every)))


def _parts(model: nn.Module) -> dict[str, tuple[Injection, list[Pair]]]:
    """The name of each part that `inject` was called on -> its record, and its pairs, with names in that part. Raises
    AdapterStateError for a model that cannot be resized."""
    tree = Tree.of(model)
    what = type(tree.root).__name__
    check_some_of_ours(model, tree)
    check_as_injected(model, tree)
    check_unsharded(
        model,
        "To give its adapter another rank, save it (save_adapter, in every process), resize the folder "
        "(resize_adapter), and load it into a model before that is sharded.",
        tree,
    )
    if any(isinstance(wrapper, DistributedDataParallel) for _, wrapper in tree.wrappers):
        raise AdapterStateError(
            f"{what} is wrapped by DistributedDataParallel, whose buckets have room for gradients of these ranks: "
            "resize the module inside of it in every process (model.module), and wrap it anew."
        )
    parts = {}
    for name, injection in injections(model, tree):
        parts[name] = (injection, list(pairs(tree.by_name[name])))
    known = {id(pair.A) for _, own in parts.values() for pair in own}
    every = list(pairs(model))
    if outside := [pair.name for pair in every if id(pair.A) not in known]:
        raise AdapterStateError(
            f"{listed(map(repr, outside), 3)} of this {what} was adapted as a part of a larger module, whose record "
            "would keep the old ranks: pass what inject was called on (under a Trainer, the LightningModule)."
        )
    for pair in every:
        for t in (pair.A, pair.B):
            if type(t) is not nn.Parameter or t.is_meta:
                where = (
                    "is on the meta device"
                    if t.is_meta
                    else f"is a {type(t).__name__} (a parametrization, for example)"
                )
                raise AdapterStateError(f"The adapter of {pair.name!r} {where}, so its rank cannot be changed.")
            if not bool(torch.isfinite(t).all()):
                raise AdapterStateError(f"The adapter of {pair.name!r} holds values that are not finite.")
    if waiting := [name or what for name, (injection, _) in parts.items() if injection.awaits_start]:
        raise AdapterStateError(f"The adapter of {listed(waiting)} is not started or loaded yet: call start_adapters.")
    return parts


# The record of `inject`, and the optimizers.


def _config(config: LoRAConfig, changes: Sequence[Change]) -> LoRAConfig:
    """`config` with the new ranks and alphas, each by the whole name of its pair."""
    ranks = {change.pair.name: change.spec.rank for change in changes}
    alphas = {change.pair.name: change.spec.alpha for change in changes}
    rank, alpha = usual(config.rank, ranks), usual(config.alpha, alphas)
    init = INITS[config.init]
    has_no_start = init.gives == "Factors" and all(change.kind == "cut" for change in changes)
    if has_no_start or any(one % init.rank_multiple for one in (rank, *ranks.values())):
        config = replace(config, init="kaiming")
    return replace(
        config,
        rank=rank,
        alpha=alpha,
        rank_pattern=exact_pattern(ranks, rank),
        alpha_pattern=exact_pattern(alphas, alpha),
    )


def _report(report: InjectionReport, changes: Sequence[Change]) -> InjectionReport:
    """The report of the injection with the new ranks and numbers of elements."""
    by_name = {change.pair.name: change for change in changes}
    modules, trained, frozen = [], 0, 0
    for row in report.modules:
        change = by_name[row.name]
        more = 0
        for p, (was, new) in zip(change.parameters, ((change.was_A, change.A), (change.was_B, change.B))):
            more += (new.numel() - was.numel()) * p.requires_grad
            frozen += (new.numel() - was.numel()) * (not p.requires_grad)
        trained += more
        note = "; ".join(part for part in row.note.split("; ") if not part.startswith("rank "))
        spec = change.spec
        modules.append(row._replace(rank=spec.rank, scale=spec.scale, parameters=row.parameters + more, note=note))
    return replace(report, modules=tuple(modules), trainable=report.trainable + trained, frozen=report.frozen + frozen)


_SUMS = ("exp_avg", "momentum_buffer", "grad_avg")
"""Names under which torch's optimizers keep sums of gradients."""
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names under which they keep sums, or maxima, of squared gradients."""


def _carried(optimizer: Optimizer, changes: Sequence[Change]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """The entries of the state of `optimizer` for pairs that change: the state of a parameter, the name, the new value.
    Raises TrainingError for an entry that cannot be carried over."""
    changed = {p: change for change in changes if change.kind != "same" for p in change.parameters}
    for p, key in moments(optimizer, {p: change.pair.name for p, change in changed.items()}):
        state = optimizer.state[p]
        yield state, key, changed[p].moved(state[key], p, is_square=key in _SQUARES)


def moments(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[nn.Parameter, str]]:
    """The entries of the state of `optimizer` for those of its parameters that are in `names` (factors, with the names
    of their pairs) that follow a change of rank. Raises TrainingError for others, but for numbers, which stay."""
    what = type(optimizer).__name__
    held = [p for group in optimizer.param_groups for p in group["params"] if p in names]
    if held and isinstance(optimizer, LBFGS):
        raise TrainingError(f"{what} keeps past steps in one flat vector, of the old ranks: {_ANEW}")
    for p in held:
        for key, value in optimizer.state.get(p, {}).items():
            if value is None or isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0):
                continue  # a count of steps, for one
            if key not in (*_SUMS, *_SQUARES) or not isinstance(value, Tensor) or value.shape != p.shape:
                raise TrainingError(
                    f"{what} keeps {key!r} for the factors of {names[p]!r}, and how that follows a change of rank is "
                    f"not known, but for {listed((*_SUMS, *_SQUARES))}, in the shape of the parameter: {_ANEW}"
                )
            yield p, key


_ANEW = "resize before the training, or without optimizer= and make a new optimizer after that. Nothing was changed."


def _notes(changes: Sequence[Change]) -> Iterator[str]:
    cuts = [change for change in changes if change.kind == "cut"]
    if any(isinstance(change.pair.module, DoRA) for change in cuts):
        yield (
            "DoRA: the magnitudes stay, so each output's weights keep their norm; the error is that of the adapted "
            "weight, relative to what the adapter changes in it"
        )
    if any(change.start for change in cuts):
        yield "the frozen start (init) is now a part of the update that was cut, as in a saved adapter"
