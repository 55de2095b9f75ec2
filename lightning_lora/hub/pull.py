"""Pull an adapter from the Hub: only its files, all of one commit, and checked before they are handed out."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lightning_lora.checked import number
from lightning_lora.errors import (
    AdapterFormatError,
    CheckpointError,
    ConfigError,
    HubNotFoundError,
    HubUnavailableError,
    listed,
)
from lightning_lora.files import written_beside
from lightning_lora.format.folder import CARD, CERTIFICATE, CONFIG, LARGEST_CONFIG, TENSORS, foreign_layout
from lightning_lora.format.inspection import check_adapter, checked_config
from lightning_lora.hub.address import hub_address, id_and_revision, is_id, local_path
from lightning_lora.hub.download import CachedRepository, Remote, RemoteFile, checksum, link_or_copy, writing

MAX_BYTES = 4 << 30
"""An adapter of rank 64 for every linear layer of a model with 70 billion parameters has about 3 GB."""
_FILES = (CONFIG, CARD, CERTIFICATE, TENSORS)
"""The small ones first: a config that is refused costs no download of tensors."""
_REQUIRED = [CONFIG, TENSORS]


@dataclass(frozen=True)
class Pulled:
    """The result of `pull`."""

    folder: Path
    repo_id: str
    commit: str
    files: dict[str, int]
    """Name -> bytes."""
    fetched: bool
    """True if anything was downloaded; False if all came from the cache."""


class Pulling(TypedDict, total=False):
    """Arguments that a function which may pull an adapter passes on to `pull_adapter`."""

    subfolder: str | None
    token: str | bool | None
    endpoint: str | None
    cache_dir: str | os.PathLike[str] | None
    local_files_only: bool
    max_bytes: int
    timeout: float


def pull_adapter(
    repo_id: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_bytes: int = MAX_BYTES,
    timeout: float = 60.0,
    ignore_fields: Collection[str] = (),
) -> Path:
    """Fetch the adapter in the repository `repo_id` and check it; returns the folder that it lies in.

    `revision` is a branch, a tag or a commit, by default "main"; `repo_id` may name it too, as "user/name@v1". It is
    resolved to a commit first, and all files come from that commit: from its `subfolder`, by default from the top. Only
    adapter_config.json, adapter_model.safetensors and README.md are fetched, into the cache of huggingface_hub
    (`cache_dir`), and copied to `local_dir` where that is given. These are checked: sizes before the download (tensors:
    `max_bytes`), checksums after it, the config (types, ranges, no field that changes the base, no regular expression
    that hangs), and the tensors (names, types, ranks, finite values). `load_adapter` checks if the adapter fits a
    model. Fields of the config that are not known here, and are not empty, are ignored where `ignore_fields` names
    them.

    Offline (`local_files_only`, HF_HUB_OFFLINE, or a Hub that is out of reach), an adapter that was pulled before is
    checked again and handed out. `token` and `endpoint` are those of huggingface_hub unless given. `timeout` is in
    seconds, for an answer with all its repetitions; a download has a second more for each 16 kB.

    Raises HubNotFoundError, HubAccessError (a token that is wrong or not let in), HubUnavailableError (offline and not
    in the cache; no answer in time), HubIntegrityError (another checksum than the Hub's), AdapterFormatError for what
    is no adapter or one that is not safe, ConfigError for an invalid argument, CheckpointError where the disk fails.
    Files that failed a check are not left in the cache.
    """
    return pull(
        repo_id,
        revision,
        subfolder=subfolder,
        token=token,
        endpoint=endpoint,
        cache_dir=cache_dir,
        local_dir=local_dir,
        local_files_only=local_files_only,
        max_bytes=max_bytes,
        timeout=timeout,
        ignore_fields=ignore_fields,
    ).folder


def pull(
    repo_id: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    endpoint: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    max_bytes: int = MAX_BYTES,
    timeout: float = 60.0,
    ignore_fields: Collection[str] = (),
) -> Pulled:
    """`pull_adapter`, which also returns what it did."""
    repo_id, revision, subfolder = _addressed(repo_id, revision, subfolder)
    _check_arguments(repo_id, revision, subfolder, timeout)
    folder = None if local_dir is None else local_path(local_dir)
    cache = CachedRepository(repo_id, cache_dir, subfolder)
    offline = local_files_only or constants.HF_HUB_OFFLINE
    # A commit never changes: what was pulled of it needs no answer from the Hub.
    known = cache.commit_of(revision)
    found = _from_cache(cache, repo_id, known, ignore_fields) if offline or known == revision else None
    if found is None and offline:
        raise HubUnavailableError(_offline(repo_id, revision, cache, known))
    if found is None:
        remote = Remote(repo_id, endpoint=endpoint, token=token, timeout=timeout, subfolder=subfolder)
        try:
            commit = remote.commit_of(revision)
        except HubUnavailableError as error:
            found = _from_cache(cache, repo_id, known, ignore_fields)
            if found is None:
                raise
            said = str(error).rstrip(".")
            warnings.warn(f"{said}. The adapter that was pulled earlier is used: commit {known}.", stacklevel=3)
        else:
            found = _fetch(remote, cache, commit, max_bytes, ignore_fields)
            cache.remember(revision, commit)
    if folder is None:
        return found
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The config last: a folder without one is no adapter yet.
        for name in [name for name in reversed(_FILES) if name in found.files]:
            with written_beside(folder / name) as beside:
                shutil.copyfile(found.folder / name, beside)
    return replace(found, folder=folder)


def adapter_folder(adapter: str | os.PathLike[str], revision: str | None = None, **options: Any) -> Path:
    """The folder of `adapter`, or the `subfolder` in it. An existing folder is taken as it is. An address on the Hub,
    or what looks like an id ("user/name", "user/name@revision"), is pulled with the `options` of `pull_adapter`.
    Raises TypeError for another option, as Python does: functions that pass theirs on accept any name."""
    if unknown := sorted(options.keys() - Pulling.__annotations__.keys() - {"ignore_fields"}):
        raise TypeError(
            f"There is no argument {unknown[0]!r}. Further arguments are: {listed(Pulling.__annotations__)}."
        )
    if hub_address(adapter) is not None:
        return pull_adapter(os.fspath(adapter), revision, **options)
    folder = local_path(adapter)
    if folder.exists():
        inside = options.get("subfolder") or ""
        if inside and not _is_path(inside):
            raise ConfigError(f"subfolder is a folder inside of the adapter's, such as 'v2', not {inside!r}.")
        if revision is not None:
            raise ConfigError(f"{str(folder)!r} is a folder here, which has no revision {revision!r}. Leave it out.")
        return folder / inside
    if not isinstance(adapter, str) or not is_id(id_and_revision(adapter).repo_id, owned=True):
        return folder
    try:
        return pull_adapter(adapter, revision, **options)
    except (HubNotFoundError, HubUnavailableError) as error:
        raise type(error)(f"There is no folder {adapter!r} here, nor can it be pulled: {error}") from error


def _addressed(repo_id: str, revision: str | None, subfolder: str | None) -> tuple[str, str, str]:
    """Id, revision and subfolder, where `repo_id` may be an address that names the other two as well."""
    if not isinstance(repo_id, str):
        return repo_id, "main", ""  # refused later
    address = hub_address(repo_id) or id_and_revision(repo_id)
    for name, given, inside in (("revision", revision, address[1]), ("subfolder", subfolder, address[2])):
        if given and inside and given != inside:
            raise ConfigError(f"{name}={given!r}, and {repo_id!r} names {inside!r}: leave out one of the two.")
    revision = address.revision if revision is None else revision
    return address.repo_id, "main" if revision is None else revision, subfolder or address.subfolder or ""


def _check_arguments(repo_id: str, revision: str, subfolder: str, timeout: float) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} is not the id of a repository, which looks like 'user/name': {error}"
        ) from error
    if not _is_path(revision):
        raise ConfigError(f"revision is a branch, a tag or a commit, not {revision!r}.")
    if subfolder and not _is_path(subfolder):
        raise ConfigError(f"subfolder is a folder in the repository, such as 'checkpoint-100', not {subfolder!r}.")
    number("timeout", timeout, above=0, unit="seconds")


def _is_path(value: Any) -> bool:
    """True if `value` is names with slashes between them, without ".." or the like."""
    parts = value.split("/") if isinstance(value, str) else [""]
    return not any(part in ("", ".", "..") or re.search(r"[\0\\:]", part) for part in parts)


def _from_cache(
    cache: CachedRepository,
    repo_id: str,
    commit: str | None,
    ignore_fields: Collection[str],
    files: Mapping[str, RemoteFile] | None = None,
) -> Pulled | None:
    """The adapter that was pulled earlier, checked again; None where the cache lacks a file or one has changed. Its
    files are compared with the Hub's list `files`, or without that with the checksums that name the cache's blobs."""
    if commit is None:
        return None
    folder = cache.snapshot(commit)

    def is_whole(name: str) -> bool:
        if files is None:
            return cache.is_whole(folder / name)
        return name in files and checksum(folder / name, files[name].checksum) == files[name].checksum

    try:
        there = [name for name in _FILES if (folder / name).exists()]
        if not {*_REQUIRED} <= {*there} or not all(map(is_whole, there)):
            return None
    except OSError:
        return None
    check_adapter(folder, ignore_fields)
    return Pulled(folder, repo_id, commit, {name: (folder / name).stat().st_size for name in there}, fetched=False)


def _offline(repo_id: str, revision: str, cache: CachedRepository, known: str | None) -> str:
    what = f"{repo_id} at {revision!r} is not in the cache ({cache.folder})"
    if known is not None and (cache.snapshot(known) / TENSORS).exists():
        what = f"What the cache holds of {repo_id} at {revision!r} ({cache.snapshot(known)}) is incomplete or damaged"
    return f"{what}, and the Hub may not be asked: local_files_only or HF_HUB_OFFLINE is set. Pull it once online."


def _fetch(
    remote: Remote, cache: CachedRepository, commit: str, max_bytes: int, ignore_fields: Collection[str]
) -> Pulled:
    entries = remote.entries(commit)
    files = {name: file for name in _FILES if (file := entries.get(name)) is not None}
    missing = [name for name in _REQUIRED if name not in files]
    if missing:
        where = f"{f'{remote.subfolder} of ' if remote.subfolder else ''}{remote.repo_id} at {commit}"
        raise AdapterFormatError(f"{where} lacks {' and '.join(missing)}. {_instead(entries, remote.subfolder)}")
    for file in files.values():
        _check_size(remote, file, max_bytes)
    found = _from_cache(cache, remote.repo_id, commit, ignore_fields, files)
    if found is not None and found.files.keys() == files.keys():
        return found
    try:
        fetched = _into_cache(remote, cache, commit, files, ignore_fields)
    except CheckpointError:
        if found is None:
            raise
        return found  # a read-only cache that others fill, often without the card
    return Pulled(cache.snapshot(commit), remote.repo_id, commit, {n: f.size for n, f in files.items()}, fetched)


def _into_cache(
    remote: Remote,
    cache: CachedRepository,
    commit: str,
    files: Mapping[str, RemoteFile],
    ignore_fields: Collection[str],
) -> bool:
    """Bring all of `files` into the cache, checked. Returns True if anything was downloaded."""
    fetched = False
    with cache.staging() as staged:
        folder = staged / remote.subfolder
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, file in files.items():
                blob = cache.blob(file.checksum)
                if blob.is_file() and checksum(blob, file.checksum) == file.checksum:
                    link_or_copy(blob, folder / name)
                else:
                    remote.fetch(commit, file, staged)
                    fetched = True
                if name == CONFIG:
                    checked_config(folder, ignore_fields)
            check_adapter(folder, ignore_fields)
        except AdapterFormatError as error:  # names the repository: the folder will be gone
            place = f"{remote.repo_id}@{commit[:12]}"
            raise AdapterFormatError(str(error).replace(str(staged), place)) from error
        cache.keep(commit, {name: (folder / name, file.checksum) for name, file in files.items()})
    return fetched


def _instead(entries: Mapping[str, RemoteFile | None], subfolder: str) -> str:
    """The sentence of an error that says what is there instead of an adapter."""
    paths = {name: f"{subfolder}/{name}" if subfolder else name for name in entries}
    if foreign := foreign_layout(paths.values()):
        return f"It looks like {foreign}."
    known = f"It holds: {listed(sorted(paths.values())) or 'nothing'}."
    folders = [paths[name] for name, file in entries.items() if file is None]
    return known + (f" If it lies in one of its folders, say subfolder={folders[0]!r}." if folders else "")


def _check_size(remote: Remote, file: RemoteFile, max_bytes: int) -> None:
    most, how = LARGEST_CONFIG, ""
    if file.name.endswith(TENSORS):
        most, how = max_bytes, " If that is right, pass a larger max_bytes=."
    if file.size > most:
        raise AdapterFormatError(
            f"{file.name} of {remote.repo_id} has {file.size:,} bytes, more than the {most:,} that are fetched.{how}"
        )
