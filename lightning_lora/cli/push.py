"""Push an adapter folder to the Hub: the adapter and its card, as one commit.

lightning-lora push adapter=runs/train/2026-01-31_12-00-00/adapter repo_id=user/name dry_run=true
lightning-lora push adapter=FOLDER repo_id=user/name private=false tag=v1 'card.front_matter={license: mit}'

The token is HF_TOKEN, or that of `hf auth login`; HF_ENDPOINT counts as in every program that uses huggingface_hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.cli.results import RESULTS

PICTURE = "loss.png"


@dataclass(frozen=True)
class Settings:
    """The top-level keys of the configuration."""

    adapter: str
    repo_id: str
    branch: str | None
    private: bool
    create_pr: bool
    message: str | None
    tag: str | None
    card: dict[str, Any]
    endpoint: str | None
    timeout: float
    dry_run: bool
    ignore_fields: list[str]


def run(settings: dict[str, Any]) -> None:
    """Push as `settings` say, and print the commit; or, for a dry run, what would be pushed."""
    from lightning_lora.hub.push import DryRun, push_adapter

    settings = dict(settings)
    folder = Path(settings.pop("adapter")).expanduser()
    card = {name: value for name, value in settings.pop("card").items() if value not in (None, [], {})}
    given = {name: value for name, value in settings.items() if value is not None}
    commit = push_adapter(folder, **given, card={**_of_run(folder), **card})
    if isinstance(commit, DryRun):
        print(f"dry run: nothing was pushed\n\n{commit}")
        return
    print(f"repository   {commit.repo_url.repo_id}\ncommit       {commit.oid}\nurl          {commit.commit_url}")
    if commit.pr_url is not None:
        print(f"pull request {commit.pr_url}")


def _of_run(adapter: Path) -> dict[str, Any]:
    """The metrics, step and picture for the card, if the adapter lies in the folder of a finished run; else nothing."""
    results = adapter.absolute().parent / RESULTS
    if adapter.name != "adapter" or not results.is_file():
        return {}
    try:
        content = json.loads(results.read_text(encoding="utf-8"))
        metrics = {name: float(value) for name, value in content["after"].items() if value is not None}
        steps = int(content["steps"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    picture = results.with_name(PICTURE)
    return {"metrics": metrics, "step": steps, **({"picture": picture} if picture.is_file() else {})}
