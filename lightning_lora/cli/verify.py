"""Prove that an adapter is applied: layer by layer in a model, or by its answers on a server.

lightning-lora verify adapter=FOLDER model=./base model.dtype=bfloat16    loads it there, and says what survives
lightning-lora verify adapter=FOLDER model=./merged base=./base           a model into which it was merged

It prints a table, and exits with 1 if the adapter is not applied as its files say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_lora.cli.settings import Node, build


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    model: Node
    base: str | None
    revision: str | None
    subfolder: str | None
    ignore_fields: list[str]
    check_base: bool


def run(settings: dict[str, Any]) -> None:
    """Verify as `settings` say, and print the report. Raises SystemExit(1) if the adapter is not applied."""
    from lightning_lora.cli.merged_model import loaded_base, named_base
    from lightning_lora.hub import load_adapter
    from lightning_lora.hub.format.reading import check_folder, read_config
    from lightning_lora.hub.pull import adapter_folder
    from lightning_lora.hub.verify import verify_adapter

    options = {name: settings[name] for name in ("subfolder", "ignore_fields")}
    folder = adapter_folder(settings["adapter"], settings["revision"], **options)
    check_folder(folder)
    config = read_config(folder)
    source = build(settings, "model") if settings["model"] is not None else named_base(config, folder)
    model = loaded_base(source, config, folder)
    checks = {"ignore_fields": settings["ignore_fields"], "check_base": settings["check_base"]}
    if settings["base"] is None:
        load_adapter(model, folder, **checks)
    report = verify_adapter(model, folder, base=settings["base"], **checks)
    print(report)
    if not report.ok:
        raise SystemExit(1)
