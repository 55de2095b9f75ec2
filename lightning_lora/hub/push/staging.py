"""Makes the copy of an adapter that is pushed: nothing changes it any more, and it holds nothing but the adapter."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import AdapterFormatError, CheckpointError, listed
from lightning_lora.files import reason, temporary_folder
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.card import RunFacts, merge_cards, model_card
from lightning_lora.hub.format.certificate import read_certificate
from lightning_lora.hub.format.config import HEADS_OF_TASK
from lightning_lora.hub.format.folder import (
    CARD,
    CERTIFICATE,
    CONFIG,
    TENSORS,
    TensorFile,
    check_folder,
    open_tensors,
    read_config,
)
from lightning_lora.hub.format.inspection import check_adapter
from lightning_lora.hub.format.peft import adapted_names, base_name, ends_with, plain_key

PICTURE = "training.png"
CHECKPOINT = "training.ckpt"
"""A training checkpoint beside its adapter, where the user pushes those too."""

_TRAINED = re.compile(
    r"(^|\.)(lora_(embedding_)?[AB](\.(weight|bias))?|lora_magnitude_vector(\.weight)?|trainable_tokens_delta)$"
)


@dataclass(frozen=True)
class Digest:
    """The size and checksums of a file, which tell if the Hub has it already."""

    size: int
    sha256: str
    git: str
    """The name of the content in git, for files that are not in LFS."""


@dataclass(frozen=True)
class Staged:
    """A private, checked copy of an adapter folder, with the facts for its card."""

    folder: Path
    config: Mapping[str, Any]
    module: str
    """The name of the base inside the model that was trained, or ""."""
    modules: int
    parameters: int
    values: str
    """A hash of the tensors alone: files with the same tensors can differ in the order of their metadata."""
    text: str | None
    """The card in the folder that it was copied from, which may hold the user's own text."""
    digests: dict[str, Digest] = field(default_factory=dict)
    """Name -> digest of every file but the card."""

    @property
    def size(self) -> int:
        return sum(digest.size for digest in self.digests.values())

    def with_file(self, name: str, content: bytes) -> Staged:
        """This copy with a further file, such as a picture."""
        (self.folder / name).write_bytes(content)
        return replace(self, digests={**self.digests, name: digest(content)})

    def card(self, run: RunFacts) -> str:
        """The card, with the user's text from the folder's own card around it."""
        if PICTURE in self.digests:
            run = replace(run, curve=PICTURE)
        ours = model_card(self.config, modules=self.modules, parameters=self.parameters, module=self.module, run=run)
        return merge_cards(ours, self.text, explicit=run.front_matter)

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def stage(
    source: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    ignore_fields: Collection[str] = (),
) -> Staged:
    """Copy the adapter in the folder `source` (and a training `checkpoint`) to a temporary folder of this process.

    A certificate in it (`make_certificate`) is copied as well.

    Raises AdapterFormatError for a folder that is no adapter, one that `pull_adapter` would refuse, and one with
    weights of the base, or with another adapter's certificate. CheckpointError where it cannot be read or written.
    """
    source = local_path(source)
    check_folder(source)
    if not (source / TENSORS).is_file():
        raise AdapterFormatError(
            f"{source} is an adapter of mlx-lm, and PEFT's layout is what is pushed: convert it first, with "
            f"lightning-lora export --for peft adapter={source} output=FOLDER."
        )
    folder = temporary_folder("push")
    try:
        shutil.copyfile(source / TENSORS, folder / TENSORS)
        shutil.copyfile(source / CONFIG, folder / CONFIG)
        _check(folder, source, ignore_fields)
        config = read_config(folder)
        named = config.get("base_model_name_or_path")
        if named is not None and base_id(named) is None:
            config["base_model_name_or_path"] = config["revision"] = None
            content = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (folder / CONFIG).write_text(content, encoding="utf-8")
        if (source / CERTIFICATE).is_file():
            read_certificate(source)
            shutil.copyfile(source / CERTIFICATE, folder / CERTIFICATE)
        if checkpoint is not None:
            shutil.copyfile(checkpoint, folder / CHECKPOINT)
        with open_tensors(folder) as file:
            shapes, note = file.header.shapes, file.header.note
            copies = _tied_copies(file, config)
        check_is_adapter((key for key in shapes if key not in copies), config, where=str(source))
        text = (source / CARD).read_text(encoding="utf-8", errors="replace") if (source / CARD).is_file() else None
        return Staged(
            folder,
            config,
            module=note.get("module", ""),
            modules=len(adapted_names(map(plain_key, shapes))),
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            values=_hash_of_values(folder / TENSORS),
            text=text,
            digests={path.name: digest_of(path) for path in sorted(folder.iterdir())},
        )
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{source} could not be copied for pushing: {reason(error)}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _tied_copies(file: TensorFile, config: Mapping[str, Any]) -> set[str]:
    """The tensors that PEFT wrote twice because it keeps tied layers tied: copies of one that was trained whole, under
    the name of the tied layer that the config does not name."""
    if not config.get("ensure_weight_tying"):
        return set()
    entries = config.get("modules_to_save") or ()
    is_whole = {key: _is_inside(base_name(plain_key(key)), entries) for key in file.header.shapes}
    trained = [file[key] for key, whole in is_whole.items() if whole]
    others = [key for key, whole in is_whole.items() if not whole and not _TRAINED.search(plain_key(key))]
    return {key for key in others if any(torch.equal(file[key], t) for t in trained)}


def _check(folder: Path, source: Path, ignore_fields: Collection[str]) -> None:
    try:
        check_adapter(folder, ignore_fields)
    except AdapterFormatError as error:  # the user knows the folder that it was copied from
        raise AdapterFormatError(str(error).replace(str(folder), str(source))) from None


def check_is_adapter(keys: Iterable[str], config: Mapping[str, Any], where: str) -> None:
    """Raise AdapterFormatError, naming them, where some of `keys` are neither factors nor trained whole by `config`."""
    whole = [*(config.get("modules_to_save") or ()), *HEADS_OF_TASK.get(config.get("task_type") or "", ())]
    biases = config.get("bias", "none") != "none"
    foreign = [
        key
        for key in map(plain_key, keys)
        if not _TRAINED.search(key) and not (biases and key.endswith(".bias")) and not _is_inside(base_name(key), whole)
    ]
    if foreign:
        raise AdapterFormatError(
            f"{where} holds tensors that are no adapter's: {listed(foreign, 4)}. They may be weights of the base, so "
            "it is not pushed. Save it with save_adapter, or name them in modules_to_save if they were trained."
        )


def _is_inside(name: str, whole: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(ends_with(list(whole), ".".join(parts[:i])) for i in range(1, len(parts)))


def digest(content: bytes) -> Digest:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return Digest(len(content), hashlib.sha256(content).hexdigest(), git.hexdigest())


def digest_of(path: Path) -> Digest:
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
            git.update(block)
    return Digest(size, sha256.hexdigest(), git.hexdigest())


def _hash_of_values(path: Path) -> str:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        values = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 20):
            values.update(block)
    return values.hexdigest()
