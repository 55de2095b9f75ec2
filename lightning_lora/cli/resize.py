"""Give an adapter another rank, and say what that costs: in its updates, and in loss where data is given.

lightning-lora resize adapter=runs/train/2026-01-31_12-00-00/adapter output=FOLDER rank=8
lightning-lora resize adapter=user/name output=FOLDER energy=0.95        ranks by module
lightning-lora resize adapter=user/name output=FOLDER max_error=0.01
lightning-lora resize adapter=FOLDER output=OTHER rank=8 model=ID data=text data.source.path=notes.txt
lightning-lora resize run=RUN output=FOLDER energy=0.95                  a run's adapter, on the data of that run

Each update is cut to the best of its new rank, and the scales stay. A larger rank is padded with zeros.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.cli.composition import ADAPTER_MISSING
from lightning_lora.cli.results import metrics_of, shown, table
from lightning_lora.cli.settings import Applied


@dataclass(frozen=True)
class Settings(Applied):
    """The settings of a command that applies an adapter to data, and its own."""

    adapter: str = field(metadata={"missing": ADAPTER_MISSING})
    output: str
    rank: int | None
    energy: float | None
    max_error: float | None
    base: str | None
    dtype: str | None


_OPTIONS = ("rank", "energy", "max_error", "base", "dtype", "subfolder", "ignore_fields")


def run(settings: dict[str, Any]) -> None:
    """Resize as `settings` say, and print the report, the metrics before and after, and the folder."""
    from lightning_lora.rewriting.resize import resize_adapter

    output = Path(settings["output"]).expanduser()
    resize = functools.partial(
        resize_adapter, settings["adapter"], output, **{name: settings[name] for name in _OPTIONS}
    )
    if settings["data"] is None:
        print(f"{resize()}\nfolder: {shown(output)}")
        return
    # Measured first: what is wrong with the model or the data is said before anything is written.
    from lightning_lora import remove
    from lightning_lora.cli.runs import LoadedAdapter, trained

    reading = (settings[name] for name in ("adapter", "subfolder", "ignore_fields", "check_base"))
    adapter = LoadedAdapter(*reading)
    trainer, task, data = trained({**settings, "ckpt_path": None}, adapter)
    trainer.validate(task, data, verbose=False)
    before = metrics_of(trainer)
    report = resize()
    remove(task)
    adapter.folder = output
    trainer.validate(task, data, verbose=False)
    after = metrics_of(trainer)
    rows = [{"metric": name, "before": before.get(name), "after": after.get(name)} for name in sorted(after)]
    print(f"{report}\n\n{table(rows, ['metric', 'before', 'after'])}\n\nfolder: {shown(output)}")
