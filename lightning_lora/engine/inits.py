"""How a fresh adapter starts: a table of functions.

To add one is to write one function here, or anywhere, under `@init`; its name is then a choice for LoRAConfig's `init`:

    @init
    def tiny(rank: int, d_in: int) -> Tensor:
        return torch.randn(rank, d_in) / 1000

A function asks for what it needs by the names of its parameters:

    rank, scale, d_in, d_out    numbers; the layer's weight is a matrix W (d_out, d_in)
    W                           that matrix, in float32
    C                           the second moment of the layer's inputs, mean of x x^T, (d_in, d_in)
    G                           the mean gradient of the loss with respect to W, (d_out, d_in)
    E                           what quantization took from W: the original less what is there, (d_out, d_in)

C and G are measured on the run's own data, E on the weights that the base was made from (see `calibration`). All is in
float32 on the layer's device; what is drawn is drawn there. What a function returns, its annotation says:

    Tensor                      A; B is zero (in an embedding it is A that is zero, and B drawn, as in PEFT)
    Factors                     A and B. The adapter keeps them frozen beside the pair that it trains, and leaves them
                                out of its update, s (B A - B0 A0) x: the adapted model starts equal to its base bit for
                                bit, and the base never changes
    Whole                       A and B, of which the update leaves out nothing: B A is zero, or it is meant

Where W has fewer ranks to give than were asked for, a function returns the factors of those, and the others start as
Kaiming's do.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError, listed

MEASURED = frozenset("CGE")
"""What is no property of the model: it is measured before the adapters are made."""
KNOWN = frozenset(("rank", "scale", "d_in", "d_out", "W")) | MEASURED


@dataclass(frozen=True)
class Factors:
    """A (rank, d_in) and B (d_out, rank), whose product is left out of the update."""

    A: Tensor
    B: Tensor


class Whole(Factors):
    """A and B whose product is part of the update from the start."""


Function = Callable[..., Tensor | Factors]


@dataclass(frozen=True)
class Init:
    """An initialiser, and what it asks for."""

    function: Function
    wants: frozenset[str]
    rank_multiple: int = 1
    """Ranks are multiples of it."""

    @property
    def measures(self) -> frozenset[str]:
        """What it needs that is measured."""
        return self.wants & MEASURED

    @property
    def computes(self) -> bool:
        """Whether it does more than draw: then there is time to save where tensors are loaded right after."""
        return bool(self.wants & (MEASURED | {"W"}))

    @functools.cached_property
    def gives(self) -> str:
        """What it returns: "Tensor", "Factors" or "Whole"."""
        annotation = inspect.signature(self.function).return_annotation
        name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        return name.rpartition(".")[2]


INITS: dict[str, Init] = {}


def init(function: Function | None = None, *, rank_multiple: int = 1, replace: bool = False) -> Any:
    """Register a function under its own name, as a choice for LoRAConfig's `init`; ranks are multiples of
    `rank_multiple`.

    A name that another module has registered is taken, such as those below, unless `replace` says that the new
    function is meant in its place. A module, or a notebook, may register a name of its own again.

    Raises ConfigError where the name is taken, a parameter is none of those above, or the annotation does not say what
    is returned.
    """
    if function is None:
        return functools.partial(init, rank_multiple=rank_multiple, replace=replace)
    there = INITS.get(function.__name__)
    is_taken = there is not None and there.function.__name__ == function.__name__  # not an alias set by hand
    if there is not None and is_taken and there.function.__module__ != function.__module__ and not replace:
        raise ConfigError(
            f"There is an initialiser {function.__name__!r} already, of {there.function.__module__}. Give yours "
            "another name, or put it in that one's place for every adapter to come: @init(replace=True)."
        )
    made = Init(function, frozenset(inspect.signature(function).parameters), rank_multiple)
    unknown = sorted(made.wants - KNOWN)
    if unknown:
        raise ConfigError(
            f"The initialiser {function.__name__!r} asks for {listed(unknown)}. There is: {listed(sorted(KNOWN), 99)}."
        )
    if made.gives not in ("Tensor", "Factors", "Whole"):
        raise ConfigError(
            f"The initialiser {function.__name__!r} has to say what it returns: -> Tensor (A alone), -> Factors, or "
            "-> Whole."
        )
    INITS[function.__name__] = made
    return function


# Drawn.


@init
def kaiming(rank: int, d_in: int) -> Tensor:
    """Uniform in +-1 / sqrt(d_in), the reference implementation's start (github.com/microsoft/LoRA)."""
    bound = 1 / math.sqrt(max(d_in, 1))  # a layer may read nothing
    return torch.empty(rank, d_in).uniform_(-bound, bound)


@init
def gaussian(rank: int, d_in: int) -> Tensor:
    """Normal (Hu et al. 2021, section 4.1), with PEFT's standard deviation of 1 / rank."""
    return torch.randn(rank, d_in) / rank


@init(rank_multiple=2)
def orthogonal(rank: int, d_in: int, d_out: int) -> Whole:
    """B A = 0 with neither of them zero, so both learn from the first step on, as PEFT's "orthogonal" does.

    Of an orthogonal Q, the columns of A are combinations of one half of its rows, and the rows of B of the other half.
    """
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    A = (torch.randn(d_in, rank // 2) @ Q[0::2]).T / 10
    B = torch.randn(d_out, rank // 2) @ Q[1::2] / 10
    return Whole(A, B)


# Computed from the weight.


@init
def pissa(W: Tensor, rank: int, scale: float) -> Factors:
    """s B A is the best approximation of W of that rank (Meng et al. 2024, arXiv:2404.02948, section 3)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _shared(U, S, Vh, rank, scale)


@init
def pissa_fast(W: Tensor, rank: int, scale: float) -> Factors:
    """The same by a randomised SVD of four power iterations (arXiv:2404.02948, section 3; Halko et al. 2011)."""
    U, S, V = torch.svd_lowrank(W, q=min(rank + 8, *W.shape), niter=4)
    return _shared(U, S, V.T, rank, scale)


@init
def olora(W: Tensor, rank: int) -> Factors:
    """B is orthonormal, the first columns of Q in W = Q R, and A is the first rows of R (Büyükakyüz 2024,
    arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(W)
    return Factors(A=R[:rank], B=Q[:, :rank])


def _shared(U: Tensor, S: Tensor, Vh: Tensor, rank: int, scale: float) -> Factors:
    """The first `rank` singular directions, whose values A and B share evenly, with the scale taken out."""
    root = (S[:rank] / scale).sqrt()
    return Factors(A=root[:, None] * Vh[:rank], B=U[:, :rank] * root)


# Measured on data.


@init
def eva(C: Tensor, rank: int) -> Tensor:
    """A spans the directions in which the layer's inputs vary most: their first right singular vectors, which are the
    eigenvectors of their second moment (Paischer et al. 2024, arXiv:2410.07170, section 3)."""
    _, vectors = torch.linalg.eigh(C)
    return vectors.flip(1)[:, :rank].T


@init
def corda(W: Tensor, C: Tensor, rank: int, scale: float) -> Factors:
    """The directions of W that the data use most: with W C = U S V^T, s B A = U_r S_r V_r^T C^-1, the first r (Yang et
    al. 2024, arXiv:2406.05223, section 3, "instruction-previewed"): to learn the task of the data."""
    U, S, Vh = _oriented(W, C)
    return _shared(U, S, Vh, rank, scale)


@init
def corda_preserving(W: Tensor, C: Tensor, rank: int, scale: float) -> Factors:
    """The same with the last r, which the data use least (arXiv:2406.05223, section 3, "knowledge-preserved"): to
    learn something else, and keep what the data ask for."""
    U, S, Vh = _oriented(W, C)
    return _shared(U.flip(1), S.flip(0), Vh.flip(0), rank, scale)


def _oriented(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T C^-1 for W C = U S V^T. C gets so much more on its diagonal that its inverse is one."""
    identity = torch.eye(C.shape[0])
    more = 0.01 * C.diagonal().mean().clamp(min=torch.finfo(C.dtype).tiny)
    while True:
        regular = C + more * identity
        inverse = torch.linalg.inv(regular)
        if (regular @ inverse - identity).norm() < 0.05:
            break
        more = 2 * more
    U, S, Vh = torch.linalg.svd(W @ regular, full_matrices=False)
    return U, S, Vh @ inverse


@init
def lora_ga(G: Tensor, rank: int) -> Factors:
    """The first step changes B A along the best approximation of rank 2r of the gradient of W, as full fine-tuning
    would: from G = U S V^T, A takes the first r of V, and B the next r of U (Wang et al. 2024, arXiv:2407.05000,
    section 3). Both are larger by d_out^(1/4) / gamma^(1/2), with a gamma of 16, so that the output keeps its size as
    the layer grows wider (ibid., on the stability of scale)."""
    U, _, V = torch.svd_lowrank(G, q=min(4 * rank, *G.shape), niter=4)
    half = min(rank, U.shape[1] // 2)
    size = G.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return Factors(A=size * V[:, :half].T, B=size * U[:, half : 2 * half])


_GAMMA = 16.0


# Measured on what a quantized base was made from.


@init
def loftq(E: Tensor, rank: int, scale: float) -> Whole:
    """s B A is the best approximation of what quantization took away, so that the adapted model starts close to the one
    that was quantized (Li et al. 2023, arXiv:2310.08659, algorithm 1, with one step: the base stays as it is)."""
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    found = _shared(U, S, Vh, rank, scale)
    return Whole(found.A, found.B)
