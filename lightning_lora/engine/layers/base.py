"""A layer is adapted by swapping its class, so it keeps its identity, its weight, its hooks and its state-dict keys.

`Adapter` is the mixin that all geometries share. A geometry says what A and B are for one kind of layer:

    class LinearLoRA(Adapter, adapts=nn.Linear):
        def update(self, x): ...

`adapt` gives the module the class `LoRALinear(LinearLoRA, Linear)`. A subclass of nn.Linear, quantized or otherwise
derived, is found through its parents and keeps its own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.engine import fused, switch
from lightning_lora.engine.layers.pair import BIAS, AdapterSpec, Pair, kept_ranks
from lightning_lora.engine.layers.reads import Reading, Reads, forget
from lightning_lora.engine.swap import name_of_input, swap, swap_back
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import can_be_dense, without_autocast
from lightning_lora.errors import AdapterStateError

NOT_GIVEN: Any = object()
"""The default of `input` in a forward: the caller gave the input as a keyword, by the base class's name for it."""


def _asking(forward: Any) -> Any:
    """Wrap a geometry's `forward`: where adapters are off (`disabled`), the base class's forward runs instead."""

    @functools.wraps(forward)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.used and switch.is_off(self):
            return self.bare_forward(*args, **kwargs)
        return forward(self, *args, **kwargs)

    asking.lora_asks = True  # type: ignore[attr-defined]
    return asking


class Adapter(Reads):
    """The base class of all geometries: `isinstance(module, Adapter)` is true for adapted layers and nothing else."""

    geometries: ClassVar[dict[type[nn.Module], type[Adapter]]] = {}
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_A0: Tensor  # noqa: N815
    lora_B0: Tensor  # noqa: N815

    def __init_subclass__(cls, adapts: type[nn.Module] | tuple[type[nn.Module], ...] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Adapter.geometries |= dict.fromkeys(adapts if isinstance(adapts, tuple) else (adapts,), cls)
        if "forward" in vars(cls) and not hasattr(cls.forward, "lora_asks"):
            cls.forward = _asking(cls.forward)  # type: ignore[method-assign]

    # A geometry overrides these. `check_swappable` refuses a module that has an attribute of one of these names.

    draws_b: ClassVar[bool] = False
    """True if A starts at zero and B is drawn (embeddings); otherwise B starts at zero and A is drawn."""
    replaces: ClassVar[tuple[str, ...]] = ()
    """Names of the base class that this geometry overrides on purpose."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Names of child modules that are adapted along with the module when it is a target."""

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        """Raise TargetError if `module` cannot be adapted with `spec`. It is called before anything is changed, once
        for all modules that differ only in the values of their tensors."""

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        """Raise TargetError if `module` does not support the DoRA, bias of B or init that `config` asks for."""

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for `module`: A reads the input, B writes the output."""
        raise NotImplementedError

    @classmethod
    def shapes_of(cls, module: Any, parameter: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for one parameter of `module`."""
        return cls.shapes(module, rank)

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        """Names of the parameters to adapt where `module` is a target; empty if its output is adapted instead."""
        return ()

    @staticmethod
    def suffix_of(parameter: str) -> str:
        """The suffix in the names of the tensors that adapt `parameter`: "_weight_ih" in "lora_A_weight_ih"."""
        return ""

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        """Reshape a weight W of `module` to the matrix (out, in) to which B A is added; a view where possible."""
        return W

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        """Undo `matrix`."""
        return M

    @classmethod
    def by_output(cls, module: Any, W: Tensor) -> Tensor:
        """Reshape a weight W of `module` so that its last dimension runs over the weights of one output (for DoRA)."""
        return cls.matrix(module, W)

    @classmethod
    def from_output(cls, module: Any, M: Tensor) -> Tensor:
        """Undo `by_output`."""
        return cls.from_matrix(module, M)

    @staticmethod
    def inputs_of(module: Any, x: Tensor) -> Tensor:
        """The vectors (n, in) that the matrix of `module` multiplies when its input is x: what `calibrate` measures."""
        raise NotImplementedError

    lora_by_position: ClassVar[bool] = False
    """True if a position of the output depends on that position of the input alone: what aLoRA needs."""

    @classmethod
    def way_for(cls, module: Any, reading: Reading) -> type[Adapter]:
        """This geometry, or one that adapts the weight where an update of the output might be something else, for a
        `module` that its parent uses as `reading` says. Raises TargetError if neither is possible."""
        return cls

    def update(self, x: Tensor) -> Tensor:
        """B A x for a layer input x, without the scale; shaped as the layer's output."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise AdapterStateError if this layer's update cannot be written as a change of its parameters."""
        weight = self._parameters.get("weight")
        if not can_be_dense(weight):
            raise AdapterStateError(
                f"a {type(self).base_class.__name__} cannot be merged: its weight is quantized in an unknown way, or "
                "computed from other parameters. Use the adapter unmerged, or load the base in full precision."
            )
        if self._parameters.get(BIAS) is not None and self._parameters.get("bias") is None:
            raise AdapterStateError(
                "it has no bias to which the bias of B (lora_bias) could be added. Use the adapter unmerged."
            )

    def shares_with(self, other: nn.Module) -> bool:
        """True if `other`, which holds the same weight, has the same adapter: merging need not untie the two then."""
        return False

    def swapped_in(self) -> None:
        """Called after `adapt` has given the module its class and its adapter."""

    def swapped_out(self) -> None:
        """Called before `unadapt` takes them away."""

    # All geometries share these.

    def forward(self, input: Any = NOT_GIVEN, *args: Any, **kwargs: Any) -> Any:
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        if switch.used and switch.is_off(self):
            return self.bare_forward(input, *args, **kwargs)
        base = self.base_forward(input, *args, **kwargs)
        return base if self.lora_by_weight else self.combine(base, self.update(input))

    forward.lora_asks = True  # type: ignore[attr-defined]

    def given_by_name(self, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Split keyword arguments into the input, found by the base class's name for it, and the others."""
        own_class: Any = type(self).base_class
        name = name_of_input(own_class)
        if name not in kwargs:
            raise TypeError(f"{type(self).__name__}.forward() misses its argument {name!r}.")
        return kwargs[name], {key: value for key, value in kwargs.items() if key != name}

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script calls this; an adapted layer cannot be scripted."""
        raise AdapterStateError(
            f"{self.lora_path!r} is adapted, and TorchScript compiles the source code of a class, which the class of "
            "an adapted layer does not have: call merge(model) first, or use torch.jit.trace or torch.compile."
        )

    def combine(self, base: Tensor, update: Tensor) -> Tensor:
        """The adapted output from the base's output and the unscaled update."""
        update, scale = update.to(base.dtype), self.lora.scale
        # torch 2.13's inductor fuses torch.add with B's product and loses the alpha.
        return base + scale * update if torch.compiler.is_compiling() else torch.add(base, update, alpha=scale)

    def lora_dropout(self, x: Tensor) -> Tensor:
        return fused.dropout(x, self.lora.dropout) if self.lora.dropout and self.training else x

    def factors(self, parameter: str = "weight", *, dropped: bool = True) -> tuple[Tensor, Tensor]:
        """A and B as the update uses them. With `dropped`, and in training, A has this forward's dropout of ranks.

        A frozen start A0, B0 is appended as further ranks: s (B A - B0 A0) = s [B - B0, B0] [A; A - A0]. That is zero
        bit for bit at the start, and stays exact where B A and B0 A0 almost cancel."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if "lora_A0" in self._buffers:
            A0, B0 = self.lora_A0.to(A.dtype), self.lora_B0.to(B.dtype)
            A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
        if dropped and self.training:
            A = A * kept_ranks(self.lora, A) if self.lora.rank_dropout or self.lora.module_dropout else A
        return A, B

    def matrices(self, parameter: str = "weight") -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) as matrices, or as stacks of matrices (one for each group of a convolution).
        Their products B A are the whole update, without scale and dropout."""
        A, B = self.factors(parameter, dropped=False)
        return A.flatten(1), B.flatten(1)

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and B's bias (or None) in `dtype`, with this forward's dropout of ranks."""
        A, B = self.factors()
        return A.to(dtype), B.to(dtype), getattr(self, BIAS).to(dtype) if BIAS in self.lora_names else None

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        """scale * B A, shaped as the layer's weight, in the precision of the factors (float32 at least)."""
        A, B = self.factors(parameter, dropped=dropped)
        dtype = torch.promote_types(A.dtype, torch.float32)
        product = B.flatten(1).to(dtype) @ A.flatten(1).to(dtype)
        # In place, since fresh memory costs more than the product; not for a DTensor, which may need redistributing.
        scaled = product.mul_(self.lora.scale) if type(product) is Tensor else self.lora.scale * product
        return self.from_matrix(self, scaled)

    def adapted_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        """W + scale * B A (rescaled by DoRA), in float32 or wider, also under autocast."""
        W = self.dense_weight(parameter)
        with without_autocast(W):
            delta = self.delta_weight(parameter, dropped=dropped)
            fits = delta.stride() == W.stride() and delta.dtype == torch.promote_types(delta.dtype, W.dtype)
            is_seen = torch.is_grad_enabled() or fused.sees_every_step()
            in_place = fits and type(delta) is Tensor and not is_seen
            return delta.add_(W) if in_place else W + delta

    def merged_parameters(self) -> dict[str, Tensor]:
        """The layer's own parameters after merging: name -> value, in the parameter's dtype."""
        merged = {"weight": self.adapted_weight().to(self.dense_weight().dtype)}
        mine, bias = self._parameters.get(BIAS), self._parameters.get("bias")
        if mine is not None and bias is not None:
            merged["bias"] = (bias + self.lora.scale * mine.to(torch.float32)).to(bias.dtype)
        return merged

    def merged_attributes(self) -> dict[str, Any]:
        """Other attributes that merging changes, such as `groups`: name -> value."""
        return {}

    def merged_shape(self) -> tuple[int, ...] | None:
        """The shape of the merged weight, if merging changes it."""
        return None

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        """Called after merging has replaced parameters of `module`, for a class that keeps them in a second place."""

    def lora_pairs(self, name: str) -> tuple[Pair, ...]:
        """The pairs (A, B) of this layer, which the model calls `name`."""
        return (Pair(name, self, "weight", self.lora, ""),)

    def extra_repr(self) -> str:
        mine = f"rank={self.lora.rank}, scale={self.lora.scale:g}"
        theirs = super().extra_repr()
        return f"{theirs}, {mine}" if theirs else mine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = [getattr(self, name) for name in self.lora_names]
        ours = {id(t) for p in own for t in (p, p.grad) if t is not None}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            if id(t) not in ours:
                return moved
            if t.is_meta and not moved.is_meta:  # to_empty leaves arbitrary numbers; `start_adapters` expects zeros
                return moved.zero_()
            # `module.to(torch.bfloat16)`, which Lightning's bf16-true does after injection, must not round A and B.
            too_narrow = self.lora.keeps_precision and moved.dtype.itemsize < torch.float32.itemsize
            return t.to(moved.device, torch.float32) if too_narrow else moved

        forget(self)  # a weight that was read before holds the memory from before the move
        return super()._apply(move, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        # A base checkpoint, which knows nothing of A and B, loads strictly after injection as well as before it.
        ours = {prefix + name for name in self.lora_names}
        is_base_checkpoint = ours.isdisjoint(state_dict)
        found: list[str] = []
        forget(self)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, found, *rest)
        missing.extend(key for key in found if not (is_base_checkpoint and key in ours))


def adapt(module: Any, mixin: Any, spec: AdapterSpec, tensors: Mapping[str, Tensor], path: str = "") -> None:
    """Make `module`, called `path` in its model, an adapted layer, in place.

    `mixin` is a geometry, or a tuple of variants and a geometry; `tensors` are the adapter's parameters and buffers by
    name."""
    own = module.__dict__
    # A read of these attributes gives the adapted value. A user's own layer type may have no weight.
    reads = tuple(spec.parameters) or (
        ("weight",) if "weight" in own["_parameters"] or hasattr(module, "weight") else ()
    )
    reads = (*reads, "bias") if BIAS in tensors else reads
    for name, tensor in tensors.items():  # not register_parameter, which would repeat checks of `check_swappable`
        own["_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"][name] = tensor
    own["lora"], own["lora_names"], own["lora_path"] = spec, tuple(tensors), path
    swap(module, "LoRA", mixin, reads)
    module.swapped_in()


def unadapt(module: Adapter) -> Callable[[], None]:
    """Undo `adapt`: the module gets its class back and loses its adapter; its weight is not touched. Returns a function
    that adapts it again."""
    cls: Any = type(module)
    own = module.__dict__
    spec, names, path = own["lora"], own["lora_names"], own["lora_path"]
    module.swapped_out()
    swap_back(module)
    tensors: dict[str, Tensor] = {}
    for name in names:
        held = own["_parameters"]
        if name not in held:
            held = own["_buffers"] if name in own["_buffers"] else own
        tensors[name] = held.pop(name)
    del own["lora"], own["lora_names"], own["lora_path"]
    forget(module)
    return functools.partial(adapt, module, cls.mixin, spec, tensors, path)


def geometry_of(cls: type[nn.Module]) -> type[Adapter] | None:
    """The geometry registered for `cls` or for its nearest parent; None where no layer of that kind can be adapted."""
    for parent in cls.__mro__:
        if parent in Adapter.geometries:
            return Adapter.geometries[parent]
    return None


def has_own_forward(cls: type[nn.Module]) -> bool:
    """True if `cls` overrides the forward of the class that its geometry is registered for. Of a swapped class, the
    base class is asked."""
    cls = cls.__dict__.get("base_class", cls)
    known = next(parent for parent in cls.__mro__ if parent in Adapter.geometries)
    return cls.forward is not known.forward


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapted layers of `model` with their names; a layer that is registered under several names comes once.

    >>> import torch
    >>> from lightning_lora.engine import LoRAConfig, adapters, inject
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["1"]))
    >>> [name for name, layer in adapters(model)]
    ['1']
    """
    found: Any = Tree.of(model).of_classes(is_adapter)
    yield from found


def is_adapter(cls: type[nn.Module]) -> bool:
    """True if modules of that class are adapted layers."""
    return issubclass(cls, Adapter)


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The pairs (A, B) of `model`: one for each adapted layer, or one for each adapted parameter of a layer.

    Args:
        model: What `inject` was called on, or what holds it.

    Raises:
        Nothing: a model without adapters has no pairs.

    Example:
        >>> import torch
        >>> from lightning_lora.engine import LoRAConfig, inject, pairs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> [(pair.name, tuple(pair.A.shape), tuple(pair.B.shape)) for pair in pairs(model)]
        [('0', (2, 4), (3, 2))]
    """
    for name, module in adapters(model):
        yield from module.lora_pairs(name)
