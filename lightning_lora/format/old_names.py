"""Translates names that modules had in older transformers, by the tables with which it reads its own old checkpoints.

LLaVA, PaliGemma, Gemma 3 and others moved `language_model.model.layers` to `model.language_model.layers` (4.52). An
adapter that was trained before has the old names in its keys, its patterns and its regular expressions.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import exact_pattern
from lightning_lora.engine.layers import geometry_of
from lightning_lora.engine.targets import name_matches
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.format import peft
from lightning_lora.format.folder import Header
from lightning_lora.format.peft import exact_targets
from lightning_lora.format.transformers_private import conversions, old_prefixes, renamed

Renaming = Callable[[str], str]

_ABOUT_A_PAIR = re.compile(r"\.lora_\w+(\.\w+)?$|\.token_adapter\.\w+$")


def todays_names(root: nn.Module, keys: Iterable[str], adapted: Set[str]) -> dict[str, str]:
    """Old name -> today's name in `root`, for the modules `adapted` and for other tensors in `keys`, if `root` does not
    have them under the old name. Experts that became a stack are not in `root` under today's name either."""
    tree = Tree.of(root)
    absent = adapted - {name for name, _ in tree.every}
    others = [name for key in keys if not _ABOUT_A_PAIR.search(key) for name in [peft.base_name(key)]]
    tensors = set(others).difference(name for name, _ in tree.tensors) if others else set()
    renaming = _of_transformers(root) if absent or tensors else None
    if renaming is None:
        return {}
    there = {name for name, _ in tree.tensors}
    # The tables rename tensors, so a module is renamed by its weight.
    found = {name: renaming(f"{name}.weight").removesuffix(".weight") for name in absent}
    found |= {name: new for name in tensors if (new := renaming(name)) in there}
    return {old: new for old, new in found.items() if new != old}


def renamed_key(key: str, names: dict[str, str]) -> str:
    """`key` with today's name of its module, or of its tensor, by `names` (old name -> today's)."""
    old = next((stem for stem in _stems(key) if stem in names), None)
    return key if old is None else key.replace(f"{peft.PREFIX}{old}", f"{peft.PREFIX}{names[old]}", 1)


def _stems(key: str) -> Iterator[str]:
    """What may be the name of the module that owns the tensor called `key`, or of the tensor itself; longest first."""
    stem = peft.base_name(key)
    while stem:
        yield stem
        stem = stem.rpartition(".")[0]


def renamed_config(config: LoRAConfig, root: nn.Module, adapted: Iterable[str], names: dict[str, str]) -> LoRAConfig:
    """`config`, which has the old names of the modules `adapted`, with today's names instead."""
    today = {old: names.get(old, old) for old in adapted}
    targets = config.target_modules
    changes: dict[str, Any] = {
        "rank_pattern": exact_pattern({new: config.rank_of(old) for old, new in today.items()}, config.rank),
        "alpha_pattern": exact_pattern({new: config.alpha_of(old) for old, new in today.items()}, config.alpha),
    }
    if targets and targets != "all-linear" and not all(name_matches(targets, new) for new in today.values()):
        others = [name for name, _ in Tree.of(root).every if name not in today.values()]
        changes |= {
            "target_modules": exact_targets(list(today.values()), others),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    return replace(config, **changes)


def _of_transformers(root: Any) -> Renaming | None:
    """A function that renames tensors of an old checkpoint as transformers does for `root`; None if it renames none."""
    if table := old_prefixes(root):
        return lambda name: _replaced(name, table)
    steps = conversions(root, "WeightRenaming")
    return (lambda name: renamed(name, steps)) if steps else None


def _replaced(name: str, table: dict[str, str]) -> str:
    """Renames as transformers 4 does: only the first pattern that matches is replaced, and the replacement loses its
    groups."""
    for pattern, replacement in table.items():
        plain = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
        new, count = re.subn(pattern, plain, name)
        if count:
            return new
    return name


# Turns pairs of single experts, which were modules in transformers 4 (`experts.3.w1`), into pairs of stacks of experts.
#
# transformers 5 holds the experts of a layer in parameters, W = [W1; W3] of each expert in one stack. Where the experts
# have pairs of their own, W + s [B1 A1; B3 A3] = W + s B A with A = [A1; A3] and B = diag(B1, B3), exactly. The tables
# of transformers say which names became which parameter; PEFT reads them too.

Recipe = Callable[[Any], Tensor]
"""A function that makes one tensor from the tensors in a file."""


class Restacked(NamedTuple):
    """What a file says, rewritten as if it had been saved from a model with stacks."""

    config: LoRAConfig
    header: Header
    keys: dict[str, str]
    """The keys in the file, and those in `recipes` -> plain keys under today's names."""
    recipes: dict[str, Recipe]
    """Keys of tensors that are not in the file -> the functions that make them from several tensors in it."""


class _Part(NamedTuple):
    """The pair of one old module, whose weight is now a part of an expert's matrix: its name, and its keys in the
    file."""

    old: str
    A: str
    B: str


def restacked(root: nn.Module, config: LoRAConfig, header: Header, keys: dict[str, str], where: str) -> Restacked:
    """The file with its pairs of single experts put together for the stacks in `root`, if there are any. `keys` maps
    the keys in the file to plain keys under today's names.

    Raises AdapterFormatError where some experts of a stack have no pair, and for tensors that do not fit a stack."""
    plain = {key: file for file, key in keys.items()}
    adapted = peft.adapted_names(plain)
    tree = Tree.of(root)
    absent = adapted - {name for name, _ in tree.every}
    parameters = dict(tree.parameters) if absent else {}
    stacks = _stacks(root, sorted(absent), parameters)
    routers = [] if config.target_parameters else sorted(name for name in adapted if _is_weight_alone(tree, name))
    if not stacks and not routers:
        return Restacked(config, header, keys, {})
    keys_of = _by_module(plain, adapted)
    own = {at: [n for n in tree.by_name[at]._parameters if (at, n) in stacks] for at, _ in stacks}
    shapes, floating = dict(header.shapes), dict(header.floating)
    recipes: dict[str, Recipe] = {}
    made_of: set[str] = set()
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for (module, parameter), (count, experts) in stacks.items():
        target = f"{module}.{parameter}"
        shape = tuple(parameters[target].shape)
        parts = {e: {p: _part(n, keys_of[n], plain, where) for p, n in by.items()} for e, by in experts.items()}
        rank, scale, made = _stack(config, header, target, shape, count, parts, where)
        ranks[target] = rank
        alphas[target] = scale * (math.sqrt(rank) if config.use_rslora else rank)
        for factor, recipe in made.items():
            key = peft.tensor_key(f"{module}.{factor}_{parameter}", {module}, (), own)
            recipes[key], floating[key] = recipe, True
            shapes[key] = (shape[0] * rank, shape[2]) if factor == "lora_A" else (shape[1], rank * shape[0])
        made_of.update(key for by in parts.values() for part in by.values() for key in (part.A, part.B))
    shapes = {key: of_key for key, of_key in shapes.items() if key not in made_of}
    keys = {key: name for key, name in keys.items() if key not in made_of} | {key: key for key in recipes}
    kept = sorted(name for name in adapted if name in tree.by_name and name not in routers)
    names = {name: name for name in kept} | {f"{name}.weight": name for name in routers}
    config = _config(config, tree, kept, routers, [*ranks, *(f"{name}.weight" for name in routers)])
    ranks |= {new: config.rank_of(name) for new, name in names.items()}
    alphas |= {new: config.alpha_of(name) for new, name in names.items()}
    config = replace(
        config,
        rank_pattern=exact_pattern(ranks, config.rank),
        alpha_pattern=exact_pattern(alphas, config.alpha),
    )
    return Restacked(config, replace(header, shapes=shapes, floating=floating), keys, recipes)


def _stacks(
    root: nn.Module, names: list[str], parameters: Mapping[str, Tensor]
) -> dict[tuple[str, str], tuple[int, dict[int, dict[int, str]]]]:
    """The stacks that the modules called `names` became parts of: (module, parameter) -> the number of parts of an
    expert's matrix, and expert -> part -> old name. A name that no table knows is left out."""
    tables = _tables(root) if names else []
    stacks: dict[tuple[str, str], tuple[int, dict[int, dict[int, str]]]] = {}
    for name in names:
        for ends, parameter in tables:
            for part, (head, tail) in enumerate(ends):
                found = re.fullmatch(rf"(.*{re.escape(head)})\.(\d+)\.{re.escape(tail)}", name)
                if found and f"{found[1]}.{parameter}" in parameters:
                    _, experts = stacks.setdefault((found[1], parameter), (len(ends), {}))
                    experts.setdefault(int(found[2]), {})[part] = name
    return stacks


def _is_weight_alone(tree: Tree, name: str) -> bool:
    """True if the module still has a weight but is of a class without a geometry, as a router that was an nn.Linear."""
    module = tree.by_name.get(name)
    return module is not None and geometry_of(type(module)) is None and "weight" in module._parameters


def _config(config: LoRAConfig, tree: Tree, kept: list[str], routers: list[str], parameters: list[str]) -> LoRAConfig:
    """`config` for the modules `kept`, and for `parameters` in place of the other modules that it named."""
    config = replace(config, target_parameters=sorted({*(config.target_parameters or []), *parameters}))
    targets = config.target_modules
    if not kept:
        return replace(config, target_modules=[], exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    if targets == "all-linear" or [n for n in (*kept, *routers) if name_matches(targets, n)] != kept:
        meant = set(kept)
        others = [name for name, _ in tree.every if name not in meant]
        targets = exact_targets(kept, others)
        return replace(config, target_modules=targets, layers_to_transform=None, layers_pattern=None)
    return config


def _by_module(keys: Iterable[str], modules: Set[str]) -> dict[str, list[str]]:
    """The keys of the tensors of each of `modules`."""
    found: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        if (module := next((stem for stem in _stems(key) if stem in modules), None)) is not None:
            found[module].append(key)
    return found


def _part(name: str, keys: list[str], plain: Mapping[str, str], where: str) -> _Part:
    A, B = (f"{peft.PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
    others = [key for key in keys if key not in (A, B)]
    if others or A not in plain or B not in plain:
        what = f"has {listed(others)}" if others else f"lacks {A if A not in plain else B}"
        raise AdapterFormatError(
            f"{where} {what}: the experts of this model are one stack now, which takes a plain pair of each alone. "
            "Nothing was changed."
        )
    return _Part(name, plain[A], plain[B])


def _stack(
    config: LoRAConfig,
    header: Header,
    target: str,
    shape: tuple[int, ...],
    count: int,
    experts: Mapping[int, Mapping[int, _Part]],
    where: str,
) -> tuple[int, float, dict[str, Recipe]]:
    """The rank and the scale of the pair of a stack of experts, and the functions that make its A and B."""
    first = next(iter(experts.values()))
    E, out, width = shape if len(shape) == 3 else (0, 0, 0)
    height = out // count
    ranks = {p: header.shapes[part.A][0] for p, part in first.items()}
    fits = out % count == 0 and set(experts) == set(range(E))
    for by in experts.values():
        fits = fits and by.keys() == ranks.keys()
        for p, part in by.items():
            wanted = (ranks.get(p), width), (height, ranks.get(p))
            fits = fits and (header.shapes[part.A], header.shapes[part.B]) == wanted
    if not fits:
        names = listed(sorted(part.old for by in experts.values() for part in by.values()))
        raise AdapterFormatError(
            f"{where} does not fit {target!r} of shape {shape}, the stack that {names} became: every expert needs a "
            "pair, of one rank and of its size. Nothing was changed."
        )
    rank = sum(ranks.values())
    scales = {p: {config.scale_of(by[p].old) for by in experts.values()} for p in ranks}
    if any(len(of_one) > 1 for of_one in scales.values()):
        raise AdapterFormatError(f"{where} gives the experts of {target!r} different scales. Nothing was changed.")
    scale = max(next(iter(of_one)) for of_one in scales.values())
    order = sorted(ranks)

    def A(file: Any) -> Tensor:  # (E * rank, in)
        return torch.cat([file[experts[e][p].A] for e in range(E) for p in order])

    def B(file: Any) -> Tensor:  # (out, rank * E)
        like = file[experts[0][order[0]].B]
        B = like.new_zeros(E, out, rank)
        for e in range(E):
            at = 0
            for p in order:
                own = file[experts[e][p].B] * (next(iter(scales[p])) / scale)
                B[e, p * height : (p + 1) * height, at : at + ranks[p]] = own
                at += ranks[p]
        return B.permute(1, 2, 0).reshape(out, rank * E)

    return rank, scale, {"lora_A": A, "lora_B": B}


def _tables(root: Any) -> list[tuple[list[tuple[str, str]], str]]:
    """How the weights of experts became stacks. An entry has, for each part, the text before and after the number of
    the expert in the old name, and then the name of the parameter."""
    tables = []
    for step in conversions(root, "WeightConverter"):
        if len(step.target_patterns) != 1:
            continue
        how = [(type(op).__name__, getattr(op, "dim", None)) for op in step.operations]
        ends = [re.fullmatch(r"\.?(.+)\.\*\.(.+)\.weight", p.replace("\\", "")) for p in step.source_patterns]
        if how in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]) and all(ends):
            tables.append(([(e[1], e[2]) for e in ends if e], step.target_patterns[0].rpartition(".")[2]))
    return tables
