"""Looks into an adapter: how many ranks its updates use, and what they are beside the base and another adapter."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.analysis.inspected import AgainstBase, AgainstOther, InspectedLayer
from lightning_lora.analysis.inspection_page import InspectionReport
from lightning_lora.checked import whole
from lightning_lora.engine.intruders import LIMIT, intruder_dimensions, is_one_matrix, matrix_of_pair
from lightning_lora.engine.judged import SURVIVES
from lightning_lora.engine.layers import adapters, pairs
from lightning_lora.engine.layers.pair import as_blocks
from lightning_lora.engine.low_rank import (
    Spectrum,
    product_cosine,
    spectrum_of_product,
    strength_within,
    subspace_similarity,
)
from lightning_lora.engine.merge import share_kept
from lightning_lora.engine.present import check_some_of_ours
from lightning_lora.engine.state import check_same_base
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import whole as gathered
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, ConfigError, listed
from lightning_lora.format.folder import CONFIG
from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.adapters import check_is_base
from lightning_lora.hub.base_weights import Base, matrix_of, weights_of
from lightning_lora.hub.pull import adapter_folder
from lightning_lora.rewriting.combinable import check_bases
from lightning_lora.rewriting.parts import Pair, Parts, any_parts_of

ROUNDING = 1e-7
"""A singular value below this share of the largest one is taken for zero: factors in float32 do not tell it from zero.
"""


@dataclass(frozen=True)
class _Update:
    """scale * B A, the update of one layer; one block for each group of a convolution."""

    A: Tensor  # (groups, r, in)
    B: Tensor  # (groups, out, r)
    rank: int
    scale: float
    is_plain: bool = True
    """False where B has a kernel, as a transposed convolution's has: the base's weight is laid out otherwise."""

    @property
    def shape(self) -> tuple[int, int]:
        groups, out, _ = self.B.shape
        return groups * out, self.A.shape[-1]


@dataclass(frozen=True)
class _Source:
    """One adapter that is looked into."""

    name: str
    updates: Mapping[str, _Update]
    parts: Parts | None
    """The content of its folder; None for a model that holds the adapter."""
    odd: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    folder: Path | None = None


def inspect_adapter(
    adapter: str | os.PathLike[str] | nn.Module,
    *,
    model: Base | None = None,
    other: str | os.PathLike[str] | nn.Module | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_fields: Collection[str] = (),
    check_base: bool = True,
    intruder_limit: int = LIMIT,
) -> InspectionReport:
    """Report what an adapter changes, layer by layer; nothing is loaded onto a model, and nothing is changed.

    Args:
        adapter: A folder in PEFT's format, an id on the Hub ("user/name@revision"), or a model that has the adapter.
        model: The base: the module, a folder or file of safetensors, or an id on the Hub ("user/name@revision"). With
            it the report tells how each update lies in its weight: relative size, amplification (Hu et al. 2021,
            arXiv:2106.09685, section 7.3), intruder dimensions (Shuttleworth et al. 2024, arXiv:2410.21228), and what
            the base's precision swallows. Of a model that has the adapter the base is known.
        other: A second adapter, to compare layer by layer: the cosine of the updates, and how much of their subspaces
            they share (Hu et al. 2021, section 7.2).
        revision, subfolder: Those of `adapter` on the Hub.
        ignore_fields: Unknown fields of the configs that are passed over.
        check_base: Refuse two adapters of different bases, and a module that is not the adapter's base.
        intruder_limit: Count intruder dimensions of weights whose smaller side is at most this; each takes two full
            SVDs, which take a minute for 4096 x 4096.

    Returns:
        The report: `str()` is a table, `write_page(path)` writes the HTML file.

    Raises:
        AdapterFormatError: The folder is no adapter, is damaged, holds values that are not finite, or does not fit
            `model`.
        BaseMismatchError: The two adapters, or the adapter and the module, belong to different bases.
        ConfigError: An argument is not valid.
        AdapterStateError: A model that should have an adapter has none.
        HubError: Something cannot be fetched.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, inspect_adapter, pairs
        >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> _ = inject(base, LoRAConfig(rank=2, alpha=2, target_modules=["0"]))
        >>> for pair in pairs(base):
        ...     _ = torch.nn.init.eye_(pair.A), torch.nn.init.eye_(pair.B)
        >>> layer = inspect_adapter(base).layers["0"]
        >>> layer.singular_values, round(layer.effective_rank, 6)
        ((1.0, 1.0), 2.0)
    """
    whole("intruder_limit", intruder_limit, least=0)
    own = _source(adapter, revision, subfolder, ignore_fields)
    theirs = None if other is None else _source(other, None, None, ignore_fields)
    if check_base and theirs is not None and own.parts is not None and theirs.parts is not None:
        names = (own.name, theirs.name if theirs.name != own.name else f"{theirs.name} (2)")
        check_bases(dict(zip(names, (own.parts, theirs.parts))))
    if isinstance(model, nn.Module) and check_base and own.parts is not None:
        try:
            check_same_base(model, own.parts.note, adapter_root(model)[1], what=f"The adapter {own.name}")
        except BaseMismatchError:
            if own.folder is None or next(adapters(model), None) is not None:
                raise
            check_is_base(model, own.folder, ignore_fields)  # it may bring some of the weights that were compared
    live = adapter if isinstance(adapter, nn.Module) and model is None else None
    base = _Weights(live if live is not None else model, own, is_adapted=live is not None)
    layers, notes = {}, [*own.notes]
    with torch.no_grad():
        for name, update in own.updates.items():
            layers[name] = _layer(update, base.of(name, update), intruder_limit)
        if theirs is not None:
            layers, compared = _compared(layers, own, theirs)
            notes += compared
    notes += base.notes(layers, intruder_limit)
    return InspectionReport(
        adapter=own.name,
        other=None if theirs is None else theirs.name,
        base=base.name,
        layers=layers,
        odd=(*own.odd, *_odd(layers, base.dtype), *(_zero_of(theirs) if theirs else ())),
        notes=tuple(notes),
        dtype=base.dtype,
        folder=own.folder,
    )


# Reads the updates, from a folder or from a model.


def _source(adapter: Any, revision: str | None, subfolder: str | None, ignore_fields: Collection[str]) -> _Source:
    if isinstance(adapter, nn.Module):
        if revision is not None or subfolder is not None:
            raise ConfigError("revision and subfolder are those of an adapter on the Hub, and a model was given.")
        check_some_of_ours(adapter, Tree.of(adapter))
        root = adapter_root(adapter)[1]  # names are relative to it in a folder, too
        return _Source(type(root).__name__, dict(_of_model(root)), None)
    if not isinstance(adapter, (str, os.PathLike)):
        raise ConfigError(f"An adapter is a folder, an id on the Hub or a model, not {adapter!r:.80}.")
    folder = adapter_folder(adapter, revision, subfolder=subfolder, ignore_fields=ignore_fields)
    parts = any_parts_of(folder, ignore_fields)
    if parts.config.target_parameters:
        raise AdapterFormatError(
            f"{folder / CONFIG}: target_parameters is {parts.data['target_parameters']!r}. Which parameters the pairs "
            "in the file belong to shows only beside the model: load the adapter onto it, and inspect the model."
        )
    if not parts.pairs:
        raise AdapterFormatError(f"{folder} holds no pair of A and B, only {listed([*parts.saved, *parts.base])}.")
    return _Source(
        _name(os.fspath(adapter)),
        {name: _of_pair(pair) for name, pair in parts.pairs.items()},
        parts,
        odd=tuple(parts.unclear()),
        notes=tuple(_unseen(parts)),
        folder=folder,
    )


def _name(adapter: str) -> str:
    """An id as it is, a folder without its path; every run calls its folder "adapter"."""
    path = Path(adapter).expanduser()
    if not path.exists():
        return adapter
    path = path.absolute()
    return f"{path.parent.name}/{path.name}" if path.name == "adapter" else path.name


def _of_pair(pair: Pair) -> _Update:
    A, B = as_blocks(pair.A, pair.B, pair.rank)
    return _Update(A.float(), B.float(), pair.rank, pair.scale, pair.B[0, 0].numel() == 1)


def _of_model(model: nn.Module) -> Iterator[tuple[str, _Update]]:
    for pair in pairs(model):
        A, B = (gathered(t.detach()).cpu() for t in pair.module.matrices(pair.parameter))
        if not (A.isfinite().all() and B.isfinite().all()):
            raise AdapterFormatError(f"{pair.name!r} holds values that are not finite: its training diverged.")
        A, B = (t.flatten(0, -3) if t.ndim > 2 else t[None] for t in (A, B))
        yield pair.name, _Update(A.float(), B.float(), pair.spec.rank, pair.spec.scale)


def _unseen(parts: Parts) -> Iterator[str]:
    if parts.saved:
        yield f"{len(parts.saved)} tensors were trained whole (modules_to_save) and are not looked into"
    if parts.biases:
        yield f"{len(parts.biases)} biases were trained and are not looked into"
    if parts.is_dora:
        yield "DoRA: what is shown is s B A, before the magnitudes rescale the rows of W + s B A"
    if parts.config.lora_bias:
        yield "the biases of B (lora_bias) are not looked into"
    if parts.config.trainable_token_indices:
        yield "single rows for tokens (trainable_token_indices) were trained and are not looked into"


class _Weights:
    """The weights of the base, one at a time, as matrices."""

    def __init__(self, base: Base | None, own: _Source, *, is_adapted: bool) -> None:
        """With `is_adapted`, `base` is the model that holds the adapter `own`."""
        self.name: str | None = None
        self.dtype: str | None = None
        self._unfit: list[str] = []
        self._layers: dict[str, Any] = {}
        self._weight = None
        self._transposed = own.parts is not None and own.parts.is_transposed
        if base is None:
            return
        if not is_adapted:
            self._weight = weights_of(base)  # checks `base`, too
        if isinstance(base, nn.Module):
            root = adapter_root(base)[1]
            self.name = type(root).__name__
            if is_adapted:
                self._layers = {pair.name: pair for pair in pairs(root)}
        else:
            self.name = _name(os.fspath(base))
        self._embeddings = {n for n, p in own.parts.pairs.items() if p.is_embedding} if own.parts is not None else set()

    def of(self, name: str, update: _Update) -> Tensor | None:
        """The weight (out, in) of a layer; None where there is no base, or its layout is not that of the update."""
        if self.name is None:
            return None
        W = self._read(name, update) if update.is_plain and update.B.shape[0] == 1 else None
        if W is None:
            self._unfit.append(name)
            return None
        self.dtype = self.dtype or str(W.dtype).removeprefix("torch.")
        return W

    def _read(self, name: str, update: _Update) -> Tensor | None:
        if self._weight is None:
            pair = self._layers[name]
            return matrix_of_pair(pair).cpu() if is_one_matrix(pair) else None
        is_embedding = name in self._embeddings
        return matrix_of(self._weight, name, update.shape, is_embedding=is_embedding, is_transposed=self._transposed)

    def notes(self, layers: Mapping[str, InspectedLayer], limit: int) -> Iterator[str]:
        if self._unfit:
            yield f"not compared with the base, whose weight has another layout: {listed(self._unfit)}"
        large = [n for n, layer in layers.items() if layer.base is not None and layer.base.intruders is None]
        if large and limit:
            yield (
                f"intruder dimensions were not counted for {len(large)} of {len(layers)} layers (weights with more "
                f"than {limit} rows and columns); intruder_limit raises that, and takes longer"
            )


# Measures one layer.


def _layer(update: _Update, W: Tensor | None, limit: int) -> InspectedLayer:
    s = spectrum_of_product(update.B.double(), update.A.double())
    S = (abs(update.scale) * s.S).flatten().sort(descending=True).values
    layer = InspectedLayer(update.shape, update.rank, update.scale, tuple(S.tolist()))
    if W is None:
        return layer
    U, Vh = _directions(s)
    wide = W.float() if W.dtype.itemsize < 4 else W
    changed = wide + update.scale * (update.B[0] @ update.A[0]).to(wide.dtype)
    intruders = None
    if min(W.shape) <= limit:
        intruders = intruder_dimensions(wide, changed) if layer.norm else 0
    norm = float(wide.norm())
    base = AgainstBase(
        norm=norm,
        strength=strength_within(wide, U, Vh),
        by_chance=len(Vh) * norm / W.numel() ** 0.5,
        kept=share_kept(W, changed),
        intruders=intruders,
    )
    return replace(layer, base=base)


def _directions(s: Spectrum) -> tuple[Tensor, Tensor]:
    """The directions (out, r) and (r, in) of a single block that are not zero, at least one."""
    used = max(1, int((s.S[0] > ROUNDING * s.S[0, 0]).sum()))
    return s.U[0, :, :used], s.Vh[0, :used]


def _compared(
    layers: Mapping[str, InspectedLayer], own: _Source, theirs: _Source
) -> tuple[dict[str, InspectedLayer], list[str]]:
    """The layers beside those of another adapter, and what cannot be compared."""
    found, unlike = dict(layers), []
    for name, one in own.updates.items():
        two = theirs.updates.get(name)
        if two is None:
            continue
        if one.B.shape[:2] != two.B.shape[:2] or one.A.shape[-1] != two.A.shape[-1]:
            raise AdapterFormatError(
                f"{name!r} is {one.shape} in {own.name} and {two.shape} in {theirs.name}: they adapt different bases."
            )
        if one.B.shape[0] > 1:
            unlike.append(name)
            continue
        A, B, A2, B2 = (t.double() for t in (one.A, one.B, two.A, two.B))
        if not (A.any() and B.any() and A2.any() and B2.any()):
            unlike.append(name)
            continue
        cosine = product_cosine(B, A, B2, A2) * (1 if one.scale * two.scale > 0 else -1)
        (U, Vh), (U2, Vh2) = (_directions(spectrum_of_product(*factors)) for factors in ((B, A), (B2, A2)))
        inputs, outputs = subspace_similarity(Vh.mT, Vh2.mT).diagonal(), subspace_similarity(U, U2).diagonal()
        found[name] = replace(found[name], other=AgainstOther(cosine, tuple(inputs.tolist()), tuple(outputs.tolist())))
    alone = [n for n in own.updates if n not in theirs.updates], [n for n in theirs.updates if n not in own.updates]
    notes = [f"only in {s.name}: {listed(names)}" for s, names in zip((own, theirs), alone) if names]
    if unlike:
        notes.append(f"not compared, since an update is zero or has groups: {listed(unlike)}")
    return found, notes


# Says what is odd.


def _zero_of(source: _Source) -> Iterator[str]:
    zero = [name for name, update in source.updates.items() if not (update.A.any() and update.B.any())]
    return _zero(zero, len(source.updates), f" of {source.name}")


def _zero(names: Collection[str], total: int, whose: str = "") -> Iterator[str]:
    if names:
        yield (
            f"{len(names)} of {total} updates{whose} are zero (B or A is), so these layers compute what the base "
            f"computes; they were not trained, or got no gradient: {listed(names)}"
        )


def _odd(layers: Mapping[str, InspectedLayer], dtype: str | None) -> Iterator[str]:
    yield from _zero([name for name, layer in layers.items() if layer.norm == 0], len(layers))
    unused = {}
    for name, layer in layers.items():
        most = min(layer.rank, *layer.shape)
        used = sum(s > ROUNDING * layer.singular_values[0] for s in layer.singular_values)
        if 0 < used < most:
            unused[name] = f"{name} ({used} of {most})"
    if unused:
        yield f"{len(unused)} updates have directions of exactly zero, which could be cut: {listed(unused.values())}"
    weak = {n: layer.base.kept for n, layer in layers.items() if layer.base and layer.base.kept < SURVIVES}
    if weak:
        said = [f"{name} {share:.2f}" for name, share in sorted(weak.items(), key=lambda item: item[1])]
        yield (
            f"{len(weak)} of {len(layers)} updates are partly lost when they are merged into the base's {dtype}; of "
            f"each this share is left: {listed(said)}. Use the adapter unmerged, or merge into float32"
        )
