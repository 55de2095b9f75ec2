"""Turns an error that a user can cause into a message of one screen."""

from __future__ import annotations

import errno
import re
import shlex
import sys
from importlib.resources import files

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from lightning_lora.checked import closest
from lightning_lora.cli.composition import CONFIG_MODULE, composed, keys, refused_key, with_pluses
from lightning_lora.cli.settings import ours_for, parameter_names
from lightning_lora.errors import LightningLoRAError, listed

# `--help`: the docstring of a command, its groups, and its settings.

FLAGS = ("-h", "--help")


def help_of(command: str, docstring: str, arguments: list[str]) -> str:
    """The text of `lightning-lora command --help`, with the settings as the other `arguments` change them.

    Raises ConfigCompositionException as a run with them would.
    """
    config, options = composed(command, with_pluses(command, [a for a in arguments if a not in FLAGS]))
    parts = [docstring]
    if options:
        lines = [f"  {group}: {', '.join(names)}" for group, names in options.items()]
        parts.append("\n".join(["Groups, chosen with group=option:", "", *lines]))
    settings = OmegaConf.to_yaml(OmegaConf.masked_copy(config, [key for key in map(str, config) if key != "hydra"]))
    parts.append("Settings, changed with key=value (a.b=value for what lies inside; ??? is yours to give):")
    parts.append(_with_comments(settings, command).rstrip())
    parts.append("Hydra's own flags: --hydra-help. The settings that a run would use: --cfg job.")
    return "\n\n".join(parts)


def _with_comments(settings: str, command: str) -> str:
    """`settings`, each followed by its comment in the command's file in conf/."""
    text = files(CONFIG_MODULE).joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    said = dict(re.findall(r"^(\w+): [^#\n]*# (.*)$", text, re.MULTILINE))
    return "\n".join(
        f"{line}  # {said[key]}" if (key := line.partition(":")[0]) in said else line for line in settings.splitlines()
    )


_NOT_WRITTEN = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT)

PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "submitit": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
    "rq": "hydra-rq-launcher",
    "optuna": "hydra-optuna-sweeper",
    "ax": "hydra-ax-sweeper",
    "nevergrad": "hydra-nevergrad-sweeper",
}
"""How the options of a launcher or sweeper of Hydra begin -> the package that provides it."""


def explain(error: Exception) -> str | None:
    """The message for `error`; None if a user did not cause it, so that its traceback should be shown."""
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read. A setting is written key=value.{_quoted(error)}"
    if isinstance(error, InterpolationKeyError):
        missing = (re.search(r"'(.*)' not found", str(error)) or ["", "a setting"])[1]
        hint = " To train without adapters: lora=none." if missing == "lora" else ""
        return f"{error.full_key} refers to {missing}, and there is no such setting.{hint}"
    if isinstance(error, HydraException) and "BasicSweeper does not support" in str(error):
        return (
            "A sweep over an interval needs a sweeper that searches: hydra/sweeper=optuna (pip install "
            f"{PLUGINS['optuna']}). Hydra's own takes every value of a list: key=1e-4,1e-3."
        )
    if isinstance(error, (HydraException, OmegaConfBaseException, yaml.YAMLError)):
        cause = f"\n{error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        return f"{error}{cause}"
    if isinstance(error, LightningLoRAError) or _is_lightnings_own(error):
        # A worker of a DataLoader hands over its error with the traceback in its message.
        kind = type(error).__name__
        return str(error).rpartition(f"{kind}: ")[2].strip() if str(error).startswith(f"Caught {kind}") else str(error)
    if isinstance(error, RuntimeError) and "`--ntasks=" in str(
        error
    ):  # Lightning's, on how a Slurm job asked for tasks
        return str(error)
    if isinstance(error, OSError) and error.errno in _NOT_WRITTEN:
        return f"{error.strerror}: {error.filename or 'a file of the run'} could not be written."
    return None


def _quoted(error: OverrideParseException) -> str:
    """A hint to quote an override that Hydra's grammar cannot read; empty if quotes do not help."""
    if "=" not in error.override:
        return ""
    key, _, value = error.override.partition("=")
    quoted = f"{key}='{value}'"
    try:
        OverridesParser.create().parse_override(quoted)
    except OverrideParseException:
        return ""
    is_plain = re.search(r"""[`"]|\$[\w{(]|\\[\\$`]""", quoted) is None  # to a shell, between double quotes
    in_shell = f'"{quoted}"' if is_plain else shlex.quote(quoted)
    return f"\nA value with such characters stands in quotes: {in_shell}"


def explain_composition(error: ConfigCompositionException, config_name: str, overrides: list[str]) -> str:
    """The message for a group option or a setting that does not exist, with the closest ones that exist."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        return _unknown_option(error)
    if key := refused_key(error):
        return _unknown_key(key, config_name, overrides)
    return explain(error) or ""


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = error.options or []
    wanted = option.partition("_")[0]
    plugins = {name for name, package in PLUGINS.items() if package.endswith(group.removeprefix("hydra/"))}
    if group.startswith("hydra/") and wanted in plugins:
        needed = f"pip install {PLUGINS[wanted]}"
        return f"{group}={option} needs a plugin of Hydra that is not installed. Install it with: {needed}"
    meant = closest(option, options, count=1)
    if not meant and (known := closest(wanted, plugins, count=1)):
        meant = [f"{known[0]} (pip install {PLUGINS[known[0]]})"]
    hint = f" Did you mean {group}={meant[0]}?" if meant else ""
    return (
        f"{group}={option}: there is no such option.{hint}\n"
        f"  Options of {group}: {listed(options, 20)}\n"
        f"  For one of your own, {group}/{option}.yaml in a folder given with --config-dir."
    )


def _unknown_key(key: str, config_name: str, overrides: list[str]) -> str:
    config, groups = composed(config_name, overrides, but=key)
    config = OmegaConf.masked_copy(config, [k for k in map(str, config) if k != "hydra"])
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    known = [*keys(config), *groups]
    if node is None:
        parent, node = "", config  # the node does not exist either: list the keys of the top level
    names = {k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent}
    if parent and isinstance(node, DictConfig):
        names |= set(parameter_names(node))
    names = {n for n in names if not n.startswith("_")}
    name = ours_for(name, names if parent else {k.rpartition(".")[2] for k in known})
    beside = [f"{parent}.{n}" if parent else n for n in closest(name, names, count=1)]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]  # rank for lora.rank
    if not elsewhere and not beside:  # settings that no file lists, such as callbacks.lora.check_base
        nodes = [k.removesuffix("._target_") for k in known if k.endswith("._target_")]
        elsewhere = [f"{k}.{name}" for k in nodes if name in parameter_names(OmegaConf.select(config, k))]
    meant = [*elsewhere, *beside] or ([] if names else closest(key, known, count=1))
    hint = f" Did you mean {meant[0]}?" if meant else ""
    if key in groups:
        hint = f" Choose one of its options: {listed(groups[key], 20)}"
    lines = [f"{key}: there is no such setting.{hint}"]
    if names:
        lines.append(f"  {parent or 'The top level'} has: {listed(sorted(names), 30)}")
    return "\n".join(lines)


def _is_lightnings_own(error: Exception) -> bool:
    """True if Lightning raised `error` for an impossible set-up. It raised nothing if it was never imported."""
    exceptions = sys.modules.get("lightning.fabric.utilities.exceptions")
    return exceptions is not None and isinstance(error, exceptions.MisconfigurationException)
