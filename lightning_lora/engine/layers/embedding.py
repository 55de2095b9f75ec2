"""nn.Embedding: the same indices are looked up in A, and B maps what is found to the embedding's width."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.layers.base import Adapter, has_own_forward
from lightning_lora.engine.layers.pair import AdapterSpec
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
