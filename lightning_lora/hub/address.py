"""Where an adapter or a base is, as people write it: a folder on this machine, or a repository on the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from huggingface_hub import constants

from lightning_lora.errors import ConfigError

# A scheme has at least two letters: "C:/" is a drive. One slash is enough: a Path has lost the second one.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")
_ID = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")


def local_path(path: Any) -> Path:
    """`path` as a Path, with "~" in it replaced. Raises ConfigError for a URL such as s3:// or hf://, but not for
    file://: as a Path, a URL would be a folder with a colon in its name."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"A path is a str or a Path, not a {type(path).__name__}: {path!r:.80}")
    text = os.fspath(path)
    found = _SCHEME.match(text) if isinstance(text, str) else None
    if found is None:
        return Path(path).expanduser()
    if found["scheme"].lower() == "file":
        return Path(url2pathname(urlsplit(text).path))
    raise ConfigError(
        f"{text!r} is no folder on this machine, and remote folders are not supported yet. Give a local folder and "
        "copy it there or from there with the tools of that storage; an adapter on the Hub is given as 'user/name'."
    )


def is_id(name: Any, *, owned: bool = False) -> bool:
    """True if `name` looks like the id of a model on the Hub; with `owned`, only "user/name" does, and not "name"."""
    found = _ID.fullmatch(name) if isinstance(name, str) else None
    return found is not None and not (owned and found["owner"] is None)


def base_id(name: Any) -> str | None:
    """`name` where it is an id on the Hub; None where it is a local path, which the Hub refuses and nobody can use."""
    return name if is_id(name) and not os.path.exists(name) else None


class HubAddress(NamedTuple):
    """A repository on the Hub, with a revision and a folder in it."""

    repo_id: str
    revision: str | None
    subfolder: str | None = None


def id_and_revision(text: str) -> HubAddress:
    """The repository of "user/name@revision", or of "user/name"."""
    name, at, revision = text.partition("@")
    return HubAddress(name, revision if at else None)


def hub_address(text: Any) -> HubAddress | None:
    """The repository that `text` names, as the address of a page on the Hub or as "hf://user/name@revision"; None where
    `text` is neither.

    Raises ConfigError for the address of anything but a model's repository.
    """
    hub = re.escape(urlsplit(constants.ENDPOINT).netloc)
    host = rf"hf://|(https?://)?(www\.)?(huggingface\.co|hf\.co|{hub})/"
    found = re.match(rf"\s*({host})([^?#\s]*)", text, re.IGNORECASE) if isinstance(text, str) else None
    if found is None:
        return None
    parts = [unquote(part) for part in found[found.lastindex or 0].split("/") if part]
    is_page = not found[1].lower().startswith("hf:")
    if parts and parts[0] == "models" and not is_page:
        del parts[0]
    if not parts or parts[0] in ("datasets", "spaces", "models", "papers", "docs", "collections"):
        raise ConfigError(f"{text!r} is no address of a model or an adapter on the Hub, such as 'hf://user/name'.")
    name, _, revision = "/".join(parts[:2]).partition("@")
    inside = parts[2:]
    if is_page and inside:  # .../tree/main/folder, .../blob/main/adapter_config.json, .../discussions
        revision = inside[1] if len(inside) > 1 and inside[0] in ("tree", "blob", "resolve", "raw", "commit") else ""
        inside = inside[2:]
    elif revision == "refs":  # hf://user/name@refs/pr/1
        revision, inside = "/".join(["refs", *inside[:2]]), inside[2:]
    if inside and inside[-1].endswith((".json", ".safetensors", ".md", ".bin")):
        del inside[-1]
    return HubAddress(name, revision or None, "/".join(inside) or None)
