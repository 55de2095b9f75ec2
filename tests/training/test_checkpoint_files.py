"""Where a checkpoint's file comes from and what is in it: no stranger's code runs, and no damaged byte gets in."""

from __future__ import annotations

import functools
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import nn

from lightning_lora import LoRACallback, adapter_state_dict, load_from_checkpoint
from lightning_lora.errors import CheckpointError

from .lit import Lit, loader, net, trainer
from .test_checkpoints import tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Attribute .* is an instance of `nn.Module`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a web server that serves the folder tmp_path."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            if not self.path.startswith("/cut/"):
                return super().do_GET()
            content = (tmp_path / self.path.removeprefix("/cut/")).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def trained(path: Path, *, seed: int = 0) -> Lit:
    torch.manual_seed(seed)
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module := Lit())
    run.save_checkpoint(path)
    return module


def same(module: pl.LightningModule, other: pl.LightningModule) -> bool:
    theirs = adapter_state_dict(other)
    return all(torch.equal(value, theirs[name]) for name, value in adapter_state_dict(module).items())


def by_trainer(entry: str) -> Callable[..., Lit]:
    def load(path: Any, **settings: Any) -> Lit:
        run = trainer(LoRACallback(rank=2), max_epochs=1)
        getattr(run, entry)(module := Lit(), ckpt_path=path, **settings)
        return module

    return load


ENTRANCES = {name: by_trainer(name) for name in ("fit", "validate", "test", "predict")}
ENTRANCES["load_from_checkpoint"] = functools.partial(load_from_checkpoint, Lit)


class Runs:
    """What leaves a mark when it is unpickled, as a pickle of a stranger's might do worse."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def schemes(path: Path, address: str) -> dict[str, Any]:
    with fsspec.open(f"memory://{path.name}", "wb") as file:
        file.write(path.read_bytes())
    return {
        "path": path,
        "http": f"{address}/{path.name}",
        "HTTP": f"HTTP{address[4:]}/{path.name}",
        "file": f"file://{path}",
        "memory": f"memory://{path.name}",
    }


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_checkpoint_runs_no_code_wherever_it_comes_from(entrance: str, tmp_path: Path, address: str) -> None:
    trained(path := tmp_path / "x.ckpt")
    torch.save({**torch.load(path), "extra": Runs(tmp_path / "mark")}, path)
    for where in schemes(path, address).values():
        with pytest.raises(CheckpointError, match=r"holds objects of .*Path.*add_safe_globals.*weights_only=False"):
            ENTRANCES[entrance](where)
        assert not (tmp_path / "mark").exists()
        ENTRANCES[entrance](where, weights_only=False)
        (tmp_path / "mark").unlink()  # it was asked for


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_checkpoint_that_is_a_bare_pickle_runs_no_code_either(entrance: str, tmp_path: Path, address: str) -> None:
    torch.save(Runs(tmp_path / "mark"), path := tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    for where in schemes(path, address).values():
        with pytest.raises(CheckpointError, match=r"x\.ckpt is not a whole checkpoint"):
            ENTRANCES[entrance](where)
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_checkpoint_gives_its_weights_wherever_it_lies(entrance: str, tmp_path: Path, address: str) -> None:
    module = trained(path := tmp_path / "x.ckpt")
    for where in schemes(path, address).values():
        assert same(ENTRANCES[entrance](where), module)


def test_two_checkpoints_of_one_name_are_not_taken_for_each_other(tmp_path: Path, address: str) -> None:
    modules = [trained(tmp_path / run / "last.ckpt", seed=seed) for seed, run in enumerate(("first", "second"))]
    for module, run in zip(modules, ("first", "second")):
        assert same(load_from_checkpoint(Lit, f"{address}/{run}/last.ckpt"), module)
        assert same(ENTRANCES["test"](f"{address}/{run}/last.ckpt"), module)
    (tmp_path / "first" / "last.ckpt").write_bytes((tmp_path / "second" / "last.ckpt").read_bytes())
    assert same(ENTRANCES["fit"](f"{address}/first/last.ckpt"), modules[1])


@pytest.mark.parametrize("folder", ["http", "https_runs", "~"])
def test_a_folder_may_have_the_name_of_a_scheme(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    module = trained(tmp_path / "x.ckpt")
    if folder != "~":
        (tmp_path / folder).mkdir()
        (tmp_path / "x.ckpt").rename(tmp_path / folder / "x.ckpt")
    for load in ENTRANCES.values():
        assert same(load(f"{folder}/x.ckpt"), module)
    with pytest.raises(FileNotFoundError):
        ENTRANCES["test"](f"{folder}/absent.ckpt")


def test_what_a_server_does_not_give_whole_is_named(tmp_path: Path, address: str) -> None:
    trained(tmp_path / "x.ckpt")
    for where, message in (
        (f"{address}/absent.ckpt", "could not be fetched: HTTP Error 404"),
        (f"{address}/cut/x.ckpt", r"could not be fetched: .* of \d+ bytes arrived"),
        ("http://127.0.0.1:1/x.ckpt", "could not be fetched"),
    ):
        for load in ENTRANCES.values():
            with pytest.raises(CheckpointError, match=message):
                load(where)


def test_a_checkpoint_io_of_ones_own_is_asked_for_its_own_places(tmp_path: Path) -> None:
    class Store(TorchCheckpointIO):
        def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
            asked.append((path, weights_only))
            return super().load_checkpoint(tmp_path / "x.ckpt", map_location, weights_only)

    asked: list[Any] = []
    module = trained(tmp_path / "x.ckpt")
    again = Lit()
    trainer(LoRACallback(rank=2), plugins=[Store()]).test(again, ckpt_path="store://x", verbose=False)
    assert same(again, module)
    assert asked == [("store://x", True)]


# Damage.


def places(path: Path, count: int) -> list[int]:
    """Bits of the file: some of every record, and others anywhere."""
    chosen = random.Random(3)
    with zipfile.ZipFile(path) as file:
        records = file.infolist()
        starts = []
        for record in records:
            with file.open(record) as opened:
                starts.append(opened._orig_compress_start)  # type: ignore[attr-defined]
    inside = [
        start * 8 + chosen.randrange(r.file_size * 8)
        for r, start in zip(records, starts)
        for _ in range(2)
        if r.file_size
    ]
    anywhere = [chosen.randrange(path.stat().st_size * 8) for _ in range(count)]
    return inside + anywhere


@pytest.mark.slow
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    trained(path := tmp_path / "x.ckpt")
    content, whole = path.read_bytes(), dict(tensors(torch.load(path)))
    refused, flips = 0, places(path, 150)
    for bit in flips:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        read: dict[str, Any] = {}

        class Reads(Lit):
            def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
                read.update(checkpoint)  # noqa: B023

        for weights_only in (None, False):
            try:
                run = trainer(LoRACallback(rank=2), max_epochs=1)
                run.fit(Reads(), ckpt_path=path, weights_only=weights_only)
            except CheckpointError:
                refused += 1
            else:
                now = dict(tensors(read))
                assert now.keys() == whole.keys()
                assert all(torch.equal(now[name], value) for name, value in whole.items()), bit
    assert refused >= len(flips)  # more than half of both readings: most of a small file is content


def test_checksums_are_written_even_where_torch_was_told_not_to(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        trained(path := tmp_path / "x.ckpt")
        assert not torch.serialization.get_crc32_options()
        assert zipfile.ZipFile(path).testzip() is None
        torch.save(torch.load(path), path)  # without
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.warns(UserWarning, match="was written without checksums"):
        load_from_checkpoint(Lit, path)


# Hyperparameters.


@dataclass
class Parts:
    backbone: nn.Module


def state_of(backbone: nn.Module) -> dict[str, Any]:
    return dict(backbone.state_dict())


KEPT_IN: dict[str, Callable[[nn.Module], Any]] = {
    "itself": lambda backbone: backbone,
    "a dict": lambda backbone: {"backbone": backbone, "width": 8},
    "a list": lambda backbone: [3, backbone],
    "a tuple in a dict": lambda backbone: {"width": 8, "deep": {"pair": (backbone, 4)}},
    "a dataclass": Parts,
    "a namespace": lambda backbone: SimpleNamespace(inner=[backbone]),
    "a partial": lambda backbone: functools.partial(nn.Sequential, backbone),
    "a bound method": lambda backbone: backbone.forward,
    "its state dict": state_of,
    "its first weight": lambda backbone: [next(backbone.parameters())],
}


class Holding(Lit):
    def __init__(self, kept: Any = None, backbone: nn.Module | None = None, lr: float = 1e-2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters(ignore=["backbone"])
        if backbone is not None:
            self.net = backbone  # type: ignore[assignment]


@pytest.mark.parametrize("kind", KEPT_IN)
def test_a_base_anywhere_among_the_settings_stays_out_of_the_checkpoint(kind: str, tmp_path: Path) -> None:
    base = net()
    kept = KEPT_IN[kind](base)

    class Data(pl.LightningDataModule):
        def __init__(self, kept: Any) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> Any:
            return loader(8)

        def val_dataloader(self) -> Any:
            return loader(20)

    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module := Holding(kept, base), Data(kept))
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    saved = torch.load(path, weights_only=True)  # so there is no module in it
    shapes = {tuple(p.shape) for p in net().parameters()}
    assert not [name for name, t in tensors(saved["hyper_parameters"]) if tuple(t.shape) in shapes]
    assert not [name for name, t in tensors(saved["datamodule_hyper_parameters"]) if tuple(t.shape) in shapes]
    assert saved["hyper_parameters"]["lr"] == 1e-2
    assert module.hparams["kept"] is kept
    if kind == "a tuple in a dict":
        assert saved["hyper_parameters"]["kept"] == {"width": 8, "deep": {"pair": (None, 4)}}
    # It has a default, which is not what was trained.
    with pytest.raises(CheckpointError, match=r"given as 'kept.*load_from_checkpoint\(Holding, path, kept=\.\.\.\)"):
        load_from_checkpoint(Holding, path)
    assert same(load_from_checkpoint(Holding, path, kept=KEPT_IN[kind](base)), module)


def test_tensors_among_the_settings_that_are_not_the_bases_stay(tmp_path: Path) -> None:
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(Holding({"class_weights": torch.ones(3)}))
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.equal(torch.load(path)["hyper_parameters"]["kept"]["class_weights"], torch.ones(3))
    load_from_checkpoint(Holding, path)


def test_a_module_kept_in_a_dict_of_all_settings_is_asked_for_by_that_dicts_name(tmp_path: Path) -> None:
    class OfOneDict(Lit):
        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__()
            self.save_hyperparameters(config)
            self.net = config["backbone"]

    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module := OfOneDict({"backbone": net(), "depth": 2}))
    run.save_checkpoint(path := tmp_path / "x.ckpt")
    assert torch.load(path)["hyper_parameters"]["depth"] == 2
    with pytest.raises(CheckpointError, match=r"given as .*'backbone'.*path, config=\.\.\.\)"):
        load_from_checkpoint(OfOneDict, path)
    assert same(load_from_checkpoint(OfOneDict, path, config={"backbone": net(), "depth": 2}), module)


# Compiled and plain.


class Counts(nn.Sequential):
    """Keeps a count in a buffer, as a queue or a moving average would be."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


class Plain(Lit):
    def build(self, seed: int) -> None:
        self.net = Counts(*net(seed))


class Compiled(Plain):
    def build(self, seed: int) -> None:
        super().build(seed)
        self.net = torch.compile(self.net, backend="eager")


class LayerCompiled(Plain):
    def build(self, seed: int) -> None:
        super().build(seed)
        self.net[3] = torch.compile(self.net[3], backend="eager")


STYLES = {"plain": Plain, "compiled": Compiled, "layer compiled": LayerCompiled}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("then", STYLES)
@pytest.mark.parametrize("first", STYLES)
def test_a_checkpoint_moves_between_a_compiled_network_and_a_plain_one(
    first: str, then: str, averaged: bool, tmp_path: Path
) -> None:
    class Sees(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            weights = [value.clone() for value in adapter_state_dict(pl_module).values()]
            states = [value for _, value in tensors(trainer.optimizers[0].state_dict())]
            seen[:] = [*weights, *(value.clone() for value in states), next(pl_module.buffers()).clone()]

    def run(style: type[Lit], path: Path | None = None) -> None:
        saver = ModelCheckpoint(tmp_path / str(path is None), filename="x", save_on_train_epoch_end=True)
        average = [EMAWeightAveraging(decay=0.5)] if averaged else []
        callbacks = LoRACallback(rank=2), *average, saver, Sees()
        running = trainer(*callbacks, max_epochs=2 if path else 1, num_sanity_val_steps=0)
        running.fit(style(), ckpt_path=path)

    seen: list[torch.Tensor] = []
    run(STYLES[first])
    saved = torch.load(path := tmp_path / "True" / "x.ckpt", weights_only=True)
    assert not [name for name, _ in tensors(saved) if "_orig_mod" in name]
    assert set(saved["state_dict"]) == {f"net.{i}.lora_{x}" for i in (0, 3) for x in "AB"}
    run(STYLES[then], path)
    there = list(saved["current_model_state" if averaged else "state_dict"].values())
    there += [value for _, value in tensors(saved["optimizer_states"])]
    there += saved["lightning_lora"]["buffers"].values()
    assert len(seen) == len(there) == 4 + 4 * 3 + 1
    assert all(torch.equal(one, other) for one, other in zip(seen, there))
    loaded = adapter_state_dict(load_from_checkpoint(STYLES[then], path)).values()
    assert all(torch.equal(one, other) for one, other in zip(loaded, saved["state_dict"].values(), strict=True))


def test_names_that_meet_once_wrappers_are_taken_off_are_refused(tmp_path: Path) -> None:
    trained(path := tmp_path / "x.ckpt")
    checkpoint = torch.load(path)
    checkpoint["state_dict"]["net._orig_mod.0.lora_A"] = checkpoint["state_dict"]["net.0.lora_A"] + 1
    torch.save(checkpoint, path)
    for load in ENTRANCES.values():
        with pytest.raises(ValueError, match=r"unexpected: net\._orig_mod\.0\.lora_A"):
            load(path)
