"""Layers inside of what torch puts around modules: a folder names them as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import LoRAConfig, inject, load_adapter, remove, save_adapter
from lightning_lora.engine import adapter_state_dict, base_fingerprint, load_adapter_state_dict


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(self.up(x)).tanh())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="eager")
    return wrapped


def both(module: nn.Module) -> nn.Module:
    return checkpoint_wrapper(compiled(module))


def wrap(model: Net, wrapper: Callable[[nn.Module], nn.Module]) -> Net:
    model.blocks[0] = wrapper(model.blocks[0])
    return model


CONFIG = LoRAConfig(rank=2, target_modules=["up"], bias="lora_only", modules_to_save=["down"])
x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
wrappers = pytest.mark.parametrize("wrapper", [compiled, checkpoint_wrapper, both], ids=lambda f: f.__name__)


@wrappers
@pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "adapted first"])
def test_a_folder_does_not_know_of_wrappers(
    wrapper: Callable[[nn.Module], nn.Module], first: bool, tmp_path: Path
) -> None:
    plain = Net()
    inject(plain, CONFIG)
    randomise(plain)
    model = wrap(Net(), wrapper) if first else Net()
    inject(model, CONFIG)
    if not first:
        wrap(model, wrapper)
    assert base_fingerprint(model) == base_fingerprint(plain)
    load_adapter_state_dict(model, dict(zip(adapter_state_dict(model), adapter_state_dict(plain).values())))

    folders = save_adapter(model, tmp_path / "model"), save_adapter(plain, tmp_path / "plain")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    torch.testing.assert_close(found, expected)
    assert len({(folder / "adapter_config.json").read_text() for folder in folders}) == 1
    given = {name: tensor + 1 for name, tensor in adapter_state_dict(model).items()}
    save_adapter(model, tmp_path / "given", tensors=given)
    torch.testing.assert_close(
        load_file(tmp_path / "given" / "adapter_model.safetensors"), {key: t + 1 for key, t in expected.items()}
    )
    assert any(isinstance(block, type(wrapper(nn.Identity()))) for block in model.blocks)  # they are back

    other = wrap(Net(), wrapper)
    load_adapter(other, folders[0])
    torch.testing.assert_close(other.eval()(x), plain.eval()(x))
    torch._dynamo.reset()


@wrappers
def test_adapters_are_removed_from_beneath_wrappers(wrapper: Callable[[nn.Module], nn.Module]) -> None:
    before = Net()
    model = Net()
    inject(model, CONFIG)
    randomise(model)
    wrap(model, wrapper)
    remove(model)
    torch.testing.assert_close(model(x), before(x))
    assert all(p.requires_grad for p in model.parameters())
    torch._dynamo.reset()
