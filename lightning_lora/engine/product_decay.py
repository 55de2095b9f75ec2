"""Weight decay on the product s B A, not on A and B by themselves, of which one can grow while the other shrinks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_lora.checked import number
from lightning_lora.engine.layers import Pair, pairs
from lightning_lora.engine.optim import check_hooks, replace_hooks, with_inner
from lightning_lora.errors import TrainingError


def product_decay(optimizer: Optimizer, model: nn.Module, strength: float) -> None:
    """Shrink every update after each step of `optimizer`: A and B take a step down the gradient of 1/2 ||s B A||_F^2,
    of size `strength` times their group's learning rate.

    The decay is decoupled from the loss's gradient and its moments, as AdamW's is (Loshchilov and Hutter 2019,
    arXiv:1711.05101, section 2); but AdamW's decays A and B, not their product. With a frozen start, s (B A - B0 A0)
    shrinks. Raises ConfigError for a strength that is not a finite number above 0, TrainingError for LBFGS, whose step
    is a search along a line.
    """
    number("product_decay", strength, above=0)
    innermost = [one for one in with_inner(optimizer) if len(with_inner(one)) == 1]
    for one in innermost:
        if isinstance(one, LBFGS):
            raise TrainingError(
                "product_decay cannot be used with LBFGS: a decay after its line search would undo the search. Use "
                "another optimizer, or leave product_decay out."
            )
        check_hooks(one, "product_decay, which runs after each step, cannot be used with it.")
    own = list(pairs(model))

    def decay(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        for pair in own:
            held = [p for p in (pair.A, pair.B) if id(p) in rates and p.requires_grad]
            if not held:
                continue
            with torch.enable_grad(), torch.autocast(pair.B.device.type, enabled=False):
                gradients = torch.autograd.grad(half_square(pair), held)
            with torch.no_grad():
                for p, g in zip(held, gradients):
                    p.sub_(g * (rates[id(p)] * strength))

    for one in innermost:  # the user of SAM may take the two halves of a step by hand, past the outer step's hooks
        replace_hooks(one, "product_decay", one.register_step_post_hook(decay))


def half_square(pair: Pair) -> Tensor:
    """1/2 ||s B A||_F^2, as a sum over (B^T B) * (A A^T). These matrices are (rank, rank): no matrix of the weight's
    size is made, here or in the gradients s^2 (B^T B) A and s^2 B (A A^T)."""
    A, B = pair.module.matrices(pair.parameter)
    return pair.spec.scale**2 / 2 * ((B.mT @ B) * (A @ A.mT)).sum()
