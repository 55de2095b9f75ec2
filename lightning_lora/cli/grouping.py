"""Which jobs of a sweep can be trained in one run: those whose settings differ in what an adapter owns alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.cli.settings import build, target
from lightning_lora.errors import listed

OWNED = ("lora", "optimizer.lr")
"""What each adapter of a run has for itself. Everything else is the run's: base, data, seed, steps, precision."""
READERS = {"callbacks.lora.config": "${lora}", "task.optimizer": "${optimizer}"}
"""Where these settings are read. Whatever else refers to them would differ between the adapters of a run."""


@dataclass
class Job:
    """One job of a sweep."""

    number: int
    overrides: Sequence[str]
    settings: dict[str, Any] = field(default_factory=dict)
    """Checked and resolved, as `train` takes them."""
    shared: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value of each setting that the jobs of one run must have in common."""
    alone: str | None = None
    """Why the job cannot share a run with any other; None where it can."""
    noted: Path | None = None
    """The last of the files that Hydra writes into the job's folder when it runs the job; None where it writes none."""


def shared(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the jobs of one run have in common: dotted key -> value.

    `raw` holds the settings with their references, `values` the same resolved. What refers to a whole node, such as
    `task.model: ${model}`, stays the reference: the node is compared at its own place.
    """
    return dict(_leaves(raw, values, "")) | _of_draws(values.get("lora") or {})


_DRAWS = ("dropout", "module_dropout", "rank_dropout")


def _of_draws(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an adapter on which the random numbers of a step depend: a shared run goes on with those that its
    first adapter has left."""
    rates = {f"lora.{name}": float(lora.get(name) or 0) for name in _DRAWS}
    if not any(rates.values()):
        return rates
    free = ("alpha",) if lora.get("rank_dropout") else ("alpha", "rank")
    return {f"lora.{name}": value for name, value in lora.items() if name not in free} | rates


_NODE = re.compile(r"\$\{(?!lora|optimizer)[\w.]+\}")


def _leaves(raw: Any, value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if where in OWNED or (where in READERS and raw == READERS[where]):
        return
    if isinstance(raw, str) and _NODE.fullmatch(raw) and isinstance(value, (dict, list)):
        yield where, raw
    elif isinstance(value, dict) and value:
        for name in value:
            yield from _leaves(raw[name] if isinstance(raw, dict) else None, value[name], _join(where, name))
    elif isinstance(value, list) and value:
        for i, item in enumerate(value):
            yield from _leaves(raw[i] if isinstance(raw, list) else None, item, f"{where}[{i}]")
    else:
        yield where, value


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else str(name)


def unshareable(settings: dict[str, Any]) -> str | None:
    """Why a job with these settings cannot share its run with any other; None where it can.

    Every part of a run that writes, stops or counts for one adapter has to be known here: what is not known would see
    several adapters as one. Raises the ConfigError of a LoRAConfig with an invalid value.
    """
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, ProgressBar
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    from lightning_lora.training.callback import LoRACallback
    from lightning_lora.training.pushing import PushCallback

    callbacks = {name: node for name, node in (settings["callbacks"] or {}).items() if node}
    adapting = [name for name, node in callbacks.items() if target(node["_target_"]) is LoRACallback]
    if not settings["lora"] or len(adapting) != 1:
        return "it has no LoRACallback with its lora settings"
    for name in ("adapter", "ckpt_path"):
        if settings[name] is not None:
            return f"{name}= is the start of one run"
    for name, node in callbacks.items():
        kind: Any = target(node["_target_"])
        if kind is LoRACallback:
            if others := [f"callbacks.{name}.{key}" for key in node if key not in ("_target_", "config")]:
                return f"{listed(others)} is for one adapter"
            build(settings, f"callbacks.{name}.config")
        elif kind is PushCallback:
            if node.get("repo_id") is not None:
                return f"callbacks.{name}.repo_id is the place of one adapter"
        elif kind is ModelCheckpoint:
            if between := [f"callbacks.{name}.{key}" for key in _BETWEEN if node.get(key) is not None]:
                return f"{listed(between)} saves adapters that are not validated"
        elif kind is not EarlyStopping and not issubclass(kind, ProgressBar):
            return f"callbacks.{name} ({kind.__name__}) would see several adapters as one"
    for name, node in (settings["logger"] or {}).items():
        if node and target(node["_target_"]) not in (CSVLogger, TensorBoardLogger):
            return f"logger.{name} ({node['_target_']}) logs one run of a process at a time"
    trainer = settings["trainer"]
    for name, plain in _ONE_DEVICE.items():
        if trainer.get(name, plain) not in (plain, str(plain), [0]):
            return f"trainer.{name}={_written(trainer[name])}: only runs on one device are shared"
    return None


_BETWEEN = ("every_n_train_steps", "train_time_interval", "save_on_train_epoch_end")
_ONE_DEVICE = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    """`jobs` as the groups that are trained in one run each, in the order of their first jobs."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        key = ("alone", job.number) if job.alone else _key(job.shared)
        groups.setdefault(key, []).append(job)
    return list(groups.values())


def why_alone(job: Job, jobs: Sequence[Job]) -> str:
    """Why `job`, the only one of its group, is trained alone, for a reader."""
    if job.alone:
        return job.alone
    others = [other for other in jobs if other is not job and other.alone is None]
    keys = dict.fromkeys(key for one in (job, *others) for key in one.shared)
    varied = [key for key in keys if len({_key(one.shared.get(key)) for one in (job, *others)}) > 1]
    if not varied:
        return "there is no other job that could share its run"
    return f"no other job has {listed([f'{key}={_written(job.shared.get(key))}' for key in varied], 3)}"


def described(groups: Sequence[Sequence[Job]]) -> str:
    """The groups, a line for each that is trained in one run, and for each job that is trained alone."""
    jobs = [job for group in groups for job in group]
    lines = []
    for group in groups:
        if len(group) > 1:
            lines.append(f"jobs {numbers(group)}: {len(group)} adapters, trained together on one base")
        else:
            lines.append(f"job {group[0].number}: trained alone, since {why_alone(group[0], jobs)}")
    return "\n".join(lines)


def numbers(group: Sequence[Job]) -> str:
    """The numbers of the jobs for a reader: "0-3, 6"."""
    runs: list[list[int]] = []
    for number in (job.number for job in group):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=repr)
