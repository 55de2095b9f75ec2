"""Bake an adapter into its base, and save the model as transformers saves one: nothing is left to install or to load.

lightning-lora merge adapter=runs/train/2026-01-31_12-00-00/adapter model=user/base output=FOLDER
lightning-lora merge adapter=user/name output=FOLDER                    into the base that the adapter names
lightning-lora merge adapter=FOLDER model=./base model.dtype=float32 output=FOLDER
lightning-lora merge adapter=FOLDER load_embedding_layers=true output=FOLDER    with tokens that were added to the base

It says how much of the update survives the base's precision; model.dtype=float32 keeps all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import shown
from lightning_lora.cli.settings import Node, build


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    output: str
    model: Node
    revision: str | None
    subfolder: str | None
    ignore_fields: list[str]
    load_embedding_layers: bool
    check_base: bool


def run(settings: dict[str, Any]) -> None:
    """Merge as `settings` say, and print what was written, where, and how much of the update is in it."""
    from lightning_lora.cli.merged_model import merge_adapter

    source = None if settings["model"] is None else build(settings, "model")
    output = Path(settings["output"]).expanduser()
    names = ("revision", "subfolder", "ignore_fields", "load_embedding_layers", "check_base")
    report = merge_adapter(settings["adapter"], source, output, **{name: settings[name] for name in names})
    print(f"{report}\nfolder: {shown(output)}")
