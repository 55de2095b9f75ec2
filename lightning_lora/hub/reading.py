"""Open an adapter folder that somebody else may have written: what is in it, before any of it is believed."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_lora.engine.foreign import foreign_layout_of
from lightning_lora.errors import AdapterFormatError, CheckpointError, listed
from lightning_lora.hub.mapped import MappedTensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
CARD = "README.md"

NOTE = "lightning_lora"
"""The key of our own data in the metadata of the tensors' header, which PEFT ignores; in the config it would warn."""

_FLOATING = ("F16", "BF16", "F32", "F64")

# What lies in the folders of others -> what it is, and what to do.
_FOREIGN = {
    "pytorch_lora_weights.safetensors": "a LoRA of diffusers' layout; load it with diffusers",
    "adapter_model.bin": "an adapter saved as a pickle, which can run code when it is opened: load it with PEFT where "
    "you trust it, and save it again with safe_serialization=True",
    "lit_model.pth.lora": "a LoRA of LitGPT; convert it with `litgpt merge_lora` and `litgpt convert_from_litgpt`",
    "adapters.safetensors": "an adapter of mlx-lm",
    "pytorch_lora_weights.bin": "a pickled LoRA of diffusers' layout",
    "model.safetensors": "a whole model, not an adapter",
    "model.safetensors.index.json": "a whole model, not an adapter",
    "pytorch_model.bin": "a whole model, not an adapter",
}


@dataclass(frozen=True)
class Header:
    """What a tensor file says about itself."""

    shapes: dict[str, tuple[int, ...]]
    floating: dict[str, bool]
    note: dict[str, Any]
    """Our own data, empty where somebody else wrote the file."""


class TensorFile:
    """An open `adapter_model.safetensors`; tensors are read one by one, when asked for."""

    def __init__(self, tensors: MappedTensors, header: Header) -> None:
        self._tensors = tensors
        self.header = header

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[key]

    def at_once(self) -> Mapping[str, Tensor] | MappedTensors:
        """All of them, which share memory where they can: to be read, not kept."""
        return self._tensors.at_once()

    def are_finite(self) -> bool:
        """Whether it is known, without a look at each of them, that all its numbers are finite."""
        return self._tensors.are_finite()


def check_folder(folder: Path) -> None:
    """Raise AdapterFormatError unless `folder` holds an adapter in PEFT's layout, naming what it looks like."""
    if not folder.exists():
        raise AdapterFormatError(f"There is no folder {str(folder)!r}.")
    if not folder.is_dir():
        if foreign := _foreign_file(folder):
            raise AdapterFormatError(f"{str(folder)!r} is {foreign}.")
        hint = f" Its folder {str(folder.parent)!r} may be meant." if folder.name in (CONFIG, TENSORS) else ""
        raise AdapterFormatError(
            f"{str(folder)!r} is a file: an adapter is a folder with {CONFIG} and {TENSORS}.{hint}"
        )
    missing = [name for name in (CONFIG, TENSORS) if not (folder / name).is_file()]
    if not missing:
        return
    there = sorted(path.name for path in folder.iterdir())
    others = (_foreign_file(folder / name) for name in there if name.endswith(".safetensors"))
    foreign = next(filter(None, others), None) or foreign_layout(there)
    what = f" It looks like {foreign}." if foreign else f" It holds: {listed(there) or 'nothing'}."
    raise AdapterFormatError(f"{str(folder)!r} lacks {' and '.join(missing)}.{what}")


def _foreign_file(path: Path) -> str | None:
    """What the tensors in a file are, if they are a LoRA of another layout."""
    try:
        with safe_open(path, framework="np") as file:
            return foreign_layout_of(file.keys(), file.metadata() or {})
    except (SafetensorError, OSError):
        return None


def foreign_layout(names: Collection[str]) -> str | None:
    """What a folder with these files looks like, where it is none of PEFT's."""
    foreign = next((meaning for name, meaning in _FOREIGN.items() if name in names), None)
    if foreign is None and any(re.fullmatch(r"adapter_\d+\.pt", name) for name in names):
        foreign = "a torchtune checkpoint; save it from torchtune in its PEFT format"
    single = next((name for name in sorted(names) if name.endswith(".safetensors") and name != TENSORS), None)
    if foreign is None and single is not None and CONFIG not in names:
        foreign = (
            f"a LoRA in one file ({single}), as kohya's scripts and diffusers write it, with scales that PEFT's layout "
            "has in adapter_config.json; convert it first"
        )
    return foreign


def read_config(folder: Path) -> Any:
    """The content of `adapter_config.json`. Raises AdapterFormatError where it is not JSON."""
    path = folder / CONFIG
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise AdapterFormatError(f"{path} is not JSON, or only the beginning of it: {error}.") from error
    except RecursionError as error:
        raise AdapterFormatError(f"{path} is nested too deeply to be a config.") from error
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error


@contextmanager
def open_tensors(folder: Path) -> Iterator[TensorFile]:
    """The tensors in `folder`. Raises AdapterFormatError where the file is not what it must be, or is cut short."""
    path = folder / TENSORS
    try:
        with safe_open(path, framework="np"):  # which raises for a header that lies; as torch's, it would map it all
            tensors = MappedTensors(path)
        yield TensorFile(tensors, _header(tensors, path))
    except SafetensorError as error:
        raise AdapterFormatError(f"{path} is cut short, or is no safetensors file: {error}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error}.") from error


def _header(tensors: MappedTensors, path: Path) -> Header:
    shapes, floating = {}, {}
    try:
        for key, entry in sorted(tensors.entries.items()):
            shapes[key] = tuple(entry["shape"])
            floating[key] = entry["dtype"] in _FLOATING
        note: Any = tensors.metadata.get(NOTE, "{}")
    except (AttributeError, LookupError, TypeError) as error:
        raise SafetensorError("it was replaced while it was opened") from error
    if not shapes:
        raise AdapterFormatError(f"{path} holds no tensor.")
    if foreign := foreign_layout_of(shapes, tensors.metadata):
        raise AdapterFormatError(f"{path} is {foreign}.")
    try:
        note = json.loads(note)
    except (TypeError, ValueError, RecursionError):
        note = None
    if not isinstance(note, dict) or not all(isinstance(note.get(k, ""), str) for k in ("module", "base_fingerprint")):
        raise AdapterFormatError(f"{path}: the entry {NOTE!r} of its metadata is not what this package writes there.")
    return Header(shapes, floating, note)
