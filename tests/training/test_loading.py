"""What is loaded fits, or is refused by name; the model is then as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import LoRACallback, load_from_checkpoint, remove
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, CheckpointError

from .lit import STYLES, BuiltInSetup, Lit, net, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # of ModelCheckpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of a run of rank 2."""
    saver = ModelCheckpoint(tmp_path, filename="good")
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(Lit())
    return tmp_path / "good.ckpt"


def edited(path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    checkpoint = torch.load(path)
    edit(checkpoint)
    torch.save(checkpoint, path.with_name("edited.ckpt"))
    return path.with_name("edited.ckpt")


def key(checkpoint: dict[str, Any]) -> dict[str, Any]:
    return checkpoint["state_dict"]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda c: key(c).pop("net.3.lora_B"), r"missing: net\.3\.lora_B"),
    "extra": (lambda c: key(c).update({"net.9.lora_A": torch.ones(1)}), r"unexpected: net\.9\.lora_A"),
    "a base weight": (lambda c: key(c).update({"net.5.bias": torch.ones(3)}), r"unexpected: net\.5\.bias"),
    "shape": (lambda c: key(c).update({"net.0.lora_A": torch.ones(3, 8)}), r"net\.0\.lora_A has shape \(3, 8\)"),
    "not finite": (lambda c: key(c)["net.0.lora_A"].fill_(torch.nan), r"lora_A holds values that are not finite"),
    "not a tensor": (lambda c: key(c).update({"net.0.lora_A": 1.0}), r"net\.0\.lora_A is a float"),
    "empty": (lambda c: key(c).clear(), r"missing: net\.0\.lora_A"),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("how", ["fit", "test", "load_from_checkpoint"])
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(edit: str, how: str, path: Path) -> None:
    change, message = EDITS[edit]
    bad = edited(path, change)
    if how == "load_from_checkpoint":
        with pytest.raises(AdapterFormatError, match=message):
            load_from_checkpoint(Lit, str(bad))
        return
    module = Lit()
    with pytest.raises(AdapterFormatError, match=message):
        getattr(trainer(LoRACallback(rank=2), max_epochs=2), how)(module, ckpt_path=str(bad))
    assert all(not t.any() for n, t in adapter_state_dict(module).items() if n.endswith("lora_B"))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 4}, CheckpointError, "rank, alpha or use_rslora differ"),
        ({"rank": 2, "alpha": 8}, CheckpointError, r"multiplies its update of 'net.0' by 8, this run's by 4"),
        ({"rank": 2, "use_rslora": True}, CheckpointError, "rank, alpha or use_rslora differ"),
        ({"rank": 4, "alpha": 32}, AdapterFormatError, r"has shape \(2, 8\) where the model has \(4, 8\)"),
        ({"rank": 2, "target_modules": ["net.0"]}, AdapterFormatError, r"unexpected: net\.3\.lora_A"),
        ({"rank": 2, "modules_to_save": ["5"]}, AdapterFormatError, r"missing: net\.5\.weight"),
    ],
)
def test_an_adapter_of_another_config_is_refused(
    fields: dict[str, Any], error: type[Exception], message: str, path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer(LoRACallback(**fields), max_epochs=2).fit(Lit(), ckpt_path=str(path))


def test_an_adapter_of_another_base_is_refused_unless_the_user_insists(path: Path) -> None:
    with pytest.raises(BaseMismatchError, match="check_base=False"):
        trainer(LoRACallback(rank=2), max_epochs=2).fit(Lit(seed=1), ckpt_path=str(path))
    with pytest.raises(BaseMismatchError, match="check_base=False"):
        load_from_checkpoint(Lit, path, seed=1)
    trainer(LoRACallback(rank=2, check_base=False), max_epochs=2).fit(Lit(seed=1), ckpt_path=str(path))
    assert load_from_checkpoint(Lit, path, seed=1, check_base=False).net[0].lora_B.any()


def test_one_changed_weight_makes_another_base(path: Path) -> None:
    module = Lit()
    with torch.no_grad():
        module.net[5].weight[1, 2] += 0.1
    with pytest.raises(BaseMismatchError):
        trainer(LoRACallback(rank=2)).test(module, ckpt_path=str(path))


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_the_same_base_in_another_precision_is_the_same_base(precision: Any, path: Path) -> None:
    module = Lit()
    module.forward = lambda x: module.net(x.to(module.net[0].weight.dtype)).float()  # type: ignore[method-assign]
    trainer(LoRACallback(rank=2), precision=precision).test(module, ckpt_path=str(path), verbose=False)
    assert module.net[0].lora_B.any()


def test_a_plain_checkpoint_is_refused_and_its_use_explained(tmp_path: Path) -> None:
    run = trainer(ModelCheckpoint(tmp_path, filename="plain"), max_epochs=1)
    run.fit(Lit())
    for load in (
        lambda: trainer(LoRACallback(rank=2), max_epochs=2).fit(Lit(), ckpt_path=str(tmp_path / "plain.ckpt")),
        lambda: load_from_checkpoint(Lit, tmp_path / "plain.ckpt"),
    ):
        with pytest.raises(CheckpointError, match="holds no adapter"):
            load()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused_by_name(share: float, path: Path) -> None:
    whole = path.read_bytes()
    broken = path.with_name("broken.ckpt")
    broken.write_bytes(whole[: int(len(whole) * share)])
    for load in (
        lambda: trainer(LoRACallback(rank=2), max_epochs=2).fit(Lit(), ckpt_path=str(broken)),
        lambda: load_from_checkpoint(Lit, broken),
    ):
        with pytest.raises(CheckpointError, match=r"broken\.ckpt is not a whole checkpoint"):
            load()
    trainer(LoRACallback(rank=2), max_epochs=2).fit(Lit(), ckpt_path=str(path))


@pytest.mark.parametrize("content", [b"not a checkpoint", b"\x80\x04garbage", b"PK\x03\x04 but no zip"])
def test_a_file_that_is_no_checkpoint_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "garbage.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"garbage\.ckpt is not a whole checkpoint"):
        trainer(LoRACallback(rank=2), max_epochs=2).fit(Lit(), ckpt_path=str(tmp_path / "garbage.ckpt"))


@pytest.mark.parametrize("style", [s for s in STYLES if s is not BuiltInSetup])
def test_load_from_checkpoint_gives_the_trained_module_of_any_style(style: type[Lit], tmp_path: Path) -> None:
    module = style(seed=3)
    saver = ModelCheckpoint(tmp_path, filename="best", save_weights_only=True)
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(module)
    loaded = load_from_checkpoint(style, tmp_path / "best.ckpt", weights_only=True)
    x = torch.randn(4, 8)
    assert loaded.hparams.seed == 3
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    remove(loaded)
    assert torch.equal(loaded(x), net(3).eval()(x))


def test_load_from_checkpoint_says_why_layers_built_in_setup_are_missing(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="best")
    trainer(LoRACallback(rank=2), saver, max_epochs=1).fit(BuiltInSetup())
    with pytest.raises(AdapterFormatError, match=r"built in setup\(\)"):
        load_from_checkpoint(BuiltInSetup, tmp_path / "best.ckpt")


def test_lightnings_own_load_from_checkpoint_is_an_error_not_silence(path: Path) -> None:
    with pytest.raises(RuntimeError, match="Missing key"):
        Lit.load_from_checkpoint(path)


def test_a_missing_checkpoint_is_lightnings_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        trainer(LoRACallback(rank=2), max_epochs=1).fit(Lit(), ckpt_path=str(tmp_path / "none.ckpt"))
