"""Every kind of network: all of its layers adapted, trained, merged, saved, loaded and removed; and PEFT agrees."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from zoo import ZOO, Kind, build, output

from lightning_lora import LoRAConfig, inject, load_adapter, merge, merged, remove, save_adapter
from lightning_lora.engine import adapter_tensors
from lightning_lora.engine.layers import geometry_of
from lightning_lora.errors import TargetError

pytestmark = [
    pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side"),
    pytest.mark.filterwarnings("ignore:Merging unties a weight"),
    pytest.mark.filterwarnings("ignore:Merged, a convolution with groups"),
    pytest.mark.filterwarnings("ignore:PEFT (cannot load|loads)"),
]
every_kind = pytest.mark.parametrize("name", ZOO)


def everything(model: nn.Module, kind: Kind) -> LoRAConfig:
    """A config that adapts every layer that can be."""
    names = [
        name
        for name, module in model.named_modules()
        if geometry_of(type(module)) is not None and not name.endswith(kind.leave or ("\0",))
    ]
    return LoRAConfig(
        **{
            "rank": 2,
            "alpha": 4,
            "target_modules": names,
            "target_parameters": list(kind.parameters) or None,
            **kind.config,
        }
    )


def trained(kind: Kind, steps: int = 3) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """The base, and a copy of it with adapters that were trained for some steps, both in evaluation mode."""
    base, inputs = build(kind), kind.inputs()
    model = copy.deepcopy(base)
    inject(model, everything(model, kind))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        y: Any = model(**inputs)
        loss = y.square().mean() if isinstance(y, Tensor) else y.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base, model.eval(), inputs


@every_kind
def test_every_adapter_learns(name: str):
    kind = ZOO[name]
    _, model, _ = trained(kind)
    tensors = {key: t for key, t in adapter_tensors(model).items() if not re.match(kind.idle or "$", key)}
    assert not [key for key, t in tensors.items() if t.grad is None], "no gradient reached them"
    assert not [key for key, t in tensors.items() if not t.any()], "one of A and B starts at zero, and both have moved"


@every_kind
@torch.no_grad()
def test_merged_it_computes_the_same(name: str):
    with torch.enable_grad():
        base, model, inputs = trained(ZOO[name])
    expected = output(model, inputs)
    assert not torch.allclose(expected, output(base, inputs), atol=1e-3)
    with merged(model):
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-3, atol=1e-4)
    assert output(model, inputs).equal(expected)
    merge(model)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-3, atol=1e-4)


@every_kind
@torch.no_grad()
def test_saved_loaded_and_removed_it_is_the_same_bit_for_bit(name: str, tmp_path: Any):
    with torch.enable_grad():
        base, model, inputs = trained(ZOO[name])
    expected, before = output(model, inputs), output(base, inputs)
    loaded = copy.deepcopy(base)
    load_adapter(loaded, save_adapter(model, tmp_path / "adapter"))
    assert output(loaded, inputs).equal(expected)
    values = {key: t.clone() for key, t in base.state_dict().items()}
    for adapted in (model, loaded):
        remove(adapted)
        assert output(adapted, inputs).equal(before)
        assert all(t.equal(values[key]) for key, t in adapted.state_dict().items())


@pytest.mark.parametrize("name", [name for name, kind in ZOO.items() if not kind.peft])
@torch.no_grad()
def test_peft_computes_the_same(name: str, tmp_path: Any):
    with torch.enable_grad():
        base, model, inputs = trained(ZOO[name])
    folder = save_adapter(model, tmp_path / "adapter")
    expected = output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(output(theirs, inputs), expected, rtol=1e-3, atol=1e-4)


def test_a_convolution_that_is_called_only_at_times_is_refused():
    with pytest.raises(TargetError, match=r"conv1d.*MambaMixer reads its weight .* exclude_modules"):
        inject(build(ZOO["mamba"]), LoRAConfig(rank=32, target_modules=["conv1d", "in_proj"]))


@pytest.mark.parametrize(("name", "layer"), [("mamba", "mixer.dt_proj"), ("wavlm", "attention.q_proj")])
def test_dropout_reaches_layers_that_are_read_and_never_called(name: str, layer: str):
    kind = ZOO[name]
    model = build(kind)
    inject(model, LoRAConfig(rank=2, target_modules=[layer], dropout=0.5))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(torch.randn(tensor.shape))
    for p in model.modules():
        if isinstance(p, nn.Dropout):
            p.p = 0.0
    model.train()
    first, *others = [output(model, kind.inputs()) for _ in range(10)]
    assert not all(other.equal(first) for other in others)
    model.eval()
    assert output(model, kind.inputs()).equal(output(model, kind.inputs()))
