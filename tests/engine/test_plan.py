"""What is decided once for a kind of layer, and what is asked of each layer all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from snapshot import assert_same, snapshot
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, adapters, inject
from lightning_lora.engine.layers import Adapter, AdapterSpec, LinearLoRA
from lightning_lora.errors import TargetError


class Limited(nn.Linear):
    """A Linear with something of its own that its geometry asks about."""

    def __init__(self, features: int, limit: Any = 1) -> None:
        super().__init__(features, features)
        self.limit = limit


@pytest.fixture
def asked() -> Iterator[list[nn.Module]]:
    """The layers whose geometry was asked whether they can be adapted."""
    modules: list[nn.Module] = []

    class LimitedLoRA(LinearLoRA, adapts=Limited):
        @classmethod
        def check(cls, module: Any, spec: AdapterSpec) -> None:
            modules.append(module)
            if module.limit == 2:
                raise TargetError("its limit is 2")

    yield modules
    del Adapter.geometries[Limited]


EVERY = {"rank": 2, "target_modules": r"layers\.\d+"}


def chain(*layers: nn.Module) -> nn.Module:
    """Layers one after the other; `EVERY` adapts them all, and takes none for a head."""
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    return model


def test_layers_that_differ_in_values_alone_are_checked_once(asked: list[nn.Module]) -> None:
    model = chain(*(Limited(4) for _ in range(5)), *(Limited(6) for _ in range(5)))
    assert len(inject(model, LoRAConfig(**EVERY)).modules) == 10
    assert asked == [model.layers[0], model.layers[5]]  # type: ignore[union-attr, index]


def test_a_layer_of_another_rank_is_checked_by_itself(asked: list[nn.Module]) -> None:
    inject(chain(*(Limited(4) for _ in range(5))), LoRAConfig(**EVERY, rank_pattern={"layers.3": 1}))
    assert len(asked) == 2


@pytest.mark.parametrize("limit", [3, [3], {"at": 3}, torch.ones(1)], ids=["number", "list", "dict", "tensor"])
def test_a_layer_is_refused_for_what_the_others_do_not_have(asked: list[nn.Module], limit: Any) -> None:
    model = chain(Limited(4, limit), Limited(4, limit), Limited(4, 2), Limited(4, limit))
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'layers\.2' \(Limited\): its limit is 2"):
        inject(model, LoRAConfig(**EVERY))
    assert_same(snapshot(model), before)


def forward_on_the_instance(layer: nn.Module) -> None:
    own = layer.forward
    layer.forward = lambda x: own(x)  # type: ignore[method-assign]


def name_that_is_taken(layer: nn.Module) -> None:
    layer.lora_A = 1  # type: ignore[assignment]


def buffer_that_is_taken(layer: nn.Module) -> None:
    layer.register_buffer("lora_B", torch.ones(1))


def child_that_is_taken(layer: nn.Module) -> None:
    layer.lora = nn.Identity()


@pytest.mark.parametrize(
    "spoil", [forward_on_the_instance, name_that_is_taken, buffer_that_is_taken, child_that_is_taken]
)
def test_a_layer_is_refused_after_others_like_it_were_not(spoil: Any) -> None:
    model = chain(*(nn.Linear(4, 4) for _ in range(4)))
    spoil(model.layers[2])  # type: ignore[union-attr, index]
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"'layers\.2'"):
        inject(model, LoRAConfig(**EVERY))
    assert_same(snapshot(model), before)


def test_layers_of_one_shape_and_several_precisions_and_devices_get_adapters_of_their_own() -> None:
    model = chain(nn.Linear(4, 4), nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4).double())
    inject(model, LoRAConfig(**EVERY, adapter_dtype="base"))
    assert [m.lora_A.dtype for _, m in adapters(model)] == [torch.float32, torch.bfloat16, torch.float64]


def test_a_layer_is_read_as_its_own_parent_reads_it() -> None:
    """The fast path of nn.TransformerEncoderLayer reads linear1 without calling it; a plain parent calls its child."""
    model = chain(nn.TransformerEncoderLayer(8, 2, 8), nn.Sequential(nn.Linear(8, 8)))
    inject(model, LoRAConfig(rank=2))
    kinds = {name: type(m).mixin.__name__ for name, m in adapters(model)}
    assert kinds["layers.0.linear1"] == "FastPathLinearLoRA"
    assert kinds["layers.1.0"] == "LinearLoRA"


def test_a_seed_gives_what_it_gives_where_each_layer_is_drawn_by_itself() -> None:
    widths = [4, 6, 4, 4, 5]
    model = chain(*(nn.Linear(n, 3) for n in widths))
    torch.manual_seed(0)
    inject(model, LoRAConfig(**EVERY))
    torch.manual_seed(0)
    expected = [torch.empty(2, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n)) for n in widths]
    assert all(m.lora_A.equal(A) for (_, m), A in zip(adapters(model), expected, strict=True))


def test_no_two_tensors_of_adapters_share_memory() -> None:
    """accelerate's and older safetensors' writers drop or refuse a tensor that shares its storage with another."""
    model = chain(*(nn.Linear(4, 4) for _ in range(5)))
    inject(model, LoRAConfig(**EVERY))
    own: list[Tensor] = [t for _, m in adapters(model) for t in (m.lora_A, m.lora_B)]
    assert len({t.untyped_storage().data_ptr() for t in own}) == len(own)


def test_a_model_that_is_told_apart_by_a_body_registered_twice_has_its_head_outside_of_it() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)
            self.again = self.body[1]

        @property
        def base_model(self) -> nn.Module:
            return self.body

        def get_output_embeddings(self) -> None:
            return None

    report = inject(Whole(), LoRAConfig(rank=2))
    assert report.head == "head"
    assert [m.name for m in report.modules] == ["body.0", "body.1"]
