"""Layers inside of what torch, Lightning and others put around modules are named as if it were not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import lightning as L
import peft
import pytest
import torch
from cases import randomise
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from lightning_lora import AdapterBank, LoRAConfig, inject, load_adapter, merge, merged, remove, save_adapter
from lightning_lora.engine import adapter_state_dict, base_fingerprint, load_adapter_state_dict
from lightning_lora.hub.adapters import save_tensors


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


def fabric(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = L.Fabric(accelerator="cpu", devices=1).setup_module(module)
    return wrapped


def averaged(module: nn.Module) -> nn.Module:
    return AveragedModel(module)


def nested(module: nn.Module) -> nn.Module:
    return fabric(DataParallel(compiled(module)))


WRAPPERS = [compiled, checkpoint_wrapper, both, fabric, DataParallel, DistributedDataParallel, averaged, nested]


@pytest.fixture(autouse=True)
def one_process(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """A group of one, which DistributedDataParallel asks for."""
    if "DistributedDataParallel" not in request.node.name:
        yield
    else:
        torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        yield
        torch.distributed.destroy_process_group()


def wrap(model: Net, wrapper: Callable[[nn.Module], nn.Module]) -> Net:
    model.blocks[0] = wrapper(model.blocks[0])
    return model


CONFIG = LoRAConfig(rank=2, target_modules=["up"], bias="lora_only", modules_to_save=["down"])
x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
wrappers = pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda f: f.__name__)


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
    load_adapter_state_dict(model, adapter_state_dict(plain))

    folders = save_adapter(model, tmp_path / "model"), save_adapter(plain, tmp_path / "plain")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    torch.testing.assert_close(found, expected)
    assert len({(folder / "adapter_config.json").read_text() for folder in folders}) == 1
    given = {name: tensor + 1 for name, tensor in adapter_state_dict(model).items()}
    save_tensors(model, tmp_path / "given", given, None)
    torch.testing.assert_close(
        load_file(tmp_path / "given" / "adapter_model.safetensors"), {key: t + 1 for key, t in expected.items()}
    )
    assert any(isinstance(block, type(wrapper(nn.Linear(1, 1)))) for block in model.blocks)  # they are back

    other = wrap(Net(), wrapper)
    load_adapter(other, folders[0])
    torch.testing.assert_close(other.eval()(x), plain.eval()(x))


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


# Around the whole model.


def whole(wrapper: Callable[[nn.Module], nn.Module], first: bool) -> nn.Module:
    """An adapted net inside of `wrapper`, which came first or second."""
    if first:
        model = wrapper(Net())
        inject(model, CONFIG)
        return model
    net = Net()
    inject(net, CONFIG)
    return wrapper(net)


order = pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "adapted first"])


@wrappers
@order
def test_a_wrapped_model_is_saved_and_loaded_as_the_plain_one(
    wrapper: Callable[[nn.Module], nn.Module], first: bool, tmp_path: Path
) -> None:
    plain = Net()
    inject(plain, CONFIG)
    randomise(plain)
    model = whole(wrapper, first)
    assert list(adapter_state_dict(model)) == list(adapter_state_dict(plain))
    load_adapter_state_dict(model, adapter_state_dict(plain))
    assert base_fingerprint(model) == base_fingerprint(plain)
    folders = save_adapter(model, tmp_path / "model"), save_adapter(plain, tmp_path / "plain")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    torch.testing.assert_close(found, expected)
    assert len({(folder / "adapter_config.json").read_text() for folder in folders}) == 1

    output = plain.eval()(x)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Net(), folders[0]).eval()(x), output)
    other = wrapper(Net())
    load_adapter(other, folders[1])
    torch.testing.assert_close(other.eval()(x), output)
    remove(other)
    torch.testing.assert_close(other.eval()(x), Net().eval()(x))


@wrappers
@order
def test_a_wrapped_child_of_a_lightning_module_names_the_folder_no_differently(
    wrapper: Callable[[nn.Module], nn.Module], first: bool, tmp_path: Path
) -> None:
    class Lit(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net: nn.Module = Net()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).sum()

    plain, model = Lit(), Lit()
    inject(plain, CONFIG)
    randomise(plain)
    if first:
        model.net = wrapper(model.net)
    inject(model, CONFIG)
    if not first:
        model.net = wrapper(model.net)
    load_adapter_state_dict(model, adapter_state_dict(plain))
    folders = save_adapter(model, tmp_path / "model"), save_adapter(plain, tmp_path / "plain")
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    torch.testing.assert_close(found, expected)
    assert "base_model.model.blocks.0.up.lora_A.weight" in found
    assert base_fingerprint(model) == base_fingerprint(plain)


@wrappers
def test_a_wrapped_model_is_served_and_merged_as_the_plain_one(
    wrapper: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    config = LoRAConfig(rank=2, target_modules=["up", "down"])
    plain = Net()
    inject(plain, config)
    randomise(plain)
    folder = save_adapter(plain, tmp_path / "plain")
    output = plain.eval()(x)

    served = wrapper(Net()).eval()
    bank = AdapterBank.from_folders(served, {"a": folder})
    with bank.use("a"), torch.no_grad():
        torch.testing.assert_close(served(x), output)
    bank.add("its own", adapter_state_dict(plain), config=config)
    bank.close()

    model = wrapper(Net()).eval()
    load_adapter(model, folder)
    with merged(model), torch.no_grad():
        torch.testing.assert_close(model(x), output)
    merge(model)
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_names_that_mention_wrappers_mean_the_plain_ones(prefix: str, tmp_path: Path) -> None:
    def config(before: str) -> LoRAConfig:
        return LoRAConfig(
            rank=2,
            target_modules=[f"{before}blocks.0.up", f"{before}blocks.1.up"],
            rank_pattern={f"{before}blocks.0.up": 3},
            modules_to_save=[f"{before}blocks.1.down"],
            target_parameters=[f"{before}blocks.0.down.weight"],
            exclude_modules=[f"{before}blocks.1.up"],
        )

    plain, model = Net(), DataParallel(compiled(Net()))
    inject(plain, config(""))
    report = inject(model, config(prefix))
    assert [m.name for m in report.modules] == ["blocks.0.up", "blocks.0.down.weight"]
    assert {n: t.shape for n, t in adapter_state_dict(model).items()} == {
        n: t.shape for n, t in adapter_state_dict(plain).items()
    }
    as_regex = DataParallel(compiled(Net()))
    inject(as_regex, LoRAConfig(rank=2, target_modules=rf"{prefix.replace('.', chr(92) + '.')}blocks\.\d\.up"))
    assert list(adapter_state_dict(as_regex))[::2] == ["blocks.0.up.lora_A", "blocks.1.up.lora_A"]


@pytest.mark.parametrize("targets", [["0", "2"], None], ids=["suffixes", "whole names"])
@pytest.mark.parametrize("wrapper", [compiled, DataParallel])
def test_a_folder_that_peft_wrote_of_a_wrapped_child_is_read_onto_the_plain_one_and_the_wrapped(
    wrapper: Callable[[nn.Module], nn.Module], targets: list[str] | None, tmp_path: Path
) -> None:
    class Holds(nn.Module):
        def __init__(self, around: Callable[[nn.Module], nn.Module] = lambda m: m) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = around(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    base = Holds(wrapper)
    whole = [name for name, m in base.named_modules() if type(m) is nn.Linear]
    config = peft.LoraConfig(r=2, target_modules=targets or whole, rank_pattern={whole[0]: 3}, init_lora_weights=False)
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path)
    x = torch.randn(3, 4)
    for model in (Holds(), Holds(wrapper)):
        load_adapter(model, tmp_path)
        # Three sums of a few terms in float32.
        torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_children_of_ones_own_keep_such_names(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self._orig_mod, self._forward_module = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self._forward_module(self._orig_mod(self.module(x)))

    torch.manual_seed(0)
    model = Own()
    names = ["module", "_orig_mod", "_forward_module"]
    inject(model, LoRAConfig(rank=2, target_modules=names))
    randomise(model)
    wrapped = fabric(DataParallel(model))
    assert [name.removesuffix(".lora_A") for name in adapter_state_dict(wrapped)][::2] == names
    folder = save_adapter(wrapped, tmp_path / "own")
    torch.manual_seed(0)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Own(), folder)(x), model(x))
