"""Checks that several adapters can be combined, before anything is computed, and reports what a combination did.

The adapters must share one base and one geometry for each module. Only pairs can be weighted: tensors that were trained
whole must be the same in all adapters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.engine.cut import shown_error
from lightning_lora.engine.report import aligned, by_ending, overall_error
from lightning_lora.engine.state import compare_bases
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, listed
from lightning_lora.format import peft
from lightning_lora.hub.address import base_id
from lightning_lora.rewriting.parts import Pair, Parts

_BASE = "base_fingerprint", "base_dtypes"


def check_combinable(adapters: Mapping[str, Parts], weights: Mapping[str, float]) -> None:
    """Raise AdapterFormatError, which names all problems, unless `adapters` (by their names) can be combined with
    `weights`."""
    problems = [*_dora(adapters), *_geometries(adapters), *_whole(adapters, weights)]
    problems += [f"{name}: {why}" for name, parts in adapters.items() for why in parts.unclear()]
    if problems:
        raise AdapterFormatError(f"These adapters cannot be combined: {'; '.join(problems)}. Nothing was written.")


def check_bases(adapters: Mapping[str, Parts]) -> None:
    """Raise BaseMismatchError where two of `adapters` were trained on different bases: the fingerprints of the weights
    differ, or, if these show nothing, the ids on the Hub."""
    for (name, parts), (other, others) in combinations(adapters.items(), 2):
        one, two = ({key: p.note.get(key) for key in _BASE} for p in (parts, others))
        why = ""
        if one["base_fingerprint"] and two["base_fingerprint"]:
            if one["base_fingerprint"] == two["base_fingerprint"]:
                continue
            dtypes = two["base_dtypes"] if isinstance(two["base_dtypes"], list) else []
            try:
                compare_bases(one, {**two, "base_dtypes": dtypes}, what=name, model=other)
            except BaseMismatchError:
                why = f"the fingerprints of their weights are {one['base_fingerprint']} and {two['base_fingerprint']}"
        ids = [base_id(p.data.get("base_model_name_or_path")) for p in (parts, others)]
        if not why and all(ids) and ids[0] != ids[1]:
            why = f"{ids[0]} and {ids[1]}"
        if why:
            raise BaseMismatchError(
                f"{name} and {other} were trained on different bases: {why}. What they change cannot be added up. If "
                "you know that the bases are the same, pass check_base=False. Nothing was written."
            )


def groups_of(pair: Pair) -> int:
    """The number of groups of a grouped convolution, each of which has a product B A of its own; else 1."""
    return pair.rank // pair.B.shape[1]


def _dora(adapters: Mapping[str, Parts]) -> list[str]:
    found = [name for name, parts in adapters.items() if parts.is_dora]
    if not found:
        return []
    return [
        f"{listed(found)}: DoRA rescales the adapted weight, and its magnitudes do not add up. Rewrite it as a plain "
        "pair first: lightning-lora export --for vllm adapter=... base=... output=..."
    ]


def _geometries(adapters: Mapping[str, Parts]) -> list[str]:
    seen: dict[str, tuple[str, str]] = {}
    problems = []
    for adapter, parts in adapters.items():
        for module, pair in parts.pairs.items():
            groups = groups_of(pair) if 0 < pair.B.shape[1] <= pair.rank else 0
            if not groups or groups * pair.B.shape[1] != pair.rank or pair.B.shape[0] % groups:
                shapes = f"{tuple(pair.A.shape)} and {tuple(pair.B.shape)}"
                problems.append(f"{adapter}: the factors of {module!r}, {shapes}, do not fit one another")
                continue
            other, theirs = seen.setdefault(module, (adapter, _geometry(pair)))
            if theirs != _geometry(pair):
                problems.append(f"{module!r} is {theirs} for {other}, and {_geometry(pair)} for {adapter}")
    return problems[:8]


def _geometry(pair: Pair) -> str:
    """The geometry of a pair, in words. Two pairs can adapt one module only if it is the same for both."""
    kind = "embedding" if pair.is_embedding else "layer" if pair.is_matrix else "convolution"
    kernel = f" with kernel {'x'.join(map(str, pair.A.shape[2:]))}" if pair.A.ndim > 2 else ""
    groups = f" in {groups_of(pair)} groups" if groups_of(pair) > 1 else ""
    return f"a {kind} {pair.A.shape[1]} -> {pair.B.shape[0]}{kernel}{groups}"


def _whole(adapters: Mapping[str, Parts], weights: Mapping[str, float]) -> list[str]:
    """Problems with modules and biases that were trained whole. They replace the base's, and the file does not hold how
    much they changed, so they cannot be weighted. They can be kept if they are the same in all adapters."""
    problems = []
    for what, field in (("modules_to_save", "saved"), ("biases", "biases"), ("weights of the base", "base")):
        by_adapter = {name: _by_name(getattr(parts, field)) for name, parts in adapters.items()}
        names = list(dict.fromkeys(key for tensors in by_adapter.values() for key in tensors))
        # Not every file has a copy of the base's own weights.
        lacking = [n for n in names if field != "base" and any(n not in tensors for tensors in by_adapter.values())]
        unequal = [
            n for n in names if n not in lacking and not _all_same([t[n] for t in by_adapter.values() if n in t])
        ]
        if lacking or unequal:
            only = f"only some have {listed(lacking, 3)}" if lacking else f"they differ in {listed(unequal, 3)}"
            problems.append(
                f"{what}: {only}. Such a tensor takes the place of the base's, and by how much it changed is not in "
                "the file, so it cannot be weighted. Combine adapters in which it is the same, or trained without it"
            )
        elif field == "biases" and names and not math.isclose(math.fsum(weights.values()), 1.0):
            problems.append(
                f"biases: {listed(names, 3)} are the base's plus what was trained, which is not known by itself: with "
                "weights that do not add up to 1 they cannot be weighted"
            )
    if len({parts.config.bias for parts in adapters.values()}) > 1 and not problems:
        problems.append("biases: some adapters train them and others do not")
    return problems


def _by_name(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {peft.base_name(key): tensor for key, tensor in tensors.items()}


def _all_same(tensors: list[Tensor]) -> bool:
    first = tensors[0]
    return all(t.shape == first.shape and t.dtype == first.dtype and torch.equal(t, first) for t in tensors[1:])


# What a combination did, as data and as a table.


@dataclass(frozen=True)
class CombinedModule:
    """One module of the combination, as it was written."""

    ranks: tuple[int | None, ...]
    """The ranks of the adapters, in their order; None for an adapter that does not adapt the module."""
    rank: int
    norm: float
    """Frobenius norm of the combination before it was cut to `rank` and rounded."""
    error: float
    """Frobenius norm of the part that was cut off, plus that of the rounding, relative to `norm`. The sum is an upper
    bound; it is exact but for the rounding."""


@dataclass(frozen=True)
class CombineReport:
    """What `combine_adapters` did; `str()` is an aligned table with totals."""

    folder: Path
    method: str
    """The method, with its settings."""
    adapters: tuple[tuple[str, float], ...]
    """The name of each adapter, and its weight."""
    modules: Mapping[str, CombinedModule]
    alpha: float
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """Frobenius norm of the errors of all modules together, relative to the combination."""
        return overall_error((m.error, m.norm) for m in self.modules.values())

    @property
    def largest_error(self) -> float:
        """The error of the module with the largest error."""
        return max(m.error for m in self.modules.values())

    def __repr__(self) -> str:
        done = f"{self.method}, {len(self.modules)} modules, error {shown_error(self.error)}"
        return f"CombineReport({str(self.folder)!r}, {done})"

    def __str__(self) -> str:
        width = max(len(f"{weight:g}") for _, weight in self.adapters)
        lines = [f"combined by {self.method}", *(f"  {weight:>{width}g} x {name}" for name, weight in self.adapters)]
        head = ("module", "number", "ranks", "rank", "largest error")
        lines += aligned([head, *self._rows()], right=(1, 3, 4))
        count = len(self.modules)
        lines.append(f"{count} module{'' if count == 1 else 's'}; error: {of_combination(self.error)}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _rows(self) -> list[tuple[str, ...]]:
        """One row for all modules whose names end alike and that have the same ranks."""

        def ranks(m: CombinedModule) -> tuple[str, str]:
            return " + ".join("-" if rank is None else str(rank) for rank in m.ranks), str(m.rank)

        return [
            (ending, str(len(members)), *of_group, shown_error(max(m.error for m in members)))
            for (ending, of_group), members in by_ending(self.modules.items(), ranks).items()
        ]


def of_combination(error: float) -> str:
    said = shown_error(error)
    return said if said == "none" else f"{said} of the combination"
