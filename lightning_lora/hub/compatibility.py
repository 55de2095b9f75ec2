"""Whether several adapters can be combined, found before anything is computed: one base, one geometry for each module,
and nothing beside the pairs that would have to be weighted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor

from lightning_lora.engine.state import compare_bases
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, listed
from lightning_lora.hub import peft
from lightning_lora.hub.card import base_id
from lightning_lora.hub.obstacles import unclear
from lightning_lora.hub.parts import Pair, Parts

_BASE = "base_fingerprint", "base_dtypes"


def check_combinable(adapters: Mapping[str, Parts], weights: Mapping[str, float]) -> None:
    """Raise AdapterFormatError, naming all that is in the way, unless `adapters` (by what to call them) can be combined
    with `weights`."""
    problems = [*_dora(adapters), *_geometries(adapters), *_whole(adapters, weights)]
    problems += [f"{name}: {why}" for name, parts in adapters.items() for why in unclear(parts)]
    if problems:
        raise AdapterFormatError(f"These adapters cannot be combined: {'; '.join(problems)}. Nothing was written.")


def check_bases(adapters: Mapping[str, Parts]) -> None:
    """Raise BaseMismatchError where two of `adapters` say that they were trained on different bases: by the
    fingerprints of the weights, or, where these cannot tell, by their ids on the Hub."""
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
    """How many products there are side by side: those of a grouped convolution, else 1."""
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
    """What two pairs must share to adapt one module, in words."""
    kind = "embedding" if pair.is_embedding else "layer" if pair.is_matrix else "convolution"
    kernel = f" with kernel {'x'.join(map(str, pair.A.shape[2:]))}" if pair.A.ndim > 2 else ""
    groups = f" in {groups_of(pair)} groups" if groups_of(pair) > 1 else ""
    return f"a {kind} {pair.A.shape[1]} -> {pair.B.shape[0]}{kernel}{groups}"


def _whole(adapters: Mapping[str, Parts], weights: Mapping[str, float]) -> list[str]:
    """Modules and biases that were trained whole replace the base's. What they changed is not in the file, so they can
    only be kept, where all agree on them."""
    problems = []
    for what, field in (("modules_to_save", "saved"), ("biases", "biases"), ("weights of the base", "base")):
        by_adapter = {name: _by_name(getattr(parts, field)) for name, parts in adapters.items()}
        names = list(dict.fromkeys(key for tensors in by_adapter.values() for key in tensors))
        # Of the base's own weights not every file has a copy.
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
