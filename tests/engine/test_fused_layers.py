"""The layers that use the fused step, in models that do more to them than call them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from cases import Written, randomise, reference
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lightning_lora.engine import LoRAConfig, inject
from tests.engine.fused_step import saved_by


class Blocks(nn.Module):
    """Two residual blocks, each checkpointed if asked."""

    def __init__(self, way: str = "not", layer: Callable[[int, int], nn.Module] = nn.Linear) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(nn.Sequential(layer(8, 12), nn.Tanh(), layer(12, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.way == "not" else checkpoint(block, x, use_reentrant=self.way == "reentrant"))
        return x


def adapted(model: nn.Module, **config: object) -> nn.Module:
    inject(model, LoRAConfig(rank=2, **{"target_modules": r"blocks\.\d\.[02]", **config}))
    randomise(model)
    return model.train()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_weights(model: nn.Module, way: str) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.way = way
    return twin


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("way", ["reentrant", "non-reentrant"])
def test_checkpointing_hooks_and_the_compiler_at_once_give_the_same_gradients(way: str, dropout: float):
    torch.manual_seed(0)
    plain = adapted(Blocks(), dropout=dropout)
    busy, seen = same_weights(plain, way), []
    for block in busy.blocks:
        block[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1,))
        block[0].register_forward_hook(lambda module, inputs, output: output.clone())
        block[2].register_full_backward_hook(lambda module, inputs, outputs: seen.append(len(inputs)))
        block[2].register_forward_hook(lambda module, inputs, output: output.mul_(1))  # in place, on what is returned
    x = torch.randn(3, 8, requires_grad=True)
    torch.manual_seed(1)
    expected = gradients(plain, x)
    torch.manual_seed(1)
    torch.testing.assert_close(gradients(busy, x), expected)
    assert seen
    if dropout == 0:  # compiled, it draws other numbers
        compiled = torch.compile(same_weights(plain, "non-reentrant"), backend="aot_eager")
        found = {name.removeprefix("_orig_mod."): g for name, g in gradients(compiled, x).items()}
        torch.testing.assert_close(found, expected)
        torch._dynamo.reset()


def parametrized(d_in: int, d_out: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(d_in, d_out))


def with_bias_of_its_own(d_in: int, d_out: int) -> nn.Module:
    layer = nn.Linear(d_in, d_out)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    return layer


def pruned(d_in: int, d_out: int) -> nn.Module:
    return prune.l1_unstructured(nn.Linear(d_in, d_out), "weight", 0.5)


def doubled_by_a_hook(d_in: int, d_out: int) -> nn.Module:
    layer = nn.Linear(d_in, d_out)
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer


@pytest.mark.parametrize(
    "layer",
    [nn.Linear, Written, parametrized, with_bias_of_its_own, pruned, doubled_by_a_hook],
    ids=lambda f: f.__name__,
)
def test_a_layer_computes_what_its_base_does_plus_the_update(layer: Callable[[int, int], nn.Module]):
    base = Blocks(layer=layer).double()
    block = base.blocks[0][0]
    x = torch.randn(3, 8, dtype=torch.float64)
    before = block(x).detach()
    adapted(base)
    A, B = block.lora_A, block.lora_B
    update = block.lora.scale * x @ A.T @ B.T
    torch.testing.assert_close(block(x), before + (2 if layer is doubled_by_a_hook else 1) * update)
    base(x).sum().backward()
    assert A.grad.abs().sum() > 0


def test_the_output_of_a_base_that_needs_it_for_its_own_gradient_is_not_changed_in_place():
    class Squashed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()  # whose gradient is computed from what it returned

    model = adapted(Blocks(layer=Squashed))
    x = torch.randn(3, 8, requires_grad=True)
    assert torch.autograd.gradcheck(model.double(), x.double().detach().requires_grad_())


def test_biases_and_weights_that_are_trained_beside_the_adapter_get_their_gradients():
    model = adapted(Blocks(), bias="all").double()
    layer = model.blocks[0][0]
    layer.weight.requires_grad_()
    x = torch.randn(3, 8, dtype=torch.float64)
    exact = reference(model)
    expected = gradients(exact.requires_grad_(), x)
    found = gradients(model, x)
    for name in ("blocks.0.0.bias", "blocks.1.2.bias", "blocks.0.0.weight"):
        torch.testing.assert_close(found[name], expected[name])


def test_accumulated_gradients_are_the_sum():
    model, x = adapted(Blocks()).double(), torch.randn(6, 8, dtype=torch.float64)
    whole = gradients(model, x)
    for half in x.split(3):
        (model(half).square().mean() / 2).backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole)


def test_functional_calls_with_other_weights_use_those():
    model, x = adapted(Blocks()), torch.randn(3, 8)
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(others[name])
    torch.testing.assert_close(torch.func.functional_call(model, others, x), twin(x))
    gradient = torch.func.grad(lambda w: torch.func.functional_call(model, w, x).square().mean())(others)
    twin.requires_grad_()
    torch.testing.assert_close(gradient, gradients(twin, x))


def test_a_layer_that_is_used_twice_gets_both_gradients():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[0](self.blocks[0](x).tanh())

    model = adapted(Twice(), target_modules=r"blocks\.0").double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = torch.randn(3, 8, dtype=torch.float64)

    def output(A: Tensor, B: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"blocks.0.lora_A": A, "blocks.0.lora_B": B}, x)

    assert torch.autograd.gradcheck(output, parameters)


@pytest.mark.parametrize("layer", [nn.Linear, lambda d_in, d_out: Conv1D(d_out, d_in)], ids=["Linear", "Conv1D"])
def test_a_known_layer_keeps_its_input_and_the_narrow_product_alone(layer: Callable[[int, int], nn.Module]):
    model = adapted(nn.ModuleDict({"blocks": nn.ModuleList([layer(32, 16)])}), target_modules=r"blocks\.0")
    x = torch.randn(64, 32, requires_grad=True)
    module = model["blocks"][0]
    known = [x, *module.parameters()]
    assert saved_by(lambda: module(x), *known) == 2 * 64  # A x, of rank 2


@pytest.mark.parametrize("config", [{}, {"lora_bias": True}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_a_replica_of_data_parallel_computes_what_its_module_does(config: dict[str, object]):
    module = adapted(Blocks(), **config).blocks[0][0]
    replica = module._replicate_for_data_parallel()  # which has no parameters: it is given copies, as attributes
    for name, p in module.named_parameters():
        setattr(replica, name, p.detach().clone())
    x = torch.randn(3, 8)
    torch.testing.assert_close(replica(x), module(x))


@pytest.mark.parametrize("name", ["bias", "lora_A", "lora_B"])
def test_a_parametrized_tensor_is_read_as_its_parametrization_says(name: str):
    class Tripled(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 3 * t

    layer = nn.Sequential(nn.Linear(5, 4)).double()
    inject(layer, LoRAConfig(rank=2, target_modules=["0"]))
    x = torch.randn(3, 5, dtype=torch.float64)
    tensors = {own: getattr(layer[0], own).detach().clone().normal_() for own in ("weight", "bias", "lora_A", "lora_B")}
    with torch.no_grad():
        for own, value in tensors.items():
            getattr(layer[0], own).copy_(value)
    parametrize.register_parametrization(layer[0], name, Tripled())
    W, b, A, B = (3 * t if own == name else t for own, t in tensors.items())
    torch.testing.assert_close(layer(x), x @ W.T + b + layer[0].lora.scale * x @ A.T @ B.T)
