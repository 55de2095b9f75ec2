"""Composes a configuration ahead of Hydra's own run: what would be refused, and what there is to mean instead."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_lora.cli.signature import HYDRA_KEYS, parameter_names
from lightning_lora.errors import ConfigError, closest, listed

CONFIG_MODULE = "lightning_lora.conf"


@contextmanager
def rehearsal(config_name: str, arguments: list[str]) -> Iterator[DictConfig]:
    """The configuration of a run (of the first job of a sweep) as its job will see it, before anything is on disk."""
    config = composed(config_name, arguments).config
    with open_dict(config):
        config.hydra.runtime.output_dir = os.getcwd()
        config.hydra.job.id = config.hydra.job.num = 0
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    try:
        yield config
    finally:
        HydraConfig.instance().cfg = None


class Composed(NamedTuple):
    """A configuration, and what it could have been composed from instead."""

    config: DictConfig
    groups: dict[str, list[str]]
    """Config group, of those that the command has -> its options."""


def refused_key(error: Exception) -> str | None:
    """The key of the override that Hydra could not apply, or None where `error` says something else."""
    found = re.match(r"Could not (?:override|delete from config)[^']*'~?([^'=]+)", str(error))
    return found and found[1]


def composed(config_name: str, arguments: list[str], but: str | None = None) -> Composed:
    """The configuration of a run with Hydra's command line `arguments`, of the first job where it is a sweep.

    With a key `but`, its overrides are left out, and any other that would be refused. Raises Hydra's
    ConfigCompositionException.
    """
    args = get_args_parser().parse_args(arguments)
    left_out = {but}
    GlobalHydra.instance().clear()
    start = initialize_config_module if args.config_path is None else initialize_config_dir
    with start(args.config_path or CONFIG_MODULE, version_base="1.3"):
        loader: Any = GlobalHydra.instance().config_loader()
        if args.config_dir:
            path = f"file://{os.path.abspath(args.config_dir)}"
            loader.get_search_path().append("command-line", path, anchor="main")
            loader.repository.initialize_sources(loader.get_search_path())
        overrides = OverridesParser.create(loader).parse_overrides(args.overrides)
        if args.multirun:
            overrides = [_first_of_sweep(override) for override in overrides]
        _check_options(overrides, loader)
        while True:
            kept = [o.input_line or "" for o in overrides if o.key_or_group not in left_out]
            try:
                config = compose(args.config_name or config_name, kept, return_hydra_config=True)
                if args.multirun and (searched := search_space(config)):
                    given = {o.key_or_group for o in overrides}
                    space = OverridesParser.create(loader).parse_overrides([f"{k}={v}" for k, v in searched.items()])
                    first = [_first_of_sweep(o).input_line or "" for o in space if o.key_or_group not in given]
                    config = compose(args.config_name or config_name, [*first, *kept], return_hydra_config=True)
                if args.multirun:
                    directions(config)
                groups = [group for group in _groups(loader) if group in config.hydra.runtime.choices]
                return Composed(config, {group: loader.get_group_options(group) for group in groups})
            except ConfigCompositionException as error:
                key = refused_key(error)
                if but is None or key is None or key in left_out:
                    raise
                left_out.add(key)
            except ValueError as error:  # of Hydra's own code, for what it cannot take apart
                raise ConfigError(f"{error}. The settings: {' '.join(kept)}") from error


def with_pluses(config_name: str, arguments: list[str]) -> list[str]:
    """`arguments` with the pluses that Hydra wants before a setting that no file lists, where its target takes it.

    The signatures are the schema, so files list only what a reader should see. Raises ConfigCompositionException for
    a setting or an option that does not exist.
    """
    while True:
        try:
            composed(config_name, arguments)
            return arguments
        except ConfigCompositionException as error:
            key = refused_key(error)
            if key is None or not any(a.startswith(f"{key}=") for a in arguments):
                raise
            *parents, name = key.split(".")
            node = OmegaConf.select(composed(config_name, arguments, but=key).config, ".".join(parents))
            known = [*parameter_names(node), *HYDRA_KEYS] if isinstance(node, DictConfig) and "_target_" in node else []
            if not parents or name not in known:
                raise
            # Two, since a job of a sweep may have the setting from its option of a group.
            arguments = [f"++{a}" if a.startswith(f"{key}=") else a for a in arguments]


def with_model_names(arguments: list[str]) -> list[str]:
    """`arguments` with `model=NAME`, where NAME is no option of the group nor close to one, as the settings meant.

    Raises ConfigError for a path at which nothing lies, before the run has a folder.
    """
    result = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        name = value.strip("'\"")
        if key != "model" or name in ("", "null") or "," in name or _is_near_an_option(name, arguments):
            result.append(argument)
        elif (
            name.startswith((".", "/", "~")) and not Path(name).expanduser().exists()
        ):  # said before a run has a folder
            raise ConfigError(f"model={name}: There is no folder {name}.")
        else:
            result += ["model=pretrained", f"model.name='{name}'"]
    return result


def _is_near_an_option(name: str, arguments: list[str]) -> bool:
    folder = next((a for flag, a in pairwise(arguments) if flag in ("--config-dir", "-cd")), None)
    own = folder is not None and (Path(folder) / "model" / f"{name}.yaml").is_file()
    options = [p.name.removesuffix(".yaml") for p in files(CONFIG_MODULE).joinpath("model").iterdir()]
    return own or name in options or (bool(closest(name, options)) and not Path(name).exists())


def keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of `config`, dotted, the inner ones of each node after its own."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        node = config._get_node(name)
        # A reference to another node repeats its keys, and a missing one has none.
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            yield from keys(node, f"{prefix}{name}.")


def search_space(config: DictConfig) -> dict[str, Any]:
    """What `hydra.sweeper.params` of the composed `config` searches, each key with the plus that Hydra wants where no
    file lists it: those of the command line have it from `with_pluses`."""
    space = OmegaConf.select(config, "hydra.sweeper.params") or {}
    given = [override.partition("=")[0] for override in config.hydra.overrides.task]
    return {
        f"++{key}" if f"++{key}" in given or not _is_listed(config, key) else key: space[key] for key in map(str, space)
    }


_DIRECTIONS = {
    "direction": ("minimize", "maximize"),  # Optuna's
    "optim.maximize": (False, True),  # Nevergrad's
    "ax_config.experiment.minimize": (True, False),
}
"""Settings of Hydra's sweepers that say which values are good -> for mode=min, which is their default, and mode=max."""


def directions(config: DictConfig) -> dict[str, Any]:
    """What the sweeper of the composed `config` is to be told by `mode`. Raises ConfigError where it was told the
    opposite."""
    found = {}
    for key, values in _DIRECTIONS.items():
        given = OmegaConf.select(config, f"hydra.sweeper.{key}")
        is_list = OmegaConf.is_list(given)  # of Optuna, for several values; a run has one
        if given is None or (is_list and len(given) != 1) or config.get("mode") not in ("min", "max"):
            continue
        found[key] = wanted = values[config.mode == "max"]
        given = given[0] if is_list else given
        name = getattr(given, "name", given)
        by_hand = any(o.startswith(f"hydra.sweeper.{key}=") for o in config.hydra.overrides.hydra) or name != values[0]
        if (by_hand or is_list) and name != wanted:
            raise ConfigError(
                f"mode={config.mode} and hydra.sweeper.{key}={name} say the opposite of each other. Leave out the "
                "second: the sweeper takes its direction from mode."
            )
    return found


def _is_listed(config: DictConfig, key: str) -> bool:
    """Whether Hydra takes an override of `key` as it is: it has a plus, or it is a group or in the configuration."""
    if key[0] in "+~" or "/" in key or key in config.hydra.runtime.choices:
        return True
    *parents, name = key.split(".")
    node = OmegaConf.select(config, ".".join(parents)) if parents else config
    return isinstance(node, DictConfig) and name in node


def _first_of_sweep(override: Override) -> Override:
    if not override.is_sweep_override():
        return override
    sign, _, _ = (override.input_line or "").partition(override.key_or_group)
    value = override.value()
    if isinstance(value, IntervalSweep):  # of Optuna and its like; it has no first value but its start
        first = str(value.start)
    else:
        first = next(iter(override.sweep_string_iterator()))
    return OverridesParser.create().parse_override(f"{sign}{override.key_or_group}={first}")


def _check_options(overrides: list[Override], loader: ConfigLoader) -> None:
    """Raises ConfigError for `group=null`, at which Hydra fails with an error of its own code's."""
    groups = _groups(loader)
    for key in (o.key_or_group for o in overrides if o.type is OverrideType.CHANGE and o.value() is None):
        if key in groups:
            options = listed(loader.get_group_options(key), 20)
            raise ConfigError(f"{key}=null: a group takes the name of an option. Options of {key}: {options}")


def _groups(loader: ConfigLoader) -> list[str]:
    top = loader.list_groups("")
    return [group for group in top if group != "hydra" and loader.get_group_options(group, ObjectType.CONFIG)]
