"""Measures what a layer adds to its base, and judges whether that is the update s B A x of an adapter.

Inputs lie in the span of A, where the adapter acts most. The base cancels: measured is the layer's output less that of
its base, or the layer's weight less the base's where a weight is merged, or is read and never called. It is measured in
float32, whatever the model's precision is: there the right adapter is told from a similar one. Then it is measured once
more in the model's own precision, to see how much of the update survives.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.bank.layers import Banked
from lightning_lora.engine.judged import (
    NOT_APPLIED,
    OTHER,
    SAME,
    SCALED,
    SURVIVES,
    SWALLOWED,
    UNCHECKED,
    Verified,
    compare_whole,
    hint,
    judge,
    norm,
    project,
    surviving,
)
from lightning_lora.engine.layers.alora import ALoRA, Everywhere
from lightning_lora.engine.layers.base import Adapter, is_adapter, without_autocast
from lightning_lora.engine.layers.conv import Convolution
from lightning_lora.engine.layers.dora import DoRA
from lightning_lora.engine.layers.embedding import TOKENS, EmbeddingBagLoRA, EmbeddingLoRA, TokenRows
from lightning_lora.engine.layers.pair import BIAS
from lightning_lora.engine.twin import holds_merged, is_adapted, is_of_peft, twin, widened
from lightning_lora.engine.weights import can_be_dense, dense, dtype_of, is_plain, stored
from lightning_lora.errors import LightningLoRAError

HALF = (torch.bfloat16, torch.float16)


def check_layer(name: str, expected: Any, live: Any, *, has_base: bool) -> list[Verified]:
    """Compare `live`, a layer of the model, with `expected`, an adapted layer on the base, with the adapter's factors.

    With `has_base` the base comes from elsewhere than `live`; else it is `live` without its adapter. There is a result
    for each adapted parameter; for most layers that is one.
    """
    if switch.used and switch.is_off(live):
        return [Verified(name, NOT_APPLIED, 0.0, 1.0, note="adapters are switched off just now (disabled)")]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels, about the dtype of their input
            return _checked(name, expected, live, has_base)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, LightningLoRAError) as error:
        said = " ".join(str(error).split())
        return [Verified(name, UNCHECKED, note=f"it cannot be called by itself: {said[:160]}")]


def _checked(name: str, expected: Any, live: Any, has_base: bool) -> list[Verified]:
    if isinstance(expected, TokenRows):
        return _token_rows(name, expected, live)
    if isinstance(expected, ALoRA) and is_adapter(type(live)):
        if not isinstance(live, ALoRA):
            return [Verified(name, OTHER, note="it acts at every position, and not from its invocation tokens on")]
        if live.lora_invocation.tokens != expected.lora_invocation.tokens:
            return [Verified(name, OTHER, note=f"its invocation tokens are {list(live.lora_invocation.tokens)}")]
        expected, live = _everywhere(expected), _everywhere(live)
    elif isinstance(expected, ALoRA):
        if is_adapted(live):
            why = "it acts from its invocation tokens on, which no layer of PEFT's is given by itself"
            return [Verified(name, UNCHECKED, note=why)]
        merged = "a merged weight acts at every position, and not from its invocation tokens on"
        rows = _by_weight(name, expected, live)
        return [row if row.verdict == NOT_APPLIED else replace(row, verdict=OTHER, note=merged) for row in rows]
    if holds_merged(live):
        if not has_base:
            return [Verified(name, UNCHECKED, note="PEFT has merged it: unmerge it, or give base=")]
        live = live.get_base_layer()
    own_class = getattr(type(live), "base_class", type(live))
    if not is_adapted(live) and (own_class is type(expected).base_class or _is_quantized_of(live, expected)):
        return _by_weight(name, expected, live)
    if not expected.lora_by_weight:
        return [_by_call(name, expected, live)]
    if is_adapter(type(live)):
        return _by_read(name, expected, live)
    why = "its update acts inside the forward of a larger module: merge the adapter, and give base="
    return [Verified(name, UNCHECKED, note=why)]


def _is_quantized_of(live: nn.Module, expected: Any) -> bool:
    """True if `live` is the base's kind of layer with a quantized weight whose numbers can be read."""
    W = live._parameters.get("weight")
    return isinstance(live, expected.base_class) and W is not None and not is_plain(W) and can_be_dense(W)


def _everywhere(layer: ALoRA) -> Any:
    """A twin of `layer` whose adapter acts at every position."""
    own = twin(layer)
    own.__dict__["lora_invocation"] = Everywhere(layer.lora_invocation.tokens)
    return own


# By calling the layer.


def _by_call(name: str, expected: Any, live: Any) -> Verified:
    computes = dtype_of(expected.own("weight"))
    wide = torch.promote_types(computes, torch.float32)
    change = widened(wide)
    E, L = twin(expected, change), twin(live) if isinstance(live, Banked) else twin(live, change)
    x = probe(E, wide)
    x = x.to(computes).to(wide) if x.is_floating_point() else x
    with without_autocast(x):
        in_bank = isinstance(live, Banked)
        narrow = x.to(computes) if x.is_floating_point() else x
        y0, y1 = E.bare_forward(x), L.forward(narrow if in_bank else x)
        promised = _promised(E, x, y0)
        y = twin(expected).bare_forward(narrow) if in_bank else y0
        size = float(y.double().norm() / promised.double().norm().clamp(min=1e-300))
        coarsest = max((torch.finfo(p.dtype).eps for p in live.parameters() if is_plain(p)), default=0.0)
        measured = y1.to(wide) - y.to(wide)
        found = judge(name, measured, promised, expected.lora, rounding=_eps(y1) * size, factors=coarsest)
        if found.verdict != SAME or computes is wide or in_bank:
            return found
        change = twin(live).forward(narrow).to(wide) - twin(expected).bare_forward(narrow).to(wide)
    return surviving(found, change, promised)


def _promised(layer: Any, x: Tensor, base: Tensor) -> Tensor:
    """The change of the layer's output by its adapter."""
    update = layer.update(x)
    if type(layer).combine in (Adapter.combine, ALoRA.combine):
        scaled: Tensor = layer.lora.scale * update
        return scaled
    changed: Tensor = layer.combine(base, update) - base  # DoRA
    return changed


def probe(layer: Any, dtype: torch.dtype) -> Tensor:
    """Inputs of `layer` on which its adapter acts most: the words with the largest columns of A for an embedding, else
    vectors in the span of A, each with a root mean square of 1."""
    A, B = layer.factors()
    if isinstance(layer, EmbeddingLoRA):
        size = A.norm(dim=0)
        if layer.padding_idx is not None:
            size[layer.padding_idx] = -1
        words = size.topk(min(32, len(size) - 1 or 1)).indices
        return words[:, None] if isinstance(layer, EmbeddingBagLoRA) else words
    count = min(64, max(4, 4096 // B.shape[0]))
    generator = torch.Generator().manual_seed(1)
    if not isinstance(layer, Convolution):
        x = torch.randn(count, A.shape[0], generator=generator).to(A.device, dtype) @ A.flatten(1).to(dtype)
    else:
        base: Any = layer
        reach = [d * (k - 1) + 1 for d, k in zip(base.dilation, base.kernel_size)]
        x = torch.zeros(4, base.in_channels, *(2 * n + 1 for n in reach), dtype=dtype, device=A.device)
        with torch.enable_grad():  # a random output of B A, mapped back to the input
            x.requires_grad_()
            y = base.update(x)
            (x,) = torch.autograd.grad(y, x, torch.randn(y.shape, generator=generator).to(y))
    return x / x.flatten(1).square().mean(1).sqrt().clamp(min=1e-30).view(-1, *(1,) * (x.dim() - 1))


# By the weight.


def _by_weight(name: str, expected: Any, live: Any) -> list[Verified]:
    """A layer without an adapter: its weight should be the merged one."""
    found = []
    for pair in expected.lora_pairs(name):
        W = live._parameters.get(pair.parameter)
        is_base = W is not None and W is expected._parameters.get(pair.parameter)
        if is_base:
            found.append(Verified(pair.name, NOT_APPLIED, 0.0, 1.0, note="it has no adapter"))
        elif not can_be_dense(W):
            found.append(Verified(pair.name, UNCHECKED, note="its weight is quantized in an unknown way"))
        else:
            base, change = _change(expected, pair.parameter)
            now = dense(live, W)
            if now.shape != change.shape:
                shapes = f"{tuple(now.shape)}, not {tuple(change.shape)}"
                found.append(Verified(pair.name, OTHER, note=f"its weight is of shape {shapes}"))
            elif is_plain(W):
                found.append(_compare_weights(pair, expected, base, change, now))
            else:
                found.append(_through_noise(pair, live, W, base, change))
    if BIAS in expected.lora_names:
        found.append(
            Verified(f"{name}.bias", UNCHECKED, note="the bias of B (lora_bias) is not looked for once merged")
        )
    return found


def _by_read(name: str, expected: Any, live: Any) -> list[Verified]:
    """A layer of ours whose weight is read and not called: the weight that a reader gets should be the adapted one."""
    found = []
    for pair in expected.lora_pairs(name):
        own = expected.own(pair.parameter)
        wide = torch.promote_types(dtype_of(own), torch.float32)
        base, change = _change(expected, pair.parameter)
        with without_autocast(base):
            read = twin(live, widened(wide)).value_read(pair.parameter)
            row = _compare_weights(pair, expected, base.to(wide), change, read)
            if row.verdict == SAME and dtype_of(own) is not wide:
                read = twin(live).value_read(pair.parameter)
                row = surviving(row, read.to(wide) - base.to(wide), change)
        found.append(row)
    return found


def _change(layer: Any, parameter: str) -> tuple[Tensor, Tensor]:
    """The base's weight, and the change that the adapter makes to it, in float32 or wider."""
    base = layer.dense_weight(parameter)
    with without_autocast(base):
        is_plain_lora = type(layer).combine is Adapter.combine and not isinstance(layer, DoRA)
        change = layer.delta_weight(parameter) if is_plain_lora else layer.adapted_weight(parameter) - base
    return base, change


def _compare_weights(pair: Any, layer: Any, base: Tensor, change: Tensor, now: Tensor) -> Verified:
    """Judge the plain weight `now`: it is compared with the merged weight, rounded as `now` is."""
    now, base = now.to(change.device), base.to(change.device)
    now = _as_rounded(now)
    before = base.to(now.dtype).to(change.dtype)
    measured = now.to(change.dtype) - before
    # The base may have been rounded before the merge (a model loaded in bfloat16), or only the merged weight after it.
    ways = [(W + change).to(now.dtype).to(change.dtype) - before for W in (before, base)]
    rounded = min(ways, key=lambda way: norm(measured - way))
    size = float(before.double().norm() / rounded.double().norm().clamp(min=1e-300))
    share = project(rounded, change)
    row = judge(
        pair.name,
        layer.matrix(layer, measured),
        layer.matrix(layer, rounded),
        pair.spec,
        rounding=_eps(now) * size,
        outputs=0,
        length=norm(change),
    )
    is_lost = share < SURVIVES and now.dtype.itemsize < 4 and bool(change.any())
    if is_lost and (row.verdict == SAME or not bool(rounded.any()) or (row.error or 1) <= 0.5):
        left = project(measured, change)
        return Verified(pair.name, SWALLOWED, row.scale, row.error, left, row.size)
    off, largest = (measured - rounded).abs(), torch.maximum(now.abs().to(before.dtype), before.abs())
    is_near = norm(off) <= 0.5 * norm(rounded) or bool((off <= 2 * _eps(now) * largest).all())
    if row.verdict == OTHER and is_near:
        why = "near it: is base= what it was merged into, in the same precision (bfloat16, quantized)?"
        return replace(row, note=f"{row.note}, {why}")
    return replace(row, share=share if row.verdict == SAME else None)


def _as_rounded(W: Tensor) -> Tensor:
    """`W` in the 16-bit dtype that holds all its numbers, if one does: it was rounded to that, and widened later."""
    return next((half for dtype in HALF if (half := W.to(dtype)).to(W.dtype).equal(W)), W)


def _through_noise(pair: Any, live: nn.Module, W: Tensor, base: Tensor, change: Tensor) -> Verified:
    """Judge W, the weight of `live`, which was quantized after the adapter was merged, against the exact change. The
    noise is larger than the update in each number, and averages out over all of them."""
    size, now = norm(change), dense(live, W).to(change)
    if not size:
        return Verified(pair.name, UNCHECKED, note="its update is zero")
    base = base.to(change)
    measured = now - base
    scale = project(measured, change)
    rest = norm(measured - scale * change)
    noise = rest / size
    doubt = 4 * noise / math.sqrt(change.numel())  # four standard errors of the regression
    row = Verified(pair.name, SAME, scale, noise, None, size, note=f"through quantization, to +-{doubt:.2g}")
    again, _ = stored(live, base + scale * change, W)
    if not is_plain(again):  # else how it was quantized is not known
        # Twice, if the base was quantized before it was merged: so at most double, with what that adds to the range.
        once = norm(dense(nn.Module(), again).to(change) - base - scale * change)
        if rest > 2 * once:
            why = f"its weight is {rest / once:.2g} times as far from the merged one as quantization puts it"
            return replace(row, verdict=OTHER, note=why)
    if doubt > 0.25:
        return Verified(pair.name, UNCHECKED, scale, None, None, size, "quantization hides so small an update")
    if abs(scale) <= doubt:
        return replace(row, verdict=NOT_APPLIED)
    if abs(scale - 1) > max(0.02, doubt):
        return replace(row, verdict=SCALED, note=hint(scale, pair.spec))
    return row


def _token_rows(name: str, expected: Any, live: Any) -> list[Verified]:
    rows = getattr(expected.lora.owner or expected, TOKENS)
    at = torch.tensor(expected.lora.tokens, device=rows.device)
    if isinstance(live, TokenRows):
        now = getattr(live.lora.owner or live, TOKENS)
        if live.lora.tokens != expected.lora.tokens:
            return [Verified(name, OTHER, note="other rows of it were trained")]
    elif "token_adapter" in live._modules or (not is_of_peft(live) and "weight" in live._parameters):
        now = live.weight[at.to(live.weight.device)]  # of PEFT's: with its trained rows, if they are on
    else:
        return [Verified(name, UNCHECKED, note="PEFT holds its trained rows elsewhere: merge them, and give base=")]
    return [compare_whole(name, now, rows, expected.dense_weight()[at])]


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0
