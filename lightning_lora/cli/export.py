"""Rewrite an adapter for vLLM, llama.cpp, LoRAX or PEFT, so that it computes the same there; or say why that cannot be.

lightning-lora export --for vllm adapter=runs/train/2026-01-31_12-00-00/adapter output=for-vllm
lightning-lora export --for llama.cpp adapter=user/name output=FOLDER base=user/base tolerance=0.05

What the consumer knows is kept bit for bit where it can be; every error is printed. DoRA needs base=.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import shown
from lightning_lora.cli.settings import base_folder
from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    consumer: str
    output: str
    base: str | None
    rank: int | None
    max_rank: int | None
    tolerance: float
    dtype: str | None
    revision: str | None
    subfolder: str | None
    ignore_fields: list[str]


def overrides(arguments: list[str]) -> list[str]:
    """`arguments` with `--for NAME`, `--for=NAME` and `for=NAME` written as `consumer=NAME`: no field of a Python class
    can be named `for`."""
    return list(_overrides(iter(arguments)))


def _overrides(arguments: Iterator[str]) -> Iterator[str]:
    for argument in arguments:
        if argument == "--for":
            name = next(arguments, None)
            if name is None:
                raise ConfigError("--for is followed by what to export for, such as --for vllm.")
            yield f"consumer={name}"
        elif argument.startswith(("--for=", "for=")):
            yield f"consumer={argument.partition('=')[2]}"
        else:
            yield argument


def run(settings: dict[str, Any]) -> None:
    """Export as `settings` say, and print what was rewritten, its error and the folder."""
    from lightning_lora.rewriting.export import export_adapter

    settings = {**settings, "base": base_folder(settings["base"])}
    output = Path(settings.pop("output")).expanduser()
    report = export_adapter(settings.pop("adapter"), output, consumer=settings.pop("consumer"), **settings)
    print(f"{report}\nfolder: {shown(output)}")
