"""The report of an injection, as data and as a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from torch import Tensor

from lightning_lora.engine.layers.pair import TENSORS, AdapterSpec
from lightning_lora.engine.plan import Plan
from lightning_lora.engine.tree import Tree, weight_users
from lightning_lora.engine.weights import shape_of
from lightning_lora.errors import listed

Row = TypeVar("Row")
Key = TypeVar("Key", bound=Hashable)


class AdaptedModule(NamedTuple):
    """One row of a report."""

    name: str
    kind: str
    """The class that was adapted."""
    shape: tuple[int, ...]
    """The shape of its weight."""
    rank: int
    scale: float
    parameters: int
    """The number of trained elements that the module's adapter has."""
    note: str = ""


@dataclass(frozen=True)
class InjectionReport:
    """The report that `inject` returns; `str()` gives an aligned table with totals.

    >>> import torch
    >>> from lightning_lora import LoRAConfig, inject
    >>> report = inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRAConfig(rank=2, target_modules=["0"]))
    >>> report.trainable, report.frozen, round(report.trainable_share, 2)
    (14, 15, 0.48)
    """

    modules: tuple[AdaptedModule, ...]
    trained_whole: tuple[str, ...]
    """Names of the parameters that are trained beside A and B: modules_to_save and biases."""
    head: str | None
    """The layer that "all-linear" took for the output head and left out."""
    tokens: dict[str, int]
    """Name of an embedding, or of a head that shares its weight -> number of its rows that are trained."""
    left_out: dict[str, str]
    """Weights and frozen parts that are not adapted though one may expect it: name -> how to adapt it."""
    trainable: int
    """The number of elements that are trained: those of the adapter and of `trained_whole`."""
    frozen: int
    """The number of elements that are frozen: those of the base, and of A with `freeze_a`."""

    @property
    def trainable_share(self) -> float:
        """The trained elements as a share of all elements, from 0 to 1."""
        return self.trainable / max(1, self.trainable + self.frozen)

    def within(self, name: str, others: int) -> InjectionReport:
        """The report of a larger model that holds the injected one as `name`, beside `others` frozen elements."""
        prefix = f"{name}." if name else ""
        return replace(
            self,
            modules=tuple(m._replace(name=f"{prefix}{m.name}".removesuffix(".")) for m in self.modules),
            trained_whole=tuple(prefix + trained for trained in self.trained_whole),
            head=None if self.head is None else prefix + self.head,
            tokens={prefix + rows: count for rows, count in self.tokens.items()},
            left_out={prefix + left: how for left, how in self.left_out.items()},
            frozen=self.frozen + others,
        )

    def __repr__(self) -> str:
        return f"InjectionReport({self._totals()})"

    def __str__(self) -> str:
        groups = _grouped(self.modules)
        rows = [
            (
                *((name or "(root)", str(count)) if len(groups) < len(self.modules) else (name or "(root)",)),
                *(m.kind, "x".join(map(str, m.shape)), str(m.rank), f"{m.scale:g}", f"{count * m.parameters:,}"),
            )
            for name, count, m in groups
        ]
        head = ["module", *(["number"] if len(groups) < len(self.modules) else [])]
        head += ["kind", "weight", "rank", "scale", "parameters"]
        right = [i for i, column in enumerate(head) if column in ("number", "rank", "scale", "parameters")]
        lines = aligned([head, *rows], right)
        lines += [f"{name}: {m.note}" for name, _, m in groups if m.note]
        if self.trained_whole:
            lines.append(f"trained whole: {listed(self.trained_whole)}")
        if self.head is not None:
            lines.append(f"taken for the output head, and so not adapted: {self.head}")
        if self.tokens:
            (name, count), *users = self.tokens.items()
            lines.append(f"rows trained: {count} of {name}{''.join(f', which {user} shares' for user, _ in users)}")
        for how in dict.fromkeys(self.left_out.values()):
            names = [name for name, way in self.left_out.items() if way == how]
            lines.append(f"not adapted: {listed(names)} (to adapt: {how})")
        return "\n".join([*lines, self._totals()])

    def _totals(self) -> str:
        count = len(self.modules)
        return (
            f"{count} module{'' if count == 1 else 's'} adapted; {self.trainable:,} parameters trained "
            f"({100 * self.trainable_share:.2f} %), {self.frozen:,} frozen"
        )


def _grouped(modules: Sequence[AdaptedModule]) -> list[tuple[str, int, AdaptedModule]]:
    """Join rows that differ only in numbers of their names: the joined name ("layers.0-31.mlp"), the number of rows,
    and the first of them.

    Names are joined in one number at a time, so that a joined name stands for all of its combinations and no others.
    """
    groups = [(m.name.split("."), 1, m) for m in modules]
    for at in reversed(range(max((len(parts) for parts, _, _ in groups), default=0))):
        alike: dict[str, list[tuple[list[str], int, AdaptedModule]]] = {}
        for parts, count, m in groups:
            number = ["#"] if at < len(parts) and parts[at].isdecimal() else parts[at : at + 1]
            key = repr((parts[:at], number, parts[at + 1 :], count, m[1:]))
            alike.setdefault(key, []).append((parts, count, m))
        groups = [members[0] if len(members) == 1 else _joined(members, at) for members in alike.values()]
    return [(".".join(parts), count, m) for parts, count, m in groups]


def _joined(members: Sequence[tuple[list[str], int, AdaptedModule]], at: int) -> tuple[list[str], int, AdaptedModule]:
    parts, _, m = members[0]
    numbers = _spans([int(own[at]) for own, _, _ in members])
    return [*parts[:at], numbers, *parts[at + 1 :]], sum(count for _, count, _ in members), m


def _spans(numbers: Sequence[int]) -> str:
    """ "0-3,7" for 0, 1, 2, 3 and 7."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def report_rows(plan: Plan, tensors: Sequence[Mapping[str, Tensor]], tree: Tree) -> Iterator[AdaptedModule]:
    """The rows of the report, for modules that are not swapped yet."""
    is_tied = len({id(p) for _, p in tree.parameters}) < len(tree.parameters)
    tied = weight_users(tree.modules) if is_tied else {}
    for (target, kind), own in zip(plan, tensors):
        spec, module = kind.spec, target.module
        parts: dict[str | None, AdapterSpec] = dict(spec.parameters.items()) or {None: spec}
        for parameter, part in parts.items():
            suffix = kind.geometry.suffix_of(parameter or "weight")
            A, B = own["lora_A" + suffix], own["lora_B" + suffix]
            weight = module._parameters.get(parameter or "weight")
            shape = shape_of(weight) if weight is not None else (B.shape[0], A.shape[1])
            mine = own if len(parts) < 2 else {k: t for k, t in own.items() if k.removesuffix(suffix) in TENSORS}
            trained = sum(t.numel() for t in mine.values() if t.requires_grad)
            notes = []
            if parameter in kind.wasteful:
                notes.append(f"rank {part.rank} is above the smaller side of the weight")
            if target.aliases:
                notes.append(f"also registered as {', '.join(target.aliases)}: adapted under every name")
            if others := [name for name, user in tied.get(id(weight), ()) if user is not module]:
                notes.append(f"shares its weight with {', '.join(others)}: only this module's use of it is adapted")
            name = target.names_of(parameter)[0]
            yield AdaptedModule(name, type(module).__name__, shape, part.rank, part.scale, trained, "; ".join(notes))


def by_ending(modules: Iterable[tuple[str, Row]], alike: Callable[[Row], Key]) -> dict[tuple[str, Key], list[Row]]:
    """The rows for modules whose names end alike, and of which `alike` says the same, together: (ending, what it says)
    -> the rows, in order. A report shows a line for each."""
    groups: dict[tuple[str, Key], list[Row]] = {}
    for name, row in modules:
        groups.setdefault((name.rpartition(".")[2] or "(root)", alike(row)), []).append(row)
    return groups


def overall_error(errors: Iterable[tuple[float, float]]) -> float:
    """The error of several updates together, relative to all: from (relative error, norm) of each, Frobenius norms."""
    known = list(errors)
    whole = math.fsum(size**2 for _, size in known)
    return math.sqrt(math.fsum((error * size) ** 2 for error, size in known) / whole) if whole else 0.0


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """`rows` as lines of aligned columns, the first row underlined; columns in `right` are set flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))] for r in rows]
    lines = ["  ".join(row).rstrip() for row in cells]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
