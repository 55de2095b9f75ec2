"""`adapter=` of the train command: the run starts from an adapter that was saved, with the config that it has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning_lora import LoRACallback, LoRAConfig
from lightning_lora.cli.signature import target
from lightning_lora.errors import ConfigError


def start_from(settings: dict[str, Any], overrides: list[str]) -> None:
    """Give the LoRACallback in `settings` the adapter that they name, and of the config what the user asked for alone:
    what `overrides` say, and what differs from the defaults. The callback compares that with the adapter's own config.

    Raises ConfigError where there is no LoRACallback, and where a folder is named that is not there.
    """
    adapter = settings["adapter"]
    looks_like_a_folder = adapter.startswith((".", "/", "~")) or adapter.count("/") != 1
    if looks_like_a_folder and not Path(adapter).is_dir() and settings["ckpt_path"] is None:
        raise ConfigError(f"adapter={adapter}: there is no such folder.")
    nodes = [node for node in (settings["callbacks"] or {}).values() if node and _is_callback(node)]
    if not nodes:
        raise ConfigError(f"adapter={adapter} is for a LoRACallback, and the settings have none (lora=none?).")
    defaults = LoRAConfig().to_dict()
    named = {o.lstrip("+").partition("=")[0].removeprefix("lora.") for o in overrides if "lora." in o.partition("=")[0]}
    for node in nodes:
        config = node.pop("config", None) or {}
        known = {f.name: config[f.name] for f in fields(LoRAConfig) if f.name in config}
        asked = {name: value for name, value in known.items() if name in named or value != defaults[name]}
        node.update(asked, adapter=adapter, **{name: settings[name] for name in ("subfolder", "ignore_fields")})


def _is_callback(node: dict[str, Any]) -> bool:
    kind: Any = target(node["_target_"])
    return isinstance(kind, type) and issubclass(kind, LoRACallback)
