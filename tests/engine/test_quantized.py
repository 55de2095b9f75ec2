"""A quantized base: it computes, trains and merges as the numbers that its weights stand for."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.engine import (
    LoRAConfig,
    adapter_state_dict,
    adapter_tensors,
    base_fingerprint,
    inject,
    load_adapter_state_dict,
    merge,
    merged,
    remove,
)
from lightning_lora.engine.weights import dense, is_quantized
from lightning_lora.errors import AdapterStateError, TargetError

bnb = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")
to_nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").to_nf4

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def linear4bit(kind: str, twice: bool, storage: torch.dtype = torch.uint8) -> nn.Module:
    return bnb.nn.Linear4bit(
        64, 32, quant_type=kind, compress_statistics=twice, compute_dtype=torch.float32, quant_storage=storage
    )


def reread(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer from a file, in which bitsandbytes' weights lose their class."""
    file = io.BytesIO()
    torch.save(make().to("cpu"), file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def of_torchao(config: Any) -> nn.Module:
    layer = nn.Sequential(nn.Linear(64, 32))
    torchao.quantize_(layer, config)
    return layer[0]


BITSANDBYTES = {
    "nf4": lambda: linear4bit("nf4", False),
    "nf4-twice": lambda: linear4bit("nf4", True),
    "fp4": lambda: linear4bit("fp4", False),
    "nf4-in-bfloat16": lambda: linear4bit("nf4", False, torch.bfloat16),
    "int8": lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False),
}
REREAD = {f"{kind} from a file": functools.partial(reread, make) for kind, make in BITSANDBYTES.items()}
TORCHAO = {
    "torchao-int8": lambda: of_torchao(torchao.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: of_torchao(
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    ),
    "torchao-float8": lambda: of_torchao(torchao.Float8WeightOnlyConfig()),
}
KINDS = {**BITSANDBYTES, **REREAD, **TORCHAO}
every_kind = pytest.mark.parametrize("kind", KINDS)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias-of-b": {"lora_bias": True},
    "dropouts": {"dropout": 0.5, "rank_dropout": 0.5, "freeze_a": True},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def build(kind: str) -> tuple[nn.Module, Tensor]:
    """Two layers, so that a gradient has to pass through a quantized one; in training mode."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), KINDS[kind](), nn.Tanh(), nn.Linear(32, 3)).to("cpu")
    for p in model.parameters():
        p.requires_grad_(False)
    return model, torch.randn(5, 16)


def config(variant: str = "plain") -> LoRAConfig:
    return LoRAConfig(**{"rank": 2, "target_modules": ["0", "2"], **VARIANTS[variant]})


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            tensor.mul_(1.5) if "magnitude" in name else tensor.add_(0.2 * torch.randn(tensor.shape))


def plain_twin(model: nn.Module) -> nn.Module:
    """The same layers with the numbers that their weights stand for, in ordinary Linears."""
    twin = nn.Sequential()
    for layer in model:
        if not isinstance(layer, nn.Linear):
            twin.append(layer)
            continue
        W = dense(layer, layer._parameters["weight"]).float()
        twin.append(nn.Linear(W.shape[1], W.shape[0]))
        with torch.no_grad():
            twin[-1].weight.copy_(W)
            twin[-1].bias.copy_(layer.bias)
    return twin


@every_kind
@every_variant
def test_a_fresh_adapter_changes_no_bit_and_a_trained_one_computes_the_formula(kind: str, variant: str):
    model, x = build(kind)
    twin = plain_twin(model)
    before = model(x)
    torch.testing.assert_close(before, twin(x))
    inject(model, config(variant))
    inject(twin, config(variant))
    if variant != "dropouts":
        assert model(x).equal(before)
    shake(model)
    load_adapter_state_dict(twin, adapter_state_dict(model))
    torch.manual_seed(2)
    ours = model(x)
    torch.manual_seed(2)
    theirs = twin(x)
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    gradients = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name].grad)
            assert p.grad.any() or "dropout" in variant


@every_kind
def test_the_report_counts_numbers_and_not_bytes(kind: str):
    model, _ = build(kind)
    report = inject(model, config())
    assert [row.shape for row in report.modules] == [(64, 16), (32, 64)]
    assert report.frozen == 64 * 16 + 64 + 32 * 64 + 32 + 3 * 32 + 3


@every_kind
def test_remove_gives_back_the_base_bit_for_bit(kind: str):
    model, x = build(kind)
    stored = {name: p.detach().clone() for name, p in model.named_parameters() if type(p) is nn.Parameter}
    expected, kinds = model(x), [type(p) for p in model.parameters()]
    inject(model, config("dora"))
    shake(model)
    model(x).sum().backward()
    remove(model)
    assert model(x).equal(expected)
    assert [type(p) for p in model.parameters()] == kinds
    # As bytes: those of two weights may be read as a bfloat16 that is not a number.
    assert all(
        p.view(torch.uint8).equal(stored[name].view(torch.uint8))
        for name, p in model.named_parameters()
        if name in stored
    )


@every_kind
def test_an_adapter_is_saved_and_loaded_onto_the_same_base(kind: str):
    (model, x), (other, _) = build(kind), build(kind)
    inject(model, config())
    inject(other, config())
    shake(model)
    file = io.BytesIO()
    torch.save(adapter_state_dict(model), file)
    file.seek(0)
    load_adapter_state_dict(other, torch.load(file))
    assert other(x).equal(model(x))


def lost_in(weight: Tensor, layer: Any) -> Tensor:
    """What storing `weight` as that of `layer` is stored leaves of it, by bitsandbytes alone."""
    if isinstance(layer, bnb.nn.Linear4bit):
        like = layer.weight
        stored, state = bnb.functional.quantize_4bit(
            weight, quant_type=like.quant_type, compress_statistics=like.compress_statistics
        )
        return bnb.functional.dequantize_4bit(stored, state)
    stored, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
    return bnb.functional.int8_vectorwise_dequant(stored, scales)


@pytest.mark.parametrize("kind", [*BITSANDBYTES, *REREAD])
@pytest.mark.parametrize("variant", ["plain", "dora", "bias-of-b"])
def test_merging_quantizes_again_and_says_what_that_loses(kind: str, variant: str):
    model, x = build(kind)
    inject(model, config(variant))
    shake(model)
    expected = model(x)
    layer: Any = model[2]
    wanted = layer.adapted_weight().detach()
    stored = lost_in(wanted, layer)
    lost = float((stored.float() - wanted).norm() / (wanted - dense(layer, layer.weight)).norm())
    numbers = plain_twin(model)
    numbers[0].weight.data, numbers[2].weight.data = model[0].adapted_weight().detach(), stored.float()
    if variant == "bias-of-b":
        for i in (0, 2):
            numbers[i].bias.data = (model[i]._parameters["bias"] + model[i].lora.scale * model[i].lora_B_bias).detach()
    inside = merged(model)
    with pytest.warns(UserWarning, match=rf"1 adapted weights again.* up to {lost:.2g} times .*'2'"):
        inside.__enter__()
    assert type(model[2]) in (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    torch.testing.assert_close(model(x), numbers(x), rtol=1e-3, atol=1e-4)  # int8 scales pass through float16
    inside.__exit__(None, None, None)
    assert model(x).equal(expected)
    with pytest.warns(UserWarning, match="quantizes 1 adapted"):
        merge(model)
    torch.testing.assert_close(model(x), numbers(x), rtol=1e-3, atol=1e-4)
    assert is_quantized(model[2].weight)


@pytest.mark.parametrize("kind", TORCHAO)
def test_merging_makes_a_weight_of_torchao_a_plain_one_and_loses_nothing(kind: str):
    model, x = build(kind)
    inject(model, config("dora"))
    shake(model)
    expected = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), expected)
    assert model(x).equal(expected)
    merge(model)
    assert type(model[2].weight) is nn.Parameter
    torch.testing.assert_close(model(x), expected)


@every_kind
def test_a_base_that_was_evaluated_changes_in_no_bit(kind: str):
    """Some layers keep what they computed from their weights in eval mode, or store them in another way since."""
    model, x = build(kind)
    with torch.no_grad():
        expected = model.eval()(x)
        trained = model.train()(x)
    for variant in ("plain", "dora"):
        inject(model, config(variant))
        assert model.eval()(x).equal(expected)
        assert model.train()(x).equal(trained)
        shake(model)
        model(x).square().sum().backward()
        assert model[0].lora_B.grad.any()
        model.eval()(x)
        remove(model)
        assert model(x).equal(expected)


@every_kind
def test_a_validation_while_it_trains_changes_no_base(kind: str):
    model, x = build(kind)
    expected = model(x)
    inject(model, config())
    with torch.no_grad():
        model.eval()(x)
    assert model.train()(x).equal(expected)
    shake(model)
    model(x).square().sum().backward()
    assert model[0].lora_B.grad.any()
    remove(model)
    assert model.train()(x).equal(expected)


@every_kind
def test_the_adapter_is_in_float32_whatever_the_weight_is_stored_in(kind: str):
    model, _ = build(kind)
    inject(model, config())
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}
    remove(model)
    inject(model, LoRAConfig(rank=2, target_modules=["2"], adapter_dtype="base"))
    assert {t.dtype for t in adapter_tensors(model).values()} == {torch.float32}


@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_layer_may_be_adapted_before_it_is_quantized_by_being_moved(kind: str):
    torch.manual_seed(1)
    model = nn.Sequential(BITSANDBYTES[kind]())
    x = torch.randn(3, 64)
    base = copy.deepcopy(model).to("cpu")(x)
    inject(model, LoRAConfig(rank=2, use_dora=True))
    model.to("cpu")
    assert is_quantized(model[0].weight)
    assert model(x).equal(base)


def test_the_fingerprint_of_a_base_leaves_out_what_is_quantized():
    model, x = build("nf4-twice")
    before = base_fingerprint(model)
    with torch.no_grad():
        model.eval()(x)  # rearranged, on some CPUs
    assert base_fingerprint(model) == before
    model[4].weight.data.mul_(2)
    assert base_fingerprint(model) != before


def test_a_weight_of_torchaos_nf4_is_read_as_its_numbers():
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(256, 64)), torch.randn(5, 256)
    weight = to_nf4(model[0].weight.detach(), 64, 256)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    expected = model(x)
    for variant in ("plain", "dora"):
        inject(model, LoRAConfig(rank=2, **VARIANTS[variant]))
        assert model(x).equal(expected)
        shake(model)
        adapted = model(x)
        with merged(model):
            torch.testing.assert_close(model(x), adapted)
        remove(model)
    inject(model, LoRAConfig(rank=2))
    shake(model)
    wanted = weight.get_original_weight() + model[0].delta_weight()
    merge(model)
    assert model[0].weight.equal(wanted)


def test_a_wrapper_that_does_not_say_its_numbers_is_refused_where_they_are_needed():
    """Such as torchao's weights for one kernel alone."""

    class Packed(torch.Tensor):
        @staticmethod
        def __new__(cls, data: Tensor) -> Any:
            return Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32, requires_grad=False)

        def __init__(self, data: Tensor) -> None:
            self.numbers = data

        def __tensor_flatten__(self) -> Any:
            return ["numbers"], None

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
                return Packed(args[0].numbers)
            if func is torch.ops.aten.t.default:
                return Packed(args[0].numbers.t())
            if func is torch.ops.aten.addmm.default:
                return func(args[0], args[1], args[2].numbers)
            raise NotImplementedError(func)

    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
    expected = model(x)
    for fields in ({"use_dora": True}, {"init": "pissa"}):
        with pytest.raises(TargetError):
            inject(model, LoRAConfig(rank=2, **fields))
    inject(model, LoRAConfig(rank=2))
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(AdapterStateError, match="unknown way"):
        merge(model)
    remove(model)
    assert model(x).equal(expected)


def test_numbers_of_an_unknown_kind_are_refused_where_they_are_needed():
    class Eighth(nn.Linear):
        """A weight of one byte with a scale of its own."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype) * 0.125, self.bias)

    layer = Eighth(4, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.Sequential(layer)
    with pytest.raises(TargetError, match="float8_e4m3fn"):
        inject(model, LoRAConfig(rank=2, use_dora=True))
    inject(model, LoRAConfig(rank=2))
    assert model[0].lora_A.dtype == torch.float32
    model(torch.randn(2, 4)).sum().backward()
    assert model[0].lora_B.grad.any()
    with pytest.raises(AdapterStateError, match="unknown way"):
        merge(model)


@every_kind
@pytest.mark.parametrize("variant", ["plain", "dora"])
@pytest.mark.slow
def test_it_compiles_and_computes_the_same(kind: str, variant: str):
    model, x = build(kind)
    inject(model, config(variant))
    shake(model)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), expected)
    torch._dynamo.reset()
