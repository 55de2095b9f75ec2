"""nn.MultiheadAttention: its input projections are parameters of its own, its output projection is a child."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.engine.layers.parameters import ParameterLoRA


class MultiheadAttentionLoRA(ParameterLoRA, adapts=nn.MultiheadAttention):
    """Adapts the packed in_proj_weight (3 embed, embed) by one pair, so that q, k and v share A (as in PEFT); or, where
    kdim or vdim differ, each of q_proj_weight, k_proj_weight and v_proj_weight; and out_proj."""

    companions = ("out_proj",)
    lora_to_kernels = True

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        if module._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")
