"""Initialisers: a table of functions that make A and B for a new adapter.

To add one is to write one function here, or anywhere, under `@init`; its name is then a choice for LoRAConfig's `init`:

    @init
    def tiny(rank: int, d_in: int) -> Tensor:
        return torch.randn(rank, d_in) / 1000

A function asks for what it needs by the names of its parameters:

    rank, scale, d_in, d_out    numbers; the layer's weight is a matrix W (d_out, d_in)
    W                           that matrix, in float32
    C                           the second moment of the layer's inputs, mean of x x^T, (d_in, d_in)
    G                           the mean gradient of the loss with respect to W, (d_out, d_in)
    E                           the quantization error of W: the original weight less the dequantized, (d_out, d_in)

C, G and E are measures, which stand under `@measure` below; to add one is to write one more function. C and G are
measured on the run's own data, E on the weights from which the base was quantized (calibration.py runs them). Tensors
are in float32, and made and drawn on the layer's device. The annotation of a function says what it returns:

    Tensor                      A; B is zero (in an embedding A is zero and B is drawn, as in PEFT)
    Factors                     A and B. The adapter keeps frozen copies A0 and B0, and its update is
                                s (B A - B0 A0) x: so the adapted model starts equal to its base bit for bit, and the
                                base never changes
    Whole                       A and B whose product counts from the start: B A is zero, or meant to change the model

A function may return fewer ranks than were asked for, since W may have no more; the others then start as Kaiming's.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from lightning_lora.errors import ConfigError, listed

KNOWN = frozenset(("rank", "scale", "d_in", "d_out", "W"))
"""The parameters that a function may ask for, besides the names of measures."""
Function = TypeVar("Function", bound=Callable[..., Any])
Reads: TypeAlias = Literal["inputs", "gradients", "weights"]


@dataclass(frozen=True)
class Measure:
    """A registered measure: what is known of a layer before its adapter is made, if an initialiser asks for it."""

    function: Callable[..., Tensor]
    words: str
    """What it is, in words that follow "starts from"."""
    reads: Reads
    """What it is computed from."""


MEASURES: dict[str, Measure] = {}
_READS: dict[tuple[str, ...], Reads] = {
    ("X",): "inputs",
    ("gradient",): "gradients",
    ("original", "dequantized"): "weights",
}


def measure(words: str) -> Callable[[Function], Function]:
    """Register a function as a measure under its own name: initialisers may then ask for a parameter of that name.

    `words` say what it is in messages ("starts from ..."). The function returns a tensor for one layer, in float32. By
    its parameters it says what it is computed from:

        X                       input vectors of the layer, (n, d_in); the measure is the sum of what it returns, over
                                the number of vectors
        gradient                the gradient of one batch's loss with respect to W, (d_out, d_in); the measure is the
                                mean of what it returns over the batches
        original, dequantized   the weight that a quantized W was made from, and W, in the layer's own layout

    Raises ConfigError for other parameters, or if the name is taken by a measure of another module.
    """

    def register(function: Function) -> Function:
        name, there = function.__name__, MEASURES.get(function.__name__)
        if name in KNOWN or (there is not None and there.function.__module__ != function.__module__):
            raise ConfigError(f"There is something else that initialisers ask for by {name!r}: give it another name.")
        takes = tuple(inspect.signature(function).parameters)
        reads = _READS.get(takes)
        if reads is None:
            raise ConfigError(
                f"The measure {name!r} takes {listed(takes) or 'nothing'}. A measure takes X, or gradient, or original "
                "and dequantized."
            )
        MEASURES[name] = Measure(function, words, reads)
        return function

    return register


@measure("the inputs of each layer on some data")
def C(X: Tensor) -> Tensor:
    """The second moment of the inputs."""
    return X.T @ X


@measure("the gradients of each weight on some data")
def G(gradient: Tensor) -> Tensor:
    return gradient


@measure("the quantization errors of each weight")
def E(original: Tensor, dequantized: Tensor) -> Tensor:
    return original - dequantized


@dataclass(frozen=True)
class Factors:
    """A (rank, d_in) and B (d_out, rank) with which a pair starts. The update leaves out their product B0 A0."""

    A: Tensor
    B: Tensor


class Whole(Factors):
    """Factors whose product is part of the update from the start: nothing is left out."""


@dataclass(frozen=True)
class Init:
    """A registered initialiser."""

    function: Callable[..., Tensor | Factors]
    wants: frozenset[str]
    """The names of the parameters that it asks for."""
    rank_multiple: int = 1
    """The rank must be a multiple of this."""

    @property
    def measures(self) -> frozenset[str]:
        """The measures that it asks for, such as C, G or E."""
        return self.wants & MEASURES.keys()

    def reads(self, *sources: Reads) -> bool:
        """True if one of its measures is computed from one of `sources`."""
        return any(MEASURES[name].reads in sources for name in self.measures)

    @property
    def computes(self) -> bool:
        """True if it computes from W or from measurements, which takes time; False if it only draws."""
        return "W" in self.wants or bool(self.measures)

    @functools.cached_property
    def gives(self) -> str:
        """The type that it returns: "Tensor", "Factors" or "Whole"."""
        annotation = inspect.signature(self.function).return_annotation
        name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        return name.rpartition(".")[2]


INITS: dict[str, Init] = {}


def init(
    function: Callable[..., Tensor | Factors] | None = None, *, rank_multiple: int = 1, replace: bool = False
) -> Any:
    """Register a function under its own name, as a choice for LoRAConfig's `init`. The rank must then be a multiple of
    `rank_multiple`.

    A name that another module has registered, such as those below, is taken; `replace=True` puts the new function in
    its place. A module, or a notebook, may register its own name again.

    Raises ConfigError if the name is taken, if a parameter is none of those listed at the top of this file, or if the
    annotation of the result is missing.
    """
    if function is None:
        return functools.partial(init, rank_multiple=rank_multiple, replace=replace)
    there = INITS.get(function.__name__)
    is_taken = there is not None and there.function.__name__ == function.__name__  # not an alias set by hand
    if there is not None and is_taken and there.function.__module__ != function.__module__ and not replace:
        raise ConfigError(
            f"There is an initialiser {function.__name__!r} already, of {there.function.__module__}. Give yours "
            "another name, or replace the other one for all adapters from now on: @init(replace=True)."
        )
    made = Init(function, frozenset(inspect.signature(function).parameters), rank_multiple)
    known = KNOWN | MEASURES.keys()
    unknown = sorted(made.wants - known)
    if unknown:
        raise ConfigError(
            f"The initialiser {function.__name__!r} asks for {listed(unknown)}. It may ask for: "
            f"{listed(sorted(known), 99)}."
        )
    if made.gives not in ("Tensor", "Factors", "Whole"):
        raise ConfigError(
            f"The initialiser {function.__name__!r} needs an annotation of what it returns: -> Tensor (A alone), "
            "-> Factors, or -> Whole."
        )
    INITS[function.__name__] = made
    return function


# These draw A.


@init
def kaiming(rank: int, d_in: int) -> Tensor:
    """Uniform in +-1 / sqrt(d_in), the reference implementation's start (github.com/microsoft/LoRA)."""
    bound = 1 / math.sqrt(max(d_in, 1))  # a layer may have no inputs
    return torch.empty(rank, d_in).uniform_(-bound, bound)


@init
def gaussian(rank: int, d_in: int) -> Tensor:
    """Normal (Hu et al. 2021, section 4.1), with PEFT's standard deviation of 1 / rank."""
    return torch.randn(rank, d_in) / rank


@init(rank_multiple=2)
def orthogonal(rank: int, d_in: int, d_out: int) -> Whole:
    """B A = 0 though neither A nor B is zero, so both learn from the first step on (PEFT's "orthogonal").

    Q is orthogonal. The columns of A are combinations of one half of Q's rows, the rows of B of the other half.
    """
    Q, _ = torch.linalg.qr(torch.randn(rank, rank))
    A = (torch.randn(d_in, rank // 2) @ Q[0::2]).T / 10
    B = torch.randn(d_out, rank // 2) @ Q[1::2] / 10
    return Whole(A, B)


# These compute A and B from the weight.


@init
def pissa(W: Tensor, rank: int, scale: float) -> Factors:
    """s B A is the best approximation of W of that rank (Meng et al. 2024, arXiv:2404.02948, section 3)."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return _shared(U, S, Vh, rank, scale)


@init
def pissa_fast(W: Tensor, rank: int, scale: float) -> Factors:
    """`pissa` by a randomised SVD of four power iterations (arXiv:2404.02948, section 3; Halko et al. 2011)."""
    U, S, V = torch.svd_lowrank(W, q=min(rank + 8, *W.shape), niter=4)
    return _shared(U, S, V.T, rank, scale)


@init
def olora(W: Tensor, rank: int) -> Factors:
    """B is orthonormal, the first columns of Q in W = Q R, and A is the first rows of R (Büyükakyüz 2024,
    arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(W)
    return Factors(A=R[:rank], B=Q[:, :rank])


def _shared(U: Tensor, S: Tensor, Vh: Tensor, rank: int, scale: float) -> Factors:
    """A and B with scale * B A = U S V^T cut to `rank`: each has the root of S / scale, so they start at one size."""
    root = (S[:rank] / scale).sqrt()
    return Factors(A=root[:, None] * Vh[:rank], B=U[:, :rank] * root)


# These start from measurements on data.


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
    """`corda` with the last r directions, which the data use least (arXiv:2406.05223, section 3,
    "knowledge-preserved"): to learn something else, and keep what the model knows of the data."""
    U, S, Vh = _oriented(W, C)
    return _shared(U.flip(1), S.flip(0), Vh.flip(0), rank, scale)


def _oriented(W: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V^T C^-1 for W C = U S V^T. C is damped first: 0.01 of its diagonal's mean is added to the diagonal, and
    doubled until the inverse is right to 0.05 (as in PEFT's CorDA)."""
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
    section 3). Both are multiplied by d_out^(1/4) / gamma^(1/2), with a gamma of 16, so that the size of the output
    does not depend on the width of the layer (ibid., on the stability of scale)."""
    U, _, V = torch.svd_lowrank(G, q=min(4 * rank, *G.shape), niter=4)
    half = min(rank, U.shape[1] // 2)
    size = G.shape[0] ** 0.25 / math.sqrt(_GAMMA)
    return Factors(A=size * V[:, :half].T, B=size * U[:, half : 2 * half])


_GAMMA = 16.0


# This one starts from the weights that a quantized base was made from.


@init
def loftq(E: Tensor, rank: int, scale: float) -> Whole:
    """s B A is the best approximation of the quantization error, so that the adapted model starts close to the model
    from before quantization (Li et al. 2023, arXiv:2310.08659, algorithm 1, with one step: the base stays as it is)."""
    U, S, Vh = torch.linalg.svd(E, full_matrices=False)
    found = _shared(U, S, Vh, rank, scale)
    return Whole(found.A, found.B)
