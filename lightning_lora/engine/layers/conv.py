"""nn.Conv1d, nn.Conv2d, nn.Conv3d: A is a convolution like the base, to `rank` channels; B is a pointwise one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers.base import NOT_GIVEN, Adapter
from lightning_lora.engine.layers.by_weight import by_weight
from lightning_lora.engine.layers.cell import NOT_HIDDEN, Cell, Factors, OwnAdapters, copy_scaled
from lightning_lora.engine.layers.pair import BIAS, AdapterSpec
from lightning_lora.engine.layers.reads import keeps_attributes
from lightning_lora.engine.torch_private import convolved, convolves_otherwise, output_padding, padded
from lightning_lora.errors import AdapterStateError, TargetError

_EXACT = (torch.float32, torch.float64)


class Convolution(Adapter):
    """The part that all convolutions share, transposed or not."""

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        if spec.rank % module.groups:
            raise TargetError(
                f"a convolution with groups={module.groups} needs a rank that is a multiple of that, not {spec.rank}: "
                "set it with rank_pattern, or leave the layer out with exclude_modules"
            )

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        init = INITS[config.init]
        if module.groups != 1 and (init.computes or init.gives != "Tensor"):
            raise TargetError(
                f"init={config.init!r} starts from the matrix of a layer, and a convolution with groups="
                f"{module.groups} has no single matrix to which B A is added: leave it out with exclude_modules, or "
                "choose init='kaiming'"
            )

    @classmethod
    def way_for(cls, module: Any, reading: Any) -> type[Adapter]:
        own: Any = type(module)
        known = next(parent for parent in own.__mro__ if parent in Adapter.geometries)
        geometry: Any = cls
        return by_weight(geometry) if convolves_otherwise(own, known) else geometry


def convolution_of(module: Any) -> Callable[..., Tensor]:
    """The function of torch that convolves in as many dimensions as `module`."""
    by_dimensions: Any = (F.conv1d, F.conv2d, F.conv3d)
    return by_dimensions[len(module.kernel_size) - 1]


class ConvLoRA(Convolution, adapts=(nn.Conv1d, nn.Conv2d, nn.Conv3d)):
    """A is (rank, in, *kernel), B is (out, rank / groups, 1, ...).

    The layout is PEFT's: A sees all input channels, B is grouped as the base is. Stride, padding, padding mode and
    dilation belong to A. With groups > 1, A mixes channels that the base keeps apart: so merging makes a convolution
    without groups, whose weight is `groups` times as large.
    """

    groups: int

    @classmethod
    def way_for(cls, module: Any, reading: Any) -> type[Adapter]:
        way = super().way_for(module, reading)
        if way.lora_by_weight and module.groups != 1:
            raise TargetError(
                f"its class has a forward of its own, and with groups={module.groups} no weight of its shape can hold "
                "the adapter: leave it out with exclude_modules"
            )
        return way

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        super().check_variant(module, config)
        if config.use_dora and module.groups != 1:
            raise TargetError(
                f"DoRA has no meaning for a convolution with groups={module.groups}: its adapter reads channels that "
                "its weight does not, so W + s B A has no norm of W to keep. Leave it out with exclude_modules"
            )

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(module.kernel_size)
        A = (rank, module.in_channels, *module.kernel_size)
        return A, (module.out_channels, rank // module.groups, *ones)

    def forward(self, input: Any = NOT_GIVEN, *args: Any, **kwargs: Any) -> Tensor:
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        if args or kwargs or not self._is_faster_in_one(input):
            return super().forward(input, *args, **kwargs)
        return convolved(self, input, self.adapted_weight(dropped=True).to(input.dtype), self.own("bias"))

    def _is_faster_in_one(self, x: Tensor) -> bool:
        """True if one convolution of x, with W + s B A, is faster than three, with W, A and B.

        The backward pass has one convolution in place of three as well. Convolutions to and from the few channels of
        the rank are slow: on a CPU rank 8 costs as much as rank 16. If the weight is smaller than x, no more memory is
        kept. False in half precision, where an update smaller than the weight's rounding would be lost.
        """
        cls: Any = type(self)
        base: Any = self
        W = self._parameters.get("weight", self.__dict__.get("weight"))
        if (
            cls.combine is not Adapter.combine
            or not keeps_attributes(cls)
            or BIAS in self.lora_names
            or base.groups != 1
            or (self.lora.dropout and self.training)  # dropout changes the input of A, not that of W
            or W is None
            or W.dtype not in _EXACT
            or x.dtype != W.dtype
            or torch.compiler.is_compiling()  # a branch on sizes would compile again for other sizes
            or (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type))
        ):
            return False
        channels, kernel = W.shape[0], W[0, 0].numel()
        positions = x.numel() // max(1, base.in_channels * math.prod(base.stride))  # about those of the output
        return channels <= max(64, 2 * self.lora.rank) and positions >= max(4, kernel) * channels

    def check_shown(self, name: str) -> None:
        if self.groups != 1:
            raise AdapterStateError(
                f"The weight of {self.lora_path!r} was read. It is a convolution with groups={self.groups}, whose "
                "adapter reads channels that its weight does not, so no weight of that shape can hold the adapter: "
                "call the layer and do not read its weight, or leave it out with exclude_modules."
            )

    def update(self, x: Tensor) -> Tensor:  # (N, in, *size) -> (N, out, *size')
        base: Any = self
        x, padding = padded(base, self.lora_dropout(x))
        A, B, bias = self.factors_in(x.dtype)
        convolve = convolution_of(base)
        h = convolve(x, A, None, base.stride, padding, base.dilation)
        return convolve(h, B, bias, groups=base.groups)

    def matrices(self, parameter: str = "weight") -> tuple[Tensor, Tensor]:
        A, B = super().matrices(parameter)
        return (A, B) if self.groups == 1 else (A.unflatten(0, (self.groups, -1)), B.unflatten(0, (self.groups, -1)))

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        A, B = self.factors(parameter, dropped=dropped)
        if A.shape[0] == B.shape[1]:  # without groups
            return super().delta_weight(parameter, dropped=dropped)
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, B = A.to(dtype).unflatten(0, (self.groups, -1)), B.to(dtype).flatten(1).unflatten(0, (self.groups, -1))
        return self.lora.scale * torch.einsum("gor,gri...->goi...", B, A).flatten(0, 1)

    def dense_weight(self, parameter: str = "weight") -> Tensor:
        W = super().dense_weight(parameter)
        if self.groups == 1:
            return W
        blocks = W.unflatten(0, (self.groups, -1))  # the weights of each group; those of other channels are zero
        whole = W.new_zeros(self.groups, blocks.shape[1], self.groups, *W.shape[1:])
        each = torch.arange(self.groups, device=W.device)
        whole[each, :, each] = blocks
        return whole.flatten(2, 3).flatten(0, 1)

    def merged_attributes(self) -> dict[str, Any]:
        return {} if self.groups == 1 else {"groups": 1}

    def merged_shape(self) -> tuple[int, ...] | None:
        base: Any = self
        return None if base.groups == 1 else (base.out_channels, base.in_channels, *base.kernel_size)

    @staticmethod
    def inputs_of(module: Any, x: Tensor) -> Tensor:
        # A convolution with one kernel for each number that the layer's kernels cover: it picks that number.
        size = (module.in_channels, *module.kernel_size)
        pick = torch.eye(math.prod(size), dtype=x.dtype, device=x.device).view(-1, *size)
        x, padding = padded(module, x)
        picked = convolution_of(module)(x, pick, None, module.stride, padding, module.dilation)
        return picked.movedim(-len(module.kernel_size) - 1, -1).reshape(-1, len(pick))

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        return W.flatten(1)

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.view(M.shape[0], -1, *module.kernel_size)


class ConvCell(Cell, serves=ConvLoRA):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d. B is stored as a full matrix, with zeros between the base's groups."""

    module: Any

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        return (rank, self.module.in_channels, *self.module.kernel_size), (rank, self.out), (self.out,), (self.out,)

    def is_batched(self, x: Tensor) -> bool:
        return x.dim() == len(self.module.kernel_size) + 2

    def has_rows_first(self, x: Tensor, count: int) -> bool:
        return self.is_batched(x) and x.shape[0] == count and (count == 1 or self.hidden is NOT_HIDDEN)

    def hides(self, x: Tensor, is_indexed: bool) -> str | None:
        return self.hidden.always or (None if is_indexed else self.hidden.where_flat)

    def doubt(self, x: Tensor) -> str | None:
        return None

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        rank, groups = A.shape[0], self.module.groups
        self.A[slot, :rank].copy_(A)
        wide, tall = rank // groups, self.out // groups
        for group in range(groups):
            inner = slice(group * wide, (group + 1) * wide)
            outer = slice(group * tall, (group + 1) * tall)
            copy_scaled(self.B[slot, inner, outer], B[outer].flatten(1).T, scale)

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        A, B = factors
        h = self._convolved(x if self.is_batched(x) else x[None], A)
        return base + torch.einsum("nr...,ro->no...", h, B).view(base.shape)

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        A, B = rows.factors(self, base.dtype)
        # The rows become groups of channels of one image, so that each is convolved with its own A.
        side = x.reshape(rows.count, -1, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        h = self._convolved(side, A.flatten(0, 1), groups=rows.count)
        h = h.unflatten(1, (rows.count, -1)).transpose(0, 1)  # (rows, each, rank, *size)
        return base + torch.einsum("ner...,nro->neo...", h, B).reshape(base.shape)

    def _convolved(self, x: Tensor, A: Tensor, groups: int = 1) -> Tensor:
        module = self.module
        x, padding = padded(module, x)
        return convolution_of(module)(x, A, None, module.stride, padding, module.dilation, groups)


# nn.ConvTranspose1d, 2d, 3d: A is a pointwise convolution to `rank` channels, B a transposed one like the base.


class ConvTransposeLoRA(Convolution, adapts=(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
    """A is (rank, in / groups, 1, ...), B is (out, rank / groups, *kernel).

    Both are grouped as the base is. Stride, padding, output padding and dilation belong to B.
    """

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        super().check_variant(module, config)
        init = INITS[config.init]
        if init.gives != "Tensor" or init.reads("inputs"):
            raise TargetError(
                f"init={config.init!r} starts from one matrix, and a transposed convolution has one for each position "
                "of its kernel: choose init='kaiming', or leave it out with exclude_modules"
            )

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(module.kernel_size)
        A = (rank, module.in_channels // module.groups, *ones)
        return A, (module.out_channels, rank // module.groups, *module.kernel_size)

    @classmethod
    def by_output(cls, module: Any, W: Tensor) -> Tensor:  # (in, out / groups, *kernel) -> (out, in / groups * kernel)
        return W.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    @classmethod
    def from_output(cls, module: Any, M: Tensor) -> Tensor:
        blocks = M.unflatten(1, (-1, *module.kernel_size)).unflatten(0, (module.groups, -1))
        return blocks.transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # type: ignore[override]
        return self.combine(self.base_forward(input, output_size), self.update(input, output_size))

    def update(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:  # (N, in, *size) -> (N, out, *size')
        base: Any = self
        x = self.lora_dropout(x)
        A, B, bias = self.factors_in(x.dtype)
        padding = output_padding(base, x, output_size)
        h = convolution_of(base)(x, A, groups=base.groups)
        B = self.from_output(self, B.flatten(1))  # as a transposed convolution stores its weight: rank first
        convolve: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(base.kernel_size) - 1]
        y: Tensor = convolve(h, B, bias, base.stride, base.padding, padding, base.groups, base.dilation)
        return y

    def matrices(self, parameter: str = "weight") -> tuple[Tensor, Tensor]:  # (g, r, in / g), (g, out / g * kernel, r)
        A, B = (t.unflatten(0, (self.groups, -1)) for t in self.factors(parameter, dropped=False))
        return A.flatten(2), B.movedim(2, -1).flatten(1, -2)

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        A, B = self.factors(parameter, dropped=dropped)
        base: Any = self
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, B = (t.to(dtype).unflatten(0, (base.groups, -1)) for t in (A.flatten(1), B))
        return self.lora.scale * torch.einsum("gri,gor...->gio...", A, B).flatten(0, 1)
