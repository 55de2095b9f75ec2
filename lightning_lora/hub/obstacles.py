"""What stands against an export, found before anything is written: each as a sentence that says how to go on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from lightning_lora.engine.low_rank import Spectrum
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.hub import peft
from lightning_lora.hub.base_weights import BaseFacts, WeightOf
from lightning_lora.hub.consumers import Consumer
from lightning_lora.hub.parts import Parts
from lightning_lora.hub.reading import CONFIG

MERGE = "merge the adapter into its base and serve that"

_HEADS = ("lm_head", "embed_out", "output_layer", "output")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def refuse(problems: list[str]) -> None:
    if problems:
        raise AdapterFormatError("; ".join(problems))


def unclear(parts: Parts) -> list[str]:
    """PEFT sorts the patterns that it saves; where that changed their meaning for a rank, nobody knows the alphas."""
    if not (parts.repaired and parts.ambiguous):
        return []
    return [
        f"its patterns were saved in another order than they were trained in (the rank of {parts.repaired[0]!r} shows "
        f"it), so which entry of alpha_pattern was meant for {listed(map(repr, parts.ambiguous))} is not known: "
        f"correct alpha_pattern in {CONFIG} by hand"
    ]


def unsupported(parts: Parts, row: Consumer, weight: WeightOf | None) -> list[str]:
    """What `row` can neither compute nor have rewritten."""
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
    if parts.data.get("fan_in_fan_out") and not row.transposed:
        problems.append(
            f"{row.title}'s converter turns the factors of Conv1D layers around as if they were weights: {merge}"
        )
    if parts.is_dora and weight is None:
        problems.append(f"{row.title} has no DoRA, and to rewrite it takes the base's weights: pass base=")
    return problems


def left_out(parts: Parts, row: Consumer, base: BaseFacts) -> list[str]:
    """Adapted modules for which `row` has no place, so that it refuses them, aborts or leaves them out silently."""
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
    """The layers of which some experts, or some of their matrices, have no adapter or one of another rank."""
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
    """The last part of the name of the module whose parameter `key` is."""
    return peft.base_name(key).rpartition(".")[0].rpartition(".")[2]


def other_base(parts: Parts, weight: WeightOf | None) -> list[str]:
    """Weights of the base in the file can be left out where they are the base's own: servers skip them."""
    problems = []
    for key, tensor in parts.base.items():
        name = peft.base_name(key)
        if weight is None:
            problems.append(
                f"the file has the base's {name}, which servers leave out: pass base= so that it can be compared"
            )
            continue
        theirs = weight(name)
        narrower = min((tensor.dtype, theirs.dtype), key=lambda d: d.itemsize)
        if tensor.shape != theirs.shape or not torch.equal(tensor.to(narrower), theirs.to(narrower)):
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
