"""A gradient for layers whose kernels pass none to their input: 4-bit weights that bitsandbytes has rearranged for a
CPU, and torchao's weights that round the input as well (Int8DynamicActivation..., for example).

Without it, adapters below such a layer would silently train on a part of their gradient. The input gets the gradient
of a layer that rounds nothing: G W, with the dequantized W (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.storage import can_be_dense, dense


def straight_through(module: nn.Module, x: Tensor, forward: Callable[[], Tensor]) -> Tensor:
    """Run `forward`, that of `module` on x, and supply the gradients of x and of the bias that it does not pass."""
    weight = module._parameters.get("weight")
    bias: Any = module._parameters.get("bias")
    is_trained = bias is not None and bias.requires_grad
    if not torch.is_grad_enabled() or not (x.requires_grad or is_trained):
        return forward()
    if is_trained:  # detached, so that y.requires_grad tells whether x gets a gradient
        module._parameters["bias"] = bias.detach()
    try:
        y = forward()
    finally:
        if is_trained:
            module._parameters["bias"] = bias
    if x.requires_grad and not y.requires_grad and can_be_dense(weight):
        y = _StraightThrough.apply(y, x, module, weight)
    return y + (bias - bias.detach()).to(y.dtype) if is_trained else y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
        ctx.module, ctx.weight = module, weight
        # y in the same memory, but not as a view: autograd refuses to change a view in place (nn.ReLU(inplace=True)).
        if torch.compiler.is_compiling():
            return y.clone()
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor, None, None]:
        return None, G @ dense(ctx.module, ctx.weight).to(G.dtype), None, None
