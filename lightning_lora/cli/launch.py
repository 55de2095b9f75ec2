"""Runs one command under Hydra: it composes, checks and runs, and then restores the process as it was."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra import main as hydra_main
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.types import RunMode
from omegaconf import DictConfig

from lightning_lora.cli.commands import docstring
from lightning_lora.cli.composition import (
    CONFIG_MODULE,
    check_pairing,
    rehearsal,
    with_finished_run,
    with_model_names,
    with_pluses,
)
from lightning_lora.cli.explain import FLAGS, explain, explain_composition, help_of
from lightning_lora.cli.hydra_private import hydra_parser
from lightning_lora.cli.process import quieten_imports, wait_without_spinning
from lightning_lora.cli.settings import checked
from lightning_lora.cli.sweep import SweepTable, record_failure
from lightning_lora.errors import ConfigError

CONFIG_PATH = ("--config-path", "-cp")
WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p", "--cfg", "-c"),
    *("--experimental-rerun", "--info", "-i"),
)
"""Hydra's flags that take a value."""


def launch(command: str, arguments: list[str]) -> int:
    """Run `command` with Hydra's `arguments`; returns the exit status.

    Errors are raised; an error of composition becomes a ConfigError with the closest names. Only in a sweep, errors of
    a job are shown and kept for its table instead, so that the other jobs run.
    """
    wait_without_spinning()
    quieten_imports()
    module = import_module(f"lightning_lora.cli.{command}")
    if hasattr(module, "overrides"):  # the command has flags of its own
        arguments = module.overrides(arguments)
    if any(field.name == "model" for field in fields(module.Settings)):
        arguments = with_model_names(arguments)
    arguments = flags_first(arguments)
    program = str(Path(sys.argv[0]).absolute())
    SweepTable.failed = status = 0
    failure: Exception | None = None
    before = os.environ.get("HYDRA_FULL_ERROR")

    def job(config: DictConfig) -> Any:
        nonlocal status, failure
        quieten_imports()  # again, since a launcher may have begun another process
        with _process(_job_argv(program, command, arguments), full_error=before):
            try:
                return module.run(_settings(config, module.Settings))
            except Exception as error:
                if HydraConfig.get().mode is RunMode.MULTIRUN:
                    status = 2
                    record_failure(error, explain(error))
                else:
                    failure = error  # raised below: Hydra would report it a second time

    # Modules in the current folder can be imported, as with `python -m`. It comes last, so that none shadows a package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    config_name, overrides = with_finished_run(command, arguments)
    _check_flags(overrides)
    _register_launcher()
    try:
        if any(flag in arguments for flag in FLAGS):
            print(help_of(command, docstring(command), arguments))
            return 0
        overrides = with_pluses(config_name, overrides)
        if _will_run(overrides):
            # Check the settings before Hydra runs: it makes the run's folder first, even for settings that are not
            # valid.
            with rehearsal(config_name, overrides) as config:
                _settings(config, module.Settings)
        with _process([f"lightning-lora {command}", *overrides], full_error="1"):
            hydra_main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=config_name)(job)()
    except ConfigCompositionException as error:
        raise ConfigError(explain_composition(error, config_name, overrides)) from error
    if failure is not None:
        raise failure
    # A job in another process (of joblib, of submitit) cannot change `status` here; SweepTable counts its failure.
    return status or int(SweepTable.failed > 0)


def _register_launcher() -> None:
    """Make `hydra/launcher=together` known to Hydra. Where another package has taken the name hydra_plugins for itself,
    it stays unknown, as all plugins but that package's own."""
    folder = str(Path(__file__).with_name("plugins"))
    if folder not in sys.path:
        sys.path.append(folder)
    with suppress(ModuleNotFoundError):
        Plugins.instance().register(import_module("hydra_plugins.lightning_lora_together").TogetherLauncher)


def _settings(config: DictConfig, known: type) -> dict[str, Any]:
    settings = checked(config, known)
    check_pairing(settings)
    return settings


def flags_first(arguments: list[str]) -> list[str]:
    """`arguments` with Hydra's flags first: Hydra's argparse takes no flag between two overrides. A --config-path is
    made absolute from the current folder; Hydra would take it from the folder of the program's code."""
    flags, overrides = [], []
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        flags.append(flag if equals and flag in CONFIG_PATH else argument)
        if argument in WITH_VALUE or flags[-1] != argument:
            following = value if equals else next(left, None)
            if following is not None:
                flags.append(os.path.abspath(following) if flag in CONFIG_PATH else following)
    return [*flags, *overrides]


def _will_run(arguments: list[str]) -> bool:
    """True if Hydra is asked to run, and not to show its help or the configuration."""
    args = hydra_parser().parse_args(arguments)
    return not (args.help or args.hydra_help or args.cfg or args.info or args.shell_completion)


def _check_flags(arguments: list[str]) -> None:
    """Raises ConfigError for flags on which Hydra fails with an internal error, or which it ignores."""
    try:
        args, unknown = hydra_parser().parse_known_args(arguments)
    except SystemExit:  # argparse has said why
        raise ConfigError("see --help, and --hydra-help for Hydra's own flags.") from None
    if unknown:
        raise ConfigError(f"there is no flag {unknown[0]}. See --help, and --hydra-help for Hydra's own.")
    if args.config_dir and not os.path.isdir(args.config_dir):
        raise ConfigError(f"--config-dir {args.config_dir}: there is no such folder.")
    if args.resolve and not args.cfg:
        raise ConfigError("--resolve goes with --cfg: --cfg job --resolve shows the settings without references.")
    if args.package and not args.cfg:
        raise ConfigError("--package goes with --cfg: --cfg job --package lora shows that part of the settings.")


def _job_argv(program: str, command: str, arguments: list[str]) -> list[str]:
    """The command line of this job alone: a process that Lightning starts for another device repeats it."""
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        overrides = hydra_parser().parse_args(arguments).overrides
        flags = [a for a in arguments if a not in overrides and a not in ("-m", "--multirun")]
        arguments = [*flags, *hydra.overrides.task]
    return [program, command, *arguments]


@contextmanager
def _process(argv: list[str], full_error: str | None) -> Iterator[None]:
    """Set the command line that Hydra or Lightning reads to `argv`, and HYDRA_FULL_ERROR to `full_error`. With "1",
    Hydra raises exceptions; without it, Hydra may print them and exit."""
    argv_before, error_before = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = argv
    _set("HYDRA_FULL_ERROR", full_error)
    try:
        yield
    finally:
        sys.argv = argv_before
        _set("HYDRA_FULL_ERROR", error_before)


def _set(variable: str, value: str | None) -> None:
    os.environ.pop(variable, None)
    if value is not None:
        os.environ[variable] = value
