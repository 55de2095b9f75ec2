"""Reads an adapter that was just written, and checks that its updates are those that it was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.engine.layers.pair import as_blocks
from lightning_lora.errors import CheckpointError, listed
from lightning_lora.rewriting.parts import Pair, Parts, parts_of


def check_written(
    folder: Path, adapters: Mapping[str, Parts], weights: Mapping[str, float], errors: Mapping[str, float]
) -> None:
    """Raise CheckpointError unless the adapter in `folder` adds to each output what `adapters` add, each by its weight.

    It is tried with inputs in the span of each A. `errors` are the Frobenius norms of the errors that are known of, by
    module; beyond them, only the rounding of the file is allowed. DoRA that became a plain pair is left out, since the
    files do not hold its update.
    """
    pairs = parts_of(folder).pairs
    meant: dict[str, list[tuple[float, Pair]]] = {}
    for name, parts in adapters.items():
        for module, pair in parts.pairs.items():
            if pair.magnitude is None or module not in pairs or pairs[module].magnitude is not None:
                meant.setdefault(module, []).append((weights[name], pair))
    wrong = [
        name for name, terms in meant.items() if name not in pairs or _is_off(pairs[name], terms, errors.get(name, 0))
    ]
    if wrong:
        raise CheckpointError(
            f"The adapter in {folder}, which was just written, was read back, and does not compute what it was made "
            f"from, in {len(wrong)} modules: {listed(wrong, 3)}. Is the disk sound? Do not use the folder."
        )


def _is_off(written: Pair, terms: Sequence[tuple[float, Pair]], error: float) -> bool:
    generator = torch.Generator().manual_seed(1)
    columns = torch.cat([pair.A.flatten(1).double() for _, pair in terms])
    x = torch.randn(4, len(columns), dtype=torch.float64, generator=generator) @ columns
    parts = [weight * _update(pair, x) for weight, pair in terms]
    rounding = 4 * max(torch.finfo(t.dtype).eps for t in (written.A, written.B))
    allowed = 1.01 * error * float(x.norm()) + rounding * sum(float(part.norm()) for part in parts)
    return not float((_update(written, x) - torch.stack(parts).sum(0)).norm()) <= allowed


def _update(pair: Pair, x: Tensor) -> Tensor:
    """s B A x, for each group of a convolution by itself: x (n, in) -> (n, groups, out / groups). The kernel of a
    transposed convolution counts as outputs."""
    A, B = as_blocks(pair.A.double(), pair.B.double(), pair.rank)
    return pair.scale * torch.einsum("gor,gri,ni->ngo", B, A, x)
