"""The settings of a command. The parameters of each `_target_` are the schema; settings are checked first, built
after."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_lora.checked import closest
from lightning_lora.cli.hydra_private import located
from lightning_lora.errors import ConfigError, LightningLoRAError, MissingExtraError, listed

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule


# The parameters of a `_target_` are the schema of its node, so there is no second list that could grow stale.

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def parameter_names(node: Mapping[Any, Any]) -> list[str]:
    """The names of the parameters of `node`'s target; empty if it has no target, or one that cannot be found."""
    try:
        return list(parameters(target(node["_target_"])))
    except (KeyError, ConfigError):
        return []


def ours_for(name: str, known: Collection[str]) -> str:
    """Our name for PEFT's `name`, if it is one of `known`; else `name`."""
    from lightning_lora.engine.peft_names import PEFT_NAMES  # imports torch, which is slow

    ours = PEFT_NAMES.get(name, name)
    return ours if ours in known else name


EXTRAS = {"bitsandbytes": "quantized", "tensorboard": "tensorboard", "wandb": "wandb"}
"""Module -> our extra that installs it."""


@lru_cache
def target(path: str) -> Callable[..., Any]:
    """The class or function at the dotted `path`. Raises ConfigError, with the closest name where the module exists."""
    try:
        found = located(path)
    except Exception as error:
        raise ConfigError(_why_not(path, error)) from error
    if not callable(found):
        raise ConfigError(f"{path} is no class and no function.")
    return found


def _why_not(path: str, error: Exception) -> str:
    parent, _, name = path.rpartition(".")
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    module = sys.modules.get(parent)
    if module is not None:
        meant = closest(name, dir(module), count=1)
        return f"{parent} has no {name!r}." + (f" Did you mean {parent}.{meant[0]}?" if meant else "")
    if isinstance(root, ModuleNotFoundError):
        extra = EXTRAS.get(root.name or "")
        hint = f" Install it with: pip install 'lightning-lora[{extra}]'" if extra else ""
        return f"there is no module {root.name!r}, on Python's path or in this folder.{hint}"
    return f"cannot import {path}: {type(root).__name__}: {root}"


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that a keyword can set, by name; empty if Python cannot read the signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in signature.parameters.items() if p.kind in named}


def takes_any_name(function: Callable[..., Any]) -> bool:
    """True if `function` has **kwargs, or a signature that Python cannot read."""
    try:
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True


def type_problem(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """The reason why the parameter `name` does not take the plain `value`; None if it does, or if that cannot be
    checked.

    Values come from YAML and are checked as JSON: a list may become a tuple and an int a float, but a string no number.
    """
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUndefinedAnnotation

    parameter = parameters(function)[name]
    annotation = _annotation(function, parameter)
    if annotation is inspect.Parameter.empty:
        return None
    try:
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a dataclass or a model brings its own configuration
            adapter = TypeAdapter(annotation)
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        try:
            adapter.validate_json(json.dumps([value]), strict=True)
            hint = f" Write {name}=[{value}]."
        except ValidationError:
            hint = ""
        choices = sorted({str(choice) for choice in _choices(annotation)})
        if choices and not isinstance(parameter.annotation, str):
            return f"{json.dumps(value)} is none of {', '.join(choices)}.{hint}"
        return f"{json.dumps(value)} is not of the type {_written(parameter, annotation)}.{hint}"
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError, NameError):
        return None  # an annotation that only a type checker understands
    return None


def _choices(annotation: Any) -> list[Any]:
    """All values of an annotation of literals alone (or None); an empty list for any other."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    inner = [_choices(part) for part in get_args(annotation) if part is not type(None)]
    is_union = get_origin(annotation) in (Union, UnionType)
    return [choice for part in inner for choice in part] if is_union and all(inner) else []


def _annotation(function: Callable[..., Any], parameter: inspect.Parameter) -> Any:
    if not isinstance(parameter.annotation, str):
        return parameter.annotation
    # One name that exists for type checkers only must not hide the others: each annotation is evaluated by itself.
    for scope in _scopes(function):
        try:
            return eval(parameter.annotation, dict(scope))
        except Exception:
            continue
    return inspect.Parameter.empty


def _scopes(function: Callable[..., Any]) -> list[dict[str, Any]]:
    classes = inspect.getmro(function) if inspect.isclass(function) else [inspect.unwrap(function)]
    modules = [getattr(c, "__module__", None) for c in classes]
    return [vars(sys.modules[m]) for m in modules if m in sys.modules]


def _written(parameter: inspect.Parameter, annotation: Any) -> str:
    if isinstance(parameter.annotation, str):
        return parameter.annotation
    return inspect.formatannotation(annotation).replace("typing.", "")


# Checks a composed configuration before anything heavy is built, and reports all that is wrong with it at once.

Node = dict[str, Any] | None
"""The type of a setting that is a node: a target with its arguments, or several of them by name."""


@dataclass(frozen=True)
class Applied:
    """The top-level keys of commands that apply an adapter to data, beside the adapter itself; each node's own keys are
    those of its target."""

    model: Node
    data: Node
    task: Node
    trainer: Node
    optimizer: Node
    scheduler: Node
    subfolder: str | None
    ignore_fields: list[str]
    check_base: bool
    seed: int | None
    run_dir: str


def checked(config: DictConfig, settings: type) -> dict[str, Any]:
    """`config` as plain values, interpolations resolved, every name and type in it checked.

    The fields of the dataclass `settings` are the top-level keys; the signature of each `_target_` is the schema of its
    node. A reference to a whole group under that group's own name (`optimizer: ${optimizer}`) is optional: it is
    removed if the target has no such parameter.

    Raises ConfigError that names every misspelt key (with the closest one that exists), wrong type and missing value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        if not missing:  # else a reference to the missing value failed, which is reported below
            raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from error
        values = None
    hints = {f.name: f.metadata.get("missing") for f in fields(settings)}
    problems = [f"{key}: a value is missing. {hints.get(key) or f'Give it with {key}=...'}" for key in missing]
    if not problems:
        raw: Any = OmegaConf.to_container(config, resolve=False)
        problems = [*_check_call("", settings, values, raw), *_check_nodes("", values, raw)]
    if problems:
        raise ConfigError("\n  ".join(["the settings do not fit:", *dict.fromkeys(problems)]))
    return values


def _check_nodes(where: str, value: Any, raw: Any) -> Iterator[str]:
    """The problems of every node with a target, inner ones too. A node behind a reference is checked at its own
    place."""
    if isinstance(raw, str):
        return
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from _check_nodes(f"{where}[{i}]", item, raw[i])
    if isinstance(value, dict):
        if "_target_" in value:
            try:
                function = target(value["_target_"])
            except ConfigError as error:
                yield f"{_join(where, '_target_')}: {error}"
                return
            for name in [n for n in value if raw[n] == f"${{{n}}}" and not _takes(function, n)]:
                del value[name]
            yield from _check_call(where, function, value, raw)
        for name in value:
            yield from _check_nodes(_join(where, name), value[name], raw[name])


def _check_call(where: str, function: Any, values: dict[str, Any], raw: dict[str, Any]) -> Iterator[str]:
    known = parameters(function)
    given = {name: value for name, value in values.items() if name not in HYDRA_KEYS}
    for name, value in given.items():
        if name in known:
            # The type of a node is known only once it is built; the constructor that gets it will check it.
            if not _holds_node(value) and (what := type_problem(function, name, value) or _no_rate(known[name], value)):
                yield f"{_join(where, name)}: {what}{_instead_of_null(_join(where, name), known[name], value)}"
        elif not takes_any_name(function):
            yield unknown_key(where, name, known, function.__name__ if where else None)
    if not values.get("_partial_") and "_args_" not in values:
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in given:
                yield f"{_join(where, name)}: a value is missing. Give it with {_join(where, name)}=..."


def _no_rate(parameter: inspect.Parameter, value: Any) -> str | None:
    """Why a learning rate of null is wrong, even for a parameter without annotation. Returns None if null is the
    default: such an optimizer sets its own rate."""
    return "null is no learning rate." if parameter.name == "lr" and value is None is not parameter.default else None


def _instead_of_null(key: str, parameter: inspect.Parameter, value: Any) -> str:
    if value is not None or not isinstance(parameter.default, (bool, int, float, str)):
        return ""
    return f" Give {key}=VALUE, or leave it out with ~{key}: it is then {json.dumps(parameter.default)}."


def unknown_key(where: str, name: str, known: Any, taker: str | None) -> str:
    """The message for a setting `name` in the node `where`: `taker`, its class or function, takes only the names
    `known`."""
    meant = closest(ours_for(name, known), known, count=1)
    hint = f"Did you mean {_join(where, meant[0])}?" if meant else f"There are: {listed(sorted(known), 12)}."
    return f"{_join(where, name)}: there is no such setting{f' of {taker}' if taker else ''}. {hint}"


def _takes(function: Any, name: str) -> bool:
    return name in parameters(function) or takes_any_name(function)


def _holds_node(value: Any) -> bool:
    if isinstance(value, dict):
        return "_target_" in value or any(map(_holds_node, value.values()))
    return isinstance(value, list) and any(map(_holds_node, value))


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


# Builds the objects that the settings describe, and says which setting an error came from.

OTHERS = ("lightning", "torch", "transformers")
"""Packages whose constructors raise an error that explains a wrong setting. Elsewhere it may be a fault in code."""
REFUSALS = (ValueError, TypeError, ImportError)
"""ImportError is for packages that are not installed: trainer.accelerator=tpu needs torch_xla."""
_EXTRAS_OF = {"TensorBoardLogger": ("tensorboard", "tensorboard"), "WandbLogger": ("wandb", "wandb")}
"""Class name -> the package that it needs, and our extra that installs it."""


def build(settings: dict[str, Any], where: str, **arguments: Any) -> Any:
    """The object that the node at the dotted key `where` describes, with further keyword `arguments`.

    Raises ConfigError if the node has no target, or if a target of one of the packages in OTHERS refuses a value;
    MissingExtraError if an optional package is missing. An error of a user's own target is raised without Hydra's
    wrapping.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    node: Any = settings
    for part in where.split("."):
        node = node[part]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{where} has no _target_: name the class or function that it describes.")
    try:
        # Escaped twice: Hydra resolves what it is given, and then reads the result once more.
        return instantiate({"_convert_": "all", **literal(literal(node))}, **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and not isinstance(cause, LightningLoRAError):
            name = node["_target_"].rpartition(".")[2]
            if name in _EXTRAS_OF:
                raise MissingExtraError(f"{where} ({name})", *_EXTRAS_OF[name]) from cause
        if isinstance(cause, REFUSALS) and node["_target_"].partition(".")[0] in OTHERS:
            raise ConfigError(f"{where}: {cause}") from cause
        raise cause if isinstance(cause, Exception) else error from None


def task_and_data(settings: dict[str, Any]) -> tuple[LightningModule, LightningDataModule]:
    """The objects that `task` and `data` describe. Raises ConfigError if one is no LightningModule or
    LightningDataModule."""
    from lightning.pytorch import LightningDataModule, LightningModule

    built: list[Any] = []
    for where, kind in (("task", LightningModule), ("data", LightningDataModule)):
        it = build(settings, where)
        if not isinstance(it, kind):
            made = f"{settings[where]['_target_']} makes a {type(it).__name__}"
            raise ConfigError(f"{where}._target_: {made}, and a {kind.__name__} is needed.")
        built.append(it)
    task, data = built
    return task, data


def literal(value: Any) -> Any:
    """`value` with "${" escaped in its texts: OmegaConf would read "${...}" as a reference."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def build_each(settings: dict[str, Any], where: str) -> list[Any]:
    """The objects that a group of named nodes describes; one that is null is left out."""
    group = settings[where] or {}
    if "_target_" in group:
        raise ConfigError(f"{where} holds nodes by name, not one _target_: write {where}.my_name._target_=...")
    return [build(settings, f"{where}.{name}") for name, node in group.items() if node is not None]


def base_folder(base: str | None) -> str | None:
    """`base`, or the folder of the model that model= calls by this name ("embedded", "smollm2")."""
    if base not in ("embedded", "smollm2"):
        return base
    from lightning_lora.recipes.models import ModelSource, smollm2

    return (ModelSource() if base == "embedded" else smollm2()).location
