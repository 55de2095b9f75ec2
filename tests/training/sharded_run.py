"""What each of two processes does with a sharded model, and how two are started."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, multiprocessing, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_lora import load_adapter, save_adapter
from lightning_lora.engine import (
    Adapter,
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    fused,
    inject,
    load_adapter_state_dict,
    merge,
    remove,
    start_adapters,
)
from lightning_lora.engine.weights import whole
from lightning_lora.errors import AdapterStateError, TargetError, TrainingError

from .ddp_run import BATCH, Share, Shared, fit
from .lit import data

WORLD = 2
# Sums over two processes are added in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
_PATIENCE = timedelta(seconds=60)


def together(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(rank, *arguments)` in two processes that can talk."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _join, (Path(folder) / "store", function, arguments), nprocs=WORLD, start_method="fork"
        )


def _join(rank: int, store: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # by which Lightning knows that the processes are there
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=_PATIENCE)
    function(rank, *arguments)
    dist.destroy_process_group()


class Net(nn.Module):
    """A residual network whose blocks are checkpointed, or not."""

    def __init__(self, *, checkpoints: bool = False) -> None:
        super().__init__()
        self.checkpoints = checkpoints
        self.first = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(2))
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x))
        return self.last(x).tanh()


def base(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return Net(**options)


def adapted(checkpoints: bool = False, **config: Any) -> nn.Module:
    """With updates that are not zero, the same in each process."""
    model = base(checkpoints=checkpoints)
    inject(model, LoRAConfig(rank=3, **config))  # which two processes share unevenly
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.train()


def shard(model: nn.Module, *, each: bool = True, **how: Any) -> nn.Module:
    """By FSDP2: each adapted layer and the rest, or all at once."""
    for module in [m for m in model.modules() if isinstance(m, Adapter)] if each else ():
        fully_shard(module, **how)
    return fully_shard(model, **how)


def batch(seed: int) -> Tensor:
    return torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(seed)  # of what dropout draws
    return model(batch(seed).to(dtype)).float().square().mean()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trains_as_one(rank: int, dropout: float, dtype: torch.dtype | None) -> None:
    """Losses, gradients and weights are, step by step, those of one process that has all of the data."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    for checkpoints, each, reshard in ((False, True, True), (True, True, True), (False, False, False)):
        model, one = (adapted(checkpoints, dropout=dropout) for _ in range(2))
        shard(model, each=each, mp_policy=policy, reshard_after_forward=reshard)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        optimizers = [torch.optim.AdamW(trainable(m).values(), lr=0.01) for m in (model, one)]
        for step in range(3):
            mine = loss(model, WORLD * step + rank)
            mine.backward()
            twins = [copy.deepcopy(one) for _ in range(WORLD)]
            for r, twin in enumerate(twins):
                for p in twin.parameters():
                    p.data = p.data.to(dtype or torch.float32)
                of_rank = loss(twin, WORLD * step + r, dtype or torch.float32)
                of_rank.backward()
                if r == rank:
                    torch.testing.assert_close(mine, of_rank)
            for (name, p), *of_ranks in zip(trainable(one).items(), *(trainable(t).values() for t in twins)):
                p.grad = torch.stack([q.grad.float() for q in of_ranks]).mean(0)
                torch.testing.assert_close(trainable(model)[name].grad.full_tensor(), p.grad)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for name, p in trainable(one).items():
            torch.testing.assert_close(trainable(model)[name].full_tensor(), p)


def takes_the_fused_step(rank: int) -> None:
    taken, can_fuse = [], fused._can_fuse

    def watched(*tensors: Tensor) -> bool:
        taken.append(can_fuse(*tensors))
        return taken[-1]

    fused._can_fuse = watched
    loss(shard(adapted()), 0).backward()
    assert taken
    assert all(taken)


def is_split_as_one(rank: int, folder: Path) -> None:
    """Tensor parallelism: by outputs, by inputs, and by both, one after the other."""
    mesh = init_device_mesh("cpu", (WORLD,))
    by_outputs, by_inputs = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    for plan in (
        {"blocks.0.0": by_outputs},
        {"blocks.0.2": by_inputs},
        {"blocks.0.0": ColwiseParallel(), "blocks.0.2": RowwiseParallel(), "first": by_outputs, "last": by_inputs},
    ):
        model, one = adapted(), adapted()
        parallelize_module(model, mesh, plan)
        torch.testing.assert_close(loss(model, 0), loss(one, 0))
        loss(model, 0).backward()
        loss(one, 0).backward()
        for name, p in trainable(one).items():
            torch.testing.assert_close(whole(trainable(model)[name].grad), p.grad)
        written = save_adapter(model, folder / f"{len(plan)}{next(iter(plan))}")
        dist.barrier()
        plain = base()
        load_adapter(plain, written)
        torch.testing.assert_close(plain(batch(0)), one(batch(0)))


def saves_and_loads(rank: int, folder: Path, config: dict[str, Any]) -> None:
    """Written by one process with the tensors of all of them, in the same numbers as an unsharded model's."""
    for each in (True, False):
        model, one = shard(adapted(**config), each=each), adapted(**config)
        written = save_adapter(model, folder / f"sharded-{each}")
        expected = save_adapter(one, folder / f"one-{each}-{rank}")
        dist.barrier()
        for name in ("adapter_config.json", "README.md"):
            assert (written / name).read_text() == (expected / name).read_text()
        plain = base()
        load_adapter(plain, written)
        torch.testing.assert_close(plain.eval()(batch(0)), one.eval()(batch(0)))

        other = {n: torch.randn(t.shape) for n, t in adapter_state_dict(one).items()}
        others = [other]
        dist.broadcast_object_list(others, 0)
        for m in (model, one):
            load_adapter_state_dict(m, others[0])
            load_adapter_state_dict(m, adapter_state_dict(m))  # sharded as it is
        torch.testing.assert_close(model.eval()(batch(0)), one(batch(0)))


def base_weights_may_come_after(rank: int, config: dict[str, Any]) -> None:
    """A fresh adapter stays one: its model is the base that was loaded, whichever way that was done."""
    source = base(seed=5)
    on_cpu = base()
    inject(on_cpu, LoRAConfig(rank=2, **config))
    with torch.device("meta"):
        on_meta = Net()
    inject(on_meta, LoRAConfig(rank=2, **config))
    for model in (on_cpu, on_meta):
        shard(model)
        model.to_empty(device="cpu") if model is on_meta else None
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(model, source.state_dict(), options=options)
        start_adapters(model)
        torch.testing.assert_close(model(batch(0)), source(batch(0)))
        assert bool(model.first.lora_A.full_tensor().all())


def refuses_what_would_go_wrong(rank: int) -> None:
    model = shard(adapted(), each=False)
    for call, says in (
        (lambda: inject(fully_shard(base()), LoRAConfig()), "Call inject first, and fully_shard"),
        (lambda: merge(model), "save it .save_adapter, in every process."),
        (lambda: remove(model), "save it .save_adapter, in every process."),
    ):
        refused(call, says)
        model.unshard()  # its weights are plain tensors just now
        refused(call, says)
        model.reshard()
    loss(model, 0).backward()


def flat_parts_are_not_taken_for_tensors(rank: int, folder: Path) -> None:
    """FSDP1 leaves a flat part in the place of each parameter."""
    model, one = adapted(), adapted()
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    loss(wrapped, rank).backward()
    for call in (adapter_state_dict, lambda m: save_adapter(m, folder / "parts")):
        refused(lambda call=call: call(model), "summon_full_params")
    refused(lambda: merge(wrapped), "is sharded over processes")
    refused(lambda: inject(FullyShardedDataParallel(base(), device_id=torch.device("cpu"))), "Call inject first")
    with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
        torch.testing.assert_close(adapter_state_dict(model), adapter_state_dict(one))
        plain = base()
        load_adapter(plain, save_adapter(model, folder / f"whole-{rank}"))
    torch.testing.assert_close(plain.eval()(batch(0)), one.eval()(batch(0)))


class Sharded(Shared):
    """Each Linear by itself, and the rest."""

    def configure_model(self) -> None:
        if isinstance(self.net, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class Split(Shared):
    """Two of its layers are split over the processes, which read the same rows."""

    def configure_model(self) -> None:
        plan = {"0": ColwiseParallel(), "3": RowwiseParallel()}
        if not isinstance(self.net[0].weight, DTensor):
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def train_dataloader(self) -> Any:
        return DataLoader(data(), batch_size=BATCH, sampler=Share(0, 1))


class ShardedInPart(Shared):
    def configure_model(self) -> None:
        fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])


class BuiltWhereSharded(Sharded):
    def build(self, seed: int) -> None: ...

    def configure_model(self) -> None:
        super().build(0)
        super().configure_model()


def strategy(style: type[Shared]) -> ModelParallelStrategy:
    sizes = (1, WORLD) if style is Split else (WORLD, 1)
    return ModelParallelStrategy(*sizes)


def fits_as_one(
    rank: int, folder: Path, style: type[Shared], expected: dict[str, Tensor], settings: dict[str, Any]
) -> None:
    """In Lightning, and so does a run that is resumed, in as many processes or in one."""
    two, run = fit(style, folder / "two", strategy(style), WORLD, **settings)
    assert all(isinstance(p, DTensor) for p in trainable(two).values())
    found = {name: whole(t) for name, t in adapter_state_dict(two).items()}
    torch.testing.assert_close(found, expected, **CLOSE)
    resumed, _ = fit(style, folder / "resumed", strategy(style), WORLD, str(folder / "two" / "step=3.ckpt"), **settings)
    for name, tensor in adapter_state_dict(resumed).items():
        assert torch.equal(whole(tensor), found[name])
    run.save_checkpoint(folder / "after.ckpt")
    predicted = run.predict(style(), ckpt_path=folder / "after.ckpt", weights_only=True)
    torch.testing.assert_close(predicted[0], two.eval()(next(iter(two.predict_dataloader()))[0]))
    saved = torch.load(folder / "after.ckpt")
    torch.testing.assert_close(saved["state_dict"], found)
    assert not any(isinstance(t, DTensor) for t in tree_leaves(saved))


def is_told_of_what_is_not_sharded(rank: int, folder: Path) -> None:
    for style, error, says, settings in (
        (ShardedInPart, TrainingError, "is not sharded, so each process would train its own", {}),
        (BuiltWhereSharded, TargetError, "build them in __init__ or setup", {}),
        (Sharded, TrainingError, "is measured on a whole model", {"init": "eva"}),
    ):
        with pytest.raises(error, match=says):
            fit(style, folder, strategy(style), WORLD, **settings)
        gc.collect()


def refused(call: Callable[[], Any], says: str) -> None:
    with pytest.raises(AdapterStateError, match=says):
        call()
