"""A 4-bit base that has rearranged its weights, as bitsandbytes does on CPUs with AVX512-BF16 in eval mode, is the same
base after `inject`, in training and after `remove`."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
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
from lightning_lora.engine.weights import dense, is_rearranged

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

SHAPES = [(32, 64), (96, 256), (64, 512), (160, 192)]
"""(out, in): one block in a row, several, other numbers of them in rows and in columns."""
BLOCKS = [32, 64, 128, 256]
every_layout = pytest.mark.parametrize(
    ("shape", "block"), [(shape, block) for shape in SHAPES for block in BLOCKS if shape[1] % block == 0]
)
every_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
twice = pytest.mark.parametrize("twice", [False, True])
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "bias-of-b": {"lora_bias": True},
    "pissa": {"init": "pissa"},
}
needs_kernel = pytest.mark.skipif(
    not functional.has_avx512bf16(), reason="only a CPU with AVX512-BF16 computes with what is rearranged"
)


def layer(
    shape: tuple[int, int],
    kind: str = "nf4",
    *,
    block: int = 64,
    twice: bool = False,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    storage: torch.dtype = torch.uint8,
    compute: torch.dtype = torch.float32,
) -> Any:
    made = bnb.nn.Linear4bit(shape[1], shape[0], bias=bias, quant_type=kind, compute_dtype=compute)
    # Other sizes in each block: scales in the wrong place would be seen.
    W = torch.randn(shape) * torch.rand(shape[0], shape[1] // block).repeat_interleave(block, 1)
    made.weight = bnb.nn.Params4bit(
        W.to(dtype), blocksize=block, quant_type=kind, compress_statistics=twice, quant_storage=storage
    )
    made.to("cpu")
    for p in made.parameters():
        p.requires_grad_(False)
    return made


def network(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(layer((256, 128), **options), nn.Tanh(), layer((96, 256), **options))


def evaluated(**options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """A model that was evaluated once, an input, and the output."""
    model, x = network(**options).eval(), torch.randn(3, 5, 128)
    with torch.no_grad():
        return model, x, model(x)


def shake(model: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            tensor.mul_(1.5) if "magnitude" in name else tensor.add_(0.1 * torch.randn(tensor.shape))


def bits(model: nn.Module) -> Iterator[Any]:
    """All that a base of 4-bit layers consists of."""
    for module in model:
        yield type(module)
        for p in module.parameters():
            yield p.detach().clone()
        if isinstance(module, nn.Linear):
            state = module.weight.quant_state
            yield from (state.absmax.clone(), state.dtype, state.nested, is_rearranged(module.weight))


def are_same(some: list[Any], other: list[Any]) -> bool:
    return len(some) == len(other) and all(
        a.dtype == b.dtype and a.equal(b) if isinstance(a, Tensor) else a == b for a, b in zip(some, other)
    )


@every_layout
@every_kind
@twice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_rearranged_weight_stands_for_its_codes_times_its_rounded_scales(
    shape: tuple[int, int], block: int, kind: str, twice: bool, dtype: torch.dtype, storage: torch.dtype
):
    torch.manual_seed(0)
    made = layer(shape, kind, block=block, twice=twice, dtype=dtype, storage=storage)
    weight = made.weight
    state = copy.deepcopy(weight.quant_state)
    if twice:
        state.absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.nested = False
    state.absmax = state.absmax.to(torch.bfloat16).float()
    expected = functional.dequantize_4bit(weight.data, state)
    weight.data, _ = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    assert is_rearranged(weight)
    numbers = dense(made, weight)
    assert numbers.dtype == dtype
    assert numbers.equal(expected)


@needs_kernel
@every_kind
@twice
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 128])
def test_adapters_that_come_and_go_change_no_bit_of_a_base_that_was_evaluated(
    kind: str, twice: bool, bias: bool, compute: torch.dtype, block: int
):
    model, x, expected = evaluated(kind=kind, twice=twice, bias=bias, compute=compute, block=block)
    before = list(bits(model))
    trained = copy.deepcopy(model).train()(x)
    for fields in ({"target_modules": ["0"]}, *VARIANTS.values()):
        inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["0", "2"], **fields}))
        assert model(x).equal(expected)
        assert model.train()(x).equal(trained)
        shake(model)
        model(x).square().sum().backward()
        model.eval()(x)
        model.state_dict()
        remove(model)
        assert are_same(list(bits(model)), before)
        assert model(x).equal(expected)


@needs_kernel
@twice
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_base_that_was_not_evaluated_is_not_rearranged_while_it_has_adapters(twice: bool, compute: torch.dtype):
    model, x = network(twice=twice, compute=compute), torch.randn(3, 5, 128)
    expected = copy.deepcopy(model)(x)
    before = list(bits(model))
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert model(x).equal(expected)
    with torch.no_grad():
        model.eval()(x)
    remove(model)
    assert are_same(list(bits(model)), before)
    assert model.train()(x).equal(expected)
    with torch.no_grad():
        model.eval()(x)
    assert is_rearranged(model[0].weight)
    assert is_rearranged(model[2].weight)


@needs_kernel
@every_layout
@twice
def test_the_kernel_computes_with_the_numbers_that_the_weight_stands_for(
    shape: tuple[int, int], block: int, twice: bool
):
    torch.manual_seed(0)
    made, x = layer(shape, block=block, twice=twice, bias=False).eval(), torch.randn(7, shape[1])
    with torch.no_grad():
        output = made(x)
        W = dense(made, made.weight)
        exact, magnitude = x.double() @ W.double().T, x.double().abs() @ W.double().abs().T
    # Each number of x and of W is rounded to bfloat16, and the output: half an eps each, and one for their products.
    assert ((output - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * magnitude).all()


@needs_kernel
@twice
@pytest.mark.parametrize("target", ["0", "2"])
def test_gradients_pass_a_rearranged_layer_as_through_its_numbers(twice: bool, target: str):
    model, x, _ = evaluated(twice=twice)
    inject(model, LoRAConfig(rank=2, target_modules=[target]))
    top, x = model[2], torch.randn(3, 5, 256, requires_grad=True)
    g = torch.randn(3, 5, 96)
    top(x).backward(g)
    W = dense(top, top._parameters["weight"])
    # Rounded products of 96 terms.
    torch.testing.assert_close(x.grad, g @ W, rtol=0, atol=96 * torch.finfo().eps * float((g.abs() @ W.abs()).max()))


@needs_kernel
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_of_rearranged_layers_are_trained(bias: str):
    model, x, expected = evaluated()
    inject(model, LoRAConfig(rank=2, target_modules=["0"], bias=bias))
    assert model(x).equal(expected)
    model.train()(x).sum().backward()
    if bias == "all":
        assert model[2].bias.grad.equal(torch.full((96,), 15.0))
    assert model[0].bias.grad.any()


@needs_kernel
@twice
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_adapter_computes_the_formula_on_a_rearranged_base(twice: bool, variant: str):
    model, x, expected = evaluated(twice=twice)
    twin = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 96))
    with torch.no_grad():
        for mine, its in zip(model, twin):
            if isinstance(its, nn.Linear):
                its.weight.copy_(dense(mine, mine.weight))
                its.bias.copy_(mine.bias)
    close = {"rtol": 0.0, "atol": 0.03 * float(expected.abs().max())}  # the kernel's inputs and outputs are bfloat16
    torch.testing.assert_close(twin(x), expected, **close)
    for each in (model, twin):
        inject(each, LoRAConfig(rank=2, target_modules=["0", "2"], **VARIANTS[variant]))
    shake(model)
    load_adapter_state_dict(twin, adapter_state_dict(model))
    torch.testing.assert_close(model(x), twin(x), **close)
    adapted = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # merging quantizes again, and says so
        with merged(model):
            inside = model(x)
        assert model(x).equal(adapted)
        wanted = [m.adapted_weight().detach() for m in (model[0], model[2])]
        merge(model)
    assert inside.equal(model(x))
    for mine, W in zip((model[0], model[2]), wanted):
        stored, state = functional.quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=twice)
        if not twice:
            state.absmax = state.absmax.to(torch.bfloat16).float()
            assert dense(mine, mine.weight).equal(functional.dequantize_4bit(stored, state))


@needs_kernel
@twice
@pytest.mark.parametrize("target", ["0", "2"])
def test_copies_and_files_of_a_rearranged_model_compute_the_same(twice: bool, target: str):
    model, x, _ = evaluated(twice=twice)
    inject(model, LoRAConfig(rank=2, target_modules=[target]))
    shake(model)
    expected, before = model(x), base_fingerprint(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other(x).equal(expected)
        other.train()(x).sum().backward()
        remove(other)
        assert type(other[0]) is type(other[2]) is bnb.nn.Linear4bit
    assert base_fingerprint(model) == before
    expected = expected.detach()
    fresh = network(twice=twice)
    inject(fresh, LoRAConfig(rank=2, target_modules=[target]))
    load_adapter_state_dict(fresh, adapter_state_dict(model))
    torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@needs_kernel
@twice
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_a_state_dict_of_rearranged_layers_holds_their_numbers_and_changes_nothing(twice: bool, storage: torch.dtype):
    model, x, _ = evaluated(twice=twice, storage=storage)
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    shake(model)
    expected = model(x)
    saved = model.state_dict()
    assert model(x).equal(expected)
    assert is_rearranged(model[0]._parameters["weight"])
    for at in "02":
        stats = {key: value for key, value in saved.items() if key.startswith(f"{at}.weight.")}
        loaded = bnb.nn.Params4bit.from_prequantized(saved[f"{at}.weight"], stats, device="cpu")
        module = model[int(at)]
        assert dense(module, loaded).equal(dense(module, module._parameters["weight"]))


@needs_kernel
@twice
def test_a_rearranged_layer_that_leaves_the_cpu_is_put_back(twice: bool):
    model, _, _ = evaluated(twice=twice)
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    weights = [m._parameters["weight"] for m in (model[0], model[2])]
    numbers = [dense(m, W) for m, W in zip((model[0], model[2]), weights)]
    model.to(torch.float32)
    assert all(map(is_rearranged, weights))
    # As a move to a GPU looks to a layer, whose weights cannot be moved to the meta device.
    model._apply(lambda t: t if t.numel() else t.to("meta"))
    assert not any(map(is_rearranged, weights))
    assert all(dense(m, W).equal(known) for m, W, known in zip((model[0], model[2]), weights, numbers))


@needs_kernel
@pytest.mark.parametrize("target", ["0", "2"])
def test_a_rearranged_model_compiles(target: str):
    model, x, _ = evaluated()
    inject(model, LoRAConfig(rank=2, target_modules=[target]))
    shake(model)
    expected = model(x)
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(compiled(x), expected)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
@pytest.mark.parametrize("shape", [(48, 96), (33, 80), (32, 1056)])
def test_a_layer_that_cannot_be_rearranged_is_adapted_and_evaluated(kind: str, shape: tuple[int, int]):
    """bitsandbytes' own forward in eval mode fails on these shapes where the CPU has AVX512-BF16."""
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(
        shape[1], shape[0], quant_type=kind, compute_dtype=torch.float32, compress_statistics=False
    )
    model, x = nn.Sequential(made).to("cpu"), torch.randn(3, shape[1])
    expected = model.train()(x)
    inject(model, LoRAConfig(rank=2))
    assert model.eval()(x).equal(expected)
    shake(model)
    W, module = dense(made, made._parameters["weight"]), made
    torch.testing.assert_close(model(x), x @ (W + module.delta_weight()).T + module.bias)
    remove(model)
    assert model.train()(x).equal(expected)
