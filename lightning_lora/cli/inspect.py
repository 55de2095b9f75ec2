"""Show what an adapter changes, layer by layer: a table here, and a page of figures that needs no network.

lightning-lora inspect adapter=runs/train/2026-01-31_12-00-00/adapter
lightning-lora inspect adapter=user/name model=user/base output=page.html    beside the base's weights
lightning-lora inspect adapter=FOLDER adapter2=OTHER                         two adapters, layer by layer

The page has the curves of the run too where the adapter lies in a run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import METRICS, curves_of, shown
from lightning_lora.cli.settings import Node, build
from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    adapter2: str | None
    model: Node
    output: str
    revision: str | None
    subfolder: str | None
    ignore_fields: list[str]
    check_base: bool
    intruder_limit: int


def run(settings: dict[str, Any]) -> None:
    """Inspect as `settings` say, print the table, and write the page."""
    from lightning_lora.analysis.inspect import inspect_adapter

    settings = dict(settings)
    output = Path(settings.pop("output")).expanduser()
    if output.is_dir() or not output.parent.is_dir():
        raise ConfigError(f"output={output} is a folder, or lies in none: give the name of a file, such as page.html.")
    source = None if settings["model"] is None else build(settings, "model")
    revision = "" if source is None or source.revision is None else f"@{source.revision}"
    settings["model"] = None if source is None else f"{source.location}{revision}"
    report = inspect_adapter(settings.pop("adapter"), other=settings.pop("adapter2"), **settings)
    report = report if source is None else replace(report, base=source.name)
    print(report)
    report.write_page(output, curves=_curves(report.folder))
    print(f"page: {shown(output)}")


def _curves(folder: Path | None) -> Mapping[str, Sequence[tuple[int, float]]]:
    """The metrics of the run whose folder holds the adapter, as RUN/adapter or RUN/checkpoints/NAME-adapter."""
    for place in folder.absolute().parents[:2] if folder is not None else ():
        if (place / METRICS).is_file():
            return curves_of(place)
    return {}
