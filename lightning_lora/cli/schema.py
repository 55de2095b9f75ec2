"""Checks a composed configuration before anything heavy is built, and reports all that is wrong with it at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lightning_lora.cli.signature import HYDRA_KEYS, ours_for, parameters, takes_any_name, target, type_problem
from lightning_lora.errors import ConfigError, closest, listed

Node = dict[str, Any] | None
"""The type of a setting that is a node: a target with its arguments, or several of them by name."""


def checked(config: DictConfig, settings: type) -> dict[str, Any]:
    """`config` as plain values, interpolations resolved, every name and type in it checked.

    The fields of the dataclass `settings` are the top-level keys; the signature of each `_target_` is the schema of
    its node. A reference to a whole group under that group's own name (`optimizer: ${optimizer}`) is an offer: a
    target without such a parameter is not given it.

    Raises ConfigError that names every misspelt key (with the closest one that exists), wrong type and missing value.
    """
    missing = sorted(OmegaConf.missing_keys(config))
    try:
        values: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        if not missing:  # else the reference to a missing value is what fails, and the missing value is what to say
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
    """Every node with a target, inner ones too; what is behind a reference is checked at its own place."""
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
            # A node's type is known only once it is built; the constructor that takes it will say.
            if not _holds_node(value) and (what := type_problem(function, name, value)):
                yield f"{_join(where, name)}: {what}"
        elif not takes_any_name(function):
            yield unknown_key(where, name, known, function.__name__ if where else None)
    if not values.get("_partial_") and "_args_" not in values:
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in given:
                yield f"{_join(where, name)}: a value is missing. Give it with {_join(where, name)}=..."


def unknown_key(where: str, name: str, known: Any, taker: str | None) -> str:
    """The message for a setting `name` in the node `where`, whose taker knows only the names `known`."""
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
