"""Composes a configuration before Hydra's own run, to find what Hydra would refuse and what could be meant instead."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_lora.checked import closest
from lightning_lora.cli.hydra_private import hydra_parser
from lightning_lora.cli.results import CONFIG, RESULTS
from lightning_lora.cli.settings import HYDRA_KEYS, parameter_names
from lightning_lora.errors import ConfigError, listed

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
    """A configuration, and the groups and options that its command has."""

    config: DictConfig
    groups: dict[str, list[str]]
    """Config group of the command -> its options."""


def refused_key(error: Exception) -> str | None:
    """The key of the override that Hydra could not apply, or None where `error` says something else."""
    found = re.match(r"Could not (?:override|delete from config)[^']*'~?([^'=]+)", str(error))
    return found and found[1]


def composed(config_name: str, arguments: list[str], but: str | None = None) -> Composed:
    """The configuration of a run with Hydra's command line `arguments`; for a sweep, that of its first job.

    With a key `but`, the overrides of that key are left out, and all others that Hydra refuses. Raises Hydra's
    ConfigCompositionException.
    """
    args = hydra_parser().parse_args(arguments)
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
            except ValueError as error:  # raised by Hydra's own code for values that it cannot parse
                raise ConfigError(f"{error}. The settings: {' '.join(kept)}") from error


def with_pluses(config_name: str, arguments: list[str]) -> list[str]:
    """`arguments` with "++", which Hydra demands, before a setting that no file lists but its target takes.

    The targets' signatures are the schema, so files list only settings that a reader should see. Raises
    ConfigCompositionException for a setting or an option that does not exist.
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
            # Two pluses (add or replace), since in a job of a sweep the option of a group may set it already.
            arguments = [f"++{a}" if a.startswith(f"{key}=") else a for a in arguments]


def with_model_names(arguments: list[str]) -> list[str]:
    """`arguments` with `model=NAME` written as model=pretrained and model.name=NAME, if NAME is not close to an option.

    Raises ConfigError for a path that does not exist, before the run has a folder.
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
    """All keys of `config` in dotted form. The keys inside a node follow the node's own key."""
    for name in map(str, config):
        yield f"{prefix}{name}"
        # A reference to another node repeats its keys, and a missing one has none.
        if OmegaConf.is_interpolation(config, name) or OmegaConf.is_missing(config, name):
            continue
        if isinstance(node := config[name], DictConfig):
            yield from keys(node, f"{prefix}{name}.")


def search_space(config: DictConfig) -> dict[str, Any]:
    """The search space in `hydra.sweeper.params` of the composed `config`. Hydra demands "++" before keys that no file
    lists: they get it here, those of the command line from `with_pluses`."""
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
"""Setting of a Hydra sweeper that gives its direction -> its values for mode=min (the default) and for mode=max."""


def directions(config: DictConfig) -> dict[str, Any]:
    """The settings by which the sweeper of the composed `config` gets the direction of `mode`. Raises ConfigError if
    the sweeper was given the opposite."""
    found = {}
    for key, values in _DIRECTIONS.items():
        given = OmegaConf.select(config, f"hydra.sweeper.{key}")
        is_list = OmegaConf.is_list(given)  # Optuna's, for several objectives; a run has one
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
    """True if Hydra takes an override of `key` as it is: it has a plus, is a group, or is in the configuration."""
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
    if isinstance(value, IntervalSweep):  # for Optuna and others: an interval, of which we take the start
        first = str(value.start)
    else:
        first = next(iter(override.sweep_string_iterator()))
    return OverridesParser.create().parse_override(f"{sign}{override.key_or_group}={first}")


def _check_options(overrides: list[Override], loader: ConfigLoader) -> None:
    """Raises ConfigError for `group=null`, on which Hydra fails with an internal error."""
    groups = _groups(loader)
    for key in (o.key_or_group for o in overrides if o.type is OverrideType.CHANGE and o.value() is None):
        if key in groups:
            options = listed(loader.get_group_options(key), 20)
            raise ConfigError(f"{key}=null: a group takes the name of an option. Options of {key}: {options}")


def _groups(loader: ConfigLoader) -> list[str]:
    top = loader.list_groups("")
    return [group for group in top if group != "hydra" and loader.get_group_options(group, ObjectType.CONFIG)]


# `run=FOLDER`: the model, data and task of a finished run, taken from its folder instead of spelt out again.

TAKEN = ("model", "data", "task")
LINKED = ("model", "optimizer", "scheduler")
ADAPTER_MISSING = (
    "Give run=FOLDER for what a run has trained, on the data of that run; adapter=FOLDER; or adapter=null for the bare "
    "base."
)


def with_finished_run(command: str, arguments: list[str]) -> tuple[str, list[str]]:
    """The config name and the arguments for Hydra. With `run=FOLDER`, the configuration is made from that run.

    A group that the user chooses anew (`data=text`) is not taken from the run, nor one that the command does not have.
    Raises ConfigError if the folder is not that of a run, or has nothing that the command takes.
    """
    given = [a for a in arguments if a.startswith("run=")]
    if not given:
        return command, arguments
    folder = Path(given[-1].removeprefix("run=").strip("'\"")).expanduser()
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"run={folder} is not the folder of a run: it has no {CONFIG}.")
    taken = [name for name in TAKEN if not any(a.startswith(f"{name}=") for a in arguments)]
    name = f"{command}_of_run"
    ConfigStore.instance().store(name=name, node=_configuration(command, folder.absolute(), taken))
    return name, [a for a in arguments if a not in given]


def _configuration(command: str, folder: Path, taken: list[str]) -> dict[str, Any]:
    text = files(CONFIG_MODULE).joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    config: Any = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    own = {*config, *(next(iter(d)) for d in config["defaults"] if d != "_self_")}
    if "adapter" not in own:
        raise ConfigError(f"run={folder}: {command} takes no run. See its settings with {command} --help.")
    taken = [name for name in taken if name in own]
    config["defaults"] = [d for d in config["defaults"] if d == "_self_" or next(iter(d)) not in taken]
    run: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG), resolve=False)
    hydra = folder / ".hydra" / "hydra.yaml"
    if hydra.is_file() and (cwd := OmegaConf.select(OmegaConf.load(hydra), "hydra.runtime.cwd")) is not None:
        run = _from(Path(cwd), run)
    for name in taken:
        config[name] = _linked(run[name], run)
    trained = _trained(folder, adapted=run.get("lora") is not None)
    if not trained.keys() <= own:
        raise ConfigError(f"run={folder} trained without adapters, and {command} takes an adapter.")
    config.update(trained)
    return config


def _from(started_in: Path, node: Any) -> Any:
    """`node` with absolute paths for the existing files and folders that it names relative to `started_in`, where the
    run was started."""
    if isinstance(node, list):
        return [_from(started_in, value) for value in node]
    if not isinstance(node, dict):
        return node
    moved = {}
    for key, value in node.items():
        is_place = isinstance(value, str) and value and "://" not in value and (key == "name" or key.endswith("path"))
        place = str(started_in / value) if is_place else ""  # an absolute path stays itself
        moved[key] = place if place and glob.glob(place, recursive=True) else _from(started_in, value)
    return moved


def _linked(node: Any, run: dict[str, Any]) -> Any:
    """`node` with a reference in place of each copy of another node, so that model.dtype=... still reaches the task."""
    for key, value in (node or {}).items():
        for name in LINKED:
            if isinstance(value, dict) and value == run.get(name):
                node[key] = f"${{{name}}}"
    return node


def _trained(folder: Path, adapted: bool) -> dict[str, str | None]:
    """The settings that load what the run has trained: its adapter or, if it had none, its best checkpoint."""
    if (folder / "adapter").is_dir():
        return {"adapter": str(folder / "adapter")}
    results = folder / RESULTS
    best = json.loads(results.read_text(encoding="utf-8")).get("best_checkpoint") if results.is_file() else None
    if adapted or best is None:
        beside = sorted(str(path) for path in folder.glob("checkpoints/*-adapter"))
        hint = f"Name one that lies beside a checkpoint with adapter=: {', '.join(beside)}" if beside else ""
        raise ConfigError(f"run={folder} has no {'adapter' if adapted else 'best checkpoint'}: it did not end. {hint}")
    return {"adapter": None, "ckpt_path": str(folder / best)}


# The data modules of this package that go with each of its tasks. Users' own classes are not checked.

DATA_OF = {
    "CausalLM": ("TextData", "InstructionData"),
    "SequenceClassification": ("TextClassificationData",),
    "ImageClassification": ("ImageClassificationData",),
}
"""Task -> the data modules whose batches it takes."""
OPTIONS = {
    "CausalLM": "task=causal_lm",
    "SequenceClassification": "task=sequence_classification",
    "ImageClassification": "task=image_classification",
    "TextData": "data=text or data=stdlib_source",
    "InstructionData": "data=instructions",
    "TextClassificationData": "data=text_classification or data=stdlib_docstrings",
    "ImageClassificationData": "data=images or data=shapes",
}
"""Class -> the option that chooses it."""
OURS = "lightning_lora."


def check_pairing(settings: dict[str, Any]) -> None:
    """Raises ConfigError if the task in `settings` does not take the batches of the data in `settings`."""
    task, data = (_class_of(settings.get(name)) for name in ("task", "data"))
    takers = [name for name, taken in DATA_OF.items() if data in taken]
    if task in DATA_OF and takers and task not in takers:
        taken = " or ".join(OPTIONS[name] for name in DATA_OF[task])
        raise ConfigError(
            f"{task} does not go with {data}. Choose {OPTIONS[takers[0]]} for these data, or {taken} for this task."
        )


def _class_of(node: Any) -> str | None:
    target = str((node or {}).get("_target_"))
    return target.rpartition(".")[2] if target.startswith(OURS) else None
