"""Fetch an adapter from the Hub, check it, and say which commit it is and where it lies.

lightning-lora pull repo_id=user/name
lightning-lora pull repo_id=user/name revision=v1 local_dir=adapters/name

HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE count as in every program that uses huggingface_hub.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import shown


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    repo_id: str
    revision: str | None
    subfolder: str | None
    local_dir: str | None
    cache_dir: str | None
    local_files_only: bool
    max_bytes: int
    timeout: float
    ignore_fields: list[str]


def run(settings: dict[str, Any]) -> None:
    """Pull as `settings` say, and print the commit, the files and the folder."""
    from lightning_lora.hub.pull import pull

    pulled = pull(**settings)
    width = max(map(len, pulled.files))
    print(f"repository   {pulled.repo_id}\ncommit       {pulled.commit}")
    print(f"files        {'fetched' if pulled.fetched else 'from the cache'}, and checked")
    for name, size in pulled.files.items():
        print(f"  {name:<{width}}  {size:>13,} bytes")
    print(f"folder       {shown(Path(pulled.folder))}")
