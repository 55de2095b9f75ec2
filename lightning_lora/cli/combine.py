"""Add, subtract, compress or vote adapters into one, and say what that costs.

lightning-lora combine adapters=[user/legal,user/german] weights=[0.7,0.3] output=both
lightning-lora combine adapters=[a,b] weights=[1,1] method=svd rank=8 output=FOLDER
lightning-lora combine adapters=[a,b,c] weights=[1,1,1] method=ties density=0.2 output=FOLDER
lightning-lora combine adapters=[toxic] weights=[-1] output=FOLDER

sum is exact and has the sum of the ranks; the others are cut to rank, and the report says how much was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import shown


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapters: list[str]
    weights: list[float]
    output: str
    method: str
    rank: int | None
    density: float | None
    seed: int
    check_base: bool
    ignore_fields: list[str]


def run(settings: dict[str, Any]) -> None:
    """Combine as `settings` say, and print the report and the folder."""
    from lightning_lora.rewriting.combine import combine_adapters

    settings = dict(settings)
    output = Path(settings.pop("output")).expanduser()
    report = combine_adapters(settings.pop("adapters"), output, **settings)
    print(f"{report}\nfolder: {shown(output)}")
