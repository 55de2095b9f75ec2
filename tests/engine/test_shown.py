"""An adapted layer shows W + s B A to whoever reads its weight; what is written, tied or copied is the base's own."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import CASES, IDS, Case, randomise, reference
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from lightning_lora.engine import LoRAConfig, adapters, base_fingerprint, inject, merge, merged, remove
from lightning_lora.engine.layers.base import Adapter as Base
from lightning_lora.engine.layers.base import pairs
from lightning_lora.errors import AdapterStateError

X = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Times(torch.autograd.Function):
    """A kernel of a user's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W.t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, W = ctx.saved_tensors
        return g @ W, g.t() @ x


READS = {
    "linear": lambda a, e, x: F.linear(x, a.weight),
    "transposed": lambda a, e, x: F.linear(a(x), a.weight.t(), a.bias[:1]),
    "slogdet": lambda a, e, x: torch.linalg.slogdet(a.weight[:6, :6])[1],
    "penalty": lambda a, e, x: a.weight.pow(2).sum() + e.weight.abs().sum(),
    "normalised": lambda a, e, x: F.linear(F.normalize(x), F.normalize(a.weight)),
    "concatenated": lambda a, e, x: F.linear(x, torch.cat([a.weight, e.weight])),
    "tied": lambda a, e, x: torch.tanh(e(torch.arange(4)) + a(x)[:4].sum()) @ e.weight.t(),
    "rows": lambda a, e, x: torch.stack(list(e.weight)) + e.weight[2] + e.weight[[1, 0]].sum(),
    "views": lambda a, e, x: a.weight.T.mT.unsqueeze(0).view(-1).narrow(0, 3, 20).reshape(4, 5).chunk(2)[1],
    "einsum": lambda a, e, x: torch.einsum("oi,ni->no", a.weight, x),
    "operators": lambda a, e, x: (2 * a.weight - 1) / (1 + a.weight**2) @ e.weight.mT,
    "another dtype": lambda a, e, x: a.weight.to(torch.float32).double(),
    "copy": lambda a, e, x: a.weight.clone().contiguous(),
    "a kernel": lambda a, e, x: Times.apply(x, a.weight),
    "a kernel of a view": lambda a, e, x: Times.apply(x[:, :6], a.weight.t()),
    "into a buffer": lambda a, e, x: torch.zeros(6, 8, dtype=torch.float64).copy_(a.weight),
    "into a part of a buffer": lambda a, e, x: torch.zeros(9, 8, dtype=torch.float64).index_put(
        (torch.arange(6),), a.weight
    ),
    "checkpointed": lambda a, e, x: checkpoint(lambda x: F.linear(x, a.weight) @ a.weight, x, use_reentrant=False),
    "read twice, in a region and out of it": lambda a, e, x: checkpoint(
        lambda x: F.linear(x, a.weight), x + a.weight.sum(), use_reentrant=False
    ),
}


class Reader(nn.Module):
    """Reads the weights of its layers, in its forward or not."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.a, self.e, self.read = nn.Linear(8, 6), nn.Embedding(5, 8), read

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.read(self.a, self.e, x)
        return y


def reader(read: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = Reader(read).double()
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["a", "e"], **fields}))
    randomise(model)
    return model


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("inside", [True, False], ids=["in the forward", "outside of it"])
def test_what_is_computed_from_a_weight_is_computed_from_the_adapted_one(read: Any, inside: bool):
    model = reader(read)

    def output(model: Any) -> Tensor:
        x = X.clone().requires_grad_()  # reentrant or not, a checkpointed region is one of autograd's
        return model(x) if inside else read(model.a, model.e, x)

    y = output(model)
    torch.testing.assert_close(y, output(reference(model)))
    # The gradients, against the same function of W + s B A as plain tensors.
    plain, leaves, ours = copy.deepcopy(model), [], []
    remove(plain)
    for pair in pairs(model):
        A, B = (t.detach().clone().requires_grad_() for t in (pair.A, pair.B))
        change = pair.spec.scale * B @ A
        base = plain.get_submodule(pair.name)
        W = base._parameters.pop("weight").detach()
        base.weight = W + (change.T if pair.name == "e" else change)
        leaves += [A, B]
        ours += [pair.A, pair.B]
    weights = torch.randn_like(y)
    wanted = torch.autograd.grad((output(plain) * weights).sum(), leaves, allow_unused=True)
    given = torch.autograd.grad((y * weights).sum(), ours, allow_unused=True)
    for g, w in zip(given, wanted):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:Merged, a convolution with groups")
def test_every_geometry_shows_the_weight_that_merging_would_give(case: Case):
    model = case.adapted()
    shown, own = {}, {}
    for name, module in adapters(model):
        for parameter in (pair.parameter for pair in module.lora_pairs(name)):
            own[name, parameter] = module._parameters[parameter]
            read = getattr(module, parameter)
            assert (read.shape, read.dtype, read.device) == (
                own[name, parameter].shape,
                torch.float32,
                torch.device("cpu"),
            )
            if module.merged_shape() is None:
                shown[name, parameter] = (read * 1).detach()
                continue
            with pytest.raises(AdapterStateError, match=f"The weight of '{name}' was read"):
                read * 1
    with merged(model):
        for (name, parameter), value in shown.items():
            torch.testing.assert_close(value, model.get_submodule(name)._parameters[parameter])


def test_rows_of_tokens_are_shown_to_a_head_that_reads_the_table():
    torch.manual_seed(0)
    model = Reader(READS["tied"]).double()
    inject(model, LoRAConfig(rank=2, target_modules=["a"], trainable_token_indices={"e": [3, 1]}))
    with torch.no_grad():
        model.e.lora_tokens.add_(1)
    y = model(X).detach()
    with merged(model):
        torch.testing.assert_close(model(X), y)
    expected = model.e._parameters["weight"].detach().clone()
    expected[[3, 1]] = model.e.lora_tokens.detach()
    torch.testing.assert_close(model.e.weight * 1, expected)
    model(X).sum().backward()
    assert model.e.lora_tokens.grad.abs().min() > 0


def test_shape_dtype_and_device_cost_nothing(monkeypatch: pytest.MonkeyPatch):
    model = reader(READS["linear"])
    for kind in type(model.a).__mro__:
        if "delta_weight" in vars(kind):
            monkeypatch.setattr(kind, "delta_weight", lambda *_, **__: pytest.fail("a weight was computed"))
    W = model.a.weight
    assert (W.shape, W.size(0), W.dim(), len(W), W.numel(), W.stride()) == ((6, 8), 6, 2, 6, 48, (8, 1))
    assert (W.dtype, W.device, W.is_cuda, W.layout, W.ndim) == (
        torch.float64,
        torch.device("cpu"),
        False,
        torch.strided,
        2,
    )
    assert W.is_floating_point()
    assert torch.is_floating_point(W)
    assert W.data_ptr() == model.a._parameters["weight"].data_ptr()
    assert W.t().shape == W.data.mT.shape == (8, 6)
    assert W.is_leaf
    assert W.grad is None
    assert W.requires_grad, "what is computed from it has a gradient"
    assert isinstance(W, nn.Parameter)
    assert model.a.weight is W
    with torch.no_grad():
        assert not model.a.weight.requires_grad


def test_a_weight_is_computed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch):
    model = reader(lambda a, e, x: F.linear(x, a.weight) @ a.weight + a.weight.sum())
    computed, compute = [], Base.delta_weight
    monkeypatch.setattr(Base, "delta_weight", lambda self, *a, **k: computed.append(self) or compute(self, *a, **k))
    model(X)
    assert len(computed) == 1
    with torch.no_grad():
        model.a.lora_B.data.mul_(2)  # which torch counts no version of
    expected = reference(model)(X)
    torch.testing.assert_close(model(X), expected)


def test_two_backward_passes_of_one_forward_and_a_penalty_of_the_second_order():
    model = reader(READS["normalised"])
    y = model(X)
    first = torch.autograd.grad(y.sum(), model.a.lora_B, retain_graph=False)
    y = model(X)
    a, b = y[:, 0].sum(), (model.a.weight**2).sum()
    a.backward()
    b.backward()
    assert torch.isfinite(first[0]).all()

    def penalty(B: Tensor) -> Tensor:
        with torch.no_grad():
            model.a.lora_B.copy_(B)
        (g,) = torch.autograd.grad((model.a.weight**4).sum(), model.a.lora_A, create_graph=True)
        return g.square().sum()

    B = model.a.lora_B.detach().clone()
    (exact,) = torch.autograd.grad(penalty(B), model.a.lora_B)
    step, direction = 1e-6, torch.randn_like(B)
    difference = (penalty(B + step * direction) - penalty(B - step * direction)) / (2 * step)
    torch.testing.assert_close((exact * direction).sum(), difference, rtol=1e-6, atol=1e-6)


def test_a_backward_pass_after_the_factors_changed_is_an_error():
    model = reader(READS["penalty"])
    y = model.a.weight.pow(2).sum()
    with torch.no_grad():
        model.a.lora_B.add_(1)
    with pytest.raises(AdapterStateError, match="call backward before the optimizer's step"):
        y.backward()


# What wants the parameter itself.


INITIALISERS = [
    nn.init.zeros_,
    nn.init.orthogonal_,
    nn.init.kaiming_uniform_,
    nn.init.xavier_normal_,
    nn.init.trunc_normal_,
    nn.init.eye_,
    lambda w: nn.init.constant_(w.data, 3.0),
    lambda w: nn.init.normal_(w[1:3]),
    lambda w: w.data.fill_(2.0),
    lambda w: w.detach().t().copy_(torch.ones(w.shape[1], w.shape[0])),
    lambda w: w.copy_(torch.arange(w.numel()).view(w.shape)),
    lambda w: w.__setitem__((0, slice(None)), 5.0),
    lambda w: w.view(-1)[3:9].mul_(0),
    lambda w: torch.add(torch.ones_like(w), 1, out=w),
    lambda w: w.data.uniform_(-1, 1).clamp_(0, 0.5),
]


@pytest.mark.parametrize("write", INITIALISERS, ids=range(len(INITIALISERS)))
@pytest.mark.parametrize(
    "which", ["a.weight", "lstm.weight_hh_l0", "attention.in_proj_weight", "attention.out_proj.weight"]
)
def test_a_write_reaches_the_base_parameter_as_if_it_were_not_adapted(write: Any, which: str):
    def made() -> Any:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(6, 24), "lstm": nn.LSTM(6, 6), "attention": nn.MultiheadAttention(6, 2)})

    plain, model = made(), made()
    inject(model, LoRAConfig(rank=2, target_modules=["a", "lstm", "attention"]))
    randomise(model)
    for m in (plain, model):
        owner, _, name = which.rpartition(".")
        torch.manual_seed(1)
        with torch.no_grad():
            write(getattr(m.get_submodule(owner), name))
    wanted = dict(plain.named_parameters())[which]
    assert model.get_submodule(owner)._parameters[name].equal(wanted)
    # And what is read from then on has it in it.
    torch.testing.assert_close(
        getattr(model.get_submodule(owner), name) * 1, model.get_submodule(owner).adapted_weight(name)
    )


def test_ties_share_the_parameter_itself():
    model = reader(READS["linear"])
    own = model.e._parameters["weight"]
    head = nn.Linear(8, 5, bias=False).double()
    head.weight = model.e.weight
    assert head._parameters["weight"] is own
    assert model.get_parameter("e.weight").data_ptr() == own.data_ptr()
    holder = nn.Module()
    holder.w = nn.Parameter(model.e.weight.t(), requires_grad=False)
    assert type(holder.w) is nn.Parameter
    assert holder.w.data_ptr() == own.data_ptr()
    assert holder.w.equal(own.t())
    other = nn.Embedding(5, 8).double()
    other.weight.data = model.e.weight.data
    assert other.weight.data_ptr() == own.data_ptr()
    assert other.weight.equal(own)
    assert dict(model.named_parameters())["e.weight"] is own
    free = nn.Parameter(model.a.weight.detach())
    (free * 2).sum().backward()
    assert free.grad.equal(torch.full((6, 8), 2.0, dtype=torch.float64)), "a parameter of its own, in the same memory"


def test_copies_of_the_parameter_are_copies_of_the_base():
    model = reader(READS["linear"])
    own = model.a._parameters["weight"]
    for twin in (copy.deepcopy(model.a.weight), pickle.loads(pickle.dumps(model.a.weight))):
        assert type(twin) is nn.Parameter
        assert twin.equal(own)
    file = io.BytesIO()
    torch.save({"w": model.a.weight}, file)
    file.seek(0)
    assert torch.load(file)["w"].equal(own)
    larger = nn.Linear(8, 9).double()
    larger.weight.data[:6] = model.a.weight.data[:6]  # how transformers resizes
    assert larger.weight[:6].equal(own)
    same = nn.Linear(8, 6).double()
    with torch.no_grad():
        same.weight.copy_(model.a.weight)
    assert same.weight.equal(own)


def test_a_resized_table_has_the_shape_that_was_written():
    embedding = nn.Sequential(nn.Embedding(5, 4))
    inject(embedding, LoRAConfig(rank=2, target_modules=["0"]))
    embedding[0].weight.data = torch.ones(7, 4)  # what transformers does to keep the type of the module
    assert embedding[0].weight.shape == (7, 4)
    assert embedding[0]._parameters["weight"].equal(torch.ones(7, 4))


def test_state_dict_and_fingerprint_are_the_bases():
    model = reader(READS["penalty"])
    base = copy.deepcopy(model)
    remove(base)
    model(X)
    assert base_fingerprint(model) == base_fingerprint(base)
    for name, value in base.state_dict().items():
        assert model.state_dict()[name].equal(value)
    (model.a.weight.sum()).backward()
    assert model.a._parameters["weight"].grad is None


# A value that has the adapter in it must not become the base.


def replaced_by_setattr(layer: Any) -> None:
    layer.weight = nn.Parameter(2 * layer.weight)


def replaced_by_data(layer: Any) -> None:
    layer.weight.data = layer.weight.data * 0.5


def replaced_by_copy(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.copy_(layer.weight.clamp(-0.1, 0.1))


@pytest.mark.parametrize("write", [replaced_by_setattr, replaced_by_data, replaced_by_copy])
def test_an_adapted_weight_written_back_is_an_error_and_nothing_changes(write: Any):
    model = reader(READS["linear"])
    before, y = model.a._parameters["weight"].clone(), model(X)
    with pytest.raises(AdapterStateError, match="'a' was read with its adapter added, and is replaced"):
        write(model.a)
    assert model.a._parameters["weight"].equal(before)
    assert model(X).equal(y)


@pytest.mark.parametrize(
    ("layer", "norm", "x", "fuse"),
    [
        (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), torch.randn(2, 3, 6, 6), nn.utils.fuse_conv_bn_eval),
        (nn.Linear(3, 8), nn.BatchNorm1d(8), torch.randn(2, 3), nn.utils.fuse_linear_bn_eval),
        (nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8), torch.randn(2, 4, 6), nn.utils.fuse_conv_bn_eval),
    ],
    ids=["convolution", "linear", "grouped"],
)
@pytest.mark.filterwarnings("ignore:Merged, a convolution with groups")
def test_folding_a_norm_into_an_adapted_layer_is_refused_and_exact_once_merged(layer, norm, x, fuse):
    model = copy.deepcopy(nn.Sequential(layer, norm)).double().eval()
    model[1].running_mean.normal_()
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    randomise(model)
    y = model(x.double())
    with pytest.raises(AdapterStateError, match="'0'"):
        fuse(model[0], model[1])
    torch.testing.assert_close(model(x.double()), y)
    merge(model)
    torch.testing.assert_close(fuse(model[0], model[1])(x.double()), y)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_mkldnn_and_projections_that_are_concatenated_take_the_adapter_with_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    inject(model, LoRAConfig(rank=2, target_modules=["0", "2"]))
    randomise(model)
    y = model(X.float()).detach()
    if torch.backends.mkldnn.is_available():
        from torch.utils.mkldnn import to_mkldnn

        packed = to_mkldnn(copy.deepcopy(model))
        torch.testing.assert_close(packed(X.float()), y, rtol=1e-4, atol=1e-5)
    fused = nn.Linear(8, 12, bias=False)  # as diffusers' fuse_qkv_projections
    with torch.no_grad():
        fused.weight.copy_(torch.cat([model[0].weight.data, model[0].weight.data]))
        torch.testing.assert_close(fused(X.float())[:, :6] + model[0].bias, model[0](X.float()))


# Others that change layers.


@pytest.mark.parametrize(
    "register", [parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm]
)
@pytest.mark.parametrize("which", ["a.weight", "lstm.weight_hh_l0"])
def test_a_parametrization_of_an_adapted_weight_is_refused_and_changes_nothing(register: Any, which: str):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 24), "lstm": nn.LSTM(6, 6)})
    inject(model, LoRAConfig(rank=2, target_modules=["a", "lstm"]))
    owner, _, name = which.rpartition(".")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterStateError, match=f"'{owner}' is adapted.*before inject"):
        register(model[owner], name)
    assert not parametrize.is_parametrized(model[owner])
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[key].equal(value) for key, value in before.items())


def test_pruning_an_adapted_weight_prunes_the_base_and_leaves_the_adapter():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 4), "lstm": nn.LSTM(6, 6)}).double()
    inject(model, LoRAConfig(rank=2, target_modules=["a", "lstm"]))
    randomise(model)
    x = torch.randn(5, 6).double()
    mask = torch.ones(24, 6).double()
    mask[::2] = 0
    prune.custom_from_mask(model["a"], "weight", mask[:4])
    prune.custom_from_mask(model["lstm"], "weight_ih_l0", mask)
    W = model["a"].weight_orig * mask[:4] + model["a"].lora.scale * model["a"].lora_B @ model["a"].lora_A
    torch.testing.assert_close(model["a"](x), F.linear(x, W, model["a"].bias))
    torch.testing.assert_close(model["a"].weight * 1, W)
    twin: Any = nn.LSTM(6, 6).double()
    lstm: Any = model["lstm"]
    for name in twin._flat_weights_names:
        if name.startswith("weight"):
            own = lstm.weight_ih_l0_orig * mask if name == "weight_ih_l0" else lstm._parameters[name]
            A, B = getattr(lstm, f"lora_A_{name}"), getattr(lstm, f"lora_B_{name}")
            twin._parameters[name] = nn.Parameter(own + lstm.lora.parameters[name].scale * B @ A)
        else:
            twin._parameters[name] = lstm._parameters[name]
    twin._flat_weights = [twin._parameters[name] for name in twin._flat_weights_names]
    torch.testing.assert_close(lstm(x)[0], twin(x)[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_a_scripted_model_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4))
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    with pytest.raises(AdapterStateError, match=r"'0' .*merge\(model\)"):
        torch.jit.script(model)
    merge(model)
    torch.jit.script(model)


@pytest.mark.parametrize(
    ("layer", "name", "x"),
    [
        (nn.Linear(4, 3), "input", torch.randn(2, 4)),
        (nn.Embedding(5, 3), "input", torch.tensor([[1, 2]])),
        (nn.EmbeddingBag(5, 3), "input", torch.tensor([[1, 2]])),
        (nn.Conv1d(4, 3, 1), "input", torch.randn(2, 4, 5)),
        (nn.Conv2d(4, 3, 1, groups=1), "input", torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 3, 2), "input", torch.randn(2, 4, 5)),
        (nn.Bilinear(4, 4, 3), "input1", torch.randn(2, 4)),
        (nn.LSTM(4, 3), "input", torch.randn(2, 4)),
        (nn.GRUCell(4, 3), "input", torch.randn(2, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_the_input_may_be_given_by_its_name(layer: nn.Module, name: str, x: Tensor, use_dora: bool):
    model: Any = nn.Sequential(copy.deepcopy(layer))
    inject(model, LoRAConfig(rank=2, target_modules=["0"], use_dora=use_dora))
    randomise(model)
    more = {"input2": x} if name == "input1" else {}
    named, placed = model[0](**{name: x}, **more), model[0](x, *more.values())
    torch.testing.assert_close(named, placed)
    with pytest.raises(TypeError, match=name):
        model[0]()


def test_dora_shows_its_weight_and_leaves_a_parametrized_bias_alone():
    class Positive(nn.Module):
        def forward(self, b: Tensor) -> Tensor:
            return b.exp()

    torch.manual_seed(0)
    layers = {"a": nn.Linear(8, 6), "b": parametrizations.weight_norm(nn.Linear(6, 3))}
    model: Any = nn.Sequential(OrderedDict(layers)).double()
    parametrize.register_parametrization(model[0], "bias", Positive())
    y = model(X)
    inject(model, LoRAConfig(rank=2, target_modules=["a", "b"], use_dora=True))
    assert model(X).equal(y)
    randomise(model)
    h = F.linear(X, model[0].weight, model[0].parametrizations.bias.original.exp())
    torch.testing.assert_close(model[0](X), h)
    layer = model[1]
    V = layer.parametrizations.weight() + layer.lora.scale * layer.lora_B @ layer.lora_A
    W = layer.lora_magnitude_vector[:, None] * V / V.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight * 1, W)
    torch.testing.assert_close(model(X), F.linear(h, W, layer.bias))


def test_loading_a_base_by_assignment_after_its_weight_was_read():
    model = reader(READS["penalty"])
    model(X)
    values = {k: v.clone() + 1 for k, v in model.state_dict().items() if "lora" not in k}
    model.load_state_dict(values, strict=False, assign=True)
    torch.testing.assert_close(model(X), reference(model)(X))


def test_an_activated_adapter_cannot_be_shown():
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a = nn.Embedding(9, 8), nn.Linear(8, 6)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.a(self.embed(input_ids)) + self.a.weight.sum()

    model = Tiny()
    inject(model, LoRAConfig(rank=2, target_modules=["a"], alora_invocation_tokens=[5]))
    assert model.a.weight.shape == (6, 8)
    with pytest.raises(AdapterStateError, match="The weight of 'a' was read"):
        model(torch.tensor([[1, 5, 2]]))
