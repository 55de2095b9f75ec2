"""Proves that a model applies an adapter: measures each layer, and compares it with what the adapter's files promise.

Nothing is stored for it. The adapter's A, B and scale are put on a twin of the base, and each layer of the twin is
compared with the layer of the model in its place (see engine/verify.py).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_lora.engine import adapter_tensors, adapters
from lightning_lora.engine.judged import (
    NOT_APPLIED,
    OTHER,
    PART,
    SAME,
    SURVIVES,
    SWALLOWED,
    UNCHECKED,
    VERDICTS,
    Verified,
    compare_whole,
)
from lightning_lora.engine.report import aligned, by_ending
from lightning_lora.engine.state import check_fits, check_same_base
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.twin import Bare, bare, has_active_adapter
from lightning_lora.engine.verify import check_layer
from lightning_lora.errors import AdapterFormatError, AdapterStateError, listed
from lightning_lora.format.inspection import opened
from lightning_lora.format.layout import member, place_of
from lightning_lora.format.matching import Fit, fit
from lightning_lora.hub.base_weights import Base, WeightOf, weights_of
from lightning_lora.hub.pull import Pulling, adapter_folder


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_adapter` found; `str()` is a table, and a line with the verdict."""

    modules: tuple[Verified, ...]
    folder: Path

    @property
    def verdict(self) -> str:
        """The verdict on the adapter as a whole: "same" if that is the verdict on each module that could be checked;
        "part missing" if others are right, and some have no update; else the gravest one.

        Modules whose update is swallowed count only where less than nine tenths of all updates together survive.
        """
        found = {m.verdict for m in self.modules} - {UNCHECKED}
        if SWALLOWED in found and self.share >= SURVIVES:
            found = found - {SWALLOWED} | {SAME}
        if NOT_APPLIED in found and found & {SAME, SWALLOWED}:
            found.add(PART)
        return next((verdict for verdict in VERDICTS if verdict in found), UNCHECKED)

    @property
    def ok(self) -> bool:
        """True if the model applies this adapter, as far as it could be checked."""
        return self.verdict == SAME

    @property
    def share(self) -> float:
        """The share of all updates together that survives the model's precision: the mean over the modules, weighted
        by the squares of the updates' norms."""
        known = [m for m in self.modules if m.share is not None and m.verdict in (SAME, SWALLOWED)]
        whole = math.fsum(m.size**2 for m in known)
        return math.fsum(m.share * m.size**2 for m in known if m.share is not None) / whole if whole else 1.0

    @property
    def not_checked(self) -> dict[str, str]:
        """Name of each module that could not be checked -> why."""
        return {m.name: m.note for m in self.modules if m.verdict == UNCHECKED}

    def raise_for_verdict(self) -> None:
        """Raise AdapterStateError, whose message is the report, unless `ok`."""
        if not self.ok:
            what = f"the adapter in {self.folder}"
            is_known = self.verdict != UNCHECKED
            said = f"The model does not apply {what} as it should." if is_known else f"Nothing shows that {what} acts."
            raise AdapterStateError(f"{said}\n{self}")

    def __repr__(self) -> str:
        return f"VerifyReport({self.verdict!r}, {len(self.modules)} modules)"

    def __str__(self) -> str:
        head = ("module", "number", "verdict", "scale", "largest error", "survives")
        groups = by_ending(((m.name, m) for m in self.modules), lambda m: m.verdict)
        rows = [_row(ending, members) for (ending, _), members in groups.items()]
        lines = aligned([head, *rows], right=(1, 3, 4, 5))
        for note in dict.fromkeys((m.verdict, m.note) for m in self.modules if m.note and m.verdict != SAME):
            names = [m.name or "(root)" for m in self.modules if (m.verdict, m.note) == note]
            lines.append(f"{note[0]}: {listed(names, 3)}: {note[1]}")
        checked = [m for m in self.modules if m.verdict != UNCHECKED]
        right = sum(m.verdict == SAME for m in checked)
        return "\n".join([*lines, f"{self.verdict}: {right} of {len(self.modules)} modules apply the adapter"])


def _row(ending: str, members: list[Verified]) -> tuple[str, ...]:
    scales, errors, shares = (
        [v for m in members if (v := getattr(m, field)) is not None] for field in ("scale", "error", "share")
    )
    texts = dict.fromkeys(f"{value:.3g}" for value in (min(scales), max(scales))) if scales else {}
    return (
        ending,
        str(len(members)),
        members[0].verdict,
        " to ".join(texts),
        f"{max(errors):.2g}" if errors else "",
        f"{100 * min(shares):.3g} %" if shares else "",
    )


def verify_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    *,
    base: Base | None = None,
    revision: str | None = None,
    check_base: bool = True,
    ignore_fields: Collection[str] = (),
    **pulling: Unpack[Pulling],
) -> VerifyReport:
    """Check that `model` applies the adapter, layer by layer. The model is not changed, and its data is not needed.

    Each adapted layer is given inputs in the span of A. What it adds to its base is compared with s B A x, from the
    adapter's files. So the base cancels, and may be quantized. A verdict on each layer says what is wrong: not applied,
    another scale (with the factor, and what it hints at), another adapter, a part missing, or swallowed by the
    precision of the model, in which a small update may round to nothing. What cannot be checked by itself is listed as
    "not checked", with the reason. Tensors that were trained whole are compared number by number.

    Args:
        model: Any module: one that this package or PEFT adapted, one in which a bank uses the adapter just now
            (`with bank.use(name)`), or one into which the adapter was merged.
        adapter: Its folder, or its id on the Hub.
        base: The base without the adapter: a module, a folder or file of safetensors, or an id on the Hub. It is needed
            where the model has no adapter that can be left out: a merged model, or layers of an unknown library (those
            need a module). Else the base is the model without its adapter.
        revision: That of the adapter on the Hub.
        check_base: Compare the base's fingerprint with the one in the adapter, if there is one, and if `base` is no
            folder.
        ignore_fields: Fields of the adapter's config, of a later PEFT, that are passed over.
        pulling: As for `pull_adapter`; `subfolder` also is a place in a folder.

    Returns:
        A report. `ok` is True if the adapter is applied, `raise_for_verdict()` raises if not; its text is a table.

    Raises:
        AdapterStateError: The model has no adapter that could be left out, and there is no `base`.
        AdapterFormatError: The adapter does not fit the model, or its folder is none.
        BaseMismatchError: The adapter was trained on another base.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, save_adapter, verify_adapter
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> report = inject(model, LoRAConfig(rank=3, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].lora_B.normal_()  # as if it had been trained
        >>> folder = save_adapter(model, tempfile.mkdtemp())
        >>> verify_adapter(model, folder).verdict
        'same'
        >>> with torch.no_grad():
        ...     _ = model[0].lora_B.mul_(2)
        >>> wrong = verify_adapter(model, folder)
        >>> wrong.ok, wrong.modules[0].note
        (False, 'x 2: as if it were added twice, or alpha doubled')
    """
    folder = adapter_folder(adapter, revision, ignore_fields=ignore_fields, **pulling)
    inside = bare(model)
    if base is None and not inside.can_switch:
        raise AdapterStateError(
            f"This {type(model).__name__} has no adapter that could be left out, so its base is not known: it is "
            "merged or was never adapted. Give the base as base= (a module, a folder of safetensors, an id on the "
            "Hub); or, to apply the adapter, call load_adapter(model, adapter)."
        )
    is_apart = isinstance(base, nn.Module)
    reference = bare(base).root if isinstance(base, nn.Module) else inside.root
    weight_of = None if base is None or is_apart else weights_of(base)
    before = [(p, p.requires_grad) for p in reference.parameters()]
    try:
        plan, whole, note = _with_factors(reference, folder, ignore_fields)
        if check_base and weight_of is None:
            check_same_base(reference, note, plan.root, what=f"The adapter in {folder}")
        live = _Live(inside, plan, note.get("module") or "") if is_apart else _Live(inside)
        return VerifyReport(tuple(_verified(reference, plan, whole, live, weight_of, base is not None)), folder)
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _with_factors(
    reference: nn.Module, folder: Path, ignore_fields: Collection[str]
) -> tuple[Fit, dict[str, Tensor], dict[str, Any]]:
    """Adapt `reference` as the adapter in `folder` says, and give it the folder's factors. Returns how they fit, the
    tensors that were trained whole, by their names in `reference`, and the note in the file."""
    with opened(folder, ignore_fields) as (config, file), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # load_adapter says them
        plan = fit(reference, config, file.header, where=str(folder))
        values = plan.read(file, compare_base=False)
        plan.inject(reference)
        own, given = adapter_tensors(reference), plan.on(reference, values)
        check_fits(own, given, what="the adapter", are_finite=True)
        note = file.header.note
    for name, layer in adapters(reference):
        for factor in layer.lora_names:
            full = member(name, factor)
            with torch.no_grad():
                own.pop(full).copy_(given[full])
    return plan, {name: given[name] for name in own}, note


class _Live:
    """The modules of a model that stand in the places of those of the reference."""

    def __init__(self, inside: Bare, plan: Fit | None = None, module: str = "") -> None:
        self._inside, self._root = inside, None
        if plan is None:
            return
        names = {name for name, _ in adapters(plan.root)}
        place = place_of(inside.root, names, module)
        if place is None:
            kind = type(inside.root).__name__
            raise AdapterFormatError(f"{kind} has no modules {listed(sorted(names), 3)}, which the adapter adapts.")
        self._root = place[1]

    def at(self, name: str, module: nn.Module) -> nn.Module:
        """What the model has in place of `module`, which is called `name` relative to the adapter's root."""
        own = module if self._root is None else submodule(self._root, name)
        return self._inside.live[id(own)]

    def others(self, seen: set[int]) -> Iterator[str]:
        """The names of the layers that have an adapter and are not among `seen`, by identity."""
        for name, module in Tree.of(self._root or self._inside.root).modules:
            there = self._inside.live.get(id(module))
            if there is not None and id(there) not in seen and has_active_adapter(there):
                yield name


def _verified(
    reference: nn.Module,
    plan: Fit,
    whole: dict[str, Tensor],
    live: _Live,
    weight_of: WeightOf | None,
    has_base: bool,
) -> Iterator[Verified]:
    """The verdicts on all that the adapter adapts, and on what is adapted though the adapter does not name it."""
    names = {id(module): name for name, module in reversed(Tree.of(plan.root).modules)}
    seen = set()
    for full, layer in adapters(reference):
        name = names[id(layer)]
        there = live.at(name, layer)
        seen.add(id(there))
        bias = getattr(there, "bias", None) if has_base and member(full, "bias") in whole else None
        if isinstance(bias, nn.Parameter):
            layer._parameters["bias"] = bias  # trained whole, and judged by itself
        try:
            with _base_of(layer, name, weight_of):
                yield from check_layer(name, layer.eval(), there, has_base=has_base)
        except AdapterFormatError as error:
            yield Verified(name, UNCHECKED, note=str(error))
    owners = dict(Tree.of(reference).modules)
    for name, wanted in whole.items():
        owner, _, own = name.rpartition(".")
        module = owners[owner]
        there = live.at(names.get(id(module), owner), module)
        now, base = (getattr(m, own, None) for m in (there, module))
        relative = member(names.get(id(module), owner), own)
        if now is None:
            yield Verified(relative, OTHER, note="the model has no such tensor")
        else:
            yield compare_whole(relative, now, wanted, base if there is not module and base is not now else None)
    for name in live.others(seen):
        yield Verified(name, OTHER, note="it has an adapter, and the files have none for it")


@contextmanager
def _base_of(layer: Any, name: str, weight_of: WeightOf | None) -> Iterator[None]:
    """Give `layer` the base's weights, read by `weight_of`, for a while."""
    held = dict(layer._parameters)
    try:
        for parameter in layer.lora.parameters or ("weight",):
            if weight_of is None:
                break
            like, value = held[parameter], weight_of(member(name, parameter))
            if value.shape != like.shape:
                raise AdapterFormatError(
                    f"the base has {name!r} of shape {tuple(value.shape)}, not {tuple(like.shape)}"
                )
            layer._parameters[parameter] = nn.Parameter(value.to(like.device), requires_grad=False)
        yield
    finally:
        layer._parameters.update(held)
