"""What combine and export write is read back, and compared with what it was made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    combine_adapters,
    export_adapter,
    inject,
    load_adapter,
    remove,
    save_adapter,
)
from lightning_lora.errors import CheckpointError
from lightning_lora.rewriting import combine, parts
from tests.hub.models import Linears


def saved(folder, seed: int):
    torch.manual_seed(seed)
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc", "head"], alpha_pattern={"fc": 3}))
    for layer in (model.fc, model.head):
        nn.init.normal_(layer.lora_B)
    return save_adapter(model, folder)


@pytest.mark.parametrize("fault", [1.02, -1.0, 0.0])
@pytest.mark.parametrize("key", ["base_model.model.fc.lora_A.weight", "base_model.model.head.lora_B.weight"])
def test_a_folder_that_does_not_compute_what_it_was_made_from_is_an_error(tmp_path, monkeypatch, key, fault):
    a, b = saved(tmp_path / "a", 1), saved(tmp_path / "b", 2)
    for module in (combine, parts):
        right = module.write_adapter

        def wrong(folder, config, tensors, *rest, right=right):
            return right(folder, config, {**tensors, key: fault * tensors[key]}, *rest)

        monkeypatch.setattr(module, "write_adapter", wrong)
    name = key.split(".")[2]
    for method, rank in (("sum", None), ("svd", 4)):  # at rank 4 nothing is cut off, so nothing may be off
        with pytest.raises(CheckpointError, match=f"does not compute what it was made from, in 1 modules: {name}"):
            combine_adapters([a, b], tmp_path / "c", weights=[0.5, 0.7], method=method, rank=rank, check_base=False)
    for consumer in ("vllm", "peft"):
        with pytest.raises(CheckpointError, match=name):
            export_adapter(a, tmp_path / "e", consumer=consumer)


GEOMETRIES = {
    "transposed": lambda: (nn.ConvTranspose2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
    "transposed, groups": lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2), torch.randn(2, 4, 7)),
    "groups": lambda: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5)),
    "an embedding": lambda: (nn.Embedding(10, 6), torch.arange(10)),
}


@pytest.mark.parametrize("method", ["sum", "svd"])
@pytest.mark.parametrize("kind", GEOMETRIES)
@pytest.mark.filterwarnings("ignore:PEFT cannot load this adapter")
def test_what_is_written_right_is_accepted_whatever_the_geometry(tmp_path, kind, method):
    layer, x = GEOMETRIES[kind]()
    base = nn.Sequential(layer)
    bare, changes, folders = base(x).detach(), [], []
    for seed in (1, 2):
        inject(base, LoRAConfig(rank=2, alpha=3, target_modules=["0"]))
        torch.manual_seed(seed)
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        changes.append(base(x).detach() - bare)
        folders.append(save_adapter(base, tmp_path / str(seed)))
        remove(base)
    combine_adapters(
        folders, tmp_path / "both", weights=[0.5, -0.7], method=method, rank=4 if method == "svd" else None
    )
    load_adapter(base, tmp_path / "both")
    wanted = bare + 0.5 * changes[0] - 0.7 * changes[1]
    # Sums of at most 4 x 9 products and a few sums in float32, of numbers of the size of `changes`.
    bound = 64 * torch.finfo(torch.float32).eps * sum(change.abs().max() for change in changes)
    assert (base(x) - wanted).abs().max() <= bound
