"""Judges a measured change against the one that an adapter promises: the same, another scale, another adapter, ..."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_lora.engine.layers.pair import AdapterSpec

SAME = "same"
NOT_APPLIED = "not applied"
SCALED = "another scale"
PART = "part missing"
OTHER = "another adapter"
SWALLOWED = "swallowed by the precision"
UNCHECKED = "not checked"
VERDICTS = (OTHER, SCALED, PART, NOT_APPLIED, SWALLOWED, UNCHECKED, SAME)
"""All verdicts, the gravest first."""

SURVIVES = 0.9
"""An update of which a smaller share survives the precision of a weight is called swallowed, and merging it warns."""


@dataclass(frozen=True)
class Verified:
    """The verdict on one module, or on one of its parameters."""

    name: str
    """Its name in the base."""
    verdict: str
    """One of VERDICTS."""
    scale: float | None = None
    """The measured update as a multiple of the adapter's: its projection on that, in float32. 1 is right."""
    error: float | None = None
    """Frobenius norm of measured less expected, relative to expected."""
    share: float | None = None
    """The share of the update that survives the precision of the model: again a projection."""
    size: float = 0.0
    """Frobenius norm of the expected update, for means over modules."""
    note: str = ""
    """More about the verdict, in words."""


def judge(
    name: str,
    measured: Tensor,
    expected: Tensor,
    spec: AdapterSpec,
    *,
    rounding: float,
    factors: float = 0.0,
    outputs: int = -1,
    length: float | None = None,
) -> Verified:
    """Compare a measured change with the expected one.

    `rounding` is the rounding of one number, relative to the expected change; `factors` that of A and B. `outputs` is
    the dimension of the layer's outputs. `length` is the norm to report, if not that of `expected`.
    """
    size = norm(expected)
    length = size if length is None else length
    change = norm(measured)
    if not math.isfinite(change):
        return Verified(name, OTHER, size=length, note="its output is not finite")
    if size == 0:
        note = "its update is zero"
        return (
            Verified(name, UNCHECKED, note=note) if change == 0 else Verified(name, OTHER, note=f"{note} in the file")
        )
    if change and outputs < 0 and rounding > 1:
        return Verified(name, UNCHECKED, size=length, note="its update is smaller than the rounding of its output")
    scale, error = project(measured, expected), norm(measured - expected) / size
    tolerance = min(0.25, 2e-3 + 4 * rounding + 4 * factors)
    row = Verified(name, SAME, scale, error, None, length)
    if abs(scale - 1) <= min(0.02, 1e-3 + rounding + factors) and error <= tolerance:
        return row
    if change <= max(1e-3, min(0.25, rounding)) * size:
        return replace(row, verdict=NOT_APPLIED)
    cosine = scale * size / change
    if abs(cosine) >= math.sqrt(1 - tolerance**2):
        return replace(row, verdict=SCALED, note=hint(scale, spec))
    if (missing := _missing_outputs(measured, expected, outputs, tolerance)) is not None:
        return replace(row, verdict=PART, note=missing)
    return replace(row, verdict=OTHER, note=f"cosine {cosine:.2f}")


def _missing_outputs(measured: Tensor, expected: Tensor, outputs: int, tolerance: float) -> str | None:
    """Which outputs get no update, in words, if all others get the right one; else None."""
    measured, expected = (t.movedim(outputs, 0).flatten(1).double() for t in (measured, expected))
    size = expected.norm(dim=1)
    lacks = (measured.norm(dim=1) <= 1e-3 * size) & (size > 0)
    rest = ~lacks
    off = (measured[rest] - expected[rest]).norm()
    if not bool(lacks.any()) or not bool(rest.any()) or off > tolerance * size[rest].norm():
        return None
    return f"{int(lacks.sum())} of {len(size)} outputs get no update"


def hint(scale: float, spec: AdapterSpec) -> str:
    """What a wrong scale looks like, in words."""
    r, s = spec.rank, spec.scale

    def is_near(value: float) -> bool:
        return value != 1 and math.isclose(scale, value, rel_tol=0.01)

    is_rslora = not math.isclose(s * r, spec.alpha, rel_tol=1e-6)
    meanings = {
        "as by alpha / sqrt(rank) (rsLoRA), where the adapter says alpha / rank": not is_rslora and is_near(r**0.5),
        "as by alpha / rank, where the adapter says rsLoRA (alpha / sqrt(rank))": is_rslora and is_near(r**-0.5),
        "as if alpha were left out (scale 1)": is_near(1 / s),
        "as if alpha were not divided by the rank": is_near(r),
        "as if it were added twice, or alpha doubled": is_near(2),
        "it is subtracted": is_near(-1),
    }
    likely = [meaning for meaning, fits in meanings.items() if fits]
    said = "; or ".join(likely) or f"as if alpha were {scale * spec.alpha:.4g} and not {spec.alpha:g}"
    return f"x {scale:.4g}: {said}"


def compare_whole(name: str, now: Tensor, wanted: Tensor, base: Tensor | None) -> Verified:
    """Judge a tensor that was trained whole: it should be `wanted`, but for rounding to its dtype. `base` is its value
    before training, if known."""
    narrow = min((now.dtype, wanted.dtype), key=lambda dtype: dtype.itemsize)

    def is_equal(value: Tensor) -> bool:
        return value.shape == now.shape and bool(torch.equal(now.to(narrow), value.to(now.device).to(narrow)))

    if is_equal(wanted):
        return Verified(name, SAME)
    if base is not None and is_equal(base):
        return Verified(name, NOT_APPLIED, note="it has the base's values, and not those that were trained")
    return Verified(name, OTHER, note="it has other values than those that were trained")


def surviving(row: Verified, measured: Tensor, expected: Tensor) -> Verified:
    """`row`, with the share of the update that is there in the precision of the model."""
    share = project(measured, expected)
    noise = norm(measured - share * expected) / norm(expected)
    is_lost = share + 2 * noise / math.sqrt(expected.numel()) < SURVIVES
    return replace(row, verdict=SWALLOWED if is_lost else row.verdict, share=share)


def project(measured: Tensor, expected: Tensor) -> float:
    """The multiple of `expected` that is nearest to `measured`; 0 if `expected` is zero."""
    size = expected.square().sum(dtype=torch.float64)
    return float((measured * expected).sum(dtype=torch.float64) / size) if size else 0.0


def norm(t: Tensor) -> float:
    return float(t.square().sum(dtype=torch.float64).sqrt())
