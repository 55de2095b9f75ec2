"""The file of a checkpoint. Reading it runs no foreign code and refuses damage; writing it leaves a whole file or none.

torch.load ignores the checksums that torch.save writes beside every tensor and the rest, and Lightning lets torch.load
run the code of a pickle from an http address.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.engine import adapter_tensors
from lightning_lora.engine.swap import swap
from lightning_lora.errors import CheckpointError, listed
from lightning_lora.files import FULL, flush, has_less_room, reason, written_beside
from lightning_lora.training.checkpoint_address import is_local, is_on_hub, local_checkpoint, local_path

# `save_hyperparameters` keeps the arguments of a model: a base among them must not go into every checkpoint.

_KEYS = ("hyper_parameters", "datamodule_hyper_parameters")  # Lightning's, of the module and of the data module
_PLAIN = (str, bytes, int, float, bool, type(None))


def leave_out_base(checkpoint: dict[str, Any], module: nn.Module) -> list[str]:
    """Take modules, and weights of the base of `module`, out of the hyperparameters in `checkpoint`, at any depth of
    dicts, lists and tuples. Any other object that holds one is taken out as a whole.

    Returns their paths in the module's own hyperparameters: "backbone", "parts.backbone". In a list or tuple, None
    takes their place.
    """
    ours = {id(t) for t in adapter_tensors(module).values()}
    base = {_storage(t) for t in (*module.parameters(), *module.buffers()) if id(t) not in ours}
    left_out: list[str] = []
    for key in _KEYS:
        given = checkpoint.get(key)
        if isinstance(given, Mapping) and (places := list(_places(given, base, ()))):
            checkpoint[key] = _without(given, set(places), ())
            if key == _KEYS[0]:
                left_out = [".".join(map(str, place)) for place in places]
    return left_out


def _places(value: Any, base: set[int], path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, _PLAIN):
        return
    if type(value) in (list, tuple):
        inside: Any = enumerate(value)
    elif isinstance(value, dict):
        inside = value.items()
    elif path:
        if _holds(value, base):
            yield path
        return
    else:
        inside = value.items()  # the hyperparameters themselves, where they are some other mapping
    for key, inner in inside:
        yield from _places(inner, base, (*path, key))


def _without(value: Any, places: set[tuple[Any, ...]], path: tuple[Any, ...]) -> Any:
    """`value` without what lies at `places`; a part that holds none of these stays the same object."""
    if not any(place[: len(path)] == path for place in places):
        return value
    if isinstance(value, (list, tuple)):
        here = ((*path, i) for i in range(len(value)))
        return type(value)(None if p in places else _without(v, places, p) for v, p in zip(value, here))
    return {k: _without(v, places, (*path, k)) for k, v in value.items() if (*path, k) not in places}


def _holds(value: Any, base: set[int]) -> bool:
    """True if pickling `value`, as a save does, meets a module or a weight of the base."""
    found = False

    class Search(pickle.Pickler):
        def persistent_id(self, inner: Any) -> str | None:
            nonlocal found
            if isinstance(inner, nn.Module):
                found = True
                return "module"
            if isinstance(inner, Tensor):
                found = found or _storage(inner) in base
                return "tensor"
            return None

    class Nowhere:
        def write(self, content: Any) -> int:
            return len(content)

    try:
        Search(Nowhere()).dump(value)
    except Exception:  # saving it will fail, too, and say why
        return found
    return found


def _storage(t: Tensor) -> int:
    try:
        return t.untyped_storage().data_ptr() or id(t)
    except (RuntimeError, NotImplementedError):  # a tensor without a storage, or a sharded one
        return id(t)


if TYPE_CHECKING:
    _Host = TorchCheckpointIO
else:
    _Host = ABC  # the base of TorchCheckpointIO: Python swaps classes only if their layouts agree

_ZIP = b"PK"


def read_checkpoint(
    path: Any, load: Callable[..., Any], weights_only: bool | None = None, *, io: CheckpointIO | None = None
) -> Any:
    """Returns `load(file, weights_only=...)`, where `file` is a local file with the content of `path`.

    `weights_only` is True unless False is given: no code has to be run to load what LoRACallback saves. `io` is the
    CheckpointIO that `load` calls. One that is not Lightning's may know places that we do not, and gets a remote `path`
    as it is. Raises CheckpointError for a file that is damaged, is no checkpoint, or holds what weights_only does not
    load.
    """
    safe = weights_only is not False
    if not (is_local(path) or is_on_hub(path) or io is None or isinstance(_writer(io), WholeFileIO)):
        return load(path, weights_only=safe)
    with local_checkpoint(path) as local:
        if os.path.isfile(local):
            check_whole(local, path)
        try:
            return load(local, weights_only=safe)
        except pickle.UnpicklingError as error:
            if not zipfile.is_zipfile(local):
                raise _not_whole(path) from error
            raise CheckpointError(_needs_code(path, local, error)) from error
        except Exception as error:
            if isinstance(error, PermissionError) or not os.path.exists(local):
                raise
            broken = isinstance(error, (EOFError, OSError)) or "PytorchStreamReader" in str(error)
            if not broken and zipfile.is_zipfile(local):
                raise  # torch's own message says what to do, on map_location for example
            raise _not_whole(path) from error


@contextmanager
def fetched(path: str | None) -> Iterator[str | None]:
    """The path of a local copy of the remote file `path`, for runs without LoRACallback: Lightning would run the code
    of a pickle from an http address. Raises CheckpointError for a file that is damaged."""
    if path is None or is_local(path):
        yield path
        return
    with local_checkpoint(path) as local:
        check_whole(local, path)
        try:
            yield local
        except pickle.UnpicklingError as error:
            raise CheckpointError(_needs_code(path, local, error)) from error


def check_whole(file: str, path: Any) -> None:
    """Raise CheckpointError, naming `path`, where `file` has torch's format and is damaged."""
    with open(file, "rb") as opened:
        if opened.read(len(_ZIP)) != _ZIP and not zipfile.is_zipfile(opened):
            return  # of another format, which torch.load may know
    try:
        with zipfile.ZipFile(file) as records:
            if not any(record.CRC for record in records.infolist() if record.file_size):
                rank_zero_warn(
                    f"{path} was written without checksums (torch.serialization.set_crc32_options(False)), so damage "
                    "to it would not be seen."
                )
                return
            damaged = records.testzip()
    except PermissionError:
        raise
    except Exception as error:  # zipfile raises what it happens to meet: BadZipFile, zlib's, NotImplementedError
        raise _not_whole(path) from error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: the checksum of its record {damaged!r} is not that of its content. Nothing was "
            "loaded. Copy it again, or take another checkpoint from the same folder."
        )


def _not_whole(path: Any) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole checkpoint: it is truncated or damaged, or was not written by Lightning. "
        "Take an earlier one from the same folder."
    )


def _needs_code(path: Any, local: str, error: Exception) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(local)
    except Exception:  # it reads the same pickle
        names = []
    what = f"objects of {listed(sorted(names), 4)}" if names else f"what torch refuses ({str(error).splitlines()[0]})"
    return (
        f"{path} holds {what}, and loading those may run code of whoever wrote the file. Nothing was loaded. If you "
        "trust it, allow these classes with torch.serialization.add_safe_globals([...]), or pass weights_only=False "
        "to what you called (fit, validate, test, predict or load_from_checkpoint). Hyperparameters that are plain "
        "values, lists and dicts need neither."
    )


def write_whole_files(io: CheckpointIO) -> CheckpointIO:
    """Have `io` write files whole or not at all, if it is Lightning's plain one or wraps that. Returns `io`."""
    writer: Any = _writer(io)
    if type(writer) is TorchCheckpointIO:
        swap(writer, "Whole", WholeFileIO)
    return io


def _writer(io: CheckpointIO) -> CheckpointIO:
    """The innermost CheckpointIO, which writes the file. AsyncCheckpointIO, a wrapper, may get another at each call."""
    while (inner := getattr(io, "checkpoint_io", None)) is not None:
        io = inner
    return io


class WholeFileIO(_Host):
    """Mixin in front of Lightning's plain CheckpointIO: a file is there whole, or not at all.

    Lightning writes the file to the folder for temporary files first and then moves it. Where that folder is on another
    file system, the move is a copy, which can be cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        sums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(True)  # reading looks at them
        try:
            if not is_local(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            with _said(local_path(path)), written_beside(Path(local_path(path))) as beside:
                super().save_checkpoint(checkpoint, str(beside), storage_options)
                flush(beside)
        finally:
            torch.serialization.set_crc32_options(sums)


@contextmanager
def _said(path: str) -> Iterator[None]:
    """Turn an error of the disk into a CheckpointError: which checkpoint was not written, and what to do."""
    try:
        yield
    except OSError as error:
        why = f"({error.strerror or error}). Earlier checkpoints are as they were."
        if error.errno in FULL and has_less_room(path):
            advice = f"Lightning writes it to the folder for temporary files first: {reason(error)}"
        else:
            advice = "Free some space, or check the folder's permissions."
        raise CheckpointError(f"The checkpoint {path} could not be written {why} {advice}") from error
