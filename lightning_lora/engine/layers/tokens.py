"""Trains single rows of an embedding, such as those of new tokens; the rest of the table stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.layers.base import NOT_GIVEN, Adapter, has_own_forward
from lightning_lora.engine.layers.embedding import gives_its_rows, scaled
from lightning_lora.engine.layers.pair import AdapterSpec, Pair
from lightning_lora.engine.weights import fill, is_own, whole
from lightning_lora.errors import TargetError

TOKENS = "lora_tokens"
"""The name under which an embedding holds its trained rows."""


@dataclass(frozen=True, kw_only=True)
class TokenSpec(AdapterSpec):
    """The spec of a module that has trained rows."""

    tokens: tuple[int, ...]
    """Indices of the trained rows, in the order in which the adapter holds them."""
    owner: nn.Module | None = None
    """The embedding that holds the trained rows, if the module shares its weight; None for that embedding itself."""


class TokenRows(Adapter):
    """An embedding that takes its rows `tokens` from `lora_tokens`, which train (PEFT's trainable_token_indices).

    They replace the base's rows and are not added to them, so the values in the new rows of a resized embedding do not
    matter. A forward does not copy the table.
    """

    lora: TokenSpec
    lora_tokens: nn.Parameter
    lora_rows: Tensor
    lora_places: Tensor

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        assert isinstance(spec, TokenSpec)
        size = len(module.weight)
        if max(spec.tokens) >= size:
            raise TargetError(f"it has {size} rows, and no row {max(spec.tokens)}: resize the embeddings first")
        cls.check_forward(module)

    @classmethod
    def check_forward(cls, module: Any) -> None:
        """Raise TargetError if the forward of `module` is more than a lookup."""
        if module.max_norm is not None:
            raise TargetError("an embedding with max_norm rewrites its weight in every forward")
        if has_own_forward(type(module)) and not gives_its_rows(module):
            raise TargetError(
                "its class has a forward of its own, which does not return the rows of its input, or those times "
                "embed_scale"
            )

    def swapped_in(self) -> None:
        rows = torch.tensor(self.lora.tokens, device=self.dense_weight().device)
        places = rows.argsort()
        self.register_buffer("lora_rows", rows[places], persistent=False)
        self.register_buffer("lora_places", places, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_meta = self.lora_rows.is_meta
        super()._apply(fn, recurse)
        if was_meta:
            self.swapped_in()
        return self

    def swapped_out(self) -> None:
        del self.lora_rows, self.lora_places

    @property
    def tokens(self) -> Tensor:
        """The trained rows, in the order of the sorted `lora_rows`."""
        owner: Any = self if self.lora.owner is None else self.lora.owner
        rows: Tensor = owner.lora_tokens[self.lora_places]
        return rows

    def forward(self, input: Any = NOT_GIVEN, **kwargs: Any) -> Tensor:  # (...) of indices -> (..., width)
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        x, base = input, self.base_forward(input, **kwargs)
        rows = self.lora_rows.to(x.dtype)
        place = torch.searchsorted(rows, x).clamp(max=len(rows) - 1)
        found = scaled(F.embedding(place, self.tokens).to(base.dtype), self).to(base.dtype)
        return torch.where((rows[place] == x)[..., None], found, base)

    def value_read(self, name: str) -> Tensor:
        W = self.dense_weight()
        return W.index_copy(0, self.lora_rows, self.tokens.to(W.dtype))

    def shown_leaves(self) -> tuple[Tensor, ...]:
        owner: Any = self if self.lora.owner is None else self.lora.owner
        return (owner.lora_tokens,)

    def merged_parameters(self) -> dict[str, Tensor]:
        return {"weight": self.value_read("weight")}

    def shares_with(self, other: nn.Module) -> bool:
        mine = self if self.lora.owner is None else self.lora.owner
        return isinstance(other, TokenRows) and (other is mine or other.lora.owner is mine)

    def lora_pairs(self, name: str) -> tuple[Pair, ...]:
        return ()

    def extra_repr(self) -> str:
        return f"{type(self).base_class.extra_repr(self)}, {len(self.lora.tokens)} trained rows"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = self._parameters.get("lora_tokens")
        at = torch.tensor(self.lora.tokens, device=self.lora_rows.device)
        is_fresh = (
            own is not None and not own.is_meta and whole(own).equal(whole(self.dense_weight())[at].to(own.dtype))
        )
        of_base = own is not None and is_fresh and is_own(state_dict.get(prefix + "lora_tokens"), own)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if of_base:  # untrained rows, and a state dict of the base alone: start again from the loaded table
            fill(self._parameters["lora_tokens"], whole(self.dense_weight())[at])


class TokenLogits(TokenRows):
    """A head that shares the embedding's weight: it computes the logits of those tokens from the trained rows."""

    @classmethod
    def check_forward(cls, module: Any) -> None:
        if has_own_forward(type(module)):
            raise TargetError("its class has a forward of its own, so it may not return one number for each row")

    def forward(self, input: Any = NOT_GIVEN, **kwargs: Any) -> Tensor:  # (..., width) -> (..., vocabulary)
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        x, base = input, self.base_forward(input, **kwargs)
        bias = self._parameters.get("bias")
        logits = F.linear(x, self.tokens.to(x.dtype), None if bias is None else bias[self.lora_rows])
        return base.index_copy(-1, self.lora_rows, logits.to(base.dtype))
