"""Where an adapter is, as people write it: a folder on this machine, or an address of the Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from huggingface_hub import constants

from lightning_lora.errors import ConfigError

# Two letters at least: "C:/" is a drive. One slash is enough: a Path has lost the second one.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")


def local_path(path: Any) -> Path:
    """`path` as a Path, with "~" in it replaced. Raises ConfigError where it is a URL, of s3:// or hf:// for example:
    as a Path, it would be a folder with a colon in its name."""
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


class HubAddress(NamedTuple):
    """A repository on the Hub, and where in it."""

    repo_id: str
    revision: str | None
    subfolder: str | None


def hub_address(text: Any) -> HubAddress | None:
    """What the address of a page on the Hub, or "hf://user/name@revision", names; None where `text` is neither.

    Raises ConfigError for the address of something else than a model's repository.
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
