"""What a `_target_` takes: its parameters are the schema of its node, so no second list of them can grow stale."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any

from lightning_lora.errors import ConfigError, closest

HYDRA_KEYS = ("_target_", "_partial_", "_convert_", "_recursive_", "_args_")


def parameter_names(node: Mapping[Any, Any]) -> list[str]:
    """The names that the target of `node` takes; none where it has no target, or one that cannot be found."""
    try:
        return list(parameters(target(node["_target_"])))
    except (KeyError, ConfigError):
        return []


def ours_for(name: str, known: Collection[str]) -> str:
    """The name that PEFT's `name` has here, where it is one of `known`; else `name`."""
    from lightning_lora.engine.peft_names import PEFT_NAMES  # brings torch, which is slow

    ours = PEFT_NAMES.get(name, name)
    return ours if ours in known else name


EXTRAS = {"bitsandbytes": "quantized", "tensorboard": "tensorboard", "wandb": "wandb"}
"""Module -> the extra of ours that brings it."""


@lru_cache
def target(path: str) -> Callable[..., Any]:
    """The class or function at the dotted `path`. Raises ConfigError, with the closest name where the module exists."""
    from hydra._internal.utils import _locate  # the public get_object announces each failure by itself

    try:
        found = _locate(path)
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
    """The parameters that a keyword can set, by name; empty where Python cannot tell."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: p for name, p in signature.parameters.items() if p.kind in named}


def takes_any_name(function: Callable[..., Any]) -> bool:
    """Whether `function` has **kwargs, or a signature that Python cannot tell."""
    try:
        return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return True


def type_problem(function: Callable[..., Any], name: str, value: Any) -> str | None:
    """What is wrong with giving the plain `value` to the parameter `name`; None where nothing is, or nobody can tell.

    Values come from YAML: they are judged as JSON is, where a list may become a tuple and an int a float, but no
    string a number.
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
        return f"{json.dumps(value)} is not of the type {_written(parameter, annotation)}.{hint}"
    except (PydanticUserError, PydanticUndefinedAnnotation, TypeError, NameError):
        return None  # an annotation that only a type checker understands
    return None


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
