"""Fits an adapter folder to a model before anything is changed: finds its root, its modules and its tensors there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import InjectionReport, LoRAConfig, inject
from lightning_lora.engine.config import exact_pattern
from lightning_lora.engine.layers import AdapterSpec
from lightning_lora.engine.layers.embedding import TOKENS
from lightning_lora.engine.merge import output_embeddings
from lightning_lora.engine.plan import promised
from lightning_lora.engine.present import check_none_of_others, other_prefix
from lightning_lora.engine.state import describe_base, is_finite
from lightning_lora.engine.targets import Selection, select, with_plain_names, without_wrappers
from lightning_lora.engine.trained import tensors_trained_whole, vocabulary
from lightning_lora.engine.tree import Tree, submodule, unwrapped
from lightning_lora.engine.weights import is_plain
from lightning_lora.errors import AdapterFormatError, TargetError, listed
from lightning_lora.format import peft
from lightning_lora.format.config import with_own_fields
from lightning_lora.format.folder import Header, OpenTensors
from lightning_lora.format.layout import (
    Adapted,
    Layout,
    adapter_root,
    layout_of,
    member,
    names_of_tensors,
    place_of,
    tensor_named,
)
from lightning_lora.format.old_names import Recipe, renamed_config, renamed_key, restacked, todays_names
from lightning_lora.format.peft import exact_targets

_LOADABLE = (
    ". Where the vocabulary was resized before the training, load it with the adapter: "
    "load_adapter(..., load_embedding_layers=True)"
)


@dataclass(frozen=True)
class Fit:
    """How an adapter folder fits onto a model: its root, its modules, and where each tensor comes from."""

    root: nn.Module
    """The module of the model to which the folder's names are relative."""
    layout: Layout
    config: LoRAConfig
    """The config to inject into the model that was given."""
    sources: dict[str, list[str]]
    """The engine's names, relative to the root -> the keys in the file that hold that tensor."""
    base: dict[str, str]
    """Keys in the file that hold a weight of the base -> the name of that weight, relative to the root."""
    kept: list[str]
    """Tensors that are trained but not in the file. They keep the base's values."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shapes of all tensors in the file, by its keys."""
    recipes: Mapping[str, Recipe]
    """Keys that stand for several tensors in the file -> the function that puts these together."""
    where: str

    def on(self, model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`values`, named relative to the root, by the names that the engine uses on `model`."""
        if self.root is unwrapped(model):
            return dict(values)
        names = names_of_tensors(model)
        return {names[id(tensor_named(self.root, name))]: value for name, value in values.items()}

    def inject(self, model: nn.Module) -> InjectionReport:
        """Adapt `model` as the folder says. Raises AdapterFormatError where that does not fit."""
        with _fitting(model, self.where):
            return inject(model, self.config, start=False)

    def read(self, file: OpenTensors | Mapping[str, Tensor], *, compare_base: bool = True) -> dict[str, Tensor]:
        """The tensors to load, by the engine's names relative to the root. Raises AdapterFormatError for one that is
        not finite, for two that should be equal and differ, and for base weights that differ from the model's. With
        `compare_base=False` the values of embeddings and heads are not compared."""
        values: dict[str, Tensor] = {}
        problems = []
        for name, (key, *same) in self.sources.items():
            value = self.recipes[key](file) if key in self.recipes else file[key]
            if not is_finite(value):
                problems.append(f"{key} holds values that are not finite")
            unequal = [other for other in same if not same_numbers(file[other], value)]
            problems += [self._tied(key, other) for other in unequal]
            values[name] = self.layout.value(name, value)
        tables = self._tables()
        for key, own in self.base.items():
            there = tensor_named(self.root, own)
            theirs, ours = self.shapes[key], tuple(there.shape)
            if theirs != ours:
                resize = f": call model.resize_token_embeddings({theirs[0]}) first, and pass load_embedding_layers=True"
                how = resize if theirs[1:] == ours[1:] else ""
                problems.append(f"{key} is of shape {theirs}, and the model's of {ours}{how}")
            elif (compare_base or key not in tables) and not same_numbers(file[key], there):
                problems.append(
                    f"{key} is a weight of the base, which PEFT saved as well (save_embedding_layers), and it differs "
                    "from this model's" + (_LOADABLE if key in tables else "")
                )
        values |= {name: tensor_named(self.root, name).detach().clone() for name in self.kept}
        self._refuse(problems)
        return values

    def tables(self, file: OpenTensors) -> dict[str, Tensor]:
        """The base's embeddings and heads in the file, by the engine's names relative to the root. Raises
        AdapterFormatError for one that cannot be loaded into the model's weight, is not finite, or differs from
        another for the same weight."""
        problems: list[str] = []
        first = names_of_tensors(self.root)
        values: dict[str, Tensor] = {}
        keys: dict[str, str] = {}
        for key, own in self._tables().items():
            parameter, value = tensor_named(self.root, own), file[key]
            name = first[id(parameter)]
            if not (is_plain(parameter) and value.is_floating_point()):
                problems.append(f"{key} cannot be loaded into a weight of {parameter.dtype}")
            elif not is_finite(value):
                problems.append(f"{key} holds values that are not finite")
            elif name in values and not same_numbers(values[name], value):
                problems.append(self._tied(keys[name], key))
            values[name], keys[name] = value, key
        self._refuse(problems)
        return values

    def _tables(self) -> dict[str, str]:
        """The entries of `base` that belong to an embedding or a head: PEFT writes these weights."""
        heads = {id(m) for _, m in Tree.of(self.root).modules if isinstance(m, nn.Embedding)}
        heads |= {id(head) for head in output_embeddings(self.root)}
        return {k: n for k, n in self.base.items() if id(submodule(self.root, n.rpartition(".")[0])) in heads}

    def _tied(self, key: str, other: str) -> str:
        modules = [peft.base_name(k).rpartition(".")[0] for k in (key, other)]
        embeddings = [isinstance(submodule(self.root, m), nn.Embedding) for m in modules]
        head = modules[embeddings.index(False)] if False in embeddings else modules[1]
        return (
            f"{key} and {other} are one tensor in the model, and differ: they were trained apart (PEFT trains a copy "
            f"for each name). Untie them first: model.{head}.weight = torch.nn.Parameter(model.{head}.weight.detach()"
            ".clone()), and in transformers model.config.tie_word_embeddings = False"
        )

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            raise AdapterFormatError(f"{self.where} cannot be loaded: {listed(problems)}. Nothing was changed.")


def fit(model: nn.Module, config: LoRAConfig, header: Header, *, where: str) -> Fit:
    """How the adapter with this config and header fits onto `model`, which is not adapted yet.

    Raises AdapterFormatError naming every key that is missing, unexpected or of another shape, and AdapterStateError as
    `inject` does.
    """
    try:
        with _fitting(model, where):
            return _fit(model, config, header, where)
    except AdapterFormatError:
        check_none_of_others(model, Tree.of(model))  # another library renames the layers that it adapts
        raise


@contextmanager
def _fitting(model: nn.Module, where: str) -> Iterator[None]:
    """Inside, a TargetError becomes an AdapterFormatError: the patterns are those of the folder."""
    try:
        yield
    except TargetError as error:
        raise AdapterFormatError(f"{where} does not fit {type(model).__name__}: {error}") from error


def _fit(model: nn.Module, config: LoRAConfig, header: Header, where: str) -> Fit:
    plain = {key: peft.plain_key(key) for key in header.shapes}
    adapts = peft.adapted_names(plain.values())
    root = _root(model, header, adapts)
    config = with_own_fields(config, header.note.get("config"), where)
    config = with_plain_names(config, Tree.of(root), of_file=True)
    names = todays_names(root, plain.values(), adapts)
    keys = plain
    if names:
        keys = {key: renamed_key(name, names) for key, name in plain.items()}
        config = renamed_config(config, root, adapts, names)
    config, header, keys, recipes = restacked(root, config, header, keys, where)
    relative = peft.for_engine(root, config, list(keys.values()))
    selection = select(relative, Tree.of(root))
    if not _has_bias(root, selection, config.bias):
        relative = replace(relative, bias="none")
    whole = tensors_trained_whole(relative, selection)
    numbers = replace(relative, rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
    adapted = {t.name: _adapted(spec, shapes) for t, spec, shapes in promised(selection.targets, numbers)}
    tokens = {}
    for name, _, _, rows in vocabulary(relative, selection):
        if rows.owner is None:
            tokens[name] = list(rows.tokens)
            weight = tensor_named(root, member(name, "weight"))
            adapted[name] = Adapted({TOKENS: (len(rows.tokens), weight.shape[1])}, {})
    packed = {t.name for t in selection.targets if t.parameters == ("in_proj_weight",) and not config.use_dora}
    doubled = [t.name for t in selection.targets if t.within in packed]
    layout = layout_of(root, adapted, whole.values(), doubled)
    # PEFT trains every bias but does not write every one: a bias that is not written keeps the base's value.
    biases = set(layout.whole) - _inside(selection.saved) if config.bias == "all" else set()
    optional = {name for name in biases if not peft.is_saved_by_peft(name)}
    sources, base = _sources(layout, header, keys, root, optional, where)
    return Fit(
        root=root,
        layout=layout,
        config=_for_model(model, root, numbers, selection, tokens),
        sources=sources,
        base=base,
        kept=sorted(optional.difference(sources)),
        shapes=header.shapes,
        recipes=recipes,
        where=where,
    )


def _adapted(spec: AdapterSpec, shapes: Mapping[str, tuple[int, ...]]) -> Adapted:
    parts = {f"_{name}": part for name, part in spec.parameters.items()} or {"": spec}
    return Adapted(shapes, {end: part.rank for end, part in parts.items()})


def _root(model: nn.Module, header: Header, wanted: set[str]) -> nn.Module:
    """The module of `model` that contains all modules called `wanted`, those that the file adapts; the `adapter_root`
    of `model` if no module does."""
    theirs = header.note.get("base_fingerprint")
    for names in (wanted, set(map(without_wrappers, wanted))):
        place = place_of(
            model,
            names,
            header.note.get("module") or "",
            lambda root: theirs is not None and describe_base(model, root)["base_fingerprint"] == theirs,
        )
        if place is not None:
            return place[1]
    return adapter_root(model)[1]


def _for_model(
    model: nn.Module, root: nn.Module, config: LoRAConfig, selection: Selection, tokens: Mapping[str, list[int]]
) -> LoRAConfig:
    """`config`, whose names are relative to `root`, with names relative to `model`, for an injection into `model`."""
    names = {id(m): name for name, m in reversed(Tree.of(model).modules)}
    place = {t.name: names[id(t.module)] for t in selection.targets}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for target in selection.targets:
        for parameter in target.parameters or (None,):
            here = place[target.name] if parameter is None else member(place[target.name], parameter)
            ranks[here] = config.rank_of(*target.names_of(parameter))
            alphas[here] = config.alpha_of(*target.names_of(parameter))
    changes: dict[str, Any] = {
        "rank_pattern": exact_pattern(ranks, config.rank),
        "alpha_pattern": exact_pattern(alphas, config.alpha),
    }
    if root is not model:
        inside = {id(m) for module in selection.saved.values() for m in module.modules()}
        mine = {id(t.module) for t in selection.targets}
        others = [n for n, m in Tree.of(model).every if id(m) not in inside | mine]
        modules = [place[t.name] for t in selection.targets if not t.parameters]
        parameters = [member(place[t.name], p) for t in selection.targets for p in t.parameters]
        changes |= {
            "target_modules": exact_targets(modules, others) if modules else [],
            "target_parameters": parameters or None,
            "trainable_token_indices": {names[id(submodule(root, n))]: rows for n, rows in tokens.items()} or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "modules_to_save": [names[id(module)] for module in selection.saved.values()] or None,
        }
    return replace(config, **changes)


def _has_bias(root: nn.Module, selection: Selection, bias: str) -> bool:
    """True if there is a bias to train. PEFT accepts a model that has none."""
    modules = root.modules() if bias == "all" else (t.module for t in selection.targets)
    return any(n.endswith("bias") for m in modules for n, _ in m.named_parameters(recurse=False))


def _inside(saved: Mapping[str, nn.Module]) -> set[str]:
    return {f"{name}.{p}" for name, module in saved.items() for p, _ in Tree.of(module).parameters}


def _sources(
    layout: Layout,
    header: Header,
    plain_keys: Mapping[str, str],
    root: nn.Module,
    optional: set[str],
    where: str,
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Our tensors -> the keys of the file that hold them; and keys that hold a weight of the base -> its name.

    `plain_keys` maps each key of the file to its plain key (see `peft.plain_key`) under today's names."""
    keys = layout.keys()
    parameters = dict(Tree.of(root).parameters)
    sources: dict[str, list[str]] = {}
    base: dict[str, str] = {}
    problems, unexpected = [], []
    for key, shape in header.shapes.items():
        plain = key if key in keys else plain_keys[key]
        plain = plain if plain in keys else without_wrappers(plain)
        if plain in keys:
            name = keys[plain]
            sources.setdefault(name, []).append(key)
            is_floating = name not in layout.whole or tensor_named(root, name).is_floating_point()
            if shape != layout.shape_in_file(name):
                problems.append(f"{key} has shape {shape} where the model has {layout.shape_in_file(name)}")
            elif header.floating[key] != is_floating:
                problems.append(f"{key} is not of the kind of number that the model has there")
        elif peft.is_untrained_original(key):
            continue
        elif peft.base_name(plain) in parameters:
            base[key] = peft.base_name(plain)
        else:
            unexpected.append(key)
    first = {name: key for key, name in reversed(list(keys.items()))}
    missing = [key for name, key in first.items() if name not in sources and name not in optional]
    if missing:
        problems.append(f"missing: {listed(reversed(missing))}")
    if unexpected:
        problems.append(f"unexpected: {listed(unexpected)}")
    if problems:
        prefix = other_prefix(unexpected, keys)
        advice = f" {prefix}. Save the adapter from the model itself, or rename its keys." if prefix else ""
        raise AdapterFormatError(
            f"{where} does not fit {type(root).__name__}: {listed(problems)}.{advice} Nothing was changed."
        )
    return sources, base


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """True if the tensors hold the same numbers when both are cast to the narrower of their dtypes."""
    if a.shape != b.shape:
        return False
    narrower = min((a.dtype, b.dtype), key=lambda d: d.itemsize)
    return torch.equal(a.to(narrower), b.detach().to("cpu", narrower))
