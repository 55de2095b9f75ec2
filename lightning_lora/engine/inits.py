"""How a fresh adapter starts: a table of functions.

A function asks for what it needs by the names of its parameters, and returns A alone (B is then zero), or both:

    rank, scale, d_in, d_out    numbers; the layer's weight is a matrix W (d_out, d_in)
    W                           that matrix, in float32
    C                           the second moment of the layer's inputs, mean of x x^T, (d_in, d_in)
    G                           the mean gradient of the loss with respect to W, (d_out, d_in)

C and G are measured on the run's own data. Everything is in float32 on the layer's device; what is drawn is drawn
there. Where B A is not zero, the adapter keeps the pair that it started with and leaves it out of its update,
s (B A - B0 A0) x: so the adapted model starts equal to its base whatever the function, and the base never changes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MEASURED = frozenset("CG")
"""What is measured on data."""


@dataclass(frozen=True)
class Factors:
    """A (rank, d_in) and B (d_out, rank)."""

    A: Tensor
    B: Tensor


Function = Callable[..., Tensor | Factors]


@dataclass(frozen=True)
class Init:
    """An initialiser, and what it asks for."""

    function: Function
    wants: frozenset[str]

    @property
    def measures(self) -> frozenset[str]:
        """What it needs that is measured on data."""
        return self.wants & MEASURED


INITS: dict[str, Init] = {}


def init(function: Function) -> Function:
    """Register `function` under its own name, as a choice for LoRAConfig's `init`."""
    INITS[function.__name__] = Init(function, frozenset(inspect.signature(function).parameters))
    return function


@init
def kaiming(rank: int, d_in: int) -> Tensor:
    """Uniform in +-1 / sqrt(d_in), the reference implementation's start (github.com/microsoft/LoRA)."""
    bound = 1 / math.sqrt(d_in)
    return torch.empty(rank, d_in).uniform_(-bound, bound)


@init
def gaussian(rank: int, d_in: int) -> Tensor:
    """Normal (Hu et al. 2021, section 4.1), with PEFT's standard deviation of 1 / rank."""
    return torch.randn(rank, d_in) / rank
