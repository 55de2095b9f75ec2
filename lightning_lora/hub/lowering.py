"""Rewrites of an adapter's pairs, dict to dict, so that a consumer with one scale and plain factors computes the same.

The consumer multiplies B A of a module by alpha / rank, with one alpha; `rank` is the same for all modules or each
module's own. alpha is chosen so that as few B as possible have to change, and those by a power of two if possible:
a file in bfloat16 then loses nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lora.engine.layers.dora import dora_update
from lightning_lora.engine.low_rank import Spectrum, product_change, product_norm, spectrum
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.hub.base_weights import WeightOf
from lightning_lora.hub.consumers import Consumer
from lightning_lora.hub.parts import Pair


@dataclass(frozen=True)
class Lowered:
    """One module as it is written."""

    A: Tensor
    B: Tensor
    is_embedding: bool
    scale: float
    """Of the module in the adapter that was read."""
    rank_before: int
    factor: float
    """What B was multiplied by."""
    error: float
    """Frobenius norm of the change of the update, relative to the update."""
    size: float
    """Frobenius norm of the update."""
    worst: float | None = None
    """For DoRA: the most by which an output is off, relative to the most that the update changes one."""
    added: bool = False
    """A pair of zeros for a module that was not adapted."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def with_every_layer(pairs: Mapping[str, Pair], restricted: bool, weight: WeightOf | None) -> dict[str, Pair]:
    """`pairs`, and zeros for each kind of module (`layers.*.mlp.up_proj`) in the layers in which it is not adapted.

    `restricted` says that the config itself names layers: then only the base can tell how many there are. Raises
    AdapterFormatError where it is not given.
    """
    kinds: dict[str, dict[int, str]] = {}
    for name in pairs:
        if found := re.search(r"(?<=\.)\d+(?=\.)", name):
            kinds.setdefault(f"{name[: found.start()]}{{}}{name[found.end() :]}", {})[int(found[0])] = name
    if not kinds:
        return dict(pairs)
    if restricted and weight is None:
        raise AdapterFormatError(
            "only some layers are adapted, and how many the model has is not known: pass base= (the model, its folder, "
            "or its id)"
        )
    count = 1 + max(max(layers) for layers in kinds.values())
    while weight is not None and any(_is_there(weight, f"{kind.format(count)}.weight") for kind in kinds):
        count += 1
    filled = dict(pairs)
    for kind, layers in kinds.items():
        like = pairs[next(iter(layers.values()))]
        empty = replace(like, A=torch.zeros_like(like.A), B=torch.zeros_like(like.B), magnitude=None)
        filled |= {kind.format(i): empty for i in range(count) if i not in layers}
    return filled


def _is_there(weight: WeightOf, name: str) -> bool:
    try:
        weight(name)
    except AdapterFormatError:
        return False
    return True


def dora_spectra(pairs: Mapping[str, Pair], weight: WeightOf, transposed: bool) -> dict[str, Spectrum]:
    """The decomposed updates of the DoRA modules among `pairs`; `transposed` where linear weights are (in, out).

    Raises AdapterFormatError for a base that does not fit.
    """
    spectra = {}
    for name, pair in pairs.items():
        if pair.magnitude is None:
            continue
        shape = (pair.B.shape[0], pair.A.shape[1])
        W = weight(f"{name}.weight" if name else "weight")
        if pair.is_embedding or (transposed and tuple(W.shape) == shape[::-1]):
            W = W.T
        if tuple(W.shape) != shape or not W.is_floating_point():
            raise AdapterFormatError(
                f"the base's {name}.weight, {tuple(W.shape)} of {W.dtype}, is not the {shape} floating-point weight "
                "that the adapter was trained on: pass a base that is not quantized"
            )
        update = dora_update(W, pair.A, pair.B, pair.scale, pair.magnitude)
        if not bool(torch.isfinite(update).all()):
            raise AdapterFormatError(f"DoRA divides by zero in {name!r}: a row of its adapted weight is zero")
        spectra[name] = spectrum(update)
    return spectra


def written_rank(rank: int, consumer: Consumer) -> int | None:
    """The smallest rank, at least `rank`, that `consumer` computes rightly with; None where there is none."""
    if consumer.ranks is not None:
        return next((allowed for allowed in consumer.ranks if allowed >= rank), None)
    return rank if consumer.most_rank is None or rank <= consumer.most_rank else None


def lowered(
    pairs: Mapping[str, Pair],
    spectra: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    cuts: Mapping[str, int],
    dtype: torch.dtype | None,
    added: set[str],
) -> tuple[dict[str, Lowered], float]:
    """The modules as they are written, with the ranks `ranks`, and their one alpha.

    `cuts` has the ranks at which the updates in `spectra` are cut. Raises AdapterFormatError where a value is too large
    for `dtype` (by default that of the file).
    """
    wholes = {name: (spectra[name].cut(cuts[name]) if name in spectra else None) for name in pairs}
    scales = {name: 1.0 if wholes[name] else pair.scale for name, pair in pairs.items()}
    counted = {name: scale for name, scale in scales.items() if name not in added}
    alpha = _alpha(counted, ranks)
    modules, overflowing = {}, []
    for name, pair in pairs.items():
        cut = wholes[name]
        A, B = (pair.A, pair.B) if cut is None else (cut.A, cut.B)
        factor = 1.0 if name in added else _clean(scales[name] * ranks[name] / alpha)
        new_A = _padded(A, ranks[name], 0).to(dtype or pair.A.dtype)
        new_B = _padded(B if factor == 1.0 else B.double() * factor, ranks[name], 1).to(dtype or pair.B.dtype)
        if not bool(torch.isfinite(new_A).all() and torch.isfinite(new_B).all()):
            overflowing.append(name)
        scale = alpha / ranks[name]
        if cut is None:
            error = _change(scales[name] * B.double(), A, scale * new_B.double(), new_A)
            size = abs(scales[name]) * product_norm(B, A)
        else:
            # Truncation and rounding errors need not be orthogonal: their sum is an upper bound.
            error = cut.error + _change(B, A, scale * new_B.double(), new_A)
            size = spectra[name].norm
        modules[name] = Lowered(
            A=new_A.contiguous(),
            B=new_B.contiguous(),
            is_embedding=pair.is_embedding,
            scale=pair.scale,
            rank_before=pair.rank,
            factor=factor if cut is None else 1.0,
            error=error,
            size=size,
            worst=None if cut is None else cut.worst,
            added=name in added,
        )
    if overflowing:
        raise AdapterFormatError(
            f"with its scale in B, {listed(overflowing)} holds values that are too large for "
            f"{str(dtype or 'the precision of the file').removeprefix('torch.')}: write it with dtype='float32'"
        )
    return modules, alpha


def _change(B: Tensor, A: Tensor, new_B: Tensor, new_A: Tensor) -> float:
    """||B A - B' A'||_F relative to ||B A||_F; as it is where B A is 0."""
    return product_change(B, A, new_B, new_A) / (product_norm(B, A) or 1.0)


def _alpha(scales: Mapping[str, float], ranks: Mapping[str, int]) -> float:
    wanted = Counter(_clean(scale * ranks[name]) for name, scale in scales.items())

    def left_alone(alpha: float) -> tuple[int, int, bool, float]:
        powers = sum(n for other, n in wanted.items() if math.frexp(_clean(other / alpha))[0] == 0.5)
        return powers, wanted[alpha], alpha.is_integer(), -alpha

    return max(wanted, key=left_alone)


def _clean(value: float) -> float:
    """`value`, above 0, without its rounding where it is a whole number or a power of two but for that."""
    near = float(round(value)) or 2.0 ** round(math.log2(value))
    return near if math.isclose(value, near, rel_tol=1e-14) else value


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim) if missing[dim] > 0 else factor
