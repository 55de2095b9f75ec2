"""The cache of huggingface_hub, in which PEFT and transformers find what was pulled, and the other way round.

    models--user--name/
      blobs/<checksum>             contents, by the sha256 of large files and by git's id of small ones
      snapshots/<commit>/<file>    links to them (copies where the system has no links)
      refs/<revision>              the commit that a branch or a tag meant when it was last asked for

Names in blobs/ are checksums: what lies here can be verified again without the Hub.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

from lightning_lora.errors import CheckpointError
from lightning_lora.files import own_name, remove_leftovers, written_beside
from lightning_lora.hub.download import checksum
from lightning_lora.hub.format.writing import local_path


class CachedRepository:
    """What the cache holds of one repository."""

    def __init__(self, repo_id: str, cache_dir: str | os.PathLike[str] | None, subfolder: str = "") -> None:
        cache = local_path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir)
        self.folder = cache / "--".join(["models", *repo_id.split("/")])
        self._subfolder = subfolder

    def commit_of(self, revision: str) -> str | None:
        """The commit that `revision` meant when it was last asked for."""
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        try:
            commit = self.folder.joinpath("refs", *revision.split("/")).read_text("utf-8").strip()
        except (OSError, ValueError):
            return None
        return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None

    def snapshot(self, commit: str) -> Path:
        """The adapter's place in what the cache has of `commit`."""
        return self.folder / "snapshots" / commit / self._subfolder

    def blob(self, checksum: str) -> Path:
        return self.folder / "blobs" / checksum

    def is_whole(self, path: Path) -> bool:
        """Whether the content of a file in a snapshot is still the one that was fetched."""
        target = path.resolve()
        if not target.is_file():
            return False
        if target.parent == self.blob("").resolve() and len(target.name) in (40, 64):
            return checksum(target, target.name) == target.name
        # A copy. Its own checksum is the name of its blob, of the one or the other kind.
        return any(self.blob(checksum(target, like)).is_file() for like in ("-" * 64, "-" * 40))

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A new folder beside the blobs, for files that are not verified yet; gone afterwards."""
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            staged = self.folder / own_name(".lightning_lora.", ".tmp")
            staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def keep(self, staged: Path, commit: str, checksums: Mapping[str, str]) -> Path:
        """Move the verified files in `staged` (name -> checksum) to their places; returns the snapshot's folder."""
        snapshot = self.snapshot(commit)
        with _writing(self.folder):
            snapshot.mkdir(parents=True, exist_ok=True)
            self.blob("").mkdir(exist_ok=True)
            for name, sum_ in checksums.items():
                blob = self.blob(sum_)
                if not (staged / name).is_symlink():
                    os.replace(staged / name, blob)
                self._link(blob, snapshot / name, staged / f"{name}.link")
        return snapshot

    def remember(self, revision: str, commit: str) -> None:
        """Note what `revision` means now, for when the Hub is out of reach."""
        if revision == commit:
            return
        ref = self.folder.joinpath("refs", *revision.split("/"))
        with contextlib.suppress(OSError):  # a branch of today may be a folder of branches of yesterday
            ref.parent.mkdir(parents=True, exist_ok=True)
            with written_beside(ref) as beside:
                beside.write_text(commit, "utf-8")

    def _link(self, blob: Path, place: Path, temporary: Path) -> None:
        if place.is_symlink() and place.resolve() == blob.resolve():
            return
        link_or_copy(blob, temporary, seen_from=place.parent)
        os.replace(temporary, place)


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"The cache could not be written at {where}: {error.strerror or error}. "
            "Give another place as cache_dir=, or set HF_HOME."
        ) from error


def link_or_copy(file: Path, place: Path, *, seen_from: Path | None = None) -> None:
    """Make `place` a relative link to `file`, or a copy where the system has no links; the link is right in the folder
    `seen_from`, if it will be moved there."""
    try:
        os.symlink(os.path.relpath(file, seen_from or place.parent), place)
    except OSError:
        shutil.copyfile(file, place)


def copy_files(files: list[Path], folder: Path) -> None:
    """Copy `files` into `folder`, each of them whole or not at all."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            with written_beside(folder / file.name) as beside:
                shutil.copyfile(file, beside)
