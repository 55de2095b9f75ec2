"""Shrinks the intruder dimensions of an adapter folder, and shows what that costs (arXiv:2410.21228)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checked import number, whole
from lightning_lora.engine.intruders import COUNT, LIMIT, THRESHOLD, Intruders, directions, intruders
from lightning_lora.engine.layers.pair import as_blocks
from lightning_lora.engine.low_rank import product_norm
from lightning_lora.engine.report import aligned, by_ending
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.files import within_temporary_folder
from lightning_lora.hub.adapters import check_is_base
from lightning_lora.hub.base_weights import Base, WeightOf, weights_of
from lightning_lora.page import number as written
from lightning_lora.rewriting.parts import Pair, Parts, parts_to_change

STRENGTHS = (1.0, 0.75, 0.5, 0.25, 0.0)
Measure = Callable[[Path], Mapping[str, float]]


@dataclass(frozen=True)
class RepairedModule:
    """One module whose adapted weight was looked at."""

    intruders: int
    """How many of the first singular vectors of W + s B A are intruder dimensions."""
    left: Mapping[float, int]
    """The same for each strength."""
    sizes: Mapping[float, float]
    """The Frobenius norm of the update for each strength."""
    of_base: tuple[float, ...] = ()
    """For each intruder the part of its singular value that W has along it by itself, which stays: ||W^T u|| / S."""


@dataclass(frozen=True)
class RepairReport:
    """What shrinking the intruder dimensions does at each strength. `str()` is the curve as a table."""

    modules: Mapping[str, RepairedModule]
    strength: float
    """The strength that was chosen."""
    metrics: Mapping[float, Mapping[str, float]]
    """What was measured of the adapter at each strength."""
    folder: Path | None
    """Where the adapter lies; None where there was no intruder, so that none was written."""
    notes: tuple[str, ...] = ()

    @property
    def strengths(self) -> tuple[float, ...]:
        """Those of the curve, the largest first."""
        return tuple(sorted({s for m in self.modules.values() for s in m.sizes}, reverse=True))

    @property
    def intruders(self) -> int:
        """The number of intruder dimensions of all modules."""
        return sum(m.intruders for m in self.modules.values())

    def left(self, strength: float) -> int:
        """The number of intruder dimensions that the adapter has at this strength."""
        return sum(m.left[strength] for m in self.modules.values())

    def kept(self, strength: float) -> float:
        """The Frobenius norm of all updates together at this strength, relative to what it was."""
        now, before = (math.hypot(*(m.sizes[s] for m in self.modules.values())) for s in (strength, 1.0))
        return now / before if before else 1.0

    def __repr__(self) -> str:
        return f"RepairReport({self.intruders} intruders, {len(self.modules)} modules, strength {self.strength:g})"

    def __str__(self) -> str:
        count = len(self.modules)
        found = f"{self.intruders} intruder dimension{'' if self.intruders == 1 else 's'}"
        lines = [f"{found} in {count} module{'' if count == 1 else 's'}"]
        if self.intruders:
            lines += ["", *self._layers(), "", *self._curve()]
        else:
            lines.append("no intruder dimension was found, so there is nothing to repair: nothing was written")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _layers(self) -> list[str]:
        rows = [("module", "number", "intruders", f"left at {self.strength:g}", "share that the base has")]
        for (ending, _), members in by_ending(self.modules.items(), lambda m: None).items():
            shares = sorted(share for m in members for share in m.of_base)
            middle = written(shares[len(shares) // 2], digits=2) if shares else "-"
            found, left = (sum(counts) for counts in zip(*((m.intruders, m.left[self.strength]) for m in members)))
            rows.append((ending, str(len(members)), str(found), str(left), middle))
        return aligned(rows, right=range(1, 5))

    def _curve(self) -> list[str]:
        names = list(dict.fromkeys(name for measured in self.metrics.values() for name in measured))
        rows = [["strength", "intruders", "update kept", *names, ""]]
        for strength in self.strengths:
            values = self.metrics.get(strength, {})
            cells = [written(values[name], digits=4) if name in values else "-" for name in names]
            mark = "written" if strength == self.strength else ""
            row = [f"{strength:g}", str(self.left(strength)), f"{100 * self.kept(strength):.1f} %", *cells, mark]
            rows.append(row)
        return aligned(rows, right=range(len(rows[0]) - 1))


def repair_adapter(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    model: Base,
    strength: float = 0.5,
    strengths: Sequence[float] = STRENGTHS,
    count: int = COUNT,
    threshold: float = THRESHOLD,
    intruder_limit: int = LIMIT,
    measure: Measure | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_fields: Collection[str] = (),
    check_base: bool = True,
) -> RepairReport:
    """Write `adapter` into `folder` with its intruder dimensions scaled by `strength`, and report the trade-off.

    An intruder is one of the first `count` left singular vectors of W + s B A that resembles none of W's: its cosine
    with each is below `threshold` (Shuttleworth et al. 2024, arXiv:2410.21228, algorithm 1). With these vectors as the
    columns of U, the update s B A becomes s (I - (1 - strength) U U^T) B A. So B alone changes, and the rank, the
    scales and A stay.

    The paper scales the whole component of W + s B A along an intruder, base included, which would be no update of
    rank r. Here what W has by itself along an intruder (U U^T W) stays; the report says how much that is. Therefore,
    and since other vectors may move up, intruders can be left even at strength 0: the curve counts them anew.

    Args:
        adapter: A folder in PEFT's format, or an id on the Hub.
        folder: Where to write the result; another folder than that of `adapter`. All else in that is carried over.
        model: The base: the module, a folder or file of safetensors, or an id on the Hub ("user/name@revision").
        strength: How much of the update along intruders is kept, from 0 (none) to below 1.
        strengths: Those of the curve in the report.
        count, threshold: Which singular vectors are intruders.
        intruder_limit: Weights whose smaller side is larger are left as they are. Each takes an SVD of the base and one
            for each strength.
        measure: Called with the folder of the adapter at each strength (a temporary one); what it returns joins the
            curve.
        revision, subfolder, ignore_fields: As in `load_adapter`.
        check_base: Refuse a module that is not the adapter's base, or that the adapter does not fit.

    Returns:
        The report; `str()` is the curve as a table. Nothing is written where there is no intruder.

    Raises:
        ConfigError: An argument is not valid.
        AdapterFormatError: The adapter is damaged, does not fit `model`, or is a DoRA, whose magnitudes rescale
            W + s B A.
        BaseMismatchError: The module is another base than that of the adapter.
        AdapterStateError: The module has adapters: `remove` them first.
        HubError: Something cannot be fetched.
        CheckpointError: Files cannot be read or written.

    Example:
        >>> import tempfile, torch
        >>> from lightning_lora import LoRAConfig, inject, remove, repair_adapter, save_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> _ = base[0].weight.data.copy_(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
        >>> _ = inject(base, LoRAConfig(rank=1, alpha=1, target_modules=["0"]))
        >>> _ = base[0].lora_B.data.fill_(0.5), base[0].lora_A.data.fill_(20.0)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = save_adapter(base, f"{place}/adapter")
        ...     remove(base)
        ...     report = repair_adapter(folder, f"{place}/repaired", model=base, strength=0.0, count=1, threshold=0.6)
        >>> report.intruders, report.left(0.0)
        (1, 0)
    """
    chosen = _strength("strength", strength)
    if chosen == 1:
        raise ConfigError("strength=1 would leave the adapter as it is: give a number from 0 to below 1.")
    asked = sorted({1.0, chosen, *(_strength("strengths", s) for s in strengths)}, reverse=True)
    whole("count", count)
    number("threshold", threshold, above=0)
    whole("intruder_limit", intruder_limit)
    parts, target = parts_to_change(adapter, folder, revision, subfolder, ignore_fields)
    if parts.is_dora:
        raise AdapterFormatError(
            f"{parts.folder} is a DoRA: its magnitudes rescale the rows of W + s B A, so scaling B would not scale an "
            "intruder. lightning-lora export --for llama.cpp writes a DoRA as plain LoRA, which can be repaired."
        )
    if isinstance(model, nn.Module) and check_base:
        check_is_base(model, parts.folder, ignore_fields)
    weight = weights_of(model)
    modules: dict[str, RepairedModule] = {}
    changed: dict[float, dict[str, Tensor]] = {s: {} for s in asked}
    unfit: list[str] = []
    with torch.no_grad():
        for name, pair in parts.pairs.items():
            W = _matrix(pair, weight, parts.is_transposed, intruder_limit)
            if W is None:
                unfit.append(name)
                continue
            modules[name], factors = _repaired(pair, W, asked, count, threshold)
            for s, tensors in factors.items():
                changed[s] |= tensors
    notes = tuple(_notes(parts, unfit, intruder_limit))
    if not any(m.intruders for m in modules.values()):
        return RepairReport(modules, chosen, {}, None, notes)
    metrics = {s: dict(_measured(parts, s, changed[s], measure)) for s in asked} if measure is not None else {}
    _write(parts, target, chosen, changed[chosen])
    return RepairReport(modules, chosen, metrics, target, notes)


def _strength(name: str, value: Any) -> float:
    found = number(name, value, least=0, why="it is the share of the update along intruders that is kept")
    if found > 1:
        raise ConfigError(f"{name} is a share from 0 to 1, not {value!r}.")
    return found


def _matrix(pair: Pair, weight: WeightOf, is_transposed: bool, limit: int) -> Tensor | None:
    """The base's weight (out, in); None for groups, experts, transposed convolutions, and weights above the limit."""
    is_one = pair.A.shape[0] == pair.rank == pair.B.shape[1] and pair.B[0, 0].numel() == 1 and not pair.parameters
    if not is_one or min(pair.B.shape[0], pair.A[0].numel()) > limit:
        return None
    W = pair.weight_in(weight, is_transposed)
    return W.float() if W.dtype.itemsize < 4 else W


def _repaired(
    pair: Pair, W: Tensor, strengths: Sequence[float], count: int, threshold: float
) -> tuple[RepairedModule, dict[float, dict[str, Tensor]]]:
    """What was found of one module, and the pair's tensors at each strength."""
    (A,), (B,) = as_blocks(pair.A, pair.B, pair.rank)
    base = directions(W)

    def found_with(B: Tensor) -> Intruders:
        change = pair.scale * (B.double() @ A.double())
        return intruders(base, W + change.to(W.dtype), count=count, threshold=threshold)

    found = found_with(B)
    factors = {s: B if s == 1 else found.scaled_in(B, s).to(B.dtype) for s in strengths}
    left = {s: len(found) if s == 1 or not len(found) else len(found_with(b)) for s, b in factors.items()}
    sizes = {s: abs(pair.scale) * product_norm(b, A) for s, b in factors.items()}
    of_base = (found.U.mT @ W.double()).norm(dim=1) / found.S
    module = RepairedModule(len(found), left, sizes, tuple(of_base.tolist()))
    tensors = {s: pair.tensors(A[None], b[None]) for s, b in factors.items()} if len(found) else {}
    return module, tensors


def _measured(parts: Parts, strength: float, changed: Mapping[str, Tensor], measure: Measure) -> Mapping[str, float]:
    if strength == 1:
        return measure(parts.folder)
    with within_temporary_folder("repair") as place:
        _write(parts, place / "adapter", strength, changed)
        return measure(place / "adapter")


def _write(parts: Parts, target: Path, strength: float, changed: Mapping[str, Tensor]) -> None:
    said = {"intruder dimensions": f"scaled by {strength:g} (arXiv:2410.21228)"}
    note = {"repaired": {"strength": strength}}
    parts.write(target, parts.data, {**parts.tensors, **changed}, note, said)


def _notes(parts: Parts, unfit: Sequence[str], limit: int) -> Iterator[str]:
    if unfit:
        yield (
            f"not looked at, and left as they are: {listed(unfit)} (more than {limit} rows and columns, groups, "
            "experts, or a transposed convolution)"
        )
    if parts.config.modules_to_save:
        yield f"modules that were trained whole stay as they are: {listed(parts.config.modules_to_save)}"
