"""Shrink the intruder dimensions of an adapter, and print the trade-off: what is left, and what that does to losses.

lightning-lora repair adapter=FOLDER model=./base output=REPAIRED            bits per byte of general text, too
lightning-lora repair adapter=FOLDER model=./base output=REPAIRED strength=0.25
lightning-lora repair adapter=FOLDER model=./base output=REPAIRED data=text data.source.path=notes.txt
lightning-lora repair run=RUN output=REPAIRED                                a run's adapter, on the data of that run

Intruder dimensions are strong directions of an adapted weight that the base does not have (arXiv:2410.21228). The
update is scaled by `strength` along them. What that costs and gains is printed for each of `strengths`. The general
text is a few passages of English works, and needs a causal language model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_lora.cli.composition import ADAPTER_MISSING
from lightning_lora.cli.results import metrics_of, shown
from lightning_lora.cli.settings import Applied, build
from lightning_lora.errors import ConfigError


@dataclass(frozen=True)
class Settings(Applied):
    """The settings of a command that applies an adapter to data, and its own."""

    adapter: str = field(metadata={"missing": ADAPTER_MISSING})
    output: str
    strength: float
    strengths: list[float]
    count: int
    threshold: float
    intruder_limit: int


_OPTIONS = ("strength", "strengths", "count", "threshold", "intruder_limit", "subfolder", "ignore_fields", "check_base")


def run(settings: dict[str, Any]) -> None:
    """Repair as `settings` say, and print the curve and the folder."""
    from lightning_lora import remove
    from lightning_lora.analysis.bits_per_byte import ScoredTexts
    from lightning_lora.cli.runs import LoadedAdapter
    from lightning_lora.embedded import general_texts
    from lightning_lora.rewriting.repair import repair_adapter

    output = Path(settings["output"]).expanduser()
    # The model is built, and the data are read, before anything is written.
    loaded = LoadedAdapter(*(settings[name] for name in ("adapter", "subfolder", "ignore_fields", "check_base")))
    model, tokenizer, evaluate = _of_data(settings, loaded) if settings["data"] else _of_model(settings, loaded)
    said = ""
    try:
        scored = ScoredTexts(model, tokenizer, general_texts())
    except ConfigError as error:
        scored, said = None, f"note: no bits per byte of general text: {error}\n"

    def measure(folder: Path) -> Mapping[str, float]:
        loaded.folder = folder
        found = dict(evaluate())
        if scored is not None:
            found["bits per byte"] = scored.bits_per_byte()
        remove(model)
        return found

    options = {name: settings[name] for name in _OPTIONS}
    report = repair_adapter(settings["adapter"], output, model=model, measure=measure, **options)
    print(f"{report}\n{said}", end="")
    if report.folder is not None:
        print(f"folder: {shown(output)}")


Evaluated = tuple[Any, Any, Callable[[], Mapping[str, float]]]
"""The base, its tokenizer, and a function that loads the adapter and measures it."""


def _of_data(settings: dict[str, Any], loaded: Any) -> Evaluated:
    from lightning_lora import remove
    from lightning_lora.cli.runs import trained

    trainer, task, data = trained({**settings, "ckpt_path": None}, loaded)

    def evaluate() -> Mapping[str, float]:
        trainer.validate(task, data, verbose=False)
        return metrics_of(trainer)

    evaluate()  # builds the model
    remove(task)
    return task, getattr(task, "tokenizer", None), evaluate


def _of_model(settings: dict[str, Any], loaded: Any) -> Evaluated:
    from lightning_lora.cli.merged_model import loaded_base
    from lightning_lora.format.folder import check_folder, read_config
    from lightning_lora.hub.pull import adapter_folder

    folder = adapter_folder(
        os.path.expanduser(settings["adapter"]),
        subfolder=settings["subfolder"],
        ignore_fields=settings["ignore_fields"],
    )
    check_folder(folder)
    config = read_config(folder)
    source = build(settings, "model")
    model = loaded_base(source, config, folder)
    is_language_model = config.get("task_type") in (None, "CAUSAL_LM")

    def evaluate() -> Mapping[str, float]:
        loaded.load(model)
        return {}

    return model, source.tokenizer() if is_language_model else None, evaluate
