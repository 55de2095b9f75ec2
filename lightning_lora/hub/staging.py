"""Makes the copy of an adapter that is pushed: nothing changes it any more, and it holds nothing but the adapter."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lightning_lora.errors import AdapterFormatError, CheckpointError, listed
from lightning_lora.files import reason, temporary_folder
from lightning_lora.format.certificate import read_certificate
from lightning_lora.format.folder import (
    CERTIFICATE,
    CONFIG,
    TENSORS,
    check_folder,
    open_tensors,
    read_card,
    read_config,
)
from lightning_lora.format.inspection import check_adapter, is_trained
from lightning_lora.format.peft import adapted_names, plain_key
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.card import RunFacts, merge_cards, model_card
from lightning_lora.hub.download import checksum

PICTURE = "training.png"
CHECKPOINT = "training.ckpt"
"""A training checkpoint beside its adapter, where the user pushes those too."""


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
        path = self.folder / name
        path.write_bytes(content)
        return replace(self, digests={**self.digests, name: digest_of(path)})

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
        return Staged(
            folder,
            config,
            module=note.get("module", ""),
            modules=len(adapted_names(map(plain_key, shapes))),
            parameters=sum(math.prod(shape) for shape in shapes.values()),
            values=_hash_of_values(folder / TENSORS),
            text=read_card(source),
            digests={path.name: digest_of(path) for path in sorted(folder.iterdir())},
        )
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(f"{source} could not be copied for pushing: {reason(error)}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _check(folder: Path, source: Path, ignore_fields: Collection[str]) -> None:
    """Raise AdapterFormatError if `pull_adapter` would refuse the copy of `source`, or it holds weights of the base."""
    try:
        config = check_adapter(folder, ignore_fields)
    except AdapterFormatError as error:  # the user knows the folder that it was copied from
        raise AdapterFormatError(str(error).replace(str(folder), str(source))) from None
    with open_tensors(folder) as file:
        trained = {key: is_trained(plain_key(key), config) for key in file.header.shapes}
        foreign = [key for key, was_trained in trained.items() if not was_trained]
        if read_config(folder).get("ensure_weight_tying"):
            # PEFT wrote a tensor that was trained whole once more, for the tied layer that the config does not name.
            whole = [file[key] for key, was_trained in trained.items() if was_trained]
            foreign = [key for key in foreign if not any(torch.equal(file[key], t) for t in whole)]
    if foreign:
        raise AdapterFormatError(
            f"{source} holds tensors that are no adapter's: {listed(map(plain_key, foreign), 4)}. They may be weights "
            "of the base, so it is not pushed. Save it with save_adapter, or name them in modules_to_save if they were "
            "trained."
        )


def digest(content: bytes) -> Digest:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    return Digest(len(content), hashlib.sha256(content).hexdigest(), git.hexdigest())


def digest_of(path: Path) -> Digest:
    return Digest(path.stat().st_size, checksum(path, "-" * 64), checksum(path, "-" * 40))


def _hash_of_values(path: Path) -> str:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        values = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 20):
            values.update(block)
    return values.hexdigest()
