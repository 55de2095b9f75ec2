"""Writes one table and one page for a sweep: the settings that were varied and the results, the best job first."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from lightning_lora.cli.composition import directions, search_space
from lightning_lora.cli.results import RESULTS, curves_of, shown, table, write_json
from lightning_lora.page.comparison import Run, comparison, differing

TABLE, PAGE = "results.csv", "results.html"
Version = tuple[int, int]
"""The inode and time of a file. Results files are replaced as a whole, so a new one has another version."""


class SweepTable(Callback):
    """A callback of Hydra. It writes results.csv and results.html into the sweep's folder after each job, and prints
    the table after the last.

    It reads the jobs' results.json and nothing else, so it does not matter which launcher ran them, or where.
    """

    failed: ClassVar[int] = 0
    """Jobs of the last sweep that failed."""

    def __init__(self) -> None:
        self._earlier: dict[Path, Version] = {}
        """The results files of earlier sweeps in the same folder."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        SweepTable.failed = 0
        self._earlier = _results(Path(config.hydra.sweep.dir))
        # Hydra builds the sweeper from this same object, so change it in place.
        with flag_override(config, ["struct", "readonly"], False):
            if space := search_space(config):
                config.hydra.sweeper.params = space
            for key, value in directions(config).items():
                OmegaConf.update(config.hydra.sweeper, key, value)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode.name == "MULTIRUN":
            write_table(Path(config.hydra.sweep.dir), self._earlier)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        if rows := write_table(folder, self._earlier):
            # The screen gets shortened errors; the file has them in full.
            SweepTable.failed = sum(bool(row.get("error")) for row in rows)
            rows = [{name: _shortened(value) for name, value in row.items()} for row in rows]
            print(f"\n{table(rows)}\n\nPage: {shown(folder / PAGE)}\nTable: {shown(folder / TABLE)}")


def record_failure(error: Exception, message: str | None) -> None:
    """Print why the running job of a sweep failed, and write it into the job's folder for the table."""
    import traceback

    hydra = HydraConfig.get()
    if message is None:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    else:
        print(f"\njob {hydra.job.num}: {message}")
    folder = Path(hydra.runtime.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RESULTS, {"overrides": list(hydra.overrides.task), "error": message})


def write_table(sweep: Path, earlier: Mapping[Path, Version] | None = None) -> list[dict[str, Any]]:
    """Write the results in the folders below `sweep` into its results.csv and results.html; returns the rows, the best
    first. Results that have not changed since `earlier` are left out."""
    found = [path for path, version in _results(sweep).items() if (earlier or {}).get(path) != version]
    jobs = [
        {"folder": path.parent.relative_to(sweep).as_posix(), **json.loads(path.read_text(encoding="utf-8"))}
        for path in found
    ]
    jobs.sort(key=lambda job: (_rank(job), int(job["folder"]) if job["folder"].isdigit() else 0))
    settings = [_settings(job) for job in jobs]
    varied = differing(settings)
    differs = len({job["trainable_parameters"] for job in jobs if "trainable_parameters" in job}) > 1
    rows = [
        {name: s.get(name) for name in varied}
        | job.get("after", {})
        | ({"parameters": job.get("trainable_parameters")} if differs else {})
        | {"seconds": job.get("seconds"), "folder": job["folder"]}
        | ({"error": _first_said(job["error"])} if "error" in job else {})
        for job, s in zip(jobs, settings, strict=True)
    ]
    # A failed job has fewer values. So `last` says which columns come last, whatever the order in a single row.
    last = ("parameters", "seconds", "folder", "error")
    columns = sorted(
        dict.fromkeys(key for row in rows for key in row), key=lambda name: name in last and last.index(name) + 1
    )
    rows = [{column: row.get(column) for column in columns} for row in rows]
    if rows:
        with (sweep / TABLE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
        _write_page(sweep, jobs, rows, varied)
    return rows


def _write_page(sweep: Path, jobs: list[dict[str, Any]], rows: list[dict[str, Any]], varied: list[str]) -> None:
    done = next((job for job in jobs if "monitor" in job), {"monitor": "the metric", "mode": "min"})
    metric = done["monitor"]
    runs = [
        Run(
            name=f"job {job['folder']}",
            settings={name: row[name] for name in varied},
            value=job.get("after", {}).get(metric),
            parameters=job.get("trainable_parameters"),
            seconds=job.get("seconds"),
            curve=curves_of(sweep / job["folder"]).get(metric, ()),
            error=row.get("error"),
        )
        for job, row in zip(jobs, rows, strict=True)
    ]
    bases = {job.get("before", {}).get(metric) for job in jobs if "after" in job}
    base = bases.pop() if len(bases) == 1 else None
    names = f" They differ in {', '.join(varied)}." if varied else ""
    lead = f"{len(jobs)} trainings, each with the metrics of the adapter that it kept.{names}"
    page = comparison(f"Sweep {sweep.name}", lead, runs, rows, metric=metric, mode=done["mode"], base=base)
    page.write(sweep / PAGE)


def _results(sweep: Path) -> dict[Path, Version]:
    """The results files in folders below `sweep`, at any depth, with their versions."""
    paths = (path for path in sweep.rglob(RESULTS) if path.parent != sweep)
    return {path: ((stat := path.stat()).st_ino, stat.st_mtime_ns) for path in paths}


def _first_said(error: str) -> str:
    """The first line of an error. If that is a heading, which ends in ":", it is the line after it."""
    first, *others = error.splitlines()
    return others[0].strip() if first.endswith(":") and others else first


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """The settings of the job's overrides: key -> value."""
    return {key.lstrip("+~"): _number(value) for key, _, value in (o.partition("=") for o in job["overrides"])}


def _rank(job: dict[str, Any]) -> float:
    """The sort key of a job: smaller is better. A job that failed or diverged comes last."""
    value = job.get("after", {}).get(job.get("monitor"))
    if value is None:
        return math.inf
    return -value if job["mode"] == "max" else value


def _shortened(value: Any) -> Any:
    return f"{value[:57]}..." if isinstance(value, str) and len(value) > 60 else value


def _number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
