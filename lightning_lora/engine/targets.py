"""Selects the modules that a config names, by PEFT's matching rules; every entry of the config must match something.

PEFT's rules (peft/tuners/tuners_utils.py, check_target_module_exists): a string is matched against the whole name; an
entry of a list is the whole name or what follows a dot; `modules_to_save` are never targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_lora.checked import closest
from lightning_lora.engine.all_linear import all_linear, is_linear, left_out_weights, parameters_of
from lightning_lora.engine.config import LoRAConfig, pattern_matches
from lightning_lora.engine.layers import Adapter, geometry_of, register_conv1d
from lightning_lora.engine.layers.quantized import register_bitsandbytes
from lightning_lora.engine.memory import Memory
from lightning_lora.engine.present import check_none_of_others
from lightning_lora.engine.torch_private import persistent_buffers
from lightning_lora.engine.tree import Candidates, Target, Tree, entry_matches, last_part, name_in
from lightning_lora.engine.weights import is_plain
from lightning_lora.errors import TargetError, listed


@dataclass(frozen=True)
class Selection:
    """The modules of one model that a config selects."""

    targets: list[Target]
    saved: dict[str, nn.Module] = field(default_factory=dict)
    """The modules that are trained whole."""
    head: str | None = None
    """The layer that "all-linear" took for the output head and left out."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Weights and frozen parts that are not adapted though one may expect it: name -> how to adapt it."""


def select(model: nn.Module, config: LoRAConfig, tree: Tree | None = None) -> Selection:
    """The modules of `model` that `config` adapts or trains whole, in the model's order. `tree` is Tree.of(model).

    Raises TargetError for an entry that matches nothing, naming the closest names there are, and for one that matches
    a module that cannot be adapted; AdapterStateError where another library has put adapters into `model`.
    """
    tree = tree or Tree.of(model)
    check_none_of_others(model, tree, lambda: _named(tree, config))
    return meant_by(config, model, tree)


def meant_by(config: LoRAConfig, model: nn.Module, tree: Tree) -> Selection:
    """As `select`, for a model that may be adapted already."""
    register_conv1d()
    register_bitsandbytes()
    saved = _saved_modules(model, config, tree)
    there = Candidates(tree, {id(m) for module in saved.values() for m in module.modules()})

    head: str | None = None
    left_out: dict[str, str] = {}
    if config.target_modules == "all-linear":
        targets, head, left_out = all_linear(there, Candidates(tree) if saved else there)
        if not targets:
            others = left_out | left_out_weights(there, [], left_out)
            ways = (f" {name!r} is not one of them: to adapt it, {how}." for name, how in list(others.items())[:3])
            raise TargetError(
                f"target_modules='all-linear' finds no linear layer in {type(model).__name__}"
                f"{f' but its head {head!r}' if head else ''}.{''.join(ways)} "
                "Name the modules to adapt: " + _adaptable(there.all)
            )
    else:
        named = _matched(there, config.target_modules, "target_modules", model) if config.target_modules else []
        targets = _with_companions(named, there)

    if config.exclude_modules is not None:
        targets = _without(targets, config.exclude_modules, there, model)
    if config.layers_to_transform is not None:
        targets = _in_layers(targets, config)
    geometries = {cls: geometry_of(cls) for cls in {type(t.module) for t in targets}}
    unfit = [t for t in targets if geometries[type(t.module)] is None] if None in geometries.values() else []
    if unfit:
        kinds = sorted({type(t.module).__name__ for t in unfit})
        raise TargetError(
            f"target_modules={config.target_modules!r} matches {listed(repr(t.name) for t in unfit)}, but a "
            f"{' or '.join(kinds)} cannot be adapted. {_adaptable(there.all)}"
        )
    if any(geometry.parameters_of is not Adapter.parameters_of for geometry in geometries.values() if geometry):
        targets = [t._replace(parameters=own) if (own := parameters_of(t.module)) else t for t in targets]
    if config.target_parameters:
        targets = _with_parameters(targets, there.all, config.target_parameters, model)
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(key, getattr(config, key), targets)
    if config.target_modules == "all-linear":
        left_out |= left_out_weights(there, targets, left_out)
    return Selection(targets, saved, head, left_out)


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


def _hits(there: Candidates, pattern: str | list[str], key: str, model: nn.Module) -> dict[str, list[int]]:
    """Entry of `pattern` -> the indices in `there.modules` that it matches. Raises TargetError if it matches none."""
    is_regex = isinstance(pattern, str)
    entries = [pattern] if isinstance(pattern, str) else pattern
    found = {entry: there.matching(entry, is_regex=is_regex) for entry in entries}
    for entry, hits in found.items():
        if not hits:
            raise TargetError(_no_match(key, entry, there.all, model, is_regex=is_regex))
    return found


def _matched(there: Candidates, pattern: str | list[str], key: str, model: nn.Module) -> list[Target]:
    places = {at for hits in _hits(there, pattern, key, model).values() for at in hits}
    return [there.target(*there.modules[at]) for at in sorted(places)]


def _with_companions(targets: list[Target], there: Candidates) -> list[Target]:
    """`targets` and their companions (children that are adapted along with them), in the model's order."""
    geometries = ((cls, geometry_of(cls)) for cls in {type(t.module) for t in targets})
    companions = {cls: geometry.companions for cls, geometry in geometries if geometry is not None}
    brought: dict[str, Target] = {}
    for target in targets if any(companions.values()) else ():
        for child in companions.get(type(target.module), ()):
            brought[f"{target.name}.{child}" if target.name else child] = target
    if not brought:
        return targets
    chosen = {t.name for t in targets} | brought.keys()
    return [t._replace(within=brought[t.name].name) if t.name in brought else t for t in there.all if t.name in chosen]


def _with_parameters(
    targets: list[Target], everything: list[Target], entries: list[str], model: nn.Module
) -> list[Target]:
    """`targets` and the parameters that `entries` name: a whole name, or what follows a dot in it (PEFT's rule)."""
    found: dict[str, tuple[str, ...]] = {}
    there = [
        (t, name, [name_in(module, name) for module in (t.name, *t.aliases)])
        for t in everything
        for name, p in t.module._parameters.items()  # a parameter that has two names is read under both
        if p is not None
    ]
    for entry in entries:
        hits = [(t, name) for t, name, full in there if any(entry_matches(entry, n) for n in full)]
        if not hits:
            parts = entry.count(".") + 1
            fit = {n for _, _, full in there for n in full}
            near = closest(entry, {".".join(n.split(".")[-parts:]) for n in fit})
            guess = f" Did you mean {listed(map(repr, near))}?" if near else ""
            stacks = sorted({name for t, name, _ in there if t.module._parameters[name].dim() in (2, 3)})  # type: ignore[union-attr]
            raise TargetError(
                f"target_parameters: the entry {entry!r} matches no parameter of {type(model).__name__}.{guess} "
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
        for t in everything
        if t.name in adapted or t.name in found
    ]


def _without(targets: list[Target], pattern: str | list[str], there: Candidates, model: nn.Module) -> list[Target]:
    """`targets` without those that `exclude_modules` matches."""
    hits_of = _hits(there, pattern, "exclude_modules", model)
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


def _no_match(key: str, entry: str, everything: list[Target], model: nn.Module, *, is_regex: bool) -> str:
    if is_regex and (names := _as_list(entry, everything)):
        return (
            f"{key}: a string is a regular expression that must match a whole name, and {entry!r} matches none of "
            f"{type(model).__name__}'s. As a list it takes every module whose name ends so: {key}={names!r}."
        )
    near = closest(entry, _suffixes(everything, parts=1 if is_regex else entry.count(".") + 1))
    guess = f" Did you mean {listed(map(repr, near))}?" if near else ""
    what = "the expression (it must match a whole name)" if is_regex else "the entry"
    return f"{key}: {what} {entry!r} matches no module of {type(model).__name__}.{guess} {_adaptable(everything)}"


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


def _saved_modules(model: nn.Module, config: LoRAConfig, tree: Tree) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for entry in config.modules_to_save or ():
        hits = {
            name: module
            for name, module in tree.modules
            if name and any(entry_matches(entry, n) for n in (name, *tree.aliases.get(id(module), ())))
        }
        if not hits:
            endings = list(dict.fromkeys(last_part(name) for name, _ in tree.modules if name))
            near = closest(entry, endings)
            guess = f" Did you mean {listed(map(repr, near))}?" if near else f" Its modules end in: {listed(endings)}."
            raise TargetError(f"modules_to_save: {entry!r} matches no module of {type(model).__name__}.{guess}")
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
            near = closest(entry, endings)
            guess = f"Did you mean {listed(map(repr, near))}?" if near else f"They end in: {listed(endings)}."
            raise TargetError(f"{key}: {entry!r} matches none of the {len(targets)} adapted modules. {guess}")


def tensors_trained_whole(model: nn.Module, config: LoRAConfig, selection: Selection) -> dict[str, Tensor]:
    """Name -> tensor, of the parameters and persistent buffers that `config` trains whole."""
    is_saved, is_wanted = trained_whole(config, selection)
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in Tree.of(model).modules if selection.saved or config.bias != "none" else ():
        for name, p in module.named_parameters(recurse=False):
            if is_wanted(module, name) and id(p) not in seen:
                full = f"{prefix}.{name}" if prefix else name
                if not is_plain(p):
                    why = "complex numbers" if p.is_complex() else "quantized weights"
                    raise TargetError(
                        f"{full!r} cannot be trained: it holds {why} ({p.dtype}). Take it out of modules_to_save, or "
                        "set bias='none' if it is a bias."
                    )
                seen.add(id(p))
                whole[full] = p
        if is_saved(module):
            for name, buffer in persistent_buffers(module):
                whole[f"{prefix}.{name}" if prefix else name] = buffer
    if config.bias != "none" and not any("bias" in name.rpartition(".")[2] for name in whole):
        raise TargetError(
            f"bias={config.bias!r} trains no parameter: {type(model).__name__} has no such bias. Set bias='none'."
        )
    return whole


def trained_whole(
    config: LoRAConfig, selection: Selection
) -> tuple[Callable[[nn.Module], bool], Callable[[nn.Module, str], bool]]:
    """Two tests: is a module trained whole, and is a parameter of a module trained whole?"""
    inside = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    adapted = {id(t.module) for t in selection.targets}

    def is_saved(module: nn.Module) -> bool:
        return id(module) in inside

    def is_wanted(module: nn.Module, name: str) -> bool:
        biases = config.bias == "all" or (config.bias == "lora_only" and id(module) in adapted)
        return id(module) in inside or (biases and "bias" in name)

    return is_saved, is_wanted


def check_shared(
    model: nn.Module,
    config: LoRAConfig,
    selection: Selection,
    whole: Mapping[str, Tensor],
    rows_of: Mapping[str, Tensor | None],
) -> None:
    """Raise TargetError if a tensor that is trained whole, or of which rows are trained (`rows_of`), is also used
    elsewhere (the tensor or its memory): the other use would change unasked."""
    if not whole and not rows_of:
        return
    _, is_wanted = trained_whole(config, selection)
    modules = Tree.of(model).modules
    memory = Memory(modules)
    trained = {id(t): name for name, t in whole.items()}
    for prefix, module in modules:
        for own, p in module._parameters.items():
            if id(p) in trained and not is_wanted(module, own):
                raise TargetError(_shared_by(trained[id(p)], [f"{prefix}.{own}" if prefix else own], config))
    for name, t in (*whole.items(), *rows_of.items()):
        if not isinstance(t, nn.Parameter):
            continue  # a buffer is often a constant, or a view of one
        others = [held.name for held in memory.sharing(t) if not held.is_attribute and id(held.tensor) not in trained]
        if others:
            raise TargetError(_shared_by(name, others, config))


def _shared_by(name: str, others: Iterable[str], config: LoRAConfig) -> str:
    others = listed(repr(other.removesuffix(".weight")) for other in others)
    what = {"modules_to_save": config.modules_to_save, "trainable_token_indices": config.trainable_token_indices}
    asked = [option for option, value in what.items() if value] + [f"bias={config.bias!r}"] * (config.bias != "none")
    return (
        f"{' and '.join(asked)}: {name.removesuffix('.weight')!r} shares its weight with {others} (they are one "
        "parameter, or two in the same memory), which would be trained with it. Name both, or untie them first: give "
        "each a weight in memory of its own."
    )
