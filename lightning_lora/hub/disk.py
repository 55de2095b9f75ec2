"""Where a bank keeps the adapters for which there is no memory: files, read by mapping them into memory."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import weakref
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_lora.errors import BankError, ConfigError
from lightning_lora.hub.mapped import MappedTensors


class DiskStore:
    """Rows of a bank's slab as safetensors files, in a new folder inside `folder`; they are gone when the bank is."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="bank-", dir=folder))
        except OSError as error:
            raise ConfigError(f"disk={str(folder)!r} cannot be written to: {error.strerror or error}.") from error
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def put(self, name: str, row: Tensor) -> None:
        path = self._path(name)
        beside = path.with_suffix(".tmp")
        try:
            save_file({"row": row.contiguous()}, beside)
            os.replace(beside, path)
        except (OSError, SafetensorError) as error:
            beside.unlink(missing_ok=True)
            raise BankError(
                f"The adapter {name!r} cannot be moved out to {str(self._folder)!r}: {error}. It stays where it is. "
                "Free space there, raise host_capacity, or remove adapters."
            ) from error

    def take(self, name: str) -> Tensor:
        try:
            return MappedTensors(self._path(name))["row"]
        except (OSError, SafetensorError) as error:
            raise BankError(
                f"The adapter {name!r} cannot be read back from {str(self._folder)!r}: {error}. Add it again."
            ) from error

    def drop(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.safetensors"
