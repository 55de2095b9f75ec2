"""The files in which a bank keeps adapters for which there is no memory; they are read by mapping them into memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import shutil
import weakref
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_lora.errors import BankError, ConfigError
from lightning_lora.files import own_name, remove_leftovers
from lightning_lora.format.mapped import MappedTensors


class DiskStore:
    """Keeps rows of a bank's slab as safetensors files, in a new folder inside `folder` that is removed with the bank.

    A file is written once and never overwritten. A forked process reads the files that are there, and writes into a
    folder of its own inside of this one's, so neither process changes what the other has.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self._numbers = itertools.count()
        try:
            self._begin(folder)
        except OSError as error:
            raise ConfigError(f"disk={str(folder)!r} cannot be written to: {error.strerror or error}.") from error

    def _begin(self, place: Path) -> None:
        """Make a folder for the files of this process, and remove those that killed processes left."""
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
        self._folder, self._process = place / own_name("bank-"), os.getpid()
        self._folder.mkdir(mode=0o700)
        weakref.finalize(self, _remove, self._folder, self._process)

    def put(self, name: str, row: Tensor) -> None:
        try:
            if self._process != os.getpid():
                self._begin(self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)  # somebody may have cleaned up there
            hashed = hashlib.sha256(name.encode()).hexdigest()[:32]
            path = self._folder / f"{hashed}-{next(self._numbers)}.safetensors"
            try:
                save_file({"row": row.contiguous()}, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    path.unlink()
                raise
        except (OSError, SafetensorError) as error:
            raise BankError(
                f"The adapter {name!r} cannot be moved out to {str(self._folder)!r}: {error}. It stays where it is. "
                "Free space there, raise host_capacity, or remove adapters."
            ) from error
        self._files[name] = path

    def take(self, name: str) -> Tensor:
        path = self._files[name]
        try:
            return MappedTensors(path)["row"]
        except (OSError, SafetensorError) as error:
            raise BankError(
                f"The adapter {name!r} cannot be read back from {str(path.parent)!r}: {error}. Add it again, with "
                "replace=True."
            ) from error

    def drop(self, name: str) -> None:
        path = self._files.pop(name)
        if self._process == os.getpid() and path.parent == self._folder:
            with contextlib.suppress(OSError):  # gone already, or with the folder
                path.unlink()


def _remove(folder: Path, process: int) -> None:
    """Called in each process that ends or drops the store; only the process that made the folder removes it."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
