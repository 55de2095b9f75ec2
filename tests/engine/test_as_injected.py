"""Layers that were changed after inject: whatever reads the adapter says which are gone, and never takes the rest for
all of it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
    save_adapter,
)
from lightning_lora.engine import base_fingerprint
from lightning_lora.engine.layers import pairs
from lightning_lora.errors import AdapterStateError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.v(torch.tanh(self.q(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 12)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]


def adapted(**fields: Any) -> Net:
    torch.manual_seed(0)
    net = Net()
    inject(net, LoRAConfig(rank=2, **{"target_modules": ["embed", "q", "v", "head"], **fields}))
    with torch.no_grad():
        for pair in pairs(net):
            pair.A.normal_()
            pair.B.normal_()
    return net


def resize(net: Any) -> None:
    """As transformers' resize_token_embeddings does: the embedding grows in place, the head is made anew."""
    net.embed.weight.data = torch.zeros(16, 8)
    net.embed.num_embeddings = 16
    net.head = nn.Linear(8, 16)


def set_to(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        parent, _, own = name.rpartition(".")
        setattr(net.get_submodule(parent), own, make(net))

    return change


def take_out_first(net: Any) -> None:
    del net.layers[0]


def unswap(net: Any) -> None:
    net.head.__class__ = nn.Linear


def lose(net: Any) -> None:
    net.head.lora_A = None


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "resized": (resize, r"head has no adapter any more, embed has A and B of \(2, 12\).* takes \(2, 16\)"),
    "replaced": (set_to("layers.1.q", lambda net: nn.Linear(8, 8)), r"layers\.1\.q has no adapter any more"),
    "deleted": (set_to("head", lambda net: nn.Identity()), r"head has no adapter any more"),
    "set to None": (set_to("head", lambda net: None), r"head has no adapter any more"),
    "pruned": (take_out_first, r"layers\.0\.q has no adapter any more.*layers\.1\.q is now layers\.0\.q"),
    "reordered": (
        set_to("layers", lambda net: nn.ModuleList(reversed(net.layers))),
        r"layers\.0\.q is now layers\.2\.q",
    ),
    "copied": (
        set_to("layers", lambda net: nn.ModuleList([*net.layers, copy.deepcopy(net.layers[0])])),
        r"layers\.3\.q has an adapter that inject did not give it",
    ),
    "copied over": (
        set_to("layers.2", lambda net: copy.deepcopy(net.layers[0])),
        r"layers\.2\.q has no adapter any more.*layers\.2\.q has an adapter that inject did not give it",
    ),
    "swapped back by hand": (unswap, r"head has no adapter any more"),
    "without its A": (lose, r"head has lost its lora_A"),
}

READERS: dict[str, Callable[[Any, Path], Any]] = {
    "save_adapter": lambda net, folder: save_adapter(net, folder),
    "adapter_state_dict": lambda net, folder: adapter_state_dict(net),
    "load_adapter_state_dict": lambda net, folder: load_adapter_state_dict(net, adapter_state_dict(adapted())),
    "merge": lambda net, folder: merge(net),
    "merged": lambda net, folder: merged(net).__enter__(),
    "base_fingerprint": lambda net, folder: base_fingerprint(net),
    "a bank": lambda net, folder: AdapterBank(Net()).add("it", net),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_every_reader_names_what_is_not_as_inject_left_it(change: str, reader: str, tmp_path: Path) -> None:
    net = adapted()
    make, message = CHANGES[change]
    make(net)
    before = {name: (id(p), p._version) for name, p in net.named_parameters()}
    with pytest.raises(AdapterStateError, match=f"Net is not as inject left it: .*{message}.*remove"):
        READERS[reader](net, tmp_path / "adapter")
    assert {name: (id(p), p._version) for name, p in net.named_parameters()} == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [name for name in CHANGES if name not in ("without its A", "swapped back by hand")])
def test_remove_is_the_way_out(change: str) -> None:
    net = adapted()
    CHANGES[change][0](net)
    remove(net)
    inject(net, LoRAConfig(rank=2, target_modules=["q", "v"]))
    assert all(".lora_" in name for name in adapter_state_dict(net))


def test_a_layer_that_is_put_back_is_as_it_was(tmp_path: Path) -> None:
    net = adapted()
    head: Any = net.head
    before = adapter_state_dict(net)
    net.head = nn.Linear(8, 12)
    net.head = head
    assert adapter_state_dict(net).keys() == before.keys()


def pickled(net: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def wrapped(net: Any) -> Any:
    net.layers[0] = torch.compile(net.layers[0], backend="eager")
    net.layers[1] = checkpoint_wrapper(net.layers[1])
    return net


def held(net: nn.Module) -> nn.Module:
    """In a module that knows one of its layers under another name, which comes first."""
    outer: Any = nn.Module()
    outer.first, outer.net = net.get_submodule("head"), net
    return outer  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, wrapped, held, nn.DataParallel, lambda net: net.double()])
def test_what_keeps_the_layers_where_they_are_changes_nothing(way: Callable[[Any], Any]) -> None:
    assert len(adapter_state_dict(way(adapted()))) == 16


def test_copies_are_compared_with_their_own_layers_and_an_adapted_layer_of_the_same_place_is_one() -> None:
    net = adapted()
    other: Any = copy.deepcopy(net)
    assert adapter_state_dict(other)
    other.head = net.head  # what it computes with, and what it saves
    assert adapter_state_dict(other)["head.lora_A"].data_ptr() == net.head.lora_A.data_ptr()
    other.head = copy.deepcopy(net.layers[0].q)
    with pytest.raises(AdapterStateError, match="head has no adapter any more"):
        adapter_state_dict(other)


def test_parts_that_were_adapted_by_themselves_are_each_compared_with_their_own_record() -> None:
    net: Any = Net()
    for part in (net.layers[0], net.layers[2]):
        inject(part, LoRAConfig(rank=2, target_modules=["q"]))
    assert len(adapter_state_dict(net)) == 4
    with merged(net.layers[0]), pytest.raises(AdapterStateError, match=r"layers\.0\.q has no .* merged just now"):
        adapter_state_dict(net)
    net.layers[2].q = nn.Linear(8, 8)
    with pytest.raises(AdapterStateError, match=r"layers\.2\.q has no adapter any more"):
        adapter_state_dict(net)
    assert len(adapter_state_dict(net.layers[0])) == 2


def test_a_module_that_was_trained_whole_and_is_gone_is_named() -> None:
    net: Any = adapted(target_modules=["q"], modules_to_save=["head"])
    net.head = nn.Identity()
    with pytest.raises(AdapterStateError, match=r"head\.weight, head\.bias of Net was trained whole, and does not"):
        adapter_state_dict(net)


def test_trained_rows_that_are_gone_are_named() -> None:
    net: Any = adapted(target_modules=["q"], trainable_token_indices={"embed": [3, 4]})
    net.embed = nn.Embedding(12, 8)
    with pytest.raises(AdapterStateError, match="embed has no adapter any more"):
        adapter_state_dict(net)


def test_a_model_of_which_all_adapted_layers_were_replaced_is_no_dead_end() -> None:
    net: Any = adapted(target_modules=["head"])
    net.head = nn.Linear(8, 12)
    with pytest.raises(AdapterStateError, match="All adapted layers of Net were replaced since inject: call remove"):
        inject(net, LoRAConfig(rank=2))
    remove(net)
    assert all(p.requires_grad for p in net.parameters())
    inject(net, LoRAConfig(rank=2))


@pytest.mark.parametrize("targets", [["embed_tokens", "lm_head", "q_proj"], ["lm_head", "q_proj"]])
def test_a_vocabulary_that_is_resized_after_inject_is_an_error_and_before_it_is_not(
    targets: list[str], tmp_path: Path
) -> None:
    transformers: Any = pytest.importorskip("transformers")
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.LlamaConfig(**size, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config)
    inject(model, LoRAConfig(rank=2, target_modules=targets))
    model.resize_token_embeddings(48, mean_resizing=False)
    with pytest.raises(AdapterStateError, match="lm_head has no adapter any more"):
        save_adapter(model, tmp_path / "it")
    remove(model)
    inject(model, LoRAConfig(rank=2, target_modules=targets))
    save_adapter(model, tmp_path / "it")
