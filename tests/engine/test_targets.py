"""Which modules a config means; and that a config which means nothing changes nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from snapshot import assert_same, snapshot
from tiny_transformers import bert, gpt2, llama, t5
from torch import nn

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.errors import TargetError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Net(nn.Module):
    """Blocks, an inner list of experts, and a head."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
        self.head = nn.Linear(4, 2)


def mlp() -> nn.Module:
    return nn.Sequential(OrderedDict(a=nn.Linear(4, 5), act=nn.ReLU(), b=nn.Linear(5, 5), out=nn.Linear(5, 2)))


def adapted(model: nn.Module, **fields: Any) -> list[str]:
    return [m.name for m in inject(model, LoRAConfig(rank=1, **fields)).modules]


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (llama, "lm_head"),
        (gpt2, "lm_head"),
        (bert, "classifier"),
        (t5, "lm_head"),
        (mlp, "out"),
        (Net, "head"),
        (lambda: nn.Sequential(nn.Linear(3, 3)), None),
        (lambda: nn.Linear(3, 3), None),
        (lambda: bert().bert, None),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 2), None),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1), None),
        (lambda: nn.Sequential(OrderedDict(body=bert().bert, drop=nn.Dropout(), top=nn.Linear(16, 2))), "top"),
    ],
    ids=[
        "llama", "gpt2", "bert", "t5", "mlp", "net", "single", "root", "headless", "encoder", "one-layer", "own-head",
    ],
)  # fmt: skip
def test_all_linear_takes_every_linear_layer_but_the_head_and_says_which_that_is(build: Any, head: str | None):
    model = build()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    report = inject(model, LoRAConfig(rank=1))
    assert report.head == head
    assert [m.name for m in report.modules] == [name for name in linear if name != head]
    assert (head is None) or (f"not adapted: {head}" in str(report))


def test_a_head_that_is_trained_whole_is_not_looked_for_elsewhere():
    model = mlp()
    report = inject(model, LoRAConfig(rank=1, modules_to_save=["out"]))
    assert report.head is None
    assert [m.name for m in report.modules] == ["a", "b"]
    assert report.trained_whole == ("out.weight", "out.bias")


def test_another_module_trained_whole_does_not_make_the_head_a_target():
    report = inject(mlp(), LoRAConfig(rank=1, modules_to_save=["b"]))
    assert report.head == "out"
    assert [m.name for m in report.modules] == ["a"]


def test_entries_match_whole_names_and_endings_but_not_parts_of_names():
    assert adapted(Net(), target_modules=["proj"]) == ["layers.0.proj", "layers.1.proj"]
    assert adapted(Net(), target_modules=["layers.1.proj", "head"]) == ["layers.1.proj", "head"]
    with pytest.raises(TargetError, match=r"'roj'.*'proj'"):
        adapted(Net(), target_modules=["roj"])


def test_a_string_is_a_regular_expression_for_the_whole_name():
    assert adapted(Net(), target_modules=r"layers\.\d+\.proj|embed") == ["embed", "layers.0.proj", "layers.1.proj"]
    with pytest.raises(TargetError, match="whole name"):
        adapted(Net(), target_modules="proj")


def test_excluded_modules_are_left_out_before_it_is_asked_whether_they_can_be_adapted():
    found = adapted(Net(), target_modules=r"layers\..+", exclude_modules=r"layers\.\d|.*norm")
    assert found == ["layers.0.proj", "layers.1.proj"]


def test_layers_are_chosen_by_the_first_number_in_a_name_or_by_the_one_after_a_pattern():
    assert adapted(Net(3), target_modules=["proj"], layers_to_transform=[0, 2]) == ["layers.0.proj", "layers.2.proj"]
    assert adapted(Net(3), target_modules=["proj"], layers_to_transform=1) == ["layers.1.proj"]
    found = adapted(Net(), target_modules=["proj", "0"], layers_to_transform=[1], layers_pattern=["layers", "experts"])
    assert found == ["layers.1.proj", "experts.1.0"]


def test_the_first_pattern_that_matches_gives_rank_and_alpha():
    config = LoRAConfig(
        rank=2,
        alpha=8,
        target_modules=["proj", "head"],
        rank_pattern={"layers.1.proj": 1, "proj": 3},
        alpha_pattern={r"layers\.0\..*": 6, "proj": 5},
    )
    report = inject(Net(), config)
    assert {m.name: (m.rank, m.scale) for m in report.modules} == {
        "layers.0.proj": (3, 2.0),
        "layers.1.proj": (1, 5.0),
        "head": (2, 4.0),
    }


NOTHING = [
    ({"target_modules": ["proj", "qproj"]}, "'qproj' matches no module of Net.*mean 'proj'"),
    ({"target_modules": ["layers.0.prj"]}, r"mean '0.proj'|mean 'layers.0.proj'"),
    ({"target_modules": "nope.*"}, "'nope.*'.*Its adaptable modules end in: embed, proj"),
    ({"target_modules": ["norm"]}, "a LayerNorm cannot be adapted"),
    ({"target_modules": ["layers"]}, "a ModuleList cannot be adapted"),
    ({"target_modules": ".*"}, "cannot be adapted"),
    ({"target_modules": ["proj"], "exclude_modules": ["hed"]}, "exclude_modules.*'hed'.*'head'"),
    ({"exclude_modules": ["layers.0"]}, r"excludes nothing.*layers.*regular expression"),
    ({"target_modules": ["proj"], "exclude_modules": ["proj"]}, "leaves nothing to adapt"),
    ({"target_modules": ["proj"], "layers_to_transform": [1, 5]}, "no target in layer 5.*layers 0 to 1"),
    ({"target_modules": ["head"], "layers_to_transform": [0]}, "No target lies in a layer"),
    ({"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, "'blocks'"),
    ({"target_modules": ["proj"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]}, "'h'"),
    ({"target_modules": ["proj"], "rank_pattern": {"head": 2}}, "rank_pattern: 'head' matches none of the 2"),
    ({"target_modules": ["proj"], "alpha_pattern": {"prj": 2}}, "alpha_pattern: 'prj'.*'proj'"),
    ({"target_modules": ["proj"], "modules_to_save": ["haed"]}, "modules_to_save: 'haed'.*'head'"),
    ({"target_modules": ["proj"], "modules_to_save": ["experts.0.1"]}, "has no parameters to train"),
]


@pytest.mark.parametrize(("fields", "message"), NOTHING, ids=[message[:40] for _, message in NOTHING])
def test_an_entry_that_matches_nothing_is_an_error_and_nothing_is_changed(fields: dict[str, Any], message: str):
    model = Net()
    model.head.bias.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        inject(model, LoRAConfig(rank=1, **fields))
    assert_same(snapshot(model), before)


def test_a_model_without_linear_layers_is_an_error():
    with pytest.raises(TargetError, match=r"no linear layer in Sequential.*end in: 0"):
        inject(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    with pytest.raises(TargetError, match="no module that can be adapted"):
        inject(nn.ReLU())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_has_nothing_to_adapt():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TargetError, match="no module that can be adapted"):
        inject(model)


def test_biases_that_are_not_there_are_an_error():
    with pytest.raises(TargetError, match="bias='all' trains no parameter"):
        inject(nn.Sequential(nn.Linear(3, 3, bias=False)), LoRAConfig(rank=1, bias="all"))


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", []),
        ("lora_only", ["layers.0.proj.bias", "layers.1.proj.bias"]),
        ("all", ["layers.0.proj.bias", "layers.0.norm.bias", "layers.1.proj.bias", "layers.1.norm.bias",
                 "experts.0.0.bias", "experts.1.0.bias", "head.bias"]),
    ],
)  # fmt: skip
def test_bias_says_which_biases_are_trained(bias: Any, trained: list[str]):
    model = Net()
    report = inject(model, LoRAConfig(rank=1, target_modules=["proj"], bias=bias))
    assert list(report.trained_whole) == trained
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name] == trained


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        (nn.LazyLinear(3), {}, "no shape yet"),
        (nn.Embedding(5, 3, max_norm=1.0), {}, "max_norm"),
        (nn.Conv2d(4, 4, 3, groups=2), {"rank": 3}, "multiple of"),
        (nn.MultiheadAttention(4, 1), {"lora_bias": True}, "lora_bias has no meaning"),
        (nn.ConvTranspose1d(4, 4, 3, groups=2), {"rank": 3}, "multiple of"),
        (nn.ConvTranspose1d(4, 4, 3), {"init": "pissa"}, "one for each position of its kernel"),
        (nn.Conv2d(4, 4, 3, groups=2), {"use_dora": True}, "DoRA has no meaning .* groups=2"),
        (nn.EmbeddingBag(5, 3, mode="max"), {}, "target_parameters="),
        (nn.EmbeddingBag(5, 3, max_norm=1.0), {}, "max_norm"),
        (nn.Embedding(5, 3), {"lora_bias": True}, "lora_bias has no meaning"),
        (nn.LayerNorm(3), {}, "LayerNorm cannot be adapted"),
        (nn.LayerNorm(3), {"target_modules": [], "target_parameters": ["layer.weight"]}, "has no low rank"),
        (nn.Conv2d(4, 4, 3), {"target_modules": [], "target_parameters": ["layer.weight"]}, "name its module"),
        (nn.Linear(3, 3), {"target_parameters": ["layer.weight"]}, "'layer' is named by target_modules, and"),
        (nn.Bilinear(3, 3, 3), {"target_parameters": ["layer.wieght"]}, "Did you mean 'layer.weight'"),
        (nn.LSTM(3, 3), {"target_parameters": ["weight_ih_l1"]}, "matches no parameter .* mean 'weight_ih_l0'"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_and_left_alone(layer: nn.Module, fields: Any, message: str):
    model = nn.Sequential(OrderedDict(first=nn.Linear(3, 3), layer=layer))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TargetError, match=message):
        inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["first", "layer"], **fields}))
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())


def test_lazy_layers_elsewhere_are_refused_too_and_adapted_once_they_have_a_shape():
    model = nn.Sequential(nn.Linear(3, 4), nn.LazyConv1d(4, 1))
    with pytest.raises(TargetError, match=r"1\.weight, 1\.bias of Sequential has no shape yet"):
        inject(model, LoRAConfig(target_modules=["0"]))
    with torch.no_grad():
        model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
        model(torch.randn(1, 3))
    assert [m.shape for m in inject(model, LoRAConfig(rank=1, target_modules=["0", "1"])).modules] == [(4, 3), (2, 4)]


def test_learned_positions_whose_input_is_no_index_are_refused():
    class Positions(nn.Embedding):
        def forward(self, x):
            return super().forward(torch.arange(x.shape[-1]) + 2)

    with pytest.raises(TargetError, match="forward of its own"):
        inject(nn.Sequential(Positions(9, 3)), LoRAConfig(target_modules=["0"]))


def test_a_rank_above_the_smaller_side_is_legal_and_called_wasteful():
    model = nn.Sequential(nn.Linear(3, 8))
    before = snapshot(model)
    with pytest.warns(UserWarning, match="legal but wasteful.*: 0"):
        report = inject(model, LoRAConfig(rank=4))
    assert "rank 4 is above the smaller side" in str(report)
    other = nn.Sequential(nn.Linear(3, 8))
    other.load_state_dict(before["values"])
    before = snapshot(other)
    with pytest.raises(UserWarning, match="wasteful"):  # warnings are errors here: nothing may be half done
        inject(other, LoRAConfig(rank=4))
    assert_same(snapshot(other), before)
