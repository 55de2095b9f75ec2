"""nn.Embedding: the same indices are looked up in A, and B maps what is found to the embedding's width; and single
rows that are trained themselves."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.forwards import begins_as_an_input
from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers.base import NOT_GIVEN, Adapter, has_own_forward
from lightning_lora.engine.layers.cell import NOT_HIDDEN, Cell, Copied, Factors, OwnAdapters, copy_scaled
from lightning_lora.engine.layers.pair import AdapterSpec, Pair
from lightning_lora.engine.weights import fill, is_own, whole
from lightning_lora.errors import TargetError


class EmbeddingLoRA(Adapter, adapts=nn.Embedding):
    """A is (rank, vocabulary), B is (width, rank); the weight's change is the transpose of B A.

    There is no dropout, as in the reference code: indices cannot be dropped.
    """

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        if has_own_forward(type(module)) and not gives_its_rows(module):
            raise TargetError(
                "its class has a forward of its own, which does not return the rows of its input, or those times "
                "embed_scale (learned positions in transformers, for example): leave it out with exclude_modules, or "
                "adapt its parameter instead, with target_parameters=['<its name>.weight']"
            )
        if module.max_norm is not None:
            raise TargetError(
                "an embedding with max_norm rewrites its weight in every forward, so it cannot stay frozen: "
                "leave it out with exclude_modules"
            )

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        if config.lora_bias:
            raise TargetError("lora_bias has no meaning for an embedding, which has no bias: leave one of the two out")
        if INITS[config.init].reads("inputs", "gradients"):
            raise TargetError(
                f"init={config.init!r} measures layers that multiply their input, and an embedding looks up indices: "
                "leave it out with exclude_modules"
            )

    @staticmethod
    def shapes(module: nn.Embedding, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.num_embeddings), (module.embedding_dim, rank)

    # As in the reference code and PEFT, A starts at zero here, and B is drawn.
    draws_b = True

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        return W.T

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.T

    def update(self, x: Tensor) -> Tensor:  # (...) of indices -> (..., width)
        base: Any = self
        A, B = self.factors()
        found = F.embedding(x, A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        update = F.linear(found, B)
        return scaled(update, self)


class EmbeddingCell(Cell, serves=EmbeddingLoRA):
    """nn.Embedding. A is stored transposed, as the base's table is: (vocabulary, rank)."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        size: int = self.geometry.shapes(self.module, rank)[0][1]
        return (size, rank), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() > 0

    def has_rows_first(self, x: Tensor, count: int) -> bool:
        shape = x.shape
        if not shape or shape[0] != count:
            return False
        return count == 1 or (self.hidden is NOT_HIDDEN and len(shape) > 1 and count not in shape[1:])

    def doubt(self, x: Tensor) -> str | None:
        # A learned table of positions gets (positions,), one of relative positions gets (positions, positions).
        is_clear = x.dim() > 1 and x.shape[0] not in x.shape[1:]
        if is_clear or begins_as_an_input(x, self.module, self.served):
            return None
        return (
            "a learned table of positions gets inputs of that shape, too, and the model was not called with this "
            "tensor itself. If it holds one entry for each row, say so with bank.rows_inside for this layer."
        )

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        self.A[slot, :, : A.shape[0]].copy_(A.T)
        copy_scaled(self.B[slot, : A.shape[0]], B.T, scale)

    def one(self, slot: int, rank: int) -> Factors:
        return self.A[slot, :, :rank], self.B[slot, :rank]

    def many(self, index: Tensor, rank: int, copied: Copied) -> Factors:
        return (copied(self.B[:, :rank], index),)  # add_rows reads only those rows of A that it looks up

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        A, B = factors
        return base + self._scaled(F.embedding(x, A) @ B)

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        (B,) = rows.factors(self, base.dtype)
        ids = x.reshape(rows.count, -1)
        found = self.A[rows.index[:, None], ids, : B.shape[1]].to(B.dtype)  # (rows, positions, rank)
        return base + self._scaled(torch.bmm(found, B)).view(base.shape)

    def _scaled(self, update: Tensor) -> Tensor:
        factor = getattr(self.module, "embed_scale", None)
        return update if factor is None else (update * factor).to(update.dtype)

    def _whole(self, slot: int) -> tuple[Tensor, Tensor]:
        return self.A[slot].T, self.B[slot]


def scaled(found: Tensor, module: Any) -> Tensor:
    """`found`, the rows that were looked up, times embed_scale where the class of the adapted `module` does so:
    transformers' scaled embeddings (Gemma, BART)."""
    is_scaled = hasattr(module, "embed_scale") and has_own_forward(type(module).base_class)
    return found * module.embed_scale if is_scaled else found


def gives_its_rows(module: Any) -> bool:
    """True if the class's own forward returns the rows of the input, times embed_scale if there is one: tried with a
    small table."""
    if module._parameters["weight"].is_meta:
        return hasattr(module, "embed_scale")  # on the meta device nothing can be tried
    tried = copy.copy(module)
    device = module._parameters["weight"].device
    table = torch.randn(5, module.embedding_dim, generator=torch.Generator().manual_seed(0)).to(device)
    tried._parameters = {**module._parameters, "weight": nn.Parameter(table, requires_grad=False)}
    vars(tried).update(num_embeddings=5, padding_idx=None, max_norm=None)
    x = torch.tensor([[3, 1, 3], [0, 4, 2]], device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            given = type(module).forward(tried, x)
            expected = table[x] * (module.embed_scale if hasattr(module, "embed_scale") else 1.0)
        except Exception:  # it takes more than indices
            return False
    return isinstance(given, Tensor) and given.shape == expected.shape and torch.allclose(given, expected, rtol=1e-3)


class EmbeddingBagLoRA(EmbeddingLoRA, adapts=nn.EmbeddingBag):
    """A's rows are summed or averaged as the base's are, and B maps the bag to the embedding's width."""

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        if module.mode == "max":
            raise TargetError(
                "with mode 'max' an update cannot be added to its output: use mode 'sum' or 'mean', or adapt its "
                "parameter instead, with target_parameters=['<its name>.weight']"
            )
        if has_own_forward(type(module)):
            raise TargetError(
                "its class has a forward of its own, so its input need not be the indices that it looks up: leave it "
                "out with exclude_modules"
            )
        super().check(module, spec)

    def forward(  # type: ignore[override]
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        base = self.base_forward(input, offsets, per_sample_weights)
        return self.combine(base, self.update(input, offsets, per_sample_weights))

    def update(self, x: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        base: Any = self
        A, B = self.factors()
        found = F.embedding_bag(
            x,
            A.T,
            offsets,
            scale_grad_by_freq=base.scale_grad_by_freq,
            mode=base.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=base.include_last_offset,
            padding_idx=base.padding_idx,
        )
        return F.linear(found, B)


# Trains single rows of an embedding, such as those of new tokens; the rest of the table stays frozen.

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
