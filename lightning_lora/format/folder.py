"""Writes an adapter as a folder, and opens one that somebody else may have written, checked before it is used."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_lora.engine.present import foreign_layout_of
from lightning_lora.errors import AdapterFormatError, CheckpointError, listed
from lightning_lora.files import write_folder
from lightning_lora.format import mlx
from lightning_lora.format.mapped import BLANK, MappedTensors, checksum

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
CARD = "README.md"
LARGEST_CONFIG = 8 << 20
"""In bytes: 8 MiB. A config that names a rank for each of ten thousand modules has 1 MiB."""
CERTIFICATE = "certificate.json"
"""How a server that applies the adapter answers (format/certificate.py)."""

NOTE = "lightning_lora"
"""The key of our own data in the metadata of the tensors' header. PEFT ignores it there; in a config it would warn."""
CHECKSUM = "checksum"
"""The key, in our own data, of the checksum of the tensors' file."""
SAID = "said_by_config"
"""The key, in our own data, of the config's fields UNSEEN as they were saved: the tensors do not show their values."""
UNSEEN = ("lora_alpha", "alpha_pattern", "use_rslora", "alora_invocation_tokens", "trainable_token_indices")

_FLOATING = ("F16", "BF16", "F32", "F64")

# Names of files in folders that other programs wrote -> what such a file is, and what to do.
_FOREIGN = {
    "pytorch_lora_weights.safetensors": "a LoRA of diffusers' layout; load it with diffusers",
    "adapter_model.bin": "an adapter saved as a pickle, which can run code when it is opened: load it with PEFT where "
    "you trust it, and save it again with safe_serialization=True",
    "lit_model.pth.lora": "a LoRA of LitGPT; convert it with `litgpt merge_lora` and `litgpt convert_from_litgpt`",
    "adapters.safetensors": "an adapter of mlx-lm; fetch the folder, of which load_adapter and export read both files",
    "adapters.npz": "an adapter of an mlx-lm of before 2024; convert it there to adapters.safetensors",
    "pytorch_lora_weights.bin": "a pickled LoRA of diffusers' layout",
    "model.safetensors": "a whole model, not an adapter",
    "model.safetensors.index.json": "a whole model, not an adapter",
    "pytorch_model.bin": "a whole model, not an adapter",
}


@dataclass(frozen=True)
class Header:
    """The header of a tensor file: the shape of each tensor, if it is floating-point, and our own data."""

    shapes: dict[str, tuple[int, ...]]
    floating: dict[str, bool]
    note: dict[str, Any]
    """Our own data, empty where somebody else wrote the file."""
    others: dict[str, str] = field(default_factory=dict)
    """The entries of the file's metadata that others made."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Header:
        """The header that a file with these tensors would have, without data of ours."""
        shapes = {key: tuple(tensor.shape) for key, tensor in sorted(tensors.items())}
        return cls(shapes, {key: tensors[key].is_floating_point() for key in shapes}, {})


class TensorFile(MappedTensors):
    """An open `adapter_model.safetensors`; tensors are read one by one, when asked for."""

    header: Header


class _Converted(dict[str, Tensor]):
    """Tensors made from those of a file that has them under other names and in other shapes."""

    header: Header


OpenTensors = TensorFile | _Converted


def check_folder(folder: Path) -> None:
    """Raise AdapterFormatError, which says what `folder` looks like, unless it holds an adapter of PEFT or mlx-lm."""
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
    if not missing or _is_mlx(folder):
        return
    there = sorted(path.name for path in folder.iterdir())
    inside = [name for name in there if (folder / name / CONFIG).is_file()]
    if inside:
        near = listed((repr(str(folder / name)) for name in inside), 3)
        raise AdapterFormatError(f"{str(folder)!r} lacks {' and '.join(missing)}. Did you mean {near}?")
    others = (_foreign_file(folder / name) for name in there if name.endswith(".safetensors"))
    foreign = next(filter(None, others), None) or foreign_layout(there)
    what = f" It looks like {foreign}." if foreign else f" It holds: {listed(there) or 'nothing'}."
    raise AdapterFormatError(f"{str(folder)!r} lacks {' and '.join(missing)}.{what}")


def _is_mlx(folder: Path) -> bool:
    """True if mlx-lm wrote the adapter in `folder`."""
    files = [folder / name for name in (TENSORS, CONFIG, mlx.TENSORS)]
    if [file.is_file() for file in files] != [False, True, True]:
        return False
    return mlx.is_config(_json(folder / CONFIG))


# The first bytes of a file that is not what its name says -> what it is, and what to do.
_BEGINNINGS = {
    b"version https://git-lfs.github.com/": "a pointer of Git LFS instead of the file itself, which was not fetched: "
    "run `git lfs pull` in its repository, or fetch it with `hf download`",
    b"# xet version": "a pointer of Xet instead of the file itself, which was not fetched: fetch it with `hf download`",
    b"GGUF": "a GGUF file, llama.cpp's own format, which cannot be turned back into an adapter: take the folder that "
    "it was converted from",
    b"PK\x03\x04": "a pickle as torch.save writes it, which can run code when it is opened: load it with PEFT where "
    "you trust it, and save it again with safe_serialization=True",
    b"\x80": "a pickle, which can run code when it is opened",
    b"<": "a page of HTML or XML, as a download that failed leaves it: fetch it again",
}


def _begins_as(path: Path) -> str | None:
    """What the file really is, by its first bytes; None where they are not in `_BEGINNINGS`."""
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip()
    except OSError:
        return None
    return next((meaning for beginning, meaning in _BEGINNINGS.items() if start.startswith(beginning)), None)


def _foreign_file(path: Path) -> str | None:
    """What the file is, if it holds a LoRA of another layout or is no safetensors file; None where that is unknown."""
    try:
        with safe_open(path, framework="np") as file:
            return foreign_layout_of(file.keys(), file.metadata() or {})
    except (SafetensorError, OSError):
        return None if path.suffix == ".json" else _begins_as(path)


def foreign_layout(names: Collection[str]) -> str | None:
    """What a folder with files of these names looks like, if it is not of PEFT's layout; None where that is unknown."""
    foreign = next((meaning for name, meaning in _FOREIGN.items() if name in names), None)
    if foreign is None and any(re.fullmatch(r"adapter_\d+\.pt", name) for name in names):
        foreign = "a torchtune checkpoint; save it from torchtune in its PEFT format"
    if foreign is None and (gguf := next((name for name in sorted(names) if name.endswith(".gguf")), None)):
        foreign = f"an adapter for llama.cpp ({gguf}), which cannot be turned back: take the folder it was made from"
    single = next((name for name in sorted(names) if name.endswith(".safetensors") and name != TENSORS), None)
    if foreign is None and single is not None and CONFIG not in names:
        foreign = (
            f"a LoRA in one file ({single}), as kohya's scripts and diffusers write it, with scales that PEFT's layout "
            "has in adapter_config.json; convert it first"
        )
    return foreign


def read_config(folder: Path) -> Any:
    """The content of `adapter_config.json`; a config of mlx-lm is translated to PEFT's fields. Raises
    AdapterFormatError where it is not JSON, or too large."""
    data = _json(folder / CONFIG)
    if not mlx.is_config(data) or not (folder / mlx.TENSORS).is_file():
        return data
    with _opened(folder / mlx.TENSORS) as tensors:
        return mlx.config_as_peft(data, list(tensors.entries), str(folder / CONFIG))


def read_card(folder: Path) -> str | None:
    """The card of the adapter in `folder`; None where it has none."""
    try:
        return (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder / CARD} could not be read: {error.strerror}.") from error


def _json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= LARGEST_CONFIG else b""
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error
    if size > LARGEST_CONFIG:
        raise AdapterFormatError(f"{path} has {size:,} bytes; a config has at most {LARGEST_CONFIG:,}.")
    try:
        return json.loads(content)
    except ValueError as error:
        what = _begins_as(path) or f"not JSON, or only the beginning of it: {error}"
        raise AdapterFormatError(f"{path} is {what}.") from error
    except RecursionError as error:
        raise AdapterFormatError(f"{path} is nested too deeply to be a config.") from error


@contextmanager
def open_tensors(folder: Path) -> Iterator[OpenTensors]:
    """The tensors in `folder`, with their header. Raises AdapterFormatError where their file is cut short, was changed,
    or is of another layout."""
    path = folder / (mlx.TENSORS if _is_mlx(folder) else TENSORS)
    with _opened(path) as tensors:
        if path.name == TENSORS:
            tensors.header = _header(tensors, path)
            _check_as_written(folder, tensors, tensors.header.note)
            yield tensors
            return
        converted = _Converted(mlx.tensors_as_peft({key: tensors[key] for key in tensors.entries}, str(path)))
        converted.header = Header.of(converted)
        yield converted


def _check_as_written(folder: Path, tensors: MappedTensors, note: Mapping[str, Any]) -> None:
    """Raise AdapterFormatError if this package wrote the file and it was changed since: the tensors do not show it."""
    said = note.get(CHECKSUM)
    if said is not None and (not isinstance(said, str) or len(said) != len(BLANK) or tensors.checksum(said) != said):
        raise AdapterFormatError(
            f"{folder / TENSORS} is not as it was written: the checksum in its header is not that of the file. It is "
            f"damaged, or a program changed it and kept the entry {NOTE!r} of its metadata. Copy it again; tensors "
            "that were changed on purpose are saved without that entry."
        )
    if SAID not in note:
        return
    then, now = note[SAID], read_config(folder)
    if not isinstance(then, dict) or not isinstance(now, dict):
        raise AdapterFormatError(f"{folder / CONFIG} is not the config that {TENSORS} was saved with.")
    others = [f"{f}={now.get(f)!r} and not {then.get(f)!r}" for f in UNSEEN if (now.get(f) or None) != then.get(f)]
    if others:
        raise AdapterFormatError(
            f"{folder / CONFIG} is not the config that the tensors beside it were saved with: it says "
            f"{listed(others)}. It is damaged, was edited, or is another adapter's. Put back what was saved; "
            "combine_adapters writes an adapter of another strength, by its weight."
        )


@contextmanager
def _opened(path: Path) -> Iterator[TensorFile]:
    try:
        with safe_open(path, framework="np"):  # raises for a false header; framework="pt" would map the whole file
            tensors = TensorFile(path)
        yield tensors
    except SafetensorError as error:
        what = _begins_as(path) or f"cut short, or is no safetensors file: {error}"
        raise AdapterFormatError(f"{path} is {what}.") from error
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
    others = {key: value for key, value in tensors.metadata.items() if key not in ("format", NOTE)}
    return Header(shapes, floating, note, others)


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
    card: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter into `folder`. `tensors` are on the CPU. Our own `note`, and the `metadata` of others, go into
    the header of their file, with a checksum and the config's fields UNSEEN, so that reading notices later changes.
    Raises CheckpointError as `write_folder` does."""
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
    """Each tensor in memory of its own, as the format requires: a tensor that shares memory with an earlier one (tied
    weights) is copied."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        apart[key] = (t.clone() if place in taken else t).contiguous()
        taken.add(place)
    return apart
