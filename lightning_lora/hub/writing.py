"""Lay tensors out in safetensors' format, as pieces of memory to write one after the other: no tensor is copied.

safetensors' own `save` copies each into one piece, and looks first for those that share memory, which are as good as
others here; its `serialize_file`, which does neither, is called in another way by each of its versions. The format:
the length of the header in 8 bytes, the header as JSON, filled with spaces to whole 8 bytes, and the numbers.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.errors import AdapterFormatError
from lightning_lora.hub.mapped import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def laid_out(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[bytes | memoryview]:
    """The pieces of a file that holds `tensors`, all of them on the CPU. They are the tensors' own memory."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    pieces: list[bytes | memoryview] = []
    end = 0
    # Widest numbers first, so that all are aligned; as safetensors does.
    for key, t in sorted(tensors.items(), key=lambda entry: (-entry[1].dtype.itemsize, entry[0])):
        if t.dtype not in _NAMES:
            raise AdapterFormatError(f"{key} holds {t.dtype}, which has no place in a file of safetensors.")
        start, end = end, end + t.nbytes
        header[key] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        pieces.append(_memory(t.contiguous()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *pieces]


def _memory(t: Tensor) -> memoryview:
    """That of a contiguous tensor. Not by way of numpy, which would leave it in a storage that cannot be resized any
    more, as FSDP does to those of parameters."""
    memory: Any = (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr())
    memory.owner = t  # lives as long as what looks at it
    return memoryview(memory)
