"""Bits per byte of text under a causal language model: how well it predicts the text, whatever its tokenizer is."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.calibration import evaluating
from lightning_lora.engine.layers import adapters
from lightning_lora.errors import ConfigError

ROWS = 8
"""The most windows in one forward."""


class ScoredTexts:
    """Texts as tokens for one causal language model; `bits_per_byte()` says how well it predicts them at present.

    That is the sum of -log2 p over the predicted tokens, divided by the number of UTF-8 bytes that these tokens stand
    for. Each text is cut into windows, which begin without what came before. Where the tokenizer has a BOS token, each
    window starts with it, so every token of a text is predicted and every byte counts. Where it has none, the first
    token of each window is not predicted, and its bytes do not count. Special tokens that a tokenizer adds by itself
    are left out.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_tokens: int = 1024) -> None:
        """
        Args:
            model: A causal language model, or a module that holds one: the outermost part whose forward takes
                `input_ids` and gives logits (rows, tokens, vocabulary), as models of transformers do.
            tokenizer: Its tokenizer, as transformers has them.
            texts: The texts.
            max_tokens: The length of a window, or less where the model reads fewer tokens.

        Raises:
            ConfigError: The model or the tokenizer cannot do this.
        """
        if not callable(tokenizer):
            raise ConfigError(
                f"Text needs a tokenizer, and {type(model).__name__} has none as `tokenizer`: give one as tokenizer=."
            )
        self.network: Any = None
        self._windows: list[Tensor] = []
        self.bytes = 0
        """The number of bytes that are predicted."""
        problems: list[str] = []
        for network in _candidates(model):
            most = min(max_tokens, context_of(getattr(network, "config", None)) or max_tokens)
            self._windows, self.bytes = _windows(tokenizer, texts, most)
            if not self.bytes:
                raise ConfigError("The texts have no token that a model could predict: give longer ones.")
            self.network = network
            if (found := self._problem()) is None:
                return
            problems.append(found)
        problem = next(iter(problems), f"no part of {type(model).__name__} has a forward with `input_ids`")
        raise ConfigError(f"Bits per byte need a causal language model: {problem}.")

    @torch.no_grad()
    def bits_per_byte(self) -> float:
        """The bits per byte, with the adapters of the model as they are used now. Modes are as before afterwards."""
        nats = 0.0
        with evaluating(self.network):
            for ids in self._windows:
                logits = self._logits(ids)
                ids = ids.to(logits.device)
                each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
                nats += float(each.double().sum())
        return nats / math.log(2) / self.bytes

    def _logits(self, ids: Tensor) -> Tensor:
        network = self.network
        weight = next(network.parameters(), None)
        options = {"use_cache": False} if "use_cache" in inspect.signature(network.forward).parameters else {}
        output = network(input_ids=ids if weight is None else ids.to(weight.device), **options)
        logits: Any = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if isinstance(output, Mapping):
            logits = output.get("logits")
        if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape or logits.shape[-1] <= int(ids.max()):
            raise _NoLogitsError(f"{type(network).__name__} gives no logits (rows, tokens, vocabulary) for input_ids")
        return logits

    @torch.no_grad()
    def _problem(self) -> str | None:
        """Why the network is none that predicts each token from those before it; None if it does."""
        ids = max(self._windows, key=lambda rows: rows.shape[1])[:1]
        other = ids.clone()
        other[0, -1] = ids[0, ids[0] != ids[0, -1]][0] if bool((ids != ids[0, -1]).any()) else (ids[0, -1] + 1) % 2
        name = type(self.network).__name__
        try:
            with evaluating(self.network):
                logits, after = (self._logits(rows)[0, :-1].float() for rows in (ids, other))
        except _NoLogitsError as error:
            return str(error)
        except (TypeError, ValueError, IndexError) as error:  # it asks for more, or does not know the tokens
            return f"{name} fails on the tokens as its input_ids alone ({error})"
        if float((after - logits).abs().max()) > 0.03 * float(logits.std()):
            return f"{name} sees the tokens after a place, so it does not predict them"
        return None


class _NoLogitsError(Exception):
    """It never leaves this file."""


def _candidates(model: nn.Module) -> Iterator[nn.Module]:
    """The parts of `model` whose forward takes `input_ids`, from the outside in; in an adapted model, those that are
    adapted."""
    is_adapted = next(adapters(model), None) is not None
    for _, module in sorted(model.named_modules(), key=lambda item: item[0].count(".") + bool(item[0])):
        takes = "input_ids" in inspect.signature(module.forward).parameters
        if takes and (not is_adapted or next(adapters(module), None) is not None):
            yield module


def _windows(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[list[Tensor], int]:
    """The windows as rows of tokens, those of one length together; and the number of bytes that are predicted."""
    start: int | None = getattr(tokenizer, "bos_token_id", None)
    alike: dict[int, list[list[int]]] = defaultdict(list)
    count = 0
    for text in texts:
        ids, ends = _encoded(tokenizer, text, has_start=start is not None)
        step = length if start is None else length - 1
        for at in range(0, len(ids), step):
            piece = ids[at : at + step]
            if start is None:
                count += len(text[ends[at] : ends[at + len(piece) - 1]].encode())
            row = piece if start is None else [start, *piece]
            if len(row) > 1:
                alike[len(row)].append(row)
        count += 0 if start is None else len(text.encode())
    return [torch.tensor(rows[i : i + ROWS]) for rows in alike.values() for i in range(0, len(rows), ROWS)], count


def _encoded(tokenizer: Any, text: str, *, has_start: bool) -> tuple[list[int], list[int]]:
    """The tokens of `text`, and, without a start token, the place in it at which each of them ends."""
    options = {"add_special_tokens": False, "verbose": False}
    try:
        encoded = tokenizer(text, **options, **({} if has_start else {"return_offsets_mapping": True}))
    except NotImplementedError as error:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no BOS token and does not say where its tokens end, so the bytes that are "
            "predicted cannot be counted: use the fast tokenizer of this model (AutoTokenizer gives it)."
        ) from error
    ids: list[int] = list(encoded["input_ids"])
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids:
        raise ConfigError(
            f"{type(tokenizer).__name__} has no token for some characters of the text {text[:40]!r}..., whose bytes "
            "would count although they are not predicted: give texts in the language of the model."
        )
    return ids, [] if has_start else [end for _, end in encoded["offset_mapping"]]


def context_of(config: Any) -> int | None:
    """The number of positions that a model of transformers has, or to which its rotary embedding was scaled; None if
    its config has none."""
    if not hasattr(config, "get_text_config"):
        return None
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    scaled = int((rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 1))
    return max(getattr(config, "max_position_embeddings", None) or 0, scaled) or None
