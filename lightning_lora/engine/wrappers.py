"""Modules that torch puts around others, by their names alone: torch.compile, activation checkpointing, FSDP1.

A layer has one name, with or without them, for a file is read where they are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPER = re.compile(rf"(^|\.)(?:{'|'.join(_INSIDE)})(?=\.|$)")


def plain_name(name: str) -> str:
    """A name as it were without wrappers."""
    if "_orig_mod" not in name and "_wrapped_module" not in name:  # thousands are asked for, and few are wrapped
        return name
    return _WRAPPER.sub("", name).removeprefix(".")


def tensors_by_plain_name(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """The parameters and buffers of `model`, each with the name that it has in its state dict."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {plain_name(name): (name, tensor) for name, tensor in named}


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[None]:
    """Inside, all that lies in `model` has its plain name: wrappers are taken out of the tree, not out of use."""
    taken = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if child is not None and child._modules and _inside(child) is not None
    ]
    try:
        for owner, name, child in taken:
            inner: nn.Module | None = child
            while inner is not None and (further := _inside(inner)) is not None:
                inner = further
            owner._modules[name] = inner
        yield
    finally:
        for owner, name, child in taken:
            owner._modules[name] = child


def _inside(module: nn.Module) -> nn.Module | None:
    return next((inner for name in _INSIDE if (inner := module._modules.get(name)) is not None), None)
