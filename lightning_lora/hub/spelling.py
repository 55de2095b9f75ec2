"""How PEFT's config says what is adapted, and what of it PEFT cannot read."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import nn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.layers import Adapter, AdapterSpec, DoRA, Pair, ParameterLoRA, register_conv1d
from lightning_lora.engine.layers.linear import OutProjectionLoRA
from lightning_lora.engine.layers.pair import START
from lightning_lora.engine.layers.tokens import TokenRows
from lightning_lora.engine.targets import name_matches

_KNOWN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LOADS_NOT = "PEFT cannot load this adapter, since it has none for these layers"
_IGNORES = "PEFT loads this adapter and ignores what is read from these layers without calling them"


@dataclass(frozen=True)
class Targets:
    """What is adapted, in PEFT's words."""

    modules: list[str]
    parameters: list[str]
    companions: list[str]
    """Modules that PEFT adapts with the one that they belong to."""
    tokens: dict[str, list[int]]
    """Rows that are trained of an embedding."""
    specs: dict[str, AdapterSpec]
    """Of each module and parameter, as it is written: as a plain pair."""
    without_dropout: bool
    """Whether PEFT knows no dropout for one of them, and refuses a config that has some."""
    unread: dict[str, list[str]]
    """What PEFT does with what it cannot read -> the names of that."""


def targets_of(adapted: Mapping[str, Adapter], config: LoRAConfig) -> Targets:
    """How to name the adapted modules of a model."""
    modules: list[str] = []
    parameters: list[str] = []
    companions: list[str] = []
    tokens: dict[str, list[int]] = {}
    specs: dict[str, AdapterSpec] = {}
    unread: dict[str, list[str]] = {}
    attentions = {name: m for name, m in adapted.items() if _is_attention(name, m, adapted, config)}
    for name, module in adapted.items():
        if isinstance(module, TokenRows):
            if module.lora.owner is None:  # else it follows the one that owns them
                tokens[name] = list(module.lora.tokens)
            continue
        parent, _, _ = name.rpartition(".")
        pairs = module.lora_pairs(name)
        if isinstance(module, OutProjectionLoRA) and parent in attentions and name != parent:
            companions.append(name)
            continue
        if name in attentions or not module.lora.parameters:
            modules.append(name)
            specs[name] = _plain(pairs[0], config)
        else:
            parameters += [pair.name for pair in pairs]
            specs |= {pair.name: _plain(pair, config) for pair in pairs}
        what = _unread(name, module, attentions)
        if what is not None:
            unread.setdefault(what, []).append(name)
    if not modules and not parameters:
        unread["PEFT cannot load this adapter, since it takes none that has trained rows alone"] = list(tokens)
    return Targets(modules, sorted(parameters), companions, tokens, specs, bool(parameters), unread)


def _is_attention(name: str, module: Adapter, adapted: Mapping[str, Adapter], config: LoRAConfig) -> bool:
    """Whether it is an nn.MultiheadAttention as PEFT adapts it: its packed projections and its out_proj, alike."""
    out = adapted.get(f"{name}.out_proj" if name else "out_proj")
    if not isinstance(module, nn.MultiheadAttention) or out is None or isinstance(module, DoRA):
        return False
    pairs = [*module.lora_pairs(name), *out.lora_pairs(name)]
    is_packed = [pair.parameter for pair in pairs] == ["in_proj_weight", "weight"]
    return is_packed and _plain(pairs[0], config) == _plain(pairs[1], config)


def _unread(name: str, module: Adapter, attentions: Mapping[str, Adapter]) -> str | None:
    if name in attentions:
        return None
    if isinstance(module, ParameterLoRA):
        return _LOADS_NOT if isinstance(module, DoRA) or not name else None
    if isinstance(module, OutProjectionLoRA):
        return _IGNORES
    conv1d = register_conv1d()
    known = _KNOWN if conv1d is None else (*_KNOWN, conv1d)
    return None if isinstance(module, known) else _LOADS_NOT


def _plain(pair: Pair, config: LoRAConfig) -> AdapterSpec:
    """Rank and alpha of the plain pair that is written for `pair`: a frozen start adds as many ranks again."""
    spec = replace(pair.spec, parameters={}) if pair.spec.parameters else pair.spec
    if START[0] + pair.suffix not in pair.module.lora_names:
        return spec
    rank = 2 * spec.rank
    return replace(spec, rank=rank, alpha=spec.scale * (math.sqrt(rank) if config.use_rslora else rank))


def exact_targets(wanted: Collection[str], others: Collection[str]) -> str | list[str]:
    """The shortest target_modules that match all of `wanted` and none of `others`: endings, full names, or a regular
    expression."""
    wanted_set = set(wanted)
    endings = sorted({name.rpartition(".")[2] for name in wanted_set})
    # The number of a layer is a poor ending: it would mean other modules in a model that is a little longer.
    options = [endings] if not any(e.isdigit() or not e for e in endings) else []
    for entries in [*options, sorted(wanted_set)]:
        if all(entries) and not any(name_matches(entries, name) for name in others if name not in wanted_set):
            return entries
    if wanted_set == {""}:
        return "^$"
    return "|".join(re.escape(name) for name in sorted(wanted_set))
