"""Write an adapter as the folder that PEFT reads: its card, its tensors and its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from lightning_lora.hub.atomic import write_folder
from lightning_lora.hub.mapped import BLANK, checksum
from lightning_lora.hub.reading import CARD, CHECKSUM, CONFIG, NOTE, SAID, TENSORS, UNSEEN


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
    card: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`tensors` are on the CPU; our own `note`, and `metadata` of others, go into the header of their file, with what
    tells whether file and config are as they were written. Raises CheckpointError as `write_folder` does."""
    said = {field: config[field] for field in UNSEEN if config.get(field)}
    note = {**note, CHECKSUM: BLANK.decode(), SAID: said}
    header = {**(metadata or {}), "format": "pt", NOTE: json.dumps(note, sort_keys=True)}
    files: dict[str, bytes | tuple[bytes, memoryview]] = {
        CARD: card.encode(),
        TENSORS: _with_checksum(save(_apart(tensors), header)),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    write_folder(folder, files)


def _with_checksum(content: bytes) -> tuple[bytes, memoryview]:
    start = 8 + int.from_bytes(content[:8], "little")
    header, body = content[:start], memoryview(content)[start:]
    return header.replace(BLANK, checksum(header, body).encode()), body


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as the format asks, copied where another name (tied weights) has it already."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        apart[key] = (t.clone() if place in taken else t).contiguous()
        taken.add(place)
    return apart
