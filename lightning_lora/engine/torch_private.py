"""Private names of torch, and those of bitsandbytes and transformers that an engine needs: each once, with why.

Where one is gone, what stands here takes the slower path that needs no such name, or raises MovedError (see
borrowed.py). `_parameters`, `_buffers` and `_modules`, in which a module keeps what it is made of, are used everywhere.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_lora.borrowed import attribute, found, needed, replace
from lightning_lora.errors import MovedError

# Whether something looks into a computation: only where nothing does may it be fused.


def _not_known(*_: Any) -> bool:
    """In the place of a query that torch no longer has: something may look in, so the caller takes the plain path."""
    return True


under_transforms: Callable[[], bool] = found(
    "torch._C:_are_functorch_transforms_active", "sees that torch.func transforms the running code", _not_known
)
"""True inside torch.func's transforms (vmap, grad, jvp), which see no operation of torch.autograd.Function."""

modes: Callable[[], int] = found(
    "torch._C:_len_torch_dispatch_stack", "sees that a mode looks at each operation", _not_known
)
"""How many TorchDispatchModes are active here; 1 where it cannot be known."""

traces: Callable[[], bool] = found(
    "torch._C:_is_tracing", "sees that torch.jit.trace records, faster than by its public query", torch.jit.is_tracing
)
"""True while torch.jit.trace records."""

_CALLED: Any = nn.Module.__call__
is_fx_traced: Callable[[], bool] = found(
    "torch.fx._symbolic_trace:is_fx_symbolic_tracing",
    "sees that torch.fx traces",
    lambda: nn.Module.__call__ is not _CALLED,  # torch.fx replaces it meanwhile
)
"""True if torch.fx, or torch.export's tracing (which is told by its modes), runs the code with proxies."""


def runs_under_modes() -> bool:
    """True if a TorchDispatchMode is known to be active: False where it cannot be known."""
    return modes is not _not_known and modes() > 0


def may_be_dual() -> bool:
    """True inside forward_ad.dual_level, and where that cannot be known: then each tensor has to be asked."""
    return bool(getattr(forward_ad, "_current_level", 0) >= 0)


# Where autograd is: `disabled` and alora_invocation_tokens tell by it what activation checkpointing computes again.

next_node: Callable[[], int] = needed(
    "torch._C:_autograd._get_sequence_nr", "knows which nodes of autograd were made inside `disabled`"
)
"""The number that autograd gives to the next node of this thread."""

node_now: Callable[[], Any] = needed(
    "torch._C:_current_autograd_node", "knows in `disabled` which node a backward pass has reached"
)
"""The node that the backward pass of this thread has reached; None outside of one."""

backward_task: Callable[[], int] = needed(
    "torch._C:_current_graph_task_id", "tells one backward pass from another, for `disabled` and aLoRA"
)
"""The id of the backward pass that runs in this thread; -1 outside of any."""

saved_tensors_hooks: Callable[[bool], Any] = needed(
    "torch._C:_autograd._top_saved_tensors_default_hooks", "sees in `disabled` that a checkpoint is around a layer"
)
"""The innermost hooks on saved tensors, which a checkpoint that is not reentrant sets; None where there are none."""

when_backward_ends: Callable[[Callable[[], object]], None] = needed(
    "torch.autograd:Variable._execution_engine.queue_callback", "is told when a backward pass ends, for aLoRA"
)
"""Has a function called at the end of the running backward pass."""


def number_of(node: Any) -> int:
    """The number that autograd gave to `node`. Raises MovedError where nodes no longer tell it."""
    number: int = attribute(node, "_sequence_nr", "knows which nodes of autograd were made inside `disabled`")()
    return number


# Tensors.

without_torch_function: Any = needed(
    "torch._C:DisableTorchFunctionSubclass", "handles the weight that a reader of an adapted layer gets"
)
"""A context in which operations on a subclass of Tensor do not arrive at its `__torch_function__`."""

stand_in: Any = needed("torch:Tensor._make_subclass", "makes the weight that a reader of an adapted layer gets")
"""Of a class, a tensor and whether it needs a gradient: a leaf of that class in the tensor's memory."""

version: Callable[[Tensor], int] = needed("torch:Tensor._version.__get__", "sees that a tensor was changed in place")
"""A number that grows with each change of a tensor in place. (Torch's own function: torch.compile, which calls it
between graphs, would try to compile one of Python's.)"""

is_view: Callable[[Tensor], bool] = found("torch:Tensor._is_view", "saves a copy of what is no view", _not_known)
"""True if autograd keeps a tensor as a view of another one, and where that cannot be known."""


_Operator: Any = found("torch._ops:OpOverload", "reads what operators write to")


def schema(func: Any) -> Any:
    """What `func`, an operator of torch, says of its arguments and results; None if it is a function of Python's.
    Raises MovedError where operators no longer say it: what one writes to is not known then."""
    if _Operator is not None and isinstance(func, _Operator):
        return attribute(func, "_schema", "knows which operators write to a weight")
    return getattr(func, "_schema", None)


# Modules.

CALL: CodeType = nn.Module.__call__.__code__
"""The code that runs for every call of a module; its local variables are `self`, `args` and `kwargs`."""

OVERRIDDEN = ("_apply", "_load_from_state_dict", "_save_to_state_dict")
"""Methods of nn.Module in whose place ours are called. If torch gave one another name, ours would never be called."""


def check_overridden() -> None:
    """Raise MovedError if nn.Module lacks a method in whose place ours are called."""
    for name in OVERRIDDEN:
        attribute(nn.Module, name, "keeps adapters right while a model is moved, saved and loaded")


def called(frame: FrameType) -> tuple[nn.Module, Any, Any]:
    """The module, the positional and the named arguments of a call of `CALL`. Raises MovedError where its local
    variables have other names."""
    known = frame.f_locals
    try:
        return known["self"], known["args"], known["kwargs"]
    except KeyError as error:
        raise _no_local("torch.nn.Module.__call__", error.args[0], "finds out how the rows of a bank lie") from None


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of `module` itself that its state dict holds, each with its name."""
    left_out = getattr(module, "_non_persistent_buffers_set", None)
    kept = None if left_out is not None else module.state_dict(keep_vars=True)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in left_out if left_out is not None else name in kept:  # type: ignore[operator]
            yield name, buffer


_HOOKS = "puts hooks on a model, and takes them off again"


def _forward_hooks(module: nn.Module) -> list[dict[Any, Any]]:
    """The hooks before forward, those after it, and three dicts of marks on them."""
    names = ("pre_hooks", "hooks", "pre_hooks_with_kwargs", "hooks_with_kwargs", "hooks_always_called")
    return [attribute(module, f"_forward_{name}", _HOOKS) for name in names]


def put_forward_hooks(module: nn.Module, key: Any, begins: Any, ends: Any) -> None:
    """Have `begins` called before each forward and `ends` after it, also after one that raised.

    They always lie under the same `key`: the guards of torch.compile look at the keys, and public hooks get new ones.
    Raises MovedError where a module keeps its hooks elsewhere.
    """
    before, after, _, _, always = _forward_hooks(module)
    before[key], after[key], always[key] = begins, ends, True


def drop_forward_hooks(module: nn.Module, chosen: Callable[[Any, Any], bool]) -> None:
    """Take off the forward hooks for which `chosen(key, hook)` is true. Raises MovedError as `put_forward_hooks`."""
    before, after, *marks = _forward_hooks(module)
    for hooks in (before, after):
        for key in [key for key, hook in hooks.items() if chosen(key, hook)]:
            for kept in (hooks, *marks):
                kept.pop(key, None)


def calls_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """True if `optimizer` calls hooks around its step: one that was made without Optimizer.__init__ does not. False,
    for which LoRA+ has an error, where torch no longer marks such steps."""
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return bool(getattr(type(optimizer).step, "hooked", False))


def flat_weights(module: nn.Module) -> list[str]:
    """The names of the weights of a recurrent layer, in the order of `_flat_weights`, the list that its kernel takes.
    Raises MovedError where it has no such list: its adapted weights would not be used."""
    why = "has the kernels of recurrent layers compute with adapted weights"
    attribute(nn.RNNBase, "flatten_parameters", why)
    attribute(nn.RNNBase, "_update_flat_weights", why)
    if "_flat_weights" not in vars(module):
        raise MovedError("torch.nn.RNNBase._flat_weights", why)
    names: list[str] = attribute(module, "_flat_weights_names", why)
    return names


NORMS: Any = found(
    "torch.nn.modules.batchnorm:_NormBase",
    "freezes running statistics",
    (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    + (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""The class, or classes, of the layers that may have running statistics."""


# Convolutions.


def convolves_otherwise(own: type, known: type) -> bool:
    """True if the class `own` may do more than `known`, which convolves with its weight; also where torch no longer
    has the method that subclasses replace, and so for every class."""
    names = ("forward", "_conv_forward")
    return not hasattr(nn.Conv2d, names[1]) or any(getattr(own, n, None) is not getattr(known, n, None) for n in names)


def convolved(module: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """What the convolution `module` makes of `x`, with another weight and bias. Never asked where the method is gone:
    `convolves_otherwise` has said so."""
    y: Tensor = module._conv_forward(x, W, bias)
    return y


def padded(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """`x` with the padding that is not of zeros, as the convolution `module` pads it, and what is left to pad."""
    if module.padding_mode == "zeros":
        return x, module.padding
    sides = getattr(module, PADDING, None)
    if sides is None:  # the last dimension first, each on both sides
        by_hand = module.padding if not isinstance(module.padding, str) else (0,) * len(module.kernel_size)
        sides = [side for p in reversed(by_hand) for side in (p, p)]
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size)]
            sides = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
    return F.pad(x, sides, mode=module.padding_mode), 0


PADDING = "_reversed_padding_repeated_twice"
"""The attribute of a convolution that is a list."""


def output_padding(module: Any, x: Tensor, output_size: list[int] | None) -> Any:
    """What the transposed convolution `module` adds to one side of its output to give it `output_size`. Raises
    MovedError where a size is asked for and torch no longer computes it."""
    if output_size is None:
        return module.output_padding
    computed = attribute(module, "_output_padding", "gives transposed convolutions the size that is asked for")
    sizes = (module.stride, module.padding, module.kernel_size, len(module.kernel_size), module.dilation)
    return computed(x, output_size, *sizes)


# Data loaders and processes.

_SEEDS = "gives workers that live on the seeds that new ones would get"


def living_iterator(loader: Any) -> Any:
    """The iterator whose worker processes a loader keeps from epoch to epoch; None before the first one. Raises
    MovedError where a loader that keeps them no longer tells."""
    if isinstance(loader, DataLoader) and loader.persistent_workers:
        return attribute(loader, "_iterator", _SEEDS)
    return getattr(loader, "_iterator", None)


def shared_seed(iterator: Any) -> Any:
    """What a loader's iterator sends to each worker with the message that an epoch begins; None where it has none."""
    return getattr(iterator, "_shared_seed", None)


def send_seed(iterator: Any, shared: Any, base: Any = None) -> None:
    """Have the workers of `iterator` get `shared` when the next epoch begins, and new ones `base` as their seed.
    Raises MovedError where an iterator has no such seeds, or torch no longer gives numpy one in each worker."""
    numpy_seed(0, 0)
    replace(iterator, _SEEDS, _shared_seed=shared, **({} if base is None else {"_base_seed": base}))


numpy_seed: Callable[[int, int], Any] = needed("torch.utils.data._utils.worker:_generate_state", _SEEDS)
"""The seed of numpy in a worker process, of torch's base seed and the worker's number."""

processes_store: Callable[[], Any] | None = found(
    "torch.distributed.distributed_c10d:_get_default_store", "collects what processes leave after an exception"
)
"""The store by which the processes of a run have met; None where it is gone: then no process hears of another's."""


# bitsandbytes and transformers, which are not imported here: a model has their parts only if something imported them.


def unrearranged(data: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A 4-bit weight, and its state, in the order in which bitsandbytes quantizes: it rearranges them for some CPUs,
    and its inverse writes into `state`. Raises MovedError where there is no inverse any more."""
    name = "bitsandbytes.functional:_convert_weight_packed_for_cpu_inverse"
    result: tuple[Tensor, Any] = needed(name, "reads a 4-bit weight that was rearranged")(data, state)
    return result


@functools.lru_cache(maxsize=2)
def _generate(utils: Any) -> CodeType | None:
    mixin = getattr(utils, "GenerationMixin", None)
    return None if mixin is None else inspect.unwrap(mixin.generate).__code__


GENERATE_LOCALS = ("self", "generation_config", "batch_size", "input_ids")
"""Local variables of transformers' `GenerationMixin.generate`: they tell a bank how the beams of a prompt lie."""


def generation() -> dict[str, Any] | None:
    """The local variables of the `generate` of transformers that runs here, as far as they are set; None outside of
    it. Raises MovedError where one has another name."""
    code = _generate(sys.modules.get("transformers.generation.utils"))
    frame: FrameType | None = sys._getframe(1) if code is not None else None
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return None
    for name in GENERATE_LOCALS:
        if name not in frame.f_code.co_varnames + frame.f_code.co_cellvars:
            raise _no_local("transformers.GenerationMixin.generate", name, "finds out how the beams of a prompt lie")
    return {name: frame.f_locals.get(name) for name in GENERATE_LOCALS}


def _no_local(function: str, name: str, purpose: str) -> Exception:
    return MovedError(f"{function}, with a local variable called {name},", purpose)
