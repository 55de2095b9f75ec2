"""Spells the keys in PEFT's files, and matches names by PEFT's rules.

All this was read in the source of peft 0.21.2 (tuners/lora, utils/save_and_load.py), and checked by running it. PEFT
wraps a module that it adapts, so the module's own members lie under `base_layer`. Its config's fields are in config.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import nn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.layers import Adapter, AdapterSpec, DoRA, Pair, ParameterLoRA, geometry_of, register_conv1d
from lightning_lora.engine.layers.embedding import TOKENS, TokenRows
from lightning_lora.engine.layers.linear import OutProjectionLoRA
from lightning_lora.engine.layers.pair import BIAS, MAGNITUDE, START
from lightning_lora.engine.targets import name_matches
from lightning_lora.engine.tree import Tree, weight_users

PREFIX = "base_model.model."

# The tensors of an adapted module: our name -> PEFT's name.
_TENSORS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    BIAS: "lora_B.bias",
    MAGNITUDE: "lora_magnitude_vector",
    TOKENS: "token_adapter.trainable_tokens_delta",
}
_TENSORS_OF_EMBEDDING = {**_TENSORS, "lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}


def tensor_key(
    name: str,
    wrapped: Collection[str],
    embeddings: Collection[str],
    parameters: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """PEFT's key of the tensor that the engine calls `name` (`<module>.lora_A`, or a parameter's own name).

    `wrapped` names the modules that PEFT wraps, `embeddings` those among them that are embeddings. `parameters` has the
    adapted parameters of a wrapped module, in the order in which it holds them: PEFT wraps it once for each, and the
    wrapper of the last one is outermost. Their tensors are called `<module>.lora_A_<parameter>`.
    """
    module, _, last = name.rpartition(".")
    path = _expanded(module, wrapped, parameters)
    if module in wrapped:
        kinds = _TENSORS_OF_EMBEDDING if module in embeddings else _TENSORS
        own = parameters.get(module, ())
        outside = path[: -max(1, len(own))] if module else path
        for inside, parameter in enumerate(reversed(own)):
            if last.removesuffix(f"_{parameter}") in kinds and last not in kinds:
                return PREFIX + ".".join(
                    [*outside, *["base_layer"] * inside, kinds[last.removesuffix(f"_{parameter}")]]
                )
        if not own and last in kinds:
            return PREFIX + ".".join([*outside, kinds[last]])
    return PREFIX + ".".join([*path, last])


def shape_in_file(last: str, shape: tuple[int, ...], of_A: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in which PEFT writes the tensor that a module holds as `last`; `of_A` is the shape of its A."""
    if last == MAGNITUDE and len(of_A) > 2:
        return (1, *shape, *(1,) * (len(of_A) - 2))  # as the output of the convolution
    return shape


def _expanded(module: str, wrapped: Collection[str], parameters: Mapping[str, Sequence[str]]) -> list[str]:
    path: list[str] = []
    parts = module.split(".") if module else []
    outer = ""
    for i, part in enumerate(parts):
        path.append(part)
        outer = f"{outer}.{part}" if i else part
        if outer in wrapped:
            path += ["base_layer"] * max(1, len(parameters.get(outer, ())))
    return path


_LEFT_IN = (
    (re.compile(r"\.(lora_(?:embedding_)?[AB])\.default(?=(?:\.(?:weight|bias))?$)"), r".\1"),
    (re.compile(r"\.trainable_tokens_delta\.default$"), ".trainable_tokens_delta"),
    (re.compile(rf"\.{MAGNITUDE}(?:\.default)?(?:\.weight)?$"), f".{MAGNITUDE}"),
    (re.compile(r"\.modules_to_save(?:\.default)?\."), "."),
)
_ADAPTED = re.compile(rf"{re.escape(PREFIX)}(?:(.*)\.)?(?:lora_(?:embedding_)?[AB]|token_adapter)(?:\.|$)")
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


def plain_key(key: str) -> str:
    """`key` without what some writers leave in: the adapter's name "default", or the infix of modules_to_save."""
    for pattern, plain in _LEFT_IN:
        key = pattern.sub(plain, key)
    return key


_FACTOR = re.compile(r"(^|\.)lora_(embedding_)?([AB])(?=\.weight$|$)")


def owner_of_factor(key: str) -> str | None:
    """The name in the base model of the module whose A or B is called `key`; None for a key of another tensor."""
    found = _FACTOR.search(key)
    return None if found is None else base_name(key[: found.start()] or PREFIX)


def other_factor(key: str) -> str:
    """The key of the B that belongs to the A called `key`, or of the A that belongs to the B."""
    return _FACTOR.sub(lambda found: found[0][:-1] + ("B" if found[3] == "A" else "A"), key)


def is_A(key: str) -> bool:
    """True if the factor called `key` is an A, and no B."""
    found = _FACTOR.search(key)
    return found is not None and found[3] == "A"


def key_of_magnitude(key_of_A: str) -> str:
    """The key of DoRA's magnitude that belongs to the A under `key_of_A`."""
    return f"{key_of_A[: key_of_A.rindex('lora_')]}{_TENSORS[MAGNITUDE]}"


def is_of_embedding(key: str) -> bool:
    """True if `key` is of a factor of an embedding."""
    return "lora_embedding_" in key


def adapted_names(keys: Iterable[str]) -> set[str]:
    """The names, in the base model, of the modules that the tensors called `keys` adapt."""
    found = {match[1] or "" for match in map(_ADAPTED.match, keys) if match}
    return set(map(base_name, found))


def base_name(key: str) -> str:
    """The name in the base model of the parameter or module that PEFT calls `key`, prefix or not."""
    return _WRAPPED.sub("", key.removeprefix(PREFIX))


def is_untrained_original(key: str) -> bool:
    """True if `key` is of the untrained copy that PEFT keeps of a module in modules_to_save. With bias="all" it gets
    into files."""
    return ".original_module." in key


def is_of_tokens(key: str) -> bool:
    """True if `key` is of single rows of an embedding that were trained (trainable_token_indices)."""
    return key.endswith(f".{_TENSORS[TOKENS]}")


def is_saved_by_peft(bias_name: str) -> bool:
    """True if PEFT writes the bias called `bias_name` when it trains all biases. It does not write `in_proj_bias`."""
    return bias_name.rpartition(".")[2] == "bias"


def is_in_layers(targets: Collection[str], layers: Any, pattern: str | Sequence[str] | None, name: str) -> bool:
    """PEFT's rule for layers_to_transform: true if `targets` select the module called `name`.

    A module whose full name is in `targets` is adapted in any layer. Layers that match nothing are no error."""
    if name in targets:
        return True
    if not any(name.endswith(f".{entry}") for entry in targets):
        return False
    if pattern:
        patterns = [pattern] if isinstance(pattern, str) else pattern
        found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns)
        match = next(filter(None, found), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    wanted = [layers] if isinstance(layers, int) else layers
    return match is not None and int(match[1]) in wanted


def ends_with(entries: Collection[str], name: str) -> bool:
    """PEFT's rule for modules_to_save: true if `name` ends in an entry. It does not require a dot before the entry."""
    return any(name.endswith(entry) for entry in entries)


def is_inside(entries: Collection[str], name: str) -> bool:
    """True if the parameter called `name` belongs to a module that `entries`, modules_to_save, name."""
    parts = name.split(".")
    return any(ends_with(entries, ".".join(parts[:i])) for i in range(1, len(parts)))


# Names the adapted modules as PEFT's config does, and finds those that PEFT cannot read.

_KNOWN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LOADS_NOT = "PEFT cannot load this adapter, since it has none for these layers"
_IGNORES = "PEFT loads this adapter and ignores what is read from these layers without calling them"


@dataclass(frozen=True)
class Targets:
    """The adapted modules and parameters, named as in PEFT's config."""

    modules: list[str]
    parameters: list[str]
    companions: list[str]
    """Modules that PEFT adapts together with the module that they belong to."""
    tokens: dict[str, list[int]]
    """The trained rows of each embedding."""
    specs: dict[str, AdapterSpec]
    """The spec of each module and parameter, as it is written: as a plain pair."""
    without_dropout: bool
    """True if PEFT has no dropout for one of them: it then refuses a config with dropout."""
    unread: dict[str, list[str]]
    """A sentence on what PEFT does with modules that it cannot read -> the names of these modules."""


def targets_of(adapted: Mapping[str, Adapter], config: LoRAConfig) -> Targets:
    """The `Targets` for the adapted modules of a model."""
    modules: list[str] = []
    parameters: list[str] = []
    companions: list[str] = []
    tokens: dict[str, list[int]] = {}
    specs: dict[str, AdapterSpec] = {}
    unread: dict[str, list[str]] = {}
    attentions = {name: m for name, m in adapted.items() if _is_attention(name, m, adapted, config)}
    for name, module in adapted.items():
        if isinstance(module, TokenRows):
            if module.lora.owner is None:  # else its rows are those of the owner, which has an entry
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
    """True if `module` is an nn.MultiheadAttention that is adapted as PEFT does it: both its packed projections and its
    out_proj, with the same spec."""
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
    """The spec of the plain pair that is written for `pair`: a frozen start doubles the rank."""
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
    # The number of a layer is a poor ending: it would match other modules in a model with more layers.
    options = [endings] if not any(e.isdigit() or not e for e in endings) else []
    for entries in [*options, sorted(wanted_set)]:
        if all(entries) and not any(name_matches(entries, name) for name in others if name not in wanted_set):
            return entries
    if wanted_set == {""}:
        return "^$"
    return "|".join(re.escape(name) for name in sorted(wanted_set))


# Reads a config by PEFT's rules.


def for_engine(root: nn.Module, config: LoRAConfig, keys: Collection[str]) -> LoRAConfig:
    """`config`, of a file with these `keys`, for the engine and `root`: without its entries that match nothing, and
    without its patterns.

    PEFT accepts an entry that matches nothing, and writes such entries itself ("score" beside "classifier"); the engine
    refuses them. The modules that the file adapts are still checked against its tensors.
    """
    modules = dict(Tree.of(root).every)
    saved = [n for n in modules if n and config.modules_to_save and ends_with(config.modules_to_save, n)]
    inside = {id(m) for name in saved for m in modules[name].modules()}
    candidates = [n for n, m in modules.items() if id(m) not in inside]
    adaptable = [n for n in candidates if geometry_of(type(modules[n]))]  # an entry for others excludes nothing
    entries = [e for e in config.modules_to_save or () if any(name_matches([e], n) for n in modules)]
    excluded, targets = config.exclude_modules, config.target_modules
    parameters = [e for e in config.target_parameters or () if _names_a_parameter(e, modules)]
    if config.layers_to_transform is not None and isinstance(targets, list):
        meant = [n for n in candidates if is_in_layers(targets, config.layers_to_transform, config.layers_pattern, n)]
        if meant:  # else the engine raises an error that says what there is
            others = [n for n in modules if n not in set(meant)]
            targets = exact_targets(meant, others)
            config = replace(config, target_modules=targets, layers_to_transform=None, layers_pattern=None)
    if targets != "all-linear" and targets:
        # If none matches, the engine raises an error with the closest names.
        targets = _matching(targets, candidates) or targets
    config = replace(
        config,
        target_modules=targets,
        target_parameters=parameters or config.target_parameters,
        trainable_token_indices=_rows(config.trainable_token_indices, modules),
        exclude_modules=None if excluded is None else _matching(excluded, adaptable),
        # The file's entries stay if they mean the same to the engine, which requires a dot before an entry.
        modules_to_save=entries if entries and all(name_matches(entries, n) for n in saved) else saved or None,
        rank_pattern={},
        alpha_pattern={},
    )
    return _with_tied(root, config, keys)


def _with_tied(root: nn.Module, config: LoRAConfig, keys: Collection[str]) -> LoRAConfig:
    """`config` that also names the modules in the file that share their weight with a module that it names.

    Where PEFT keeps tied layers tied (ensure_weight_tying), it adapts or trains both, but writes only one name."""
    tree = Tree.of(root)
    users = weight_users(tree.modules)
    tied = {id(m): {n for n, _ in group} for group in users.values() if len(group) > 1 for _, m in group}
    if not tied:
        return config
    adapted = adapted_names(keys)
    whole = {base_name(key).rpartition(".")[0] for key in keys} - adapted
    targets, saved = config.target_modules, config.modules_to_save or []

    def beside(pattern: str | list[str], there: set[str]) -> list[str]:
        named = [m for name, m in tree.modules if name and id(m) in tied and name_matches(pattern, name)]
        found = {name for m in named for name in tied[id(m)]} & there
        return sorted(name for name in found if not name_matches(pattern, name))

    if targets and targets != "all-linear" and (more := beside(targets, adapted)):
        if isinstance(targets, str):
            targets = "|".join([f"(?:{targets})", *map(re.escape, more)])
        else:
            targets = [*targets, *more]
    return replace(config, target_modules=targets, modules_to_save=[*saved, *beside(saved, whole)] or None)


def _rows(indices: Any, modules: Mapping[str, nn.Module]) -> Any:
    """trainable_token_indices by the full names of the modules that its entries match in PEFT."""
    if not isinstance(indices, dict):
        return indices
    found = {n: rows for n in modules for entry, rows in indices.items() if n and ends_with([entry], n)}
    return found or indices


def _names_a_parameter(entry: str, modules: Mapping[str, nn.Module]) -> bool:
    module, _, parameter = entry.rpartition(".")
    return any(
        parameter in m._parameters and (not module or name_matches([module], name)) for name, m in modules.items()
    )


def _matching(pattern: str | list[str], names: Iterable[str]) -> str | list[str] | None:
    """`pattern` without its entries that match none of `names`; None if nothing is left."""
    names = list(names)
    if isinstance(pattern, str):
        return pattern if any(name_matches(pattern, name) for name in names) else None
    return [entry for entry in pattern if any(name_matches([entry], name) for name in names)] or None
