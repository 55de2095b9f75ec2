"""Writes an adapter as a folder in PEFT's format: its card, its tensors and its config."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor

from lightning_lora.errors import ConfigError
from lightning_lora.files import write_folder
from lightning_lora.hub.format.mapped import BLANK, checksum
from lightning_lora.hub.format.reading import CARD, CHECKSUM, CONFIG, NOTE, SAID, TENSORS, UNSEEN

# Reads where an adapter is, as people write it: a folder on this machine, or an address of the Hub.

# A scheme has at least two letters: "C:/" is a drive. One slash is enough: a Path has lost the second one.
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/")


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


class HubAddress(NamedTuple):
    """A repository on the Hub, with a revision and a folder in it."""

    repo_id: str
    revision: str | None
    subfolder: str | None


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


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    note: Mapping[str, Any],
    card: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write an adapter into `folder`. `tensors` are on the CPU. Our own `note`, and the `metadata` of others, go into
    the header of their file, with a checksum and the config's fields UNSEEN, so that reading notices later changes.
    Raises CheckpointError as `write_folder` does."""
    said = {field: config[field] for field in UNSEEN if config.get(field)}
    note = {**note, CHECKSUM: BLANK.decode(), SAID: said}
    header = {**(metadata or {}), "format": "pt", NOTE: json.dumps(note, sort_keys=True)}
    files: dict[str, bytes | tuple[bytes, memoryview]] = {
        CARD: card.encode(),
        TENSORS: _with_checksum(save(_apart(tensors), header)),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }
    write_folder(folder, files)


def _with_checksum(content: bytes) -> tuple[bytes, memoryview]:
    start = 8 + int.from_bytes(content[:8], "little")
    header, body = content[:start], memoryview(content)[start:]
    return header.replace(BLANK, checksum(header, body).encode()), body


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in memory of its own, as the format requires: a tensor that shares memory with an earlier one (tied
    weights) is copied."""
    apart: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, t in tensors.items():
        place = t.untyped_storage().data_ptr()
        apart[key] = (t.clone() if place in taken else t).contiguous()
        taken.add(place)
    return apart
