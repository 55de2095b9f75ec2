"""Activated LoRA: the adapter acts from its invocation tokens on; the base alone computes the positions before them.

So the adapter can use the keys and values that the base has cached for a prompt (Greenewald et al. 2025,
arXiv:2504.12397).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch, torch_private
from lightning_lora.engine.layers.base import Adapter, adapters
from lightning_lora.engine.torch_private import drop_forward_hooks
from lightning_lora.errors import AdapterStateError, TargetError


class ALoRA(Adapter):
    """A variant of linear layers: the update is added only at positions from the invocation tokens on."""

    lora_invocation: Invocation

    def combine(self, base: Tensor, update: Tensor) -> Tensor:
        invoked = self.lora_invocation.at(base)[..., None]
        return torch.where(invoked, super().combine(base, update), base)

    def check_shown(self, name: str) -> None:
        raise AdapterStateError(
            f"The weight of {self.lora_path!r} was read. Its adapter acts from its invocation tokens on, and a weight "
            "acts everywhere: call the layer and do not read its weight, or leave it out with exclude_modules."
        )

    def check_mergeable(self) -> None:
        raise AdapterStateError(
            "an adapter that acts from its invocation tokens on cannot be merged into a weight, which acts everywhere. "
            "Use it unmerged."
        )


@dataclass(frozen=True, eq=False)
class Running:
    """A running call of a module that takes input_ids."""

    module: nn.Module
    backward: int
    """The id of the backward pass in which it is called (activation checkpointing); -1 outside of any."""
    is_outermost: bool = True
    """False if the call lies in another one with the same tokens."""
    ids: Tensor | None = None
    invoked: Tensor | None = None
    """(rows, positions): where the adapter acts."""
    seen: Tensor | None = None
    """The last tokens of each row: an invocation may begin in them and end in the next call."""


class Own(threading.local):
    """The state of one thread. A forward runs in one thread and never awaits, so asyncio tasks are kept apart as well.
    It is no ContextVar, since torch.compile traces the hooks and cannot read one."""

    running: tuple[Running, ...] = ()
    """All running calls, the innermost first, also those of a forward around the present one."""
    last: Tensor | None = None
    """`invoked` of the last forward that ended, for a head that is called by itself on the model's output."""


class Invocation:
    """Finds, in each row of the running forward, the positions from the last occurrence of `tokens` on.

    Hooks on the modules that take `input_ids` show it the tokens. A row that is invoked stays invoked while its cache
    is continued. The cache holds that state, so several caches can be used in turn, and copied. A call that continues a
    cache with one token never invokes the adapter; a longer one (the next turn of a chat) can, even if the sequence
    began in the call before it.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.own = Own()
        self.backwards: dict[int, list[Tensor]] = {}
        """Id of a running backward pass, of any thread -> `invoked` of each forward that the pass has reached."""

    def __reduce__(self) -> Any:
        return Invocation, (self.tokens,)

    def running(self) -> Iterator[Running]:
        """The calls of the forward that runs in this thread, the innermost first."""
        for entry in self.own.running:
            yield entry
            if entry.is_outermost:
                return

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook."""
        ids, cache = (_argument(module, name, args, kwargs) for name in ("input_ids", "past_key_values"))
        if switch.used and switch.is_off(module):
            ids = None  # adapters are off: this call neither invokes anything nor is remembered
        around = list(self.running())
        entry = Running(module, backward_pass(), ids=ids)
        try:
            # A module that is running already, called once more, begins a new forward inside the running one.
            if around and all(e.module is not module for e in around) and _are_same(ids, around[0].ids):
                entry = replace(around[0], module=module, is_outermost=False)
            elif ids is not None:
                invoked, seen = self._heard(ids, cache)
                entry = replace(entry, invoked=invoked, seen=seen)
        finally:  # `after` is called even if this raises
            self.own.running = (entry, *self.own.running)

    def _heard(self, ids: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
        goes_on = cache is not None and bool(cache.get_seq_length() > 0)
        nothing = ids.new_zeros(ids.shape[0], dtype=torch.bool), ids[:, :0]
        was, seen = getattr(cache, _MEMORY, nothing) if goes_on else nothing
        if was.shape[0] != ids.shape[0]:
            raise AdapterStateError(
                f"The cache remembers which of its {was.shape[0]} rows were invoked, and this forward has "
                f"{ids.shape[0]} rows: rows of a cache cannot be chosen or repeated after the prompt."
            )
        if goes_on and ids.shape[1] == 1:
            invoked = was[:, None]
        else:
            invoked = was[:, None] | self.from_last_occurrence(torch.cat([seen, ids], dim=1))[:, seen.shape[1] :]
        return invoked, torch.cat([seen, ids], dim=1)[:, max(0, seen.shape[1] + ids.shape[1] - len(self.tokens) + 1) :]

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A forward hook, called also if the forward raised."""
        if not self.own.running or self.own.running[0].module is not module:
            return
        entry, *others = self.own.running
        self.own.running = tuple(others)
        if not entry.is_outermost:
            return
        self.own.last = entry.invoked
        if entry.invoked is None:
            return
        cache = _argument(module, "past_key_values", args, kwargs)
        cache = cache if cache is not None else getattr(output, "past_key_values", None)
        if cache is not None:
            setattr(cache, _MEMORY, (entry.invoked[:, -1], entry.seen))
        if torch.is_grad_enabled():
            self._watch(output, entry.invoked)

    def _watch(self, output: Any, invoked: Tensor) -> None:
        """Note when a backward pass reaches `output`: it then computes checkpointed layers again, in any thread of
        autograd's, and they need `invoked`."""

        def begins(_: Tensor) -> None:
            task = torch_private.backward_task()
            if task not in self.backwards:
                self.backwards[task] = []
                torch_private.when_backward_ends(lambda: self.backwards.pop(task, None))
            forwards = self.backwards[task]
            if all(other is not invoked for other in forwards):
                forwards.append(invoked)

        if isinstance(output, Tensor):
            if output.requires_grad:
                output.register_hook(begins)
        elif isinstance(output, (Mapping, tuple, list)):
            for inner in output.values() if isinstance(output, Mapping) else output:
                self._watch(inner, invoked)

    def from_last_occurrence(self, ids: Tensor) -> Tensor:
        """(rows, positions): true from the first token of the row's last occurrence of `tokens` on."""
        length, count = ids.shape[1], len(self.tokens)
        if length < count:
            return torch.zeros_like(ids, dtype=torch.bool)
        wanted = torch.tensor(self.tokens, device=ids.device, dtype=ids.dtype)
        begins = (ids.unfold(1, count, 1) == wanted).all(-1)
        position = torch.arange(length, device=ids.device)
        last = torch.where(begins, position[: begins.shape[1]], -1).amax(1, keepdim=True)
        return (last >= 0) & (position >= last)

    def at(self, output: Tensor) -> Tensor:
        """Where the adapter acts on a layer's `output` (..., width): booleans of its shape without the width."""
        running, task = next(self.running(), None), backward_pass()
        if running is not None and running.backward == task:
            invoked = running.invoked
        elif task == -1:
            invoked = self.own.last
        else:  # gradient checkpointing computes the layer again
            forwards = self.backwards.get(task, [])
            if len(forwards) > 1:
                raise AdapterStateError(
                    "Under gradient checkpointing an adapter with alora_invocation_tokens needs a backward pass for "
                    "each forward: this one is for several, and it is not known for which of them a layer is computed "
                    "again."
                )
            invoked = forwards[0] if forwards else None
        if invoked is None:
            raise AdapterStateError(
                "An adapter with alora_invocation_tokens looks for them in input_ids, and the model was given none: "
                "call the whole model, with input_ids and not with inputs_embeds; under gradient checkpointing, "
                "compute the loss from what the model returns."
            )
        shape = output.shape[:-1]
        if shape == invoked.shape:
            return invoked
        if len(shape) == 1 and shape[0] == invoked.numel():  # rows and positions in one dimension, as for experts
            return invoked.reshape(-1)
        if len(shape) == 2 and shape[0] == invoked.shape[0] and shape[1] < invoked.shape[1]:  # a head at the last ones
            return invoked[:, -shape[1] :]
        raise AdapterStateError(
            f"A layer with alora_invocation_tokens gives an output of shape {tuple(output.shape)}, which does not fit "
            f"the {tuple(invoked.shape)} tokens: leave it out with exclude_modules."
        )


class Everywhere(Invocation):
    """Lets the adapter act at every position, to measure it."""

    def at(self, output: Tensor) -> Tensor:
        return output.new_ones(output.shape[:-1], dtype=torch.bool)


_MEMORY = "lora_invocation"
"""The attribute of a cache that holds which of its rows are invoked, and their last tokens."""


def readers(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that take `input_ids` and have submodules."""
    return [
        module
        for module in model.modules()
        if any(True for _ in module.children()) and "input_ids" in inspect.signature(module.forward).parameters
    ]


def check_readers(model: nn.Module) -> None:
    """Raise TargetError if no module of `model` takes tokens."""
    if not readers(model):
        raise TargetError(
            f"alora_invocation_tokens are looked for in input_ids, and the forward of no module of "
            f"{type(model).__name__} takes input_ids: use them with causal language models of transformers."
        )


def listen(model: nn.Module, tokens: Sequence[int]) -> None:
    """Let the adapters of `model` act from `tokens` on."""
    invocation = Invocation(tokens)
    for module in readers(model):
        module.register_forward_pre_hook(invocation.before, with_kwargs=True)
        module.register_forward_hook(invocation.after, with_kwargs=True, always_call=True)
    for _, adapter in adapters(model):
        if isinstance(adapter, ALoRA):
            adapter.__dict__["lora_invocation"] = invocation


def stop_listening(model: nn.Module) -> None:
    """Undo `listen`."""
    for module in model.modules():
        module.__dict__.pop("lora_invocation", None)
        drop_forward_hooks(module, lambda _, hook: isinstance(getattr(hook, "__self__", None), Invocation))


def backward_pass() -> int:
    """The id of the backward pass that runs here; -1 outside of any, and always where torch.compile traces."""
    return -1 if torch.compiler.is_compiling() else torch_private.backward_task()


def _are_same(ids: Tensor | None, others: Tensor | None) -> bool:
    """True if an inner module works on `others`, the tokens of the module around it: it was given equal `ids`, or none
    (their embeddings)."""
    if ids is None or ids is others:
        return True
    return others is not None and ids.shape == others.shape and torch.equal(ids, others.to(ids.device))


def _argument(module: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None
