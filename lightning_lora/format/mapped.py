"""Reads the tensors of a safetensors file without a copy: the file is mapped into memory.

safetensors' own `get_tensor` leaks 32 bytes in each call (0.8.0). That is nothing for a model that is loaded once, but
2 GiB a day for a bank that brings 800 adapters a second back from disk.
"""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

BLANK = b"e1f3b0c94a7d5826d20c6f8a71b94e35"
"""The placeholder in a header for the checksum of the whole file."""


def checksum(header: bytes, tensors: bytes | memoryview) -> str:
    """The checksum of a file whose header has BLANK in place of the checksum."""
    digest = xxhash.xxh3_128(header)
    digest.update(tensors)
    return digest.hexdigest()


class MappedTensors:
    """The tensors in `path`, by key. Writing into a tensor changes this process's memory alone, never the file.

    Raises OSError where there is no such file, SafetensorError where its header, or a tensor in it, cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
                self._start = 8 + int.from_bytes(self._bytes[:8], "little")
                self.entries: dict[str, Any] = json.loads(self._bytes[8 : self._start])
                """The entry of each tensor in the header: its dtype, its shape and where its bytes are."""
                self.metadata: dict[str, str] = self.entries.pop("__metadata__", None) or {}
            except (ValueError, RecursionError, AttributeError, TypeError) as error:
                raise SafetensorError(f"its header cannot be read: {error}") from error

    def checksum(self, said: str) -> str:
        """The checksum of the file, computed with BLANK where its header holds the checksum `said`."""
        with memoryview(self._bytes) as content:
            return checksum(self._bytes[: self._start].replace(said.encode(), BLANK), content[self._start :])

    def __getitem__(self, key: str) -> Tensor:
        try:
            entry = self.entries[key]
            dtype, shape, (start, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            count = math.prod(shape)
            if end - start != count * dtype.itemsize:
                raise ValueError(f"{end - start} bytes for {shape} of {entry['dtype']}")
            if start == end:
                return torch.empty(shape, dtype=dtype)
            return torch.frombuffer(self._bytes, dtype=dtype, count=count, offset=self._start + start).view(shape)
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise SafetensorError(f"{key!r} cannot be read from it: {error}") from error
