"""What a CPU cannot show: kernels in bfloat16, recorded CUDA graphs, and memory on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from rounding import Rounded, assert_rounded
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject
from lightning_lora.errors import AdapterStateError
from tests.engine.bank_models import MOST, close_to, served, small

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here can be shown on a CPU"),
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),  # what inductor itself imports
]
DEVICE = "cuda"


@pytest.fixture(autouse=True)
def as_the_bounds_assume() -> Iterator[None]:
    """bfloat16 is summed in float32, also where a kernel splits the sum (see tests/rounding.py)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    yield
    matmul.allow_bf16_reduced_precision_reduction = before


def adapted(width: int, rank: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width, device=DEVICE, dtype=dtype))
    inject(model, LoRAConfig(rank=rank, alpha=rank, target_modules=["0"]))
    nn.init.normal_(model[0].lora_B, std=0.02)
    return model


def test_bfloat16_gives_the_formula_up_to_rounding():
    model, x = adapted(512, 8, torch.bfloat16), torch.randn(64, 512, device=DEVICE, dtype=torch.bfloat16)
    own = dict(model[0].named_parameters())
    X, W, b, A, B = (
        Rounded.of(t, torch.bfloat16) for t in (x, own["weight"], own["bias"], own["lora_A"], own["lora_B"])
    )
    assert_rounded(model(x), X @ W.T + b + X @ A.T @ B.T * model[0].lora.scale)


def test_a_recorded_step_gives_the_gradients_of_new_inputs():
    model, x = adapted(64, 4, torch.float32), torch.randn(16, 64, device=DEVICE)
    twin = copy.deepcopy(model)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        loss = model(x).square().mean()
        for p, g in zip(trained, torch.autograd.grad(loss, trained)):
            p.grad.copy_(g)
        return loss

    for p in trained:
        p.grad = torch.zeros_like(p)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up before a graph is recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = twin(x).square().mean()
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for p, q in zip(trained, (q for q in twin.parameters() if q.requires_grad)):
            torch.testing.assert_close(p.grad, q.grad)
            q.grad = None


@torch.no_grad()
def test_a_bank_serves_every_routing_with_reduced_overhead():
    base, factors, alone = small(3)
    base, alone = base.to(DEVICE), {name: model.to(DEVICE) for name, model in alone.items()}
    bank = served(base, 3, MOST)
    for name, part in factors.items():
        bank.put(name, part)
    x = torch.randn(3, 6, device=DEVICE)
    plain = base(x)
    compiled = torch.compile(base, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the first two calls warm up and record
        for name in ("a0", "a2"):
            with bank.use(name):
                assert close_to(compiled(x).clone(), alone[name](x))
        with bank.use(["a2", None, "a1"]):
            expected = torch.stack([alone["a2"](x)[0], plain[1], alone["a1"](x)[2]])
            assert close_to(compiled(x).clone(), expected)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_graph_of_a_bank_that_would_replay_one_routing_is_refused():
    base, factors, _ = small(1)
    base = base.to(DEVICE)
    bank = served(base, 1, MOST)
    bank.put("a0", factors["a0"])
    x = torch.randn(3, 6, device=DEVICE)
    with bank.use("a0"):
        base(x)
        with (
            pytest.raises(AdapterStateError, match="A CUDA graph is recorded"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            base(x)


def test_a_forward_keeps_its_input_once_and_the_products_with_A():
    rows, width, rank = 4096, 1024, 8
    model, x = adapted(width, rank, torch.float32), torch.randn(rows, width, device=DEVICE, requires_grad=True)
    size, slack = 4 * rows * width, 1 << 20  # the allocator rounds each tensor up to 512 bytes, large ones to 2 MiB
    model(x).sum().backward()  # cuBLAS takes its workspace
    x.grad = None
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = model(x)
    kept = torch.cuda.memory_allocated() - before
    assert size <= kept <= size + 2 * 4 * rows * rank + slack  # y and x A^T; x was there
    y.backward(torch.ones_like(y))
    # The gradients of y and x, x's once more while its two parts are added, and nothing of W's.
    assert torch.cuda.max_memory_allocated() - before <= kept + 3 * size + slack
