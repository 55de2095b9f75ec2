"""Rewrites an adapter's pairs so that a consumer with one scale and plain factors computes the same as we do.

The consumer multiplies B A of a module by alpha / rank, with one alpha; `rank` is the same for all modules or each
module's own. alpha is chosen so that as few B as possible have to change, and that these change by a power of two if
possible: a file in bfloat16 then loses nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lora.engine.layers.dora import dora_update
from lightning_lora.engine.low_rank import Spectrum, product_change, product_norm, spectrum
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.format import peft
from lightning_lora.format.matching import same_numbers
from lightning_lora.hub.base_weights import BaseFacts, WeightOf
from lightning_lora.hub.consumers import Consumer
from lightning_lora.rewriting.parts import Pair, Parts


@dataclass(frozen=True)
class Lowered:
    """One module as it is written."""

    A: Tensor
    B: Tensor
    is_embedding: bool
    scale: float
    """The scale of the module in the adapter that was read."""
    rank_before: int
    factor: float
    """The number by which B was multiplied."""
    error: float
    """Frobenius norm of the change of the update, relative to the update."""
    size: float
    """Frobenius norm of the update."""
    worst: float | None = None
    """For DoRA: the largest error of an output, relative to the largest change that the update makes to one."""
    added: bool = False
    """True for a pair of zeros, for a module that was not adapted."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def with_every_layer(pairs: Mapping[str, Pair], restricted: bool, weight: WeightOf | None) -> dict[str, Pair]:
    """`pairs`, with pairs of zeros for each kind of module (`layers.*.mlp.up_proj`) in the layers that do not adapt it.

    `restricted` says that the config itself names layers: then only the base, by `weight`, shows how many there are.
    Raises AdapterFormatError where `weight` is None then.
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
    """The decomposed updates of the DoRA modules among `pairs`. `transposed` says that linear weights are (in, out).

    Raises AdapterFormatError where the base does not fit, or DoRA divides by zero.
    """
    spectra = {}
    for name, pair in pairs.items():
        if pair.magnitude is None:
            continue
        W = pair.weight_in(weight, transposed)
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
    """||B A - B' A'||_F relative to ||B A||_F; not divided where B A is 0."""
    return product_change(B, A, new_B, new_A) / (product_norm(B, A) or 1.0)


def _alpha(scales: Mapping[str, float], ranks: Mapping[str, int]) -> float:
    wanted = Counter(_clean(scale * ranks[name]) for name, scale in scales.items())
    return least_change(wanted, wanted)


def least_change(wanted: Counter[float], allowed: Iterable[float]) -> float:
    """That of the `allowed` alphas with which most B stay as they are or change by a power of two: a file in bfloat16
    then loses nothing. `wanted` counts the modules that have each alpha."""

    def left_alone(alpha: float) -> tuple[int, int, bool, float]:
        powers = sum(n for other, n in wanted.items() if math.frexp(_clean(other / alpha))[0] == 0.5)
        return powers, wanted[alpha], alpha.is_integer(), -alpha

    return max(allowed, key=left_alone)


def _clean(value: float) -> float:
    """The whole number or power of two that `value`, above 0, differs from by rounding alone; else `value` itself."""
    near = float(round(value)) or 2.0 ** round(math.log2(value))
    return near if math.isclose(value, near, rel_tol=1e-14) else value


def _padded(factor: Tensor, rank: int, dim: int) -> Tensor:
    missing = list(factor.shape)
    missing[dim] = rank - factor.shape[dim]
    return torch.cat([factor, factor.new_zeros(missing)], dim) if missing[dim] > 0 else factor


# Finds what is in the way of an export, before anything is written. Each problem is a text that says how to go on.

MERGE = "merge the adapter into its base and serve that"

_HEADS = ("lm_head", "embed_out", "output_layer", "output")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def refuse(problems: list[str]) -> None:
    if problems:
        raise AdapterFormatError("; ".join(problems))


def unsupported(parts: Parts, row: Consumer, weight: WeightOf | None) -> list[str]:
    """Problems with parts of the adapter that `row` cannot compute and that cannot be rewritten for it."""
    keys = parts.tensor_keys(parts.pairs)
    inner = [n for n in parts.pairs if ".base_layer." in keys[n][0] or not n]
    shapes = [n for n, pair in parts.pairs.items() if not pair.is_matrix]
    words = [n for n, pair in parts.pairs.items() if pair.is_embedding]
    heads = {head_of(key) for key in parts.saved}
    merge = MERGE
    problems = []
    if shapes:
        problems.append(f"{row.title} has no adapters for convolutions ({listed(shapes)}): {merge}")
    if inner:
        problems.append(f"{row.title} adapts no module inside of an adapted one ({listed(map(repr, inner))}): {merge}")
    if words and not row.embeddings:
        problems.append(f"{row.title} would silently leave out the embeddings ({listed(words)}): {merge}")
    if parts.saved and (len(heads) > 1 or not heads <= set(row.heads)):
        takes = f" other than {' or '.join(row.heads)}, by itself" if row.heads else ""
        names = listed(sorted({peft.base_name(key).rpartition(".")[0] for key in parts.saved}))
        what = f"modules that were trained whole{takes} (modules_to_save: {names})"
        problems.append(f"{row.title} takes no {what}: {merge}")
    if parts.biases:
        problems.append(f"{row.title} takes no trained biases ({listed(map(peft.base_name, parts.biases))}): {merge}")
    if parts.is_transposed and not row.transposed:
        problems.append(
            f"{row.title}'s converter turns the factors of Conv1D layers around as if they were weights: {merge}"
        )
    if parts.is_dora and weight is None:
        problems.append(f"{row.title} has no DoRA, and to rewrite it takes the base's weights: pass base=")
    return problems


def left_out(parts: Parts, row: Consumer, base: BaseFacts) -> list[str]:
    """Problems with adapted modules for which `row` has no place: it refuses them, aborts, or silently drops them."""
    last = {name: name.rpartition(".")[2] for name in parts.pairs}
    words = [n for n, pair in parts.pairs.items() if pair.is_embedding]
    heads = [n for n in last if last[n] in _HEADS and not any(part.isdigit() for part in n.split("."))]
    is_tied = True if base.architecture in row.one_table else base.is_tied
    problems = []
    if row.word_tables and (others := [n for n in words if last[n] not in row.word_tables]):
        problems.append(f"{row.title} adapts no embedding but that of the tokens ({listed(others)}): {MERGE}")
    elif not row.tied and (words or heads) and is_tied is not False:
        what = f"share one weight, which {row.title} cannot adapt ({listed([*words, *heads])})"
        if is_tied is None:
            problems.append(f"head and embedding of the base may {what}: pass base=, so that this is known")
        elif base.architecture in row.one_table:
            no_other = f"{row.title} has no separate head for {base.architecture}, so merging does not help"
            problems.append(f"head and embedding {what}; {no_other}: train without them")
        else:
            problems.append(f"head and embedding of the base {what}: {MERGE}")
    if not row.latent and (base.is_latent or any(part in _LATENT for part in last.values())):
        dropped = [n for n in last if last[n] in (*_LATENT, "q_proj") or n in heads]
        if dropped:
            what = f"the head and the projections of latent attention ({listed(dropped)})"
            problems.append(f"{row.title} applies no adapters of {what}: {MERGE}")
    if not row.experts_apart and (layers := _uneven_experts(parts)):
        what = "takes the experts of a layer all together, their three matrices with one rank"
        problems.append(f"{row.title} {what} (in {listed(layers)} they are not): {MERGE}")
    return problems


def _uneven_experts(parts: Parts) -> list[str]:
    """The layers in which some experts, or some of their matrices, have no pair or a pair of another rank."""
    layers: dict[str, dict[int, list[int]]] = {}
    for name, pair in parts.pairs.items():
        if found := re.fullmatch(r"(.*\.experts)\.(\d+)\.\w+", name):
            layers.setdefault(found[1], {}).setdefault(int(found[2]), []).append(pair.rank)
    return [
        layer
        for layer, ranks in layers.items()
        if sorted(ranks) != list(range(len(ranks)))
        or any(len(r) != 3 for r in ranks.values())
        or len({rank for r in ranks.values() for rank in r}) > 1
    ]


def head_of(key: str) -> str:
    """The last part of the name of the module that owns the parameter called `key`."""
    return peft.base_name(key).rpartition(".")[0].rpartition(".")[2]


def other_base(parts: Parts, weight: WeightOf | None) -> list[str]:
    """Problems with weights of the base in the file. Servers skip them, so they must equal the base's own."""
    problems = []
    for key, tensor in parts.base.items():
        name = peft.base_name(key)
        if weight is None:
            problems.append(
                f"the file has the base's {name}, which servers leave out: pass base= so that it can be compared"
            )
            continue
        theirs = weight(name)
        if not same_numbers(tensor, theirs):
            problems.append(f"the file has a {name} of its own, other than the base's, which servers leave out")
    return problems


def refuse_loss(
    spectra: Mapping[str, Spectrum], cuts: Mapping[str, int], row: Consumer, most: float, tolerance: float
) -> None:
    errors = {name: s.left_out(cuts[name]) for name, s in spectra.items()}
    if not errors or max(errors.values()) <= tolerance:
        return
    worst = max(errors, key=errors.__getitem__)
    whole = math.sqrt(sum(s.norm**2 for s in spectra.values()))
    total = math.sqrt(sum((errors[n] * s.norm) ** 2 for n, s in spectra.items())) / whole
    needed = max(s.rank_for(tolerance) for s in spectra.values())
    takes = f" ({row.title} takes at most {int(most)} here)" if needed > most else ""
    raise AdapterFormatError(
        f"DoRA rescales the rows of the weights, which no low rank can do exactly: at rank {max(cuts.values())} "
        f"{total:.2g} of the update is lost, {errors[worst]:.2g} of that of {worst!r}, more than "
        f"tolerance={tolerance:g}. That takes rank {needed}{takes}. Pass rank= or tolerance= to decide otherwise, or "
        "merge the adapter into its base and serve that"
    )
