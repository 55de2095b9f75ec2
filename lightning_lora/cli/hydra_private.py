"""Private names of Hydra. Each is written once, with its purpose."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from lightning_lora.borrowed import found, needed


def hydra_parser() -> ArgumentParser:
    """The parser of Hydra's own flags. Raises MovedError if it has moved: then we do not know how Hydra reads a command
    line."""
    parser: ArgumentParser = needed("hydra._internal.utils:get_args_parser", "reads a command line as Hydra does")()
    return parser


def located(path: str) -> Any:
    """The object at the dotted `path`. Raises the error of the import. Hydra's public function does the same but logs
    each failure, so it is used only if the private one is gone."""
    from hydra.utils import get_object

    return found("hydra._internal.utils:_locate", "finds a class without a line in the log", get_object)(path)


def completions(loader: Any, command: str, line: str) -> list[str]:
    """Completions of the last word of `line`, for any shell; empty if Hydra no longer gives them."""
    complete = found(
        "hydra._internal.core_plugins.bash_completion:BashCompletion", "completes a command line", lambda _: None
    )(loader)
    query = getattr(complete, "_query", None)
    return [] if query is None else list(query(config_name=command, line=line))
