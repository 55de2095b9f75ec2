"""`--help`: what a command says of itself, the groups that it has, and its settings."""

from __future__ import annotations

import re
from importlib.resources import files

from omegaconf import OmegaConf

from lightning_lora.cli.composition import CONFIG_MODULE, composed, with_pluses

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
    """What the command's file in conf/ says of its settings, behind them."""
    text = files(CONFIG_MODULE).joinpath(f"{command}.yaml").read_text(encoding="utf-8")
    said = dict(re.findall(r"^(\w+): [^#\n]*# (.*)$", text, re.MULTILINE))
    return "\n".join(
        f"{line}  # {said[key]}" if (key := line.partition(":")[0]) in said else line for line in settings.splitlines()
    )
