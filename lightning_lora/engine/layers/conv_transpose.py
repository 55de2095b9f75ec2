"""nn.ConvTranspose1d, 2d, 3d: A is a pointwise convolution to `rank` channels, B a transposed one like the base."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers.conv import Convolution
from lightning_lora.errors import TargetError


class ConvTransposeLoRA(Convolution):
    """A is (rank, in / groups, 1, ...), B is (out, rank / groups, *kernel).

    Both are grouped as the base is. Stride, padding, output padding and dilation belong to B.
    """

    lora_kind = "transposed convolution"
    lora_pointwise: Any
    lora_convolve: Any

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        init = INITS[config.init]
        if init.gives != "Tensor" or "C" in init.wants:
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
        padding = base._output_padding(
            x, output_size, base.stride, base.padding, base.kernel_size, len(base.kernel_size), base.dilation
        )
        h = self.lora_pointwise(x, A, groups=base.groups)
        B = self.from_output(self, B.flatten(1))  # as a transposed convolution stores its weight: rank first
        return self.lora_convolve(h, B, bias, base.stride, base.padding, padding, base.groups, base.dilation)

    def matrices(self, parameter: str = "weight") -> tuple[Tensor, Tensor]:  # (g, r, in / g), (g, out / g * kernel, r)
        A, B = (t.unflatten(0, (self.groups, -1)) for t in self.factors(parameter, dropped=False))
        return A.flatten(2), B.movedim(2, -1).flatten(1, -2)

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        A, B = self.factors(parameter, dropped=dropped)
        base: Any = self
        dtype = torch.promote_types(A.dtype, torch.float32)
        A, B = (t.to(dtype).unflatten(0, (base.groups, -1)) for t in (A.flatten(1), B))
        return self.lora.scale * torch.einsum("gri,gor...->gio...", A, B).flatten(0, 1)


class ConvTranspose1dLoRA(ConvTransposeLoRA, adapts=nn.ConvTranspose1d):
    lora_pointwise = staticmethod(torch.conv1d)
    lora_convolve = staticmethod(torch.conv_transpose1d)


class ConvTranspose2dLoRA(ConvTransposeLoRA, adapts=nn.ConvTranspose2d):
    lora_pointwise = staticmethod(torch.conv2d)
    lora_convolve = staticmethod(torch.conv_transpose2d)


class ConvTranspose3dLoRA(ConvTransposeLoRA, adapts=nn.ConvTranspose3d):
    lora_pointwise = staticmethod(torch.conv3d)
    lora_convolve = staticmethod(torch.conv_transpose3d)
