"""A certificate: a few prompts, and what base and adapter answer to them. It shows whether a server applies an adapter.

It keeps, for each prompt, the five likeliest next tokens of the base and of the adapter, with the log-probabilities
that both give to them: all that a server tells.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import AdapterFormatError, BaseMismatchError, CheckpointError
from lightning_lora.files import written_beside
from lightning_lora.format.folder import CERTIFICATE, TENSORS, check_folder, open_tensors, read_config

BEST = 5
SAME = 0.2
"""A server whose distance is at most this applies the adapter: 4-bit bases come to 0.15, the least fault to 0.26."""
_FORMAT = 1


@dataclass(frozen=True)
class Candidate:
    """One of the likeliest next tokens of a prompt."""

    id: int
    text: str
    """The text that it adds to the prompt, as servers show it."""
    piece: str
    """The token as the vocabulary has it."""
    base: float
    """The log-probability that the base gives to it."""
    adapter: float


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the answers to it."""

    text: str
    ids: tuple[int, ...]
    """The whole prompt in the chat template of the base, as tokens."""
    best: tuple[Candidate, ...]


@dataclass(frozen=True)
class Certificate:
    """What a server that applies the adapter answers, and what one does that does not."""

    prompts: tuple[Prompt, ...]
    adapter: str
    """A hash of the adapter's files, so that a certificate is not taken for another adapter's."""
    base_fingerprint: str | None

    def write(self, folder: Path) -> Path:
        """Write it into the adapter's `folder`, beside the card."""
        content: dict[str, Any] = {"format": _FORMAT, **asdict(self)}
        content["checksum"] = _checksum(content)
        path = folder / CERTIFICATE
        with written_beside(path) as staged:
            staged.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path

    def compare(self, measured: Sequence[Mapping[int, float]]) -> Distances:
        """How far `measured` is from the certificate: for each prompt, token -> log-probability of the best tokens."""
        to_adapter = to_base = along = whole = moved = 0.0
        for prompt, got in zip(self.prompts, measured, strict=True):
            least = min(got.values(), default=0.0)
            for c in prompt.best:
                weight, size = math.exp(max(c.base, c.adapter)), c.adapter - c.base
                off = _beyond(c.adapter, got.get(c.id), least)
                to_adapter += weight * off**2
                to_base += weight * _beyond(c.base, got.get(c.id), least) ** 2
                along += weight * (off + size) * size
                moved += weight * (off + size) ** 2
                whole += weight * size**2
        cosine = along / math.sqrt(moved * whole) if moved else 0.0
        return Distances(math.sqrt(to_adapter / whole), math.sqrt(to_base / whole), along / whole, cosine)


def _beyond(known: float, here: float | None, least: float) -> float:
    """How much the log-probability `here` is above `known`. A token that a server does not name (None) is at most as
    likely as the least of those that it names."""
    if here is None:
        return 0.0 if known <= least else least - known
    return here - known


@dataclass(frozen=True)
class Distances:
    """How far a server's answers lie from those in a certificate, relative to the distance of base and adapter.

    Each is the root of a mean of squares over the tokens of all prompts, weighted by their probability."""

    adapter: float
    base: float
    scale: float
    """The change from the base, as a multiple of the adapter's: its projection on that."""
    cosine: float

    @property
    def verdict(self) -> str:
        """ "same", "ignored", "scaled" (another scale, or a part of the adapter), or "another" adapter or base."""
        if self.adapter <= SAME:
            return "same"
        if self.base <= SAME:
            return "ignored"
        return "scaled" if self.cosine >= 0.9 else "another"


def read_certificate(adapter: str | os.PathLike[str]) -> Certificate:
    """The certificate in an adapter's folder.

    Raises AdapterFormatError if there is none, or if it is damaged or another adapter's; BaseMismatchError if it is one
    for another base.
    """
    folder = Path(adapter)
    check_folder(folder)
    path = folder / CERTIFICATE
    make = "lightning-lora verify adapter=... model=... make=true makes it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        said, known = content.pop("checksum"), content["format"]
        if known != _FORMAT:
            raise AdapterFormatError(f"{path} is of format {known}, and this version reads format {_FORMAT}: {make}.")
        is_whole = said == _checksum(content)
        prompts = tuple(
            Prompt(p["text"], tuple(p["ids"]), tuple(Candidate(**c) for c in p["best"])) for p in content["prompts"]
        )
        found = Certificate(prompts, content["adapter"], content["base_fingerprint"])
    except FileNotFoundError as error:
        raise AdapterFormatError(f"There is no {CERTIFICATE} in {folder}: {make}.") from error
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise AdapterFormatError(f"{path} is no certificate, or is damaged ({error}): {make} again.") from error
    if not is_whole or not prompts:
        raise AdapterFormatError(
            f"{path} is damaged or was edited: its checksum is not that of its content: {make} again."
        )
    with open_tensors(folder) as file:
        theirs = file.header.note.get("base_fingerprint")
    if theirs is not None and found.base_fingerprint is not None and theirs != found.base_fingerprint:
        raise BaseMismatchError(
            f"{path} is for a base with the fingerprint {found.base_fingerprint}, and the adapter was trained on one "
            f"with {theirs}: {make} on that base."
        )
    if found.adapter != adapter_hash(folder):
        raise AdapterFormatError(f"{path} is the certificate of another adapter, or of an earlier one: {make} again.")
    return found


def adapter_hash(folder: Path) -> str:
    """A hash of an adapter's tensors and config, without the name of its base: a push leaves out one that is a path."""
    config = {k: v for k, v in read_config(folder).items() if k not in ("base_model_name_or_path", "revision")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in (TENSORS, "adapters.safetensors"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    return digest.hexdigest()[:32]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
