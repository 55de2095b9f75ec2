"""Selects the modules that a config names, by PEFT's matching rules; every entry of the config must match something.

PEFT's rules (peft/tuners/tuners_utils.py, check_target_module_exists): a string is matched against the whole name; an
entry of a list is the whole name or what follows a dot; `modules_to_save` are never targets.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import nn

from lightning_lora.checked import did_you_mean
from lightning_lora.engine.all_linear import all_linear, is_linear, left_out_weights, parameters_of
from lightning_lora.engine.config import LoRAConfig, pattern_matches
from lightning_lora.engine.layers import geometry_of, register_conv1d
from lightning_lora.engine.layers.quantized import register_bitsandbytes
from lightning_lora.engine.present import Injection, check_none_of_others
from lightning_lora.engine.tree import NAMES, Candidates, Target, Tree, entry_matches, flags_kept, last_part, name_in
from lightning_lora.errors import TargetError, listed


@dataclass(frozen=True)
class Selection:
    """The modules of one model that a config selects."""

    tree: Tree
    targets: list[Target]
    saved: dict[str, nn.Module] = field(default_factory=dict)
    """The modules that are trained whole."""
    inside: Set[int] = frozenset()
    """The ids of the modules that are trained whole, and of those inside them."""
    head: str | None = None
    """The layer that "all-linear" took for the output head and left out."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Weights and frozen parts that are not adapted though one may expect it: name -> how to adapt it."""


def select(config: LoRAConfig, tree: Tree) -> Selection:
    """The modules of the model in `tree` that `config` adapts or trains whole, in the model's order.

    Raises TargetError for an entry that matches nothing, naming the closest names there are, and for one that matches
    a module that cannot be adapted; AdapterStateError where another library has put adapters into the model.
    """
    check_none_of_others(tree.root, tree, lambda: _named(tree, config))
    return meant_by(config, tree)


def meant_by(config: LoRAConfig, tree: Tree) -> Selection:
    """As `select`, for a model that may be adapted already."""
    register_conv1d()
    register_bitsandbytes()
    saved = _saved_modules(config, tree)
    inside = {id(m) for module in saved.values() for m in module.modules()}
    there = Candidates(tree, inside)

    head: str | None = None
    left_out: dict[str, str] = {}
    if config.target_modules == "all-linear":
        targets, head, left_out = all_linear(there, Candidates(tree) if saved else there)
        if not targets:
            others = left_out | left_out_weights(there, [], left_out)
            ways = (f" {name!r} is not one of them: to adapt it, {how}." for name, how in list(others.items())[:3])
            raise TargetError(
                f"target_modules='all-linear' finds no linear layer in {tree.kind}"
                f"{f' but its head {head!r}' if head else ''}.{''.join(ways)} "
                "Name the modules to adapt: " + _adaptable(there.all)
            )
    else:
        hits_of = _hits(there, config.target_modules, "target_modules") if config.target_modules else {}
        places = sorted({at for hits in hits_of.values() for at in hits})
        targets = _with_companions([there.target(*there.modules[at]) for at in places], there)

    if config.exclude_modules is not None:
        targets = _without(targets, config.exclude_modules, there)
    if config.layers_to_transform is not None:
        targets = _in_layers(targets, config)
    if unfit := [t for t in targets if geometry_of(type(t.module)) is None]:
        kinds = sorted({type(t.module).__name__ for t in unfit})
        raise TargetError(
            f"target_modules={config.target_modules!r} matches {listed(repr(t.name) for t in unfit)}, but a "
            f"{' or '.join(kinds)} cannot be adapted. {_adaptable(there.all)}"
        )
    targets = [t._replace(parameters=own) if (own := parameters_of(t.module)) else t for t in targets]
    if config.target_parameters:
        targets = _with_parameters(targets, there, config.target_parameters)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(key, getattr(config, key), targets)
    if config.target_modules == "all-linear":
        left_out |= left_out_weights(there, targets, left_out)
    return Selection(tree, targets, saved, inside, head, left_out)


def _named(tree: Tree, config: LoRAConfig) -> Iterator[str]:
    """The names of the modules that `config` would adapt or train whole, also of those that cannot be adapted."""
    modules, excluded = config.target_modules, config.exclude_modules
    parameters = [entry.rpartition(".") for entry in config.target_parameters or ()]
    for name, module in tree.every:
        if modules == "all-linear":
            is_meant = is_linear(type(module))
        else:
            is_meant = bool(modules) and name_matches(modules, name)
        if is_meant and excluded and name_matches(excluded, name):
            is_meant = False
        if not is_meant:
            is_meant = name_matches(config.modules_to_save or [], name) or any(
                own in module._parameters and (not owner or entry_matches(owner, name)) for owner, _, own in parameters
            )
        if is_meant:
            yield name


def name_matches(pattern: str | list[str], name: str) -> bool:
    """True if `pattern` matches the module name `name`, by PEFT's rule."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(entry_matches(entry, name) for entry in pattern)


def _hits(there: Candidates, pattern: str | list[str], key: str) -> dict[str, list[int]]:
    """Entry of `pattern` -> the indices in `there.modules` that it matches. Raises TargetError if it matches none."""
    is_regex = isinstance(pattern, str)
    entries = [pattern] if isinstance(pattern, str) else pattern
    found = {entry: there.matching(entry, is_regex=is_regex) for entry in entries}
    for entry, hits in found.items():
        if not hits:
            raise TargetError(_no_match(key, entry, there, is_regex=is_regex))
    return found


def _with_companions(targets: list[Target], there: Candidates) -> list[Target]:
    """`targets` and their companions (children that are adapted along with them), in the model's order."""
    geometries = ((cls, geometry_of(cls)) for cls in {type(t.module) for t in targets})
    companions = {cls: geometry.companions for cls, geometry in geometries if geometry is not None}
    brought: dict[str, Target] = {}
    for target in targets if any(companions.values()) else ():
        for child in companions.get(type(target.module), ()):
            brought[name_in(target.name, child)] = target
    if not brought:
        return targets
    chosen = {t.name for t in targets} | brought.keys()
    return [t._replace(within=brought[t.name].name) if t.name in brought else t for t in there.all if t.name in chosen]


def _with_parameters(targets: list[Target], there: Candidates, entries: list[str]) -> list[Target]:
    """`targets` and the parameters that `entries` name: a whole name, or what follows a dot in it (PEFT's rule)."""
    found: dict[str, tuple[str, ...]] = {}
    every = [
        (t, name, [name_in(module, name) for module in (t.name, *t.aliases)])
        for t in there.all
        for name, p in t.module._parameters.items()  # a parameter that has two names is read under both
        if p is not None
    ]
    for entry in entries:
        hits = [(t, name) for t, name, full in every if any(entry_matches(entry, n) for n in full)]
        if not hits:
            parts = entry.count(".") + 1
            fit = {n for _, _, full in every for n in full}
            guess = did_you_mean(entry, {".".join(n.split(".")[-parts:]) for n in fit})
            stacks = sorted({name for t, name, _ in every if t.module._parameters[name].dim() in (2, 3)})  # type: ignore[union-attr]
            raise TargetError(
                f"target_parameters: the entry {entry!r} matches no parameter of {there.tree.kind}.{guess} "
                f"Its parameters that can be adapted are called: {listed(stacks, 16)}."
            )
        for t, name in hits:
            found[t.name] = (*found.get(t.name, ()), name)
    twice = [t.name for t in targets if t.name in found and not t.parameters]
    if twice:
        raise TargetError(
            f"{listed(map(repr, twice))} is named by target_modules, and a parameter of it by target_parameters: a "
            "weight can be adapted in one way only. Remove it from one of the two, with exclude_modules for example."
        )
    adapted = {t.name: t for t in targets}
    return [
        adapted.get(t.name, t)._replace(
            parameters=tuple(dict.fromkeys((*adapted.get(t.name, t).parameters, *found.get(t.name, ())))),
        )
        for t in there.all
        if t.name in adapted or t.name in found
    ]


def _without(targets: list[Target], pattern: str | list[str], there: Candidates) -> list[Target]:
    """`targets` without those that `exclude_modules` matches."""
    hits_of = _hits(there, pattern, "exclude_modules")
    targeted = {t.name for t in targets}
    for entry, hits in hits_of.items():
        found = [there.modules[at] for at in hits]
        if not any(name in targeted or geometry_of(type(module)) for name, module in found):
            # A trap: an entry of a list names the module itself, and not the modules inside it.
            inside = rf"(.*\.)?{re.escape(found[0][0])}\..*"
            raise TargetError(
                f"exclude_modules: {entry!r} excludes nothing, since {listed(repr(name) for name, _ in found)} cannot "
                f"be adapted itself. To exclude what lies inside, use a regular expression: exclude_modules={inside!r}."
            )
    excluded = {there.modules[at][0] for hits in hits_of.values() for at in hits}
    left = [t for t in targets if t.name not in excluded]
    if not left:
        raise TargetError(f"exclude_modules={pattern!r} leaves nothing to adapt. Exclude fewer modules.")
    return left


def _no_match(key: str, entry: str, there: Candidates, *, is_regex: bool) -> str:
    everything, what = there.all, there.tree.kind
    if is_regex and (names := _as_list(entry, everything)):
        return (
            f"{key}: a string is a regular expression that must match a whole name, and {entry!r} matches none of "
            f"{what}'s. As a list it takes every module whose name ends so: {key}={names!r}."
        )
    guess = did_you_mean(entry, _suffixes(everything, parts=1 if is_regex else entry.count(".") + 1))
    who = "the expression (it must match a whole name)" if is_regex else "the entry"
    return f"{key}: {who} {entry!r} matches no module of {what}.{guess} {_adaptable(everything)}"


def _as_list(text: str, everything: Iterable[Target]) -> list[str]:
    """The names in `text`, such as "q_proj, v_proj", if each is the ending of a module's name; else an empty list."""
    names = re.split(r"[\s,|]+", text.strip())
    endings = [f".{t.name}" for t in everything]
    return names if all(n and any(e.endswith(f".{n}") for e in endings) for n in names) else []


def _suffixes(everything: Iterable[Target], parts: int = 1) -> list[str]:
    endings = (".".join(t.name.split(".")[-parts:]) for t in everything if geometry_of(type(t.module)) is not None)
    return list(dict.fromkeys(endings))


def _adaptable(everything: Iterable[Target]) -> str:
    suffixes = _suffixes(everything)
    if not suffixes:
        return "The model has no module that can be adapted."
    return f"Its adaptable modules end in: {listed(suffixes, 16)}."


def _saved_modules(config: LoRAConfig, tree: Tree) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or ():
        hits = {
            name: module
            for name, module in tree.modules
            if name and any(entry_matches(entry, n) for n in (name, *tree.aliases.get(id(module), ())))
        }
        if not hits:
            endings = list(dict.fromkeys(last_part(name) for name, _ in tree.modules if name))
            guess = did_you_mean(entry, endings, f" Its modules end in: {listed(endings)}.")
            raise TargetError(f"modules_to_save: {entry!r} matches no module of {tree.kind}.{guess}")
        empty = [name for name, module in hits.items() if next(module.parameters(), None) is None]
        if empty:
            raise TargetError(f"modules_to_save: {empty[0]!r} has no parameters to train. Take it out of the list.")
        saved.update(hits)
    return saved


def _in_layers(targets: list[Target], config: LoRAConfig) -> list[Target]:
    given = config.layers_pattern
    patterns = [given] if isinstance(given, str) else given or []
    for pattern in patterns:
        if all(_layer_of(t.name, [pattern]) is None for t in targets):
            raise TargetError(f"layers_pattern: no target lies in a numbered layer of {pattern!r}.")
    assert isinstance(config.layers_to_transform, list), "normalised by the config"
    wanted = set(config.layers_to_transform)
    # PEFT's rule: an entry that is a module's whole name means that module, in whichever layer it lies.
    whole = set(config.target_modules) if isinstance(config.target_modules, list) else set()
    named = {id(t) for t in targets if whole.intersection((t.name, *t.aliases))}
    by_layer = {id(t): _layer_of(t.name, patterns) for t in targets}
    there = sorted({layer for layer in by_layer.values() if layer is not None})
    absent = sorted(wanted.difference(there))
    if absent:
        where = f"The targets lie in layers {there[0]} to {there[-1]}." if there else "No target lies in a layer."
        hint = f" layers_pattern is {given!r}." if given else ""
        raise TargetError(f"layers_to_transform: no target in layer {listed(map(str, absent))}. {where}{hint}")
    return [t for t in targets if by_layer[id(t)] in wanted or id(t) in named]


def _layer_of(name: str, patterns: list[str]) -> int | None:
    for before_number in [rf"{p}\." for p in patterns] or [""]:
        found = re.match(rf"(?:^|.*?\.){before_number}(?P<index>\d+)\.", name)
        if found is not None:
            return int(found["index"])
    return None


def _check_patterns(key: str, pattern: dict[str, Any], targets: list[Target]) -> None:
    if not pattern:
        return
    names = [n for t in targets for parameter in (t.parameters or (None,)) for n in t.names_of(parameter)]
    known = set(names)
    for entry in pattern:
        is_a_name = entry in known and pattern_matches(entry, entry)
        if not is_a_name and not any(pattern_matches(entry, name) for name in names):
            endings = list(dict.fromkeys(last_part(name) for name in names))
            guess = did_you_mean(entry, endings, f" They end in: {listed(endings)}.")
            raise TargetError(f"{key}: {entry!r} matches none of the {len(targets)} adapted modules.{guess}")


# Rewrites names in a config that mention wrappers, such as "model._orig_mod.up", to plain names ("model.up").

_MENTIONED = re.compile(rf"(?<![^.(|])(?:{'|'.join(sorted(NAMES))})(?:\\?\.|$)")

_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters")
_DICTS = ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def with_plain_names(config: LoRAConfig, tree: Tree, *, of_file: bool = False) -> LoRAConfig:
    """`config` without the names of wrappers, in those names and expressions that match nothing in `tree` as they are.

    Nothing is changed if the model has no wrappers, unless the config is `of_file`: then it may come from a model that
    was wrapped."""
    if not (tree.wrappers or of_file):
        return config
    names = [name for name, _ in (*tree.every, *tree.tensors)]
    changes: dict[str, Any] = {}
    for name in _LISTS:
        value = getattr(config, name)
        if isinstance(value, list):
            changes[name] = [_plain(entry, names, entry_matches) for entry in value]
        elif isinstance(value, str) and value != "all-linear":
            changes[name] = _plain(value, names, name_matches)
    for name in _DICTS:
        value = getattr(config, name)
        if isinstance(value, dict):
            matches = entry_matches if name == "trainable_token_indices" else pattern_matches
            changes[name] = {_plain(entry, names, matches): of for entry, of in value.items()}
    return replace(config, **changes)


def _plain(entry: str, names: list[str], matches: Callable[[str, str], bool]) -> str:
    plain = without_wrappers(entry)
    return entry if plain in ("", entry) or any(matches(entry, name) for name in names) else plain


@functools.cache
def without_wrappers(entry: str) -> str:
    """A name, or an expression, without the names of wrappers in it."""
    return _MENTIONED.sub("", entry).removesuffix(".").removesuffix("\\")


# Compares two configs by what they select, however they say it: endings in another order, an expression for a list,
# "all-linear" for the layers that it selects.

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_RANKS = ("rank", "rank_pattern")
_ALPHAS = ("alpha", "alpha_pattern")
_SAVED = ("modules_to_save",)


def differences(model: nn.Module, injection: Injection, config: LoRAConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> its value in `injection.config` and in `config`, for the fields whose difference matters for `model`,
    which `injection.config` adapted."""
    tree = Tree.of(model)
    theirs, ours = injection.config, with_plain_names(config, tree)
    both = {f.name: (getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(LoRAConfig)}
    differing = {name: values for name, values in both.items() if values[0] != values[1]}
    if not differing.keys() & {*_TARGETS, *_RANKS, *_ALPHAS, *_SAVED}:
        return differing
    with flags_kept(p for _, p in tree.parameters):
        for name, p in tree.parameters:  # "all-linear" depends on what was frozen before `inject`
            if p.requires_grad is not (before := name in injection.was_trainable):
                p.requires_grad_(before)
        try:
            meant = [_meaning(meant_by(c, tree), c) for c in (theirs, ours)]
        except TargetError:  # an entry of `config` matches nothing, so the configs do differ
            return differing
    for names in (_TARGETS, _RANKS, _ALPHAS, _SAVED):
        if meant[0][names] == meant[1][names]:
            differing = {name: values for name, values in differing.items() if name not in names}
    return differing


def _meaning(selection: Selection, config: LoRAConfig) -> dict[tuple[str, ...], Any]:
    """Group of fields -> what it selects: the targets, their ranks, their alphas, the modules trained whole."""
    known = {
        (target.name, parameter): target.names_of(parameter)
        for target in selection.targets
        for parameter in target.parameters or (None,)
    }
    return {
        _TARGETS: set(known),
        _RANKS: {key: config.rank_of(*names) for key, names in known.items()},
        _ALPHAS: {key: config.alpha_of(*names) for key, names in known.items()},
        _SAVED: set(selection.saved),
    }
