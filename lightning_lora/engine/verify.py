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
from lightning_lora.engine.layers.alora import ALoRA
from lightning_lora.engine.layers.base import Adapter, is_adapter, without_autocast
from lightning_lora.engine.layers.conv import Convolution
from lightning_lora.engine.layers.dora import DoRA
from lightning_lora.engine.layers.embedding import EmbeddingBagLoRA, EmbeddingLoRA
from lightning_lora.engine.layers.pair import BIAS
from lightning_lora.engine.layers.tokens import TOKENS, TokenRows
from lightning_lora.engine.twin import holds_merged, is_adapted, is_of_peft, twin, widened
from lightning_lora.engine.weights import can_be_dense, dense, dtype_of, is_plain
from lightning_lora.errors import LightningLoRAError


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
    if isinstance(expected, ALoRA):
        return [Verified(name, UNCHECKED, note="it acts from its invocation tokens on, and not in a layer by itself")]
    if holds_merged(live):
        if not has_base:
            return [Verified(name, UNCHECKED, note="PEFT has merged it: unmerge it, or give base=")]
        live = live.get_base_layer()
    own_class = getattr(type(live), "base_class", type(live))
    if not is_adapted(live) and own_class is type(expected).base_class:
        return _by_weight(name, expected, live)
    if not expected.lora_by_weight:
        return [_by_call(name, expected, live)]
    if is_adapter(type(live)):
        return _by_read(name, expected, live)
    why = "its update acts inside the forward of a larger module: merge the adapter, and give base="
    return [Verified(name, UNCHECKED, note=why)]


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
        found = judge(
            name, y1.to(wide) - y.to(wide), promised, expected.lora, rounding=_eps(y1) * size, factors=_coarsest(live)
        )
        if found.verdict != SAME or computes is wide or in_bank:
            return found
        change = twin(live).forward(narrow).to(wide) - twin(expected).bare_forward(narrow).to(wide)
    return surviving(found, change, promised)


def _promised(layer: Any, x: Tensor, base: Tensor) -> Tensor:
    """The change of the layer's output by its adapter."""
    update = layer.update(x)
    if type(layer).combine is Adapter.combine:
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
            is_exact = is_plain(W)
            found.append(_compare_weights(pair, expected, base, change, now, is_exact))
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
            row = _compare_weights(pair, expected, base.to(wide), change, read, True)
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


def _compare_weights(pair: Any, layer: Any, base: Tensor, change: Tensor, now: Tensor, is_exact: bool) -> Verified:
    """Judge the weight `now`. A plain weight (`is_exact`) is compared with the merged weight, rounded as `now` is; a
    quantized one with the exact change, through its noise."""
    if now.shape != change.shape:
        return Verified(pair.name, OTHER, note=f"its weight is of shape {tuple(now.shape)}, not {tuple(change.shape)}")
    now, base = now.to(change.device), base.to(change.device)
    if not is_exact:
        return _through_noise(pair, now.to(change.dtype) - base, change)
    before = base.to(now.dtype).to(change.dtype)
    rounded = (base + change).to(now.dtype).to(change.dtype) - before
    measured = now.to(change.dtype) - before
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
    return replace(row, share=share if row.verdict == SAME else None)


def _through_noise(pair: Any, measured: Tensor, change: Tensor) -> Verified:
    """Judge a weight that was quantized after the adapter was merged: the noise is larger than the update in each
    number, and averages out over all of them."""
    size = norm(change)
    if not size:
        return Verified(pair.name, UNCHECKED, note="its update is zero")
    scale = project(measured, change)
    noise = norm(measured - scale * change) / size
    doubt = 4 * noise / math.sqrt(change.numel())  # four standard errors of the regression
    row = Verified(pair.name, SAME, scale, noise, None, size, note=f"through quantization, to +-{doubt:.2g}")
    if doubt > 0.25:
        return Verified(pair.name, UNCHECKED, scale, None, None, size, "quantization hides so small an update")
    if abs(scale) <= doubt:
        return Verified(pair.name, NOT_APPLIED, scale, noise, None, size, row.note)
    if abs(scale - 1) > max(0.02, doubt):
        return Verified(pair.name, SCALED, scale, noise, None, size, hint(scale, pair.spec))
    return row


def _token_rows(name: str, expected: Any, live: Any) -> list[Verified]:
    rows = getattr(expected.lora.owner or expected, TOKENS)
    at = torch.tensor(expected.lora.tokens, device=rows.device)
    if isinstance(live, TokenRows):
        now = getattr(live.lora.owner or live, TOKENS)
        if live.lora.tokens != expected.lora.tokens:
            return [Verified(name, OTHER, note="other rows of it were trained")]
    elif not is_of_peft(live) and "weight" in live._parameters:
        now = live.weight[at.to(live.weight.device)]
    else:
        return [Verified(name, UNCHECKED, note="PEFT holds its trained rows elsewhere: merge them, and give base=")]
    return [compare_whole(name, now, rows, expected.dense_weight()[at])]


def _eps(t: Tensor) -> float:
    return torch.finfo(t.dtype).eps if t.is_floating_point() else 0.0


def _coarsest(live: nn.Module) -> float:
    """The rounding of the coarsest number that a layer's adapter may be held in."""
    return max((torch.finfo(p.dtype).eps for p in live.parameters() if is_plain(p)), default=0.0)
