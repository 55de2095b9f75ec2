"""LightningCLI makes the optimizer from the base's parameters, before anything is adapted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_lora import LoRACallback, LoRAConfig, inject, save_adapter
from lightning_lora.engine import adapters
from lightning_lora.engine.layers import pairs
from lightning_lora.errors import AdapterStateError

from .lit import Lit

# Between Lightning and jsonargparse.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_lora.LoRACallback
      init_args:
        rank: 4
        lora_plus_ratio: 4
        target_modules: ["0", "3"]
"""


@pytest.fixture(autouse=True)
def no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fit.py"])


def run(tmp_path: Path, config: str, *arguments: str) -> LightningCLI:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    return LightningCLI(Plain, save_config_callback=None, args=["fit", "--config", str(path), *arguments])


class Plain(Lit):
    """Leaves its optimizer to the command line."""

    configure_optimizers = Lit.__mro__[1].configure_optimizers  # type: ignore[attr-defined, assignment]


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "Adagrad"])
def test_an_optimizer_of_the_command_line_trains_the_adapters(tmp_path: Path, optimizer: str) -> None:
    # By its whole path: bitsandbytes, where it was imported, has optimizers of the same names.
    chosen = ["--optimizer", f"torch.optim.{optimizer}", "--optimizer.lr", "0.05"]
    cli = run(tmp_path, CONFIG, *chosen, "--lr_scheduler", "ExponentialLR", "--lr_scheduler.gamma", "0.9")
    layers = dict(adapters(cli.model))
    assert list(layers) == ["net.0", "net.3"]
    assert all(m.lora.rank == 4 and bool(m.lora_B.abs().sum() > 0) for m in layers.values())
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LoRACallback)]
    assert callback.config.rank == 4
    (group,) = cli.trainer.optimizers[0].param_groups
    assert {id(p) for p in group["params"]} == {id(p) for p in cli.model.parameters() if p.requires_grad}


def test_a_misspelt_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, CONFIG.replace("rank: 4", "rnak: 4"))
    assert "rnak" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        "{rank: 4, target_modules: ['0', '3']}",
        "{class_path: lightning_lora.LoRAConfig, init_args: {rank: 4, target_modules: ['0', '3']}}",
    ],
)
def test_the_config_of_the_callback_may_be_one_object(tmp_path: Path, config: str) -> None:
    text = CONFIG[: CONFIG.index("        rank: 4")] + f"        config: {config}\n        lora_plus_ratio: 4\n"
    cli = run(tmp_path, text, "--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.05")
    assert list(dict(adapters(cli.model))) == ["net.0", "net.3"]
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, LoRACallback)]
    assert callback.config is not None
    assert callback.config.rank == 4


def test_it_starts_from_an_adapter(tmp_path: Path) -> None:
    module = Lit()
    inject(module, LoRAConfig(rank=3, target_modules=["0"]))
    save_adapter(module, tmp_path / "it")
    start = CONFIG[: CONFIG.index("        rank: 4")] + f"        adapter: {tmp_path / 'it'}\n"
    chosen = ["--optimizer", "torch.optim.AdamW", "--optimizer.lr", "0.05"]
    assert list(dict(adapters(run(tmp_path, start, *chosen).model))) == ["net.0"]
    with pytest.raises(AdapterStateError, match="rank is 3 there and 4 here"):
        run(tmp_path, start + "        rank: 4\n", *chosen)


def test_the_callback_may_be_given_its_config_as_an_object(tmp_path: Path) -> None:
    config = CONFIG.replace("        rank: 4\n", "        config: {rank: 4, target_modules: ['0', '3']}\n")
    config = config.replace('        target_modules: ["0", "3"]\n', "")
    cli = run(tmp_path, config, "--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.05")
    assert {pair.spec.rank for pair in pairs(cli.model)} == {4}
    assert len(list(adapters(cli.model))) == 2
