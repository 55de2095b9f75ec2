"""Folders on this machine: what is given as one, and is none."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

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
