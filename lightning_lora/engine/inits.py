"""How a fresh adapter starts: a table of functions, each of which fills the factor that reads the input.

The other factor starts at zero, so the adapted model starts exactly equal to its base. For an embedding the roles are
swapped, as in the reference code: its A, which is a table of rows that are looked up, is zero and its B is Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

Init = Callable[[Tensor], object]
INITS: dict[str, Init] = {}


def init(function: Init) -> Init:
    """Register `function(A)`, which fills A (rank, in, ...) in place, under its own name."""
    INITS[function.__name__] = function
    return function


@init
def kaiming(A: Tensor) -> None:
    """Uniform in +-1 / sqrt(fan_in), the reference implementation's start (github.com/microsoft/LoRA)."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))


@init
def gaussian(A: Tensor) -> None:
    """Normal (Hu et al. 2021, section 4.1), with PEFT's standard deviation of 1 / rank."""
    nn.init.normal_(A, std=1.0 / A.shape[0])
