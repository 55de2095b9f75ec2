"""Which frozen parts of a model "all-linear" takes for references, and leaves out."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric

from lightning_lora import LoRAConfig, inject
from lightning_lora.errors import TargetError


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


class Model(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def adapted(model: nn.Module, **fields: Any) -> set[str]:
    return {m.name for m in inject(model, LoRAConfig(rank=2, **fields)).modules}


class Transformer(nn.Module):
    """Tokens to features."""

    def __init__(self, width: int = 16, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(mlp(width, 4 * width, width) for _ in range(layers))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)


student = mlp(8, 16, 16, 4)
REFERENCES: dict[str, Callable[[], dict[str, nn.Module]]] = {
    "a teacher": lambda: {"student": mlp(8, 16, 16, 4), "other": frozen(mlp(8, 16, 16, 4))},
    "a teacher that comes first": lambda: {"other": frozen(mlp(8, 16, 16, 4)), "student": mlp(8, 16, 16, 4)},
    "a larger teacher": lambda: {"other": frozen(mlp(8, 256, 256, 4)), "student": mlp(8, 16, 16, 4)},
    "a smaller teacher": lambda: {"student": mlp(8, 16, 16, 4), "other": frozen(mlp(8, 12, 4))},
    "a copy": lambda: {"student": student, "other": frozen(copy.deepcopy(student))},
    "copies in a ModuleDict": lambda: {
        "other": frozen(nn.ModuleDict({"ema": copy.deepcopy(student), "first": copy.deepcopy(student)})),
        "student": copy.deepcopy(student),
    },
    "a perceptual network": lambda: {"student": mlp(8, 16, 16, 4), "other": frozen(mlp(4, 256, 256))},
    "a perceptual network that comes first": lambda: {
        "other": frozen(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(2048, 64))),
        "student": mlp(8, 16, 16, 4),
    },
    "an encoder of what a larger net reads": lambda: {
        "other": frozen(nn.Sequential(nn.Conv2d(3, 64, 3), nn.Linear(64, 64), nn.Conv2d(64, 4, 3))),
        "student": nn.Sequential(*mlp(4, 16, 16, 4), *(nn.Conv2d(4, 4, 1) for _ in range(2))),
    },
    "a text encoder": lambda: {"other": frozen(Transformer(24)), "student": mlp(8, 16, 16, 4)},
}


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("depth", [0, 1], ids=["child", "grandchild"])
def test_a_reference_beside_a_part_that_trains_is_left_out_and_said(case: str, depth: int) -> None:
    model = Model(**copy.deepcopy(REFERENCES[case]()))
    prefix = ""
    if depth:
        model, prefix = Model(module=model), "module."
    report = inject(model, LoRAConfig(rank=2))
    # Its last layer is the head of what trains, not of the reference.
    assert {m.name for m in report.modules} == {f"{prefix}student.0", f"{prefix}student.2"}
    assert report.head == f"{prefix}student.4"
    assert list(report.left_out) == [f"{prefix}other"]
    assert f"not adapted: {prefix}other (to adapt: name its layers in target_modules; it was frozen" in str(report)


def convolutions(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(6)), nn.Flatten(), *more)


@pytest.mark.parametrize("more", [(nn.Linear(12, 4),), (nn.Linear(12, 8), nn.Linear(8, 4))], ids=len)
@pytest.mark.parametrize("student_first", [True, False])
def test_the_teacher_of_a_convolutional_student_is_left_out(student_first: bool, more: tuple[nn.Module, ...]) -> None:
    parts = {"student": convolutions(*copy.deepcopy(more)), "teacher": frozen(Transformer())}
    model = Model(**(parts if student_first else dict(reversed(parts.items()))))
    report = inject(model, LoRAConfig(rank=2))
    assert [m.name for m in report.modules] == ["student.7"]  # a lone linear layer is not taken for a head
    assert list(report.left_out) == ["teacher"]


def test_where_nothing_else_is_linear_the_error_says_how_to_adapt_the_frozen_part() -> None:
    model = Model(student=convolutions(), perceptual=frozen(Transformer()))
    with pytest.raises(TargetError, match="'perceptual' is not one of them: to adapt it, name its layers"):
        inject(model, LoRAConfig(rank=2))
    assert len(adapted(model, target_modules=r"perceptual\.blocks\.\d\.[02]")) == 4


def test_a_copy_of_one_layer_is_left_out_where_the_one_that_trains_is_the_whole_rest() -> None:
    for parts in ({"a": nn.Linear(8, 4), "b": frozen(nn.Linear(8, 4))}, {"b": frozen(mlp(8, 4)), "a": mlp(8, 4)}):
        assert {name[0] for name in adapted(Model(**parts))} == {"a"}


def test_named_layers_are_adapted_in_a_reference_as_well() -> None:
    model = Model(**REFERENCES["a teacher"]())
    report = inject(model, LoRAConfig(rank=2, target_modules=["other.0", "student.0"]))
    assert [m.name for m in report.modules] == ["student.0", "other.0"]
    assert not report.left_out


class Perceptual(Metric):
    """As torchmetrics' LPIPS and CLIPScore, which hold their network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(4, 16, 16)

    def update(self, x: Tensor) -> None: ...

    def compute(self) -> Tensor:
        return torch.zeros(())


def test_a_reference_that_comes_last_is_not_taken_for_the_output_head() -> None:
    perceptual = frozen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 8)))
    report = inject(Model(generator=mlp(8, 16, 16, 4), perceptual=perceptual), LoRAConfig(rank=2))
    assert ({m.name for m in report.modules}, report.head) == ({"generator.0", "generator.2"}, "generator.4")
    assert list(report.left_out) == ["perceptual"]


@pytest.mark.parametrize("is_frozen", [True, False])
def test_the_network_of_a_metric_is_left_out(is_frozen: bool) -> None:
    metric = Perceptual()
    model = Model(student=mlp(8, 16, 16, 4), metric=frozen(metric) if is_frozen else metric)
    report = inject(model, LoRAConfig(rank=2))
    assert ({m.name for m in report.modules}, report.head) == ({"student.0", "student.2"}, "student.4")
    assert "it is part of a metric" in report.left_out["metric"]


def test_of_a_metric_that_holds_no_weights_nothing_is_said() -> None:
    metrics = MetricCollection([MeanMetric(), SumMetric()])
    report = inject(Model(body=mlp(8, 16, 4), metrics=metrics, loss=MeanMetric()), LoRAConfig(rank=2))
    assert ({m.name for m in report.modules}, report.left_out) == ({"body.0"}, {})


BACKBONES: dict[str, tuple[Callable[[], dict[str, nn.Module]], int]] = {
    "of tokens, under one layer": (lambda: {"body": Transformer(), "head": nn.Linear(16, 3)}, 0),
    "of tokens, under two layers": (lambda: {"body": Transformer(), "head": mlp(16, 16, 3)}, 1),
    "of tokens, under a head and a norm": (
        lambda: {"body": Transformer(), "norm": nn.LayerNorm(16), "head": mlp(16, 16, 3)},
        1,
    ),
    "of features, under one layer": (lambda: {"body": mlp(8, 32, 32), "head": nn.Linear(32, 4)}, 0),
    "of equally many features, under one layer": (lambda: {"body": mlp(16, 16, 16), "head": nn.Linear(16, 16)}, 0),
    "of features, under two layers": (lambda: {"body": mlp(8, 32, 32), "head": mlp(32, 16, 4)}, 1),
    "that comes after its head": (lambda: {"head": nn.Linear(32, 4), "body": mlp(8, 32, 32)}, 0),
    "under no head, beside an embedding": (lambda: {"tokens": nn.Embedding(50, 8), "body": mlp(8, 32, 32)}, 0),
    "under no head, beside a number that trains": (lambda: {"body": mlp(8, 32, 32), "norm": nn.LayerNorm(8)}, 0),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_a_frozen_backbone_under_a_head_that_trains_is_what_is_adapted(case: str) -> None:
    make, of_head = BACKBONES[case]
    parts = make()
    frozen(parts["body"])
    report = inject(Model(**parts), LoRAConfig(rank=2))
    inside = [m.name for m in report.modules if m.name.startswith("body")]
    assert len(inside) >= (4 if "tokens" in case else 1)
    assert not report.left_out
    if of_head:
        assert [m.name for m in report.modules if m.name.startswith("head")] == ["head.0"]


def test_two_frozen_backbones_under_one_head_are_adapted() -> None:
    model = Model(tokens=frozen(Transformer()), numbers=frozen(mlp(8, 32, 32)), head=mlp(48, 16, 3))
    assert {name.split(".")[0] for name in adapted(model)} == {"tokens", "numbers", "head"}


def test_a_backbone_is_adapted_and_a_copy_of_its_head_is_not() -> None:
    head = mlp(16, 16, 3)
    model = Model(body=frozen(Transformer()), head=head, average=frozen(copy.deepcopy(head)))
    report = inject(model, LoRAConfig(rank=2))
    assert {m.name for m in report.modules} >= {"body.blocks.0.0", "body.blocks.1.2", "head.0"}
    assert list(report.left_out) == ["average"]


def test_of_a_model_that_is_frozen_as_a_whole_all_is_adapted() -> None:
    everything = adapted(Model(**REFERENCES["a text encoder"]()).requires_grad_(True))
    assert adapted(frozen(Model(**REFERENCES["a text encoder"]()))) == everything
    assert len(everything) == 6


def test_of_a_stack_the_blocks_that_train_are_adapted() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.ModuleList(Block() for _ in range(8)), nn.Linear(16, 50))
    for block in list(model[1])[:6]:  # type: ignore[arg-type]
        frozen(block)
    report = inject(model, LoRAConfig(rank=2))
    assert {m.name for m in report.modules} == {f"1.{i}.{own}" for i in (6, 7) for own in ("up", "down")}
    assert list(report.left_out) == [f"1.{i}" for i in range(6)]


def test_weights_that_cannot_train_do_not_make_a_part_frozen() -> None:
    quantized = pytest.importorskip("bitsandbytes").nn.Linear4bit
    for move in (lambda module: module, lambda module: module.to("cpu")):  # it quantizes
        body = nn.Sequential(quantized(64, 64, bias=False), nn.ReLU(), quantized(64, 64, bias=False))
        assert adapted(move(Model(body=body, rest=mlp(64, 64, 64, 4)))) == {"body.0", "body.2", "rest.0", "rest.2"}


def test_a_quantized_model_that_was_prepared_for_training_is_adapted_under_a_head() -> None:
    quantized = pytest.importorskip("bitsandbytes").nn.Linear4bit
    body = nn.Sequential(nn.Embedding(50, 64), nn.LayerNorm(64), quantized(64, 64), quantized(64, 64))
    assert adapted(Model(body=frozen(body).to("cpu"), head=mlp(64, 64, 4))) == {"body.2", "body.3", "head.0"}


def test_weights_that_are_frozen_where_norms_train_are_adapted() -> None:
    model = nn.Sequential(Block(), Block(), nn.Linear(16, 4))
    for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
        frozen(linear)
    assert adapted(model) == {"0.up", "0.down", "1.up", "1.down"}


# Weights of classes that nobody knows.


class OwnLinear(nn.Module):
    """As torch_geometric's."""

    def __init__(self, inputs: int, outputs: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(outputs, inputs)))
        self.bias, self.name = nn.Parameter(torch.zeros(outputs)), name

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, getattr(self, self.name), self.bias)


@pytest.mark.parametrize("name", ["weight", "kernel", "W", "w1", "W_q", "router_weight"])
def test_a_linear_layer_of_its_own_class_is_named_with_the_way_to_adapt_it(name: str) -> None:
    model = nn.Sequential(OwnLinear(8, 16, name), nn.Linear(16, 16), nn.Linear(16, 4))
    report = inject(model, LoRAConfig(rank=2))
    assert report.left_out == {f"0.{name}": "name it in target_parameters"}
    other = nn.Sequential(OwnLinear(8, 16, name), nn.Linear(16, 16), nn.Linear(16, 4))
    assert adapted(other, target_modules=["1"], target_parameters=[f"0.{name}"]) == {f"0.{name}", "1"}


def test_a_model_that_has_no_other_linear_layer_says_so() -> None:
    model = nn.Sequential(OwnLinear(8, 16), nn.ReLU(), OwnLinear(16, 16), nn.Linear(16, 4))
    with pytest.raises(TargetError, match=r"'0.weight' is not one of them: to adapt it, name it in target_parameters"):
        inject(nn.Sequential(*model[:3]), LoRAConfig(rank=2))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_embed, self.queries = nn.Parameter(torch.zeros(9, 16)), nn.Parameter(torch.zeros(4, 16))
        self.weight = nn.Parameter(torch.ones(1, 16))


def test_tables_and_norms_are_no_linear_layers() -> None:
    model = nn.Sequential(Table(), nn.LayerNorm((4, 16)), nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    assert not inject(model, LoRAConfig(rank=2)).left_out
