"""A certificate shows whether a server applies an adapter: a few prompts, and what base and adapter answer to them.

It keeps, for each prompt, the five likeliest next tokens of the base and of the adapter, with the log-probabilities
that both give to them: all that a server tells. The prompts are common English words, chosen by SHA-256, so there is
nothing of anybody's data in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import disabled
from lightning_lora.engine.calibration import evaluating
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, CheckpointError, ConfigError
from lightning_lora.files import written_beside
from lightning_lora.hub.format.layout import adapter_root
from lightning_lora.hub.format.reading import CERTIFICATE, TENSORS, check_folder, open_tensors, read_config

PROMPTS = 8
"""Eight were right in 60 of 60 draws, for every fault that was tried; four in 98 %, two in 82 %."""
BEST = 5
SAME = 0.2
"""A server whose distance is at most this applies the adapter: 4-bit bases come to 0.15, the least fault to 0.26."""
_LEAST = 0.2
"""The least change of log-probabilities that is certified. Rounding to bfloat16 changes those of small models by 0.01
to 0.02, which is then a tenth of the adapter's effect, and half of SAME."""
_FORMAT = 1

WORDS = re.findall(
    r"\w+",
    """
time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education foot boy age policy process music market sense nation plan college interest death experience effect use
class control care field development role effort rate heart drug show leader light voice wife whole police mind price
report decision son view relationship town road arm difference value building action season society tax director
position player record paper space ground form event official matter center couple site project activity star table
need court american oil situation cost industry figure street image phone data picture practice piece land product
doctor wall patient worker news test movie north love support technology step baby computer type attention film tree
source hair look window culture chance brother energy period course summer plant opportunity term letter condition
choice rule daughter south husband floor campaign material population call economy hospital church risk fire future
bank garden river green small large early quick bright simple strong quiet
winter spring autumn weather cloud rain snow stone island mountain valley ocean beach forest farm animal bird horse dog
cat bread milk coffee sugar salt apple orange kitchen dinner lunch breakfast glass bottle box paint wood metal gold
silver engine wheel bridge train ship plane map pencil song dance lamp chair clock
""",
)


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


def make_certificate(model: nn.Module, tokenizer: Any, adapter: str | os.PathLike[str]) -> Certificate:
    """Ask a causal language model of transformers for the certificate of its adapter.

    Args:
        model: The model, into which the adapter in that folder was loaded. In float32 the certificate is most exact.
        tokenizer: Its tokenizer, whose chat template the prompts get, if it has one.
        adapter: The adapter's folder.

    Returns:
        The certificate; `write(folder)` keeps it beside the adapter's card.

    Raises:
        AdapterStateError: The model does not apply the adapter (`verify_adapter`), or hardly changes its answers by it.
        ConfigError: The model gives no logits for tokens.
    """
    from lightning_lora.hub.verify import verify_adapter

    folder = Path(adapter)
    verify_adapter(model, folder).raise_for_verdict()
    root: Any = adapter_root(model)[1]
    prompts = []
    with evaluating(model):
        for text in prompt_texts():
            ids = _tokens(tokenizer, text)
            after = _next(root, ids)
            with disabled(model):
                before = _next(root, ids)
            chosen = dict.fromkeys([*after.topk(BEST).indices.tolist(), *before.topk(BEST).indices.tolist()])
            start = tokenizer.decode(ids)
            best = [
                Candidate(
                    id=i,
                    text=tokenizer.decode([*ids, i]).removeprefix(start),
                    piece=str(tokenizer.convert_ids_to_tokens(i)),
                    base=round(float(before[i]), 5),
                    adapter=round(float(after[i]), 5),
                )
                for i in chosen
            ]
            prompts.append(Prompt(text, tuple(ids), tuple(best)))
    effect = math.sqrt(
        sum(math.exp(max(c.base, c.adapter)) * (c.adapter - c.base) ** 2 for p in prompts for c in p.best)
        / len(prompts)
    )
    if effect < _LEAST:
        raise AdapterStateError(
            f"The adapter in {folder} changes the log-probabilities of the prompts' next tokens by {effect:.2g} alone: "
            "no server's answers would show whether it is applied. verify_adapter can check it in a model."
        )
    with open_tensors(folder) as file:
        fingerprint = file.header.note.get("base_fingerprint")
    return Certificate(tuple(prompts), adapter_hash(folder), fingerprint)


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


def prompt_texts(count: int = PROMPTS) -> list[str]:
    """The prompts: eight words each, and a question mark.

    >>> from lightning_lora.hub.certificate import prompt_texts
    >>> prompt_texts() == prompt_texts(), len(prompt_texts()[0].split())
    (True, 8)
    """

    def word(prompt: int, place: int) -> str:
        number = int.from_bytes(hashlib.sha256(f"{prompt}:{place}".encode()).digest()[:4], "big")
        return WORDS[number % len(WORDS)]

    return [" ".join(word(prompt, place) for place in range(8)) + "?" for prompt in range(count)]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text}]
        found = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    else:
        found = tokenizer(text)["input_ids"]
    return [int(i) for i in found]


@torch.no_grad()
def _next(model: Any, ids: Sequence[int]) -> Tensor:
    """(vocabulary,): the log-probabilities of the token after `ids`."""
    device = next(model.parameters()).device
    output = model(input_ids=torch.tensor([list(ids)], device=device))
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != len(ids):
        raise ConfigError(f"{type(model).__name__} gives no logits for each token: a certificate is for causal models.")
    return logits[0, -1].float().log_softmax(-1).cpu()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
