"""The page of a pack: the adapters that one run trained, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning_lora.errors import ConfigError, listed
from lightning_lora.page import Page
from lightning_lora.page.comparison import Run, comparison, differing
from lightning_lora.training.many.pack import Member, Pack


def page_of(pack: Pack | None, metric: str | None, mode: str) -> Page:
    """The page of `pack`, by its validations so far. Raises ConfigError for a metric that no validation gave."""
    known = [] if pack is None else list(dict.fromkeys(key for own in pack.metrics.values() for key in own))
    if pack is None or not known:
        raise ConfigError("There is nothing to show yet: no validation of this run has ended.")
    metric = metric or next((name for name in known if "loss" in name), known[0])
    if metric not in known:
        raise ConfigError(f"monitor={metric}: validation gave each adapter {listed(known)}.")
    settings = {name: _settings(member) for name, member in pack.members.items()}
    varied = differing(settings.values())
    runs = [
        Run(
            name,
            settings={key: settings[name].get(key) for key in varied},
            value=pack.metrics.get(name, {}).get(metric),
            parameters=sum(p.numel() for p in pack.parameters.get(name, ())) or None,
            curve=[(step, own[name][metric]) for step, own in pack.history if metric in own.get(name, {})],
        )
        for name in pack.members
    ]
    sign = -1 if mode == "max" else 1
    runs.sort(key=lambda run: math.inf if run.value is None or math.isnan(run.value) else sign * run.value)
    rows = [
        {
            "adapter": run.name,
            **run.settings,
            **{key: pack.metrics.get(run.name, {}).get(key) for key in known},
            "parameters": run.parameters,
            "validations": len(run.curve),
        }
        for run in runs
    ]
    lead = f"{len(runs)} adapters, trained in one run on one base; each as its last validation found it."
    return comparison("Adapters of one run", lead, runs, rows, metric=metric, mode=mode)


def _settings(member: Member) -> Mapping[str, Any]:
    """The fields of its config, its learning rate and seed; what is no number is a text."""
    given = {**member.config.to_dict(), "lr": member.lr, "seed": member.seed}
    return {key: v if v is None or isinstance(v, (int, float)) else str(v) for key, v in given.items()}
