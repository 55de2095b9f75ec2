"""nn.MultiheadAttention: its input projections are parameters of its own, its output projection is a child."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_lora.engine.layers.parameters import ParameterLoRA


class MultiheadAttentionLoRA(ParameterLoRA, adapts=nn.MultiheadAttention):
    """The packed in_proj_weight (3 embed, embed), as one update in which q, k and v share A; or, where kdim or vdim
    make them differ, q_proj_weight, k_proj_weight and v_proj_weight; and out_proj. PEFT does so with the packed one."""

    companions = ("out_proj",)
    lora_to_kernels = True

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        if module._qkv_same_embed_dim:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")
