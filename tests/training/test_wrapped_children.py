"""A module of which a part is compiled, or otherwise wrapped: its checkpoints are those of the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DataParallel

from lightning_lora import LoRACallback, adapter_state_dict
from lightning_lora.training.checkpoint import load_from_checkpoint

from .lit import Lit, net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # each run has its own folder


def compiled(module: nn.Module) -> nn.Module:
    wrapped: nn.Module = torch.compile(module, backend="eager")
    return wrapped


def nested(module: nn.Module) -> nn.Module:
    return DataParallel(checkpoint_wrapper(compiled(module)))


class Wrapped(Lit):
    net: Any

    def __init__(self, wrapper: Callable[[nn.Module], nn.Module] | None = None) -> None:
        super().__init__()
        if wrapper is not None:
            self.net = wrapper(self.net)

    def build(self, seed: int) -> None:
        self.net = nn.Sequential(*(m for m in net(seed) if not isinstance(m, nn.Dropout)))


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Wrapped, Path]]:
    folders = count()

    def run(wrapper: Any, epochs: int, *callbacks: Any, path: Path | None = None) -> tuple[Wrapped, Path]:
        torch.manual_seed(0)
        module = Wrapped(wrapper)
        folder = tmp_path / str(next(folders))
        lora = LoRACallback(rank=2, target_modules=["0", "2"])
        checkpoints = ModelCheckpoint(folder, save_last=True)
        trainer(lora, *callbacks, checkpoints, max_epochs=epochs).fit(module, ckpt_path=path, weights_only=False)
        return module, folder / "last.ckpt"

    return run


wrappers = pytest.mark.parametrize(
    "wrapper", [compiled, checkpoint_wrapper, DataParallel, nested], ids=lambda f: f.__name__
)


@wrappers
def test_a_run_resumes_from_the_checkpoint_of_another_in_which_more_or_less_is_wrapped(wrapper: Any, run: Any) -> None:
    whole = adapter_state_dict(run(None, 2)[0])
    _, of_plain = run(None, 1)
    _, of_wrapped = run(wrapper, 1)
    saved, expected = (torch.load(path, weights_only=False) for path in (of_wrapped, of_plain))
    torch.testing.assert_close(saved["state_dict"], expected["state_dict"])
    for key in ("base_fingerprint", "scales", "configs"):
        assert saved["lightning_lora"][key] == expected["lightning_lora"][key]
    for here, path in ((wrapper, of_plain), (None, of_wrapped), (wrapper, of_wrapped)):
        torch.testing.assert_close(adapter_state_dict(run(here, 2, path=path)[0]), whole)


@wrappers
def test_an_average_in_a_checkpoint_has_plain_names_and_comes_back(wrapper: Any, run: Any) -> None:
    def ema() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.5)

    whole = adapter_state_dict(run(wrapper, 2, ema())[0])
    _, path = run(wrapper, 1, ema())
    saved = torch.load(path, weights_only=False)
    assert saved["state_dict"].keys() == saved["current_model_state"].keys() == whole.keys()
    assert not all(saved["state_dict"][n].equal(saved["current_model_state"][n]) for n in whole)
    for here in (wrapper, None):
        torch.testing.assert_close(adapter_state_dict(run(here, 2, ema(), path=path)[0]), whole)


@wrappers
def test_the_checkpoint_of_a_wrapped_module_loads_into_the_plain_one(wrapper: Any, run: Any) -> None:
    module, path = run(wrapper, 1)
    for here in (wrapper, None):
        loaded = load_from_checkpoint(Wrapped, path, wrapper=here, weights_only=False)
        torch.testing.assert_close(adapter_state_dict(loaded), adapter_state_dict(module))
    # Lightning and users call load_state_dict on the module itself.
    other = load_from_checkpoint(Wrapped, path, wrapper=wrapper, weights_only=False)
    given = {name: tensor + 1 for name, tensor in adapter_state_dict(other).items()}
    other.load_state_dict(dict(given))
    torch.testing.assert_close(adapter_state_dict(other), given)
    other.load_state_dict(module.state_dict())
    torch.testing.assert_close(adapter_state_dict(other), adapter_state_dict(module))
