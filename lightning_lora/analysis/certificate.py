"""Asks a model for the certificate of its adapter (format/certificate.py).

The prompts are common English words, chosen by SHA-256, so there is nothing of anybody's data in it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import disabled
from lightning_lora.engine.calibration import evaluating
from lightning_lora.errors import AdapterStateError, ConfigError
from lightning_lora.format.certificate import BEST, Candidate, Certificate, Prompt, adapter_hash
from lightning_lora.format.folder import open_tensors
from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.verify import verify_adapter

PROMPTS = 8
"""Eight were right in 60 of 60 draws, for every fault that was tried; four in 98 %, two in 82 %."""
_LEAST = 0.2
"""The least change of log-probabilities that is certified. Rounding to bfloat16 changes those of small models by 0.01
to 0.02, which is then a tenth of the adapter's effect, and half of SAME."""
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


def prompt_texts() -> list[str]:
    """The prompts: eight words each, and a question mark.

    >>> from lightning_lora.analysis.certificate import prompt_texts
    >>> prompt_texts() == prompt_texts(), len(prompt_texts()[0].split())
    (True, 8)
    """

    def word(prompt: int, place: int) -> str:
        number = int.from_bytes(hashlib.sha256(f"{prompt}:{place}".encode()).digest()[:4], "big")
        return WORDS[number % len(WORDS)]

    return [" ".join(word(prompt, place) for place in range(8)) + "?" for prompt in range(PROMPTS)]


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
