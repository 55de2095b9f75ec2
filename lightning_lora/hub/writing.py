"""Write an adapter as the folder that PEFT reads: its card, its tensors and its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lightning_lora.hub.atomic import write_folder
from lightning_lora.hub.reading import CARD, CONFIG, TENSORS


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], header: Mapping[str, str], card: str
) -> None:
    """`tensors` are on the CPU, and `header` goes into their file. Raises CheckpointError as `write_folder` does."""
    files = {
        CARD: card.encode(),
        TENSORS: save(_apart(tensors), dict(header)),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    write_folder(folder, files)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as the format asks, copied where another name (tied weights) has it already."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        apart[key] = (t.clone() if place in taken else t).contiguous()
        taken.add(place)
    return apart
