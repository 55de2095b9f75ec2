"""Which of this package's data go with which of its tasks; what users bring of their own is theirs to match."""

from __future__ import annotations

from typing import Any

from lightning_lora.errors import ConfigError

DATA_OF = {
    "CausalLM": ("TextData", "InstructionData"),
    "SequenceClassification": ("TextClassificationData",),
    "ImageClassification": ("ImageClassificationData",),
}
"""Task -> the data modules whose batches it takes."""
OPTIONS = {
    "CausalLM": "task=causal_lm",
    "SequenceClassification": "task=sequence_classification",
    "ImageClassification": "task=image_classification",
    "TextData": "data=text or data=stdlib_source",
    "InstructionData": "data=instructions",
    "TextClassificationData": "data=text_classification or data=stdlib_docstrings",
    "ImageClassificationData": "data=images or data=shapes",
}
"""Class -> how it is chosen."""
OURS = "lightning_lora."


def check_pairing(settings: dict[str, Any]) -> None:
    """Raises ConfigError where the task of `settings` does not take the batches of their data."""
    task, data = (_class_of(settings.get(name)) for name in ("task", "data"))
    takers = [name for name, taken in DATA_OF.items() if data in taken]
    if task in DATA_OF and takers and task not in takers:
        taken = " or ".join(OPTIONS[name] for name in DATA_OF[task])
        raise ConfigError(
            f"{task} does not go with {data}. Choose {OPTIONS[takers[0]]} for these data, or {taken} for this task."
        )


def _class_of(node: Any) -> str | None:
    target = str((node or {}).get("_target_"))
    return target.rpartition(".")[2] if target.startswith(OURS) else None
