"""Activated LoRA: the adapter acts from a sequence of tokens on, and what came before is the base's own.

So the keys and values that the base computed for a prompt serve the adapter as they are (Greenewald et al. 2025,
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

from lightning_lora.engine import switch
from lightning_lora.engine.layers.base import Adapter, adapters
from lightning_lora.engine.layers.linear import LinearLoRA
from lightning_lora.errors import AdapterStateError, TargetError


class ALoRA(Adapter):
    """In front of a linear layer: the update is added where the adapter was invoked, and nowhere else."""

    lora_invocation: Invocation

    @classmethod
    def check_geometry(cls, geometry: type[Adapter]) -> None:
        """Raise TargetError unless a layer of that geometry computes each position by itself."""
        if not issubclass(geometry, LinearLoRA) or geometry.lora_by_weight:
            raise TargetError(
                "alora_invocation_tokens adapts linear layers alone, whose update can be added at some positions and "
                "not at others: leave it out with exclude_modules"
            )

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
    """A module that was given tokens, from when it is called until it returns."""

    module: nn.Module
    backward: int
    """The backward pass that it is called in, to compute again what was not kept; -1 outside of any."""
    is_outermost: bool = True
    ids: Tensor | None = None
    invoked: Tensor | None = None
    """(rows, positions)"""
    seen: Tensor | None = None
    """The last tokens, in which an invocation may have begun."""


class Own(threading.local):
    """What each thread has for itself. A forward runs in one thread and awaits nothing, so that this keeps asyncio's
    tasks apart too; torch.compile, which traces the hooks, knows it, and not a ContextVar."""

    running: tuple[Running, ...] = ()
    """Innermost first, of forwards inside of others too."""
    last: Tensor | None = None
    """What the last forward that ended invoked: for a head that is called by itself on what the model returned."""


class Invocation:
    """Which positions of the tokens in the running forward come from the last occurrence of `tokens` on, row by row.

    It hears the tokens by hooks on the modules of the model that are given `input_ids`. A row that is invoked stays so
    as long as its cache goes on: the cache itself remembers it, so that several can be used in turn, and copied. What
    is generated token by token after a prompt does not invoke; a longer continuation, such as the next turn of a chat,
    can, also with a sequence that began before it.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tuple(tokens)
        self.own = Own()
        self.backwards: dict[int, list[Tensor]] = {}
        """For each backward pass that is under way, in any thread: what was invoked in each forward that it reached."""

    def __reduce__(self) -> Any:
        return Invocation, (self.tokens,)

    def running(self) -> Iterator[Running]:
        """The modules of the forward that runs here, innermost first."""
        for entry in self.own.running:
            yield entry
            if entry.is_outermost:
                return

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A forward pre-hook."""
        ids, cache = (_argument(module, name, args, kwargs) for name in ("input_ids", "past_key_values"))
        if switch.used and switch.is_off(module):
            ids = None  # nothing acts, and nothing is remembered of it
        around = list(self.running())
        entry = Running(module, backward_pass(), ids=ids)
        try:
            # One that runs already is called by a forward of its own, inside of the other.
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
                f"The cache knows of {was.shape[0]} rows which of them were invoked, and this forward has "
                f"{ids.shape[0]}: rows of a cache cannot be chosen or repeated after the prompt."
            )
        if goes_on and ids.shape[1] == 1:
            invoked = was[:, None]
        else:
            invoked = was[:, None] | self.from_last_occurrence(torch.cat([seen, ids], dim=1))[:, seen.shape[1] :]
        return invoked, torch.cat([seen, ids], dim=1)[:, max(0, seen.shape[1] + ids.shape[1] - len(self.tokens) + 1) :]

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """A forward hook, called where the forward raised as well."""
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
        """Learn of it when a backward pass reaches `output`: checkpointed layers are then computed again, in whatever
        thread autograd has for them."""

        def begins(_: Tensor) -> None:
            task = torch._C._current_graph_task_id()
            if task not in self.backwards:
                self.backwards[task] = []
                engine: Any = torch.autograd.Variable._execution_engine
                engine.queue_callback(lambda: self.backwards.pop(task, None))
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
        """(rows, positions): whether a position comes from the last occurrence of the tokens on, itself included."""
        length, count = ids.shape[1], len(self.tokens)
        if length < count:
            return torch.zeros_like(ids, dtype=torch.bool)
        wanted = torch.tensor(self.tokens, device=ids.device, dtype=ids.dtype)
        begins = (ids.unfold(1, count, 1) == wanted).all(-1)
        position = torch.arange(length, device=ids.device)
        last = torch.where(begins, position[: begins.shape[1]], -1).amax(1, keepdim=True)
        return (last >= 0) & (position >= last)

    def at(self, output: Tensor) -> Tensor:
        """The positions of a layer's `output` (..., width), in its shape without the width."""
        running, task = next(self.running(), None), backward_pass()
        if running is not None and running.backward == task:
            invoked = running.invoked
        elif task == -1:
            invoked = self.own.last
        else:  # computed again, under gradient checkpointing
            forwards = self.backwards.get(task, [])
            if len(forwards) > 1:
                raise AdapterStateError(
                    "Under gradient checkpointing an adapter with alora_invocation_tokens needs a backward pass for "
                    "each forward: in one of several, it cannot be told for which a layer is computed again."
                )
            invoked = forwards[0] if forwards else None
        if invoked is None:
            raise AdapterStateError(
                "An adapter with alora_invocation_tokens looks for them in input_ids, and the model was given none: "
                "call the model with input_ids, not with inputs_embeds, nor a part of it by itself; under gradient "
                "checkpointing, compute the loss from what the model returns."
            )
        shape = output.shape[:-1]
        if shape == invoked.shape:
            return invoked
        if len(shape) == 1 and shape[0] == invoked.numel():  # rows and positions in one, as for experts
            return invoked.reshape(-1)
        if len(shape) == 2 and shape[0] == invoked.shape[0] and shape[1] < invoked.shape[1]:  # the last ones, of a head
            return invoked[:, -shape[1] :]
        raise AdapterStateError(
            f"A layer with alora_invocation_tokens computes outputs of shape {tuple(output.shape)}, which are not "
            f"those of {tuple(invoked.shape)} tokens: leave it out with exclude_modules."
        )


_MEMORY = "lora_invocation"
"""The attribute under which a cache remembers which of its rows are invoked, and the last tokens."""


def readers(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that are given `input_ids` and hold others."""
    return [
        module
        for module in model.modules()
        if any(True for _ in module.children()) and "input_ids" in inspect.signature(module.forward).parameters
    ]


def check_readers(model: nn.Module) -> None:
    """Raise TargetError where nothing in `model` is given tokens."""
    if not readers(model):
        raise TargetError(
            f"alora_invocation_tokens are looked for in input_ids, and no module of {type(model).__name__} takes any "
            "in its forward: it is for causal language models as transformers has them."
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
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Invocation)]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)


def backward_pass() -> int:
    """The one that this is called from, -1 outside of any; what torch.compile traces is taken to be outside."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def _are_same(ids: Tensor | None, others: Tensor | None) -> bool:
    """Whether a module inside was given `others`, those of the one around it, itself or by their embeddings."""
    if ids is None or ids is others:
        return True
    return others is not None and ids.shape == others.shape and torch.equal(ids, others.to(ids.device))


def _argument(module: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(module.forward).parameters)
    place = names.index(name) if name in names else len(args)
    return args[place] if place < len(args) else None
