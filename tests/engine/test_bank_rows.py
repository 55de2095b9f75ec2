"""Which row of a batch a layer's positions belong to: known, said, or an error that names the layer, never a guess."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.bank import Bank, LayerFactors
from lightning_lora.errors import AdapterStateError, BankError, ConfigError, TargetError
from tests.engine.bank_models import close_to


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def bank_on(model: nn.Module, targets: list[str], count: int = 3) -> Bank:
    """With adapters "a", "b", ... on every layer that is targeted, far from each other."""
    bank = Bank(model.eval(), count, max_rank=2, target_modules=targets)
    for i in range(count):
        shapes = {name: cell.geometry.shapes(cell.module, 2) for name, cell in bank._cells.items()}
        factors = {n: LayerFactors(torch.randn(A), torch.randn(B), 2.0**i) for n, (A, B) in shapes.items()}
        bank.put("abcdef"[i], factors)
    return bank


def alone(model: nn.Module, bank: Bank, *inputs: Any) -> dict[str | None, Any]:
    """What each adapter gives when all rows use it, for which no rows are told apart."""
    outputs: dict[str | None, Any] = {}
    for name in (*bank.names, None):
        with bank.use(name):
            outputs[name] = model(*inputs)
    return outputs


def picked(outputs: dict[str | None, Tensor], names: list[str | None]) -> Tensor:
    return torch.stack([outputs[name][i] for i, name in enumerate(names)])


def refused(model: nn.Module, bank: Bank, names: list[str | None], *inputs: Any, match: str, **said: Any) -> None:
    with bank.use(names, **said), pytest.raises(AdapterStateError, match=match):
        model(*inputs)


class Calls(nn.Module):
    """A layer that is called with what `before` makes of the input."""

    def __init__(self, layer: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.layer, self.before = layer, before

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.before(x))


OTHERS = {
    "guidance": (nn.Linear(4, 5), lambda x: torch.cat([x, x]), (2, 4)),
    "frames of videos": (nn.Conv2d(3, 4, 2), lambda x: x.flatten(0, 1), (2, 3, 3, 5, 5)),
    "one-dimensional frames": (nn.Conv1d(3, 4, 2), lambda x: x.flatten(0, 1), (2, 4, 3, 5)),
    "flattened tokens": (nn.Linear(4, 5), lambda x: x.flatten(0, 1), (2, 3, 4)),
    "a sequence first": (nn.Linear(4, 5), lambda x: x.transpose(0, 1), (2, 6, 4)),
    "patches": (nn.Linear(4, 5), lambda x: x, (6, 4)),
    "four prompts for two names": (nn.Linear(4, 5), lambda x: x, (4, 3, 4)),
    "three prompts": (nn.Linear(4, 5), lambda x: x, (3, 4)),
    "ids that are flattened": (nn.Embedding(9, 4), lambda x: x.flatten(), (2, 4)),
    "ids that every row shares": (nn.Embedding(9, 4), lambda x: x[:1], (2, 4)),
    "no dimension for rows": (nn.Linear(4, 5), lambda x: x[0], (2, 4)),
    "an image alone": (nn.Conv2d(3, 4, 2), lambda x: x[0], (2, 3, 5, 5)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_first_dimension_that_is_not_the_rows_is_refused_by_name_and_one_adapter_serves_it(kind: str):
    layer, before, shape = OTHERS[kind]
    model = Calls(layer, before)
    x = torch.randint(9, shape) if isinstance(layer, nn.Embedding) else torch.randn(shape)
    plain = model(x)
    bank = bank_on(model, ["layer"])
    refused(model, bank, ["a", "b"], x, match=r"given 2 rows, and 'layer' got an input of shape \(")
    refused(model, bank, ["a", "a"], x, match="'layer' got")  # not by luck: it is refused for all names alike
    outputs = alone(model, bank, x)
    assert not close_to(outputs["a"], outputs["b"])
    assert outputs[None].equal(plain)
    bank.close()


def test_guidance_is_served_where_the_user_says_tiled():
    text, unet = nn.Linear(4, 5), nn.Linear(4, 5)
    model = nn.ModuleDict({"text": text, "unet": unet})
    bank = bank_on(model, ["text", "unet"])
    x, names = torch.randn(3, 6, 4), ["b", None, "a"]
    one, two, three = (alone(unet, bank, torch.cat([x] * times)) for times in (1, 2, 3))
    of_text = alone(text, bank, x)
    with bank.use(names, layout="tiled"):
        for _ in range(2):  # a step each
            assert close_to(text(x), picked(of_text, names))  # as many rows as there are
            assert close_to(unet(torch.cat([x, x])), picked(two, names * 2))
        assert close_to(unet(x), picked(one, names))  # a step without guidance
        with pytest.raises(AdapterStateError, match=r"'unet' got the 3 rows 3 times, .* 2 times"):
            unet(torch.cat([x, x, x]))
    with bank.use(names, layout="tiled"):
        assert close_to(unet(torch.cat([x, x, x])), picked(three, names * 3))
    with bank.use(names, layout="repeated"):
        assert close_to(
            unet(x.repeat_interleave(2, 0)),
            picked(alone(unet, bank, x.repeat_interleave(2, 0)), [n for n in names for _ in "12"]),
        )


class Multimodal(nn.Module):
    """Images of any number of patches, all in one dimension, and texts, padded to one length."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.merger, self.language = nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, patches: Tensor, row_of_patch: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen = self.vision(patches)
        return seen, self.merger(seen.view(-1, 8)), self.language(texts)


def test_towers_are_served_where_the_user_says_the_row_of_each_position():
    model = Multimodal()
    bank = bank_on(model, ["vision.0", "vision.2", "merger", "language"])
    patches, texts = torch.randn(6, 4), torch.randn(2, 3, 4)
    row_of_patch = torch.tensor([1, 1, 0, 0, 0, 0])
    inputs = (patches, row_of_patch, texts)
    names = ["a", "b"]
    refused(model, bank, names, *inputs, match=r"'vision\.0' got an input of shape \(6, 4\).*bank\.rows_inside")
    outputs = alone(model, bank, *inputs)
    exact = (
        picked({name: output[0] for name, output in outputs.items()}, ["b", "b", "a", "a", "a", "a"]),
        picked({name: output[1] for name, output in outputs.items()}, ["b", "a", "a"]),
        picked({name: output[2] for name, output in outputs.items()}, names),
    )
    inside = bank.rows_inside(model.vision, lambda _: row_of_patch)
    refused(model, bank, names, *inputs, match=r"'merger' got an input of shape \(3, 8\)")
    bank.rows_inside(model.merger, lambda pairs: row_of_patch[::2].tolist()[: len(pairs)])
    for _ in range(2):
        with bank.use(names):
            for found, right in zip(model(*inputs), exact):
                assert close_to(found, right)
    with bank.use("a"):
        assert model(*inputs)[0].equal(outputs["a"][0])
    assert model(*inputs)[0].equal(outputs[None][0])
    inside.remove()
    refused(model, bank, names, *inputs, match=r"'vision\.0'")
    with bank.use(names, rows=row_of_patch):
        assert close_to(model.vision(patches), exact[0])
        assert close_to(model.language(texts), exact[2])
        with pytest.raises(AdapterStateError, match=r"'language' got an input of shape \(4, 4\)"):
            model.language(torch.randn(4, 4))
    bank.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_is_said_for_a_tower_ends_with_it_even_where_it_raises():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, fail: bool = False) -> Tensor:
            y = self.fc(x)
            if fail:
                raise RuntimeError("inside")
            return y

    model = nn.ModuleDict({"tower": Tower(), "fc": nn.Linear(4, 4)})
    bank = bank_on(model, ["fc"])
    bank.rows_inside(model.tower, lambda x, fail=False: [0] * (len(x) - 1) + [1])
    x = torch.randn(2, 4)
    outputs = alone(model.fc, bank, x)
    with bank.use(["a", "b"]):
        with pytest.raises(RuntimeError, match="inside"):
            model.tower(torch.randn(3, 4), fail=True)
        assert close_to(model.fc(x), picked(outputs, ["a", "b"]))
    bank.rows_inside(model.fc, lambda x: [0, 2])
    with (
        bank.use(["a", "b"]),
        pytest.raises(ConfigError, match=r"position 1 belongs to row 2, .* 2 names"),
    ):
        model.fc(x)
    with bank.use(["a", "b", "c"]):  # two positions of three rows
        assert close_to(model.fc(x), picked(outputs, ["a", "c"]))


def test_a_compiled_model_has_the_same_rows():
    model = Multimodal()
    bank = bank_on(model, ["vision.0", "vision.2", "language"])
    inputs = (torch.randn(4, 4), torch.tensor([1, 0, 0, 0]), torch.randn(2, 3, 4))
    outputs = alone(model, bank, *inputs)
    refused(torch.compile(model, backend="aot_eager"), bank, ["a", "b"], *inputs, match=r"'vision\.0' got")
    torch._dynamo.reset()
    bank.rows_inside(model.vision, lambda _: [1, 0, 0, 0])  # before it is compiled, which takes the hooks as they are
    compiled = torch.compile(model, backend="aot_eager")
    compiled(*inputs)
    for names in (["a", "b"], ["c", None], ["b", "c"]):
        with bank.use(names):
            seen, _, texts = compiled(*inputs)
        one, other = names
        assert close_to(seen, picked({n: o[0] for n, o in outputs.items()}, [other, one, one, one]))
        assert close_to(texts, picked({n: o[2] for n, o in outputs.items()}, names))
    torch._dynamo.reset()


class Positions(nn.Module):
    """Embeddings of ids, and of what the model makes up itself."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.table, self.made = nn.Embedding(9, 4), nn.Embedding(9, 4), made

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.table(self.made(ids))


@pytest.mark.parametrize(
    "made",
    [
        lambda ids: torch.arange(ids.shape[1]),
        lambda ids: (torch.arange(ids.shape[1])[:, None] - torch.arange(ids.shape[1])).abs(),
        lambda ids: ids[0],
        lambda ids: ids.T,
    ],
    ids=["positions", "relative positions", "the ids of one row", "ids with the sequence first"],
)
def test_a_table_with_as_many_entries_as_rows_is_not_routed_by_row(made: Callable[[Tensor], Tensor]):
    model = Positions(made)
    bank = bank_on(model, ["words", "table"])
    ids = torch.randint(9, (3, 3))
    outputs = alone(model, bank, ids)
    refused(model, bank, ["a", "b", "c"], ids, match=r"'table' got an input of shape \(3.*learned table.*rows_inside")
    with bank.use("b"):
        assert model(ids).equal(outputs["b"])
    model.made = lambda ids: ids
    with bank.use(["a", None, "c"]):  # as long as there are rows, and the model's own input
        found = model(ids)
    assert close_to(found, picked(alone(model, bank, ids), ["a", None, "c"]))


@dataclass
class Batch:
    """As data modules have them."""

    users: Tensor
    more: dict[str, Tensor]


def test_an_id_for_each_row_is_served_where_the_model_was_called_with_it_or_the_user_says_so():
    class Rated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item = nn.Embedding(9, 4), nn.Embedding(9, 4)

        def forward(self, batch: Batch) -> Tensor:
            return self.user(batch.users) * self.item(batch.more["pairs"][:, 1])

    model = Rated()
    bank = bank_on(model, ["user", "item"])
    batch = Batch(torch.randint(9, (3,)), {"pairs": torch.randint(9, (3, 2))})
    names: list[str | None] = ["b", "a", None]
    exact = picked(alone(model, bank, batch), names)
    with bank.use(names):
        assert close_to(model(batch), exact)
        with pytest.raises(AdapterStateError, match="'user' got"):  # not through the model: nothing says what it is
            model.user(batch.users)
    bank.rows_inside(model.user, lambda ids: range(len(ids)))
    with bank.use(names):
        assert close_to(model.user(batch.users), picked(alone(model.user, bank, batch.users), names))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.MultiheadAttention])
def test_a_sequence_as_long_as_the_batch_is_refused_where_the_model_takes_the_sequence_first(kind: type[nn.Module]):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer, self.fc = kind(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Net()
    bank = bank_on(model, ["fc"])
    refused(model, bank, ["a", "b"], torch.randn(2, 2, 4), match="'fc' got .*'mixer' takes the sequence first.*Pad")
    x, last = torch.randn(2, 5, 4), torch.randn(2, 4)
    for known in (x, last):  # another length; no sequence
        with bank.use(["a", "b"]):
            found = model(known)
        assert close_to(found, picked(alone(model, bank, known), ["a", "b"]))


def test_a_sequence_as_long_as_the_batch_is_refused_where_the_model_turns_its_input():
    turned = Calls(nn.Linear(4, 5), lambda x: x.transpose(0, 1))
    refused(turned, bank_on(turned, ["layer"]), ["a", "b"], torch.randn(2, 2, 4), match="'layer' got .*transposed")
    plain = Calls(nn.Linear(4, 5), lambda x: x[:, :, :4])
    bank, x = bank_on(plain, ["layer"]), torch.randn(2, 2, 6)
    with bank.use(["a", "b"]):
        found = plain(x)
    assert close_to(found, picked(alone(plain, bank, x), ["a", "b"]))


class Routed(nn.Module):
    """A mixture of which each expert gets two of the tokens."""

    def __init__(self, experts: str, router: str) -> None:
        super().__init__()
        self.names = experts, router
        self.add_module(experts, nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
        self.add_module(router, nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        experts, tokens = getattr(self, self.names[0]), x.flatten(0, 1)
        y = torch.empty_like(tokens)
        for expert, those in zip(experts, ([0, 3], [2, 1])):
            y[those] = expert(tokens[those])
        return y.view_as(x)


@pytest.mark.parametrize(
    ("experts", "router"), [("experts", "w"), ("local_experts", "w"), ("blocks", "gate"), ("ffn", "router")]
)
def test_tokens_that_a_router_picked_are_refused_though_they_are_as_many_as_the_rows(experts: str, router: str):
    model = Routed(experts, router)
    bank = bank_on(model, ["0", "1"])
    refused(model, bank, ["a", "b"], torch.randn(2, 2, 4), match=rf"'{experts}\.0' (is one of several experts|lies)")
    alone(model, bank, torch.randn(2, 2, 4))


def test_a_tower_that_packs_its_rows_is_refused_though_it_has_as_many_positions_as_there_are_rows():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
            return self.fc(x)

    model = Calls(Tower())
    bank = bank_on(model, ["layer.fc"])
    tower, x, cuts = model.layer, torch.randn(2, 4), torch.tensor([0, 2])
    refused(tower, bank, ["a", "b"], x, cuts, match="packs the positions of all rows.*cu_seqlens.*rows_inside")
    outputs = alone(tower, bank, x, cuts)
    bank.rows_inside(tower, lambda x, cu_seqlens: [0, 0])
    with bank.use(["a", "b"]):
        assert close_to(tower(x, cuts), picked(outputs, ["a", "a"]))


def test_other_numbers_of_images_and_texts_are_refused_and_equal_ones_served():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Conv2d(3, 4, 2), nn.Linear(4, 4)

        def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
            return self.image(images), self.text(texts)

    model = Pair()
    bank = bank_on(model, ["image", "text"])
    texts = torch.randn(2, 4)
    for images in (1, 3, 4):
        refused(model, bank, ["a", "b"], torch.randn(images, 3, 4, 4), texts, match="'image' got an input of shape")
    images = torch.randn(2, 3, 4, 4)
    outputs = alone(model, bank, images, texts)
    with bank.use(["a", "b"]):
        for at, found in enumerate(model(images, texts)):
            assert close_to(found, picked({name: output[at] for name, output in outputs.items()}, ["a", "b"]))


def test_gradients_reach_what_comes_before_in_every_layout():
    model = Calls(nn.Linear(4, 5))
    bank = bank_on(model, ["layer"])
    rows = [1, 0, 0, 2, 0]
    for x, order, said in (
        (torch.randn(6, 4), [0, 1, 2] * 2, {"layout": "tiled"}),
        (torch.randn(6, 4), [0, 0, 1, 1, 2, 2], {"layout": "repeated"}),
        (torch.randn(5, 4), rows, {"rows": rows}),
    ):
        with torch.enable_grad():
            x.requires_grad_()
            exact = []
            for place, row in enumerate(order):
                with bank.use("abc"[row]):
                    exact.append(model(x)[place])
            (wanted,) = torch.autograd.grad(torch.stack(exact).square().sum(), x)
            with bank.use(["a", "b", "c"], **said):
                (found,) = torch.autograd.grad(model(x).square().sum(), x)
        assert close_to(found, wanted)


def test_an_empty_input_holds_no_row():
    model = Calls(nn.Linear(4, 5))
    bank = bank_on(model, ["layer"])
    with bank.use(["a", "b"]):
        assert model(torch.randn(0, 4)).shape == (0, 5)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 5), nn.Conv2d(4, 5, 1), nn.Embedding(9, 5)], ids=lambda m: type(m).__name__
)
def test_an_input_may_come_by_its_name(layer: nn.Module):
    model = nn.ModuleDict({"layer": layer})
    bank = bank_on(model, ["layer"])
    x = torch.randint(9, (2, 3)) if isinstance(layer, nn.Embedding) else torch.randn(2, 4, 4, 4)
    exact = picked(alone(layer, bank, x), ["a", None])
    with bank.use(["a", None]):
        assert close_to(layer(input=x), exact)
    with pytest.raises(TypeError, match="unexpected keyword"):
        layer(inputs=x)
    bank.close()


def test_bad_input_is_named():
    model = Calls(nn.Linear(4, 5))
    bank = bank_on(model, ["layer"])
    for said, match in (
        ({"layout": "interleaved"}, "layout='interleaved'.*'repeated'.*'tiled'"),
        ({"layout": "tiled", "rows": [0, 1, 0]}, "not both"),
        ({"rows": [0, 1, 2]}, "position 2 belongs to row 2, and bank.use was given 2 names"),
        ({"rows": [0, -1, 1]}, "position 1 belongs to row -1"),
        ({"rows": [1, 0]}, "as many positions as there are names"),
        ({"rows": [0.0, 1.0, 1.0]}, "a whole number for each position"),
        ({"rows": [True, False, False]}, "a whole number for each position"),
        ({"rows": []}, "a whole number for each position"),
        ({"rows": "010"}, "a whole number for each position"),
        ({"rows": torch.zeros(3)}, r"torch\.float32 tensor of shape \(3,\)"),
        ({"rows": torch.zeros(3, 1, dtype=torch.long)}, r"of shape \(3, 1\)"),
    ):
        with pytest.raises(ConfigError, match=match):
            bank.use(["a", "b"], **said)
    with pytest.raises(ConfigError, match="layout="):
        bank.use("a", layout="other")
    with pytest.raises(TargetError, match="a module of the model that the bank serves"):
        bank.rows_inside(nn.Linear(1, 1), lambda x: [0])
    with pytest.raises(TargetError, match="and a function"):
        bank.rows_inside(model.layer, [0, 1])
    with pytest.raises(BankError, match="empty list"), bank.use([], layout="tiled"):
        pass
    x = torch.randn(4, 4)
    with bank.use("a"):
        exact = model(x)
    with bank.use("a", layout="tiled"):  # one adapter has no layout
        assert model(x).equal(exact)
    assert F.linear(x, model.layer.weight, model.layer.bias).equal(model(x))


class Tied(nn.Module):
    """A head that reads the weight of the embedding, as functions do that compute with it."""

    def __init__(self, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.fc, self.read = nn.Embedding(9, 4), nn.Linear(4, 4), read

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).to(self.fc.weight.dtype)
        assert self.fc.weight.shape == (4, 4)
        assert self.fc.weight.device.type == "cpu"
        assert self.fc.weight.size(0) == self.fc.weight.data_ptr() - self.fc._parameters["weight"].data_ptr() + 4
        return self.read(self, self.fc(h))


READS = {
    "a tied head": lambda m, h: F.linear(h, m.embed.weight),
    "a product": lambda m, h: h @ m.fc.weight.T,
    "a determinant": lambda m, h: h + m.fc.weight.det(),
    "a penalty": lambda m, h: h + m.fc.weight.square().sum(),
    "its data": lambda m, h: h @ m.fc.weight.data,
    "a row": lambda m, h: h + m.embed.weight[0],
    "a write": lambda m, h: h + m.fc.weight.mul_(2),
}


@pytest.mark.parametrize("kind", READS)
def test_a_weight_that_is_read_while_adapters_are_in_use_is_an_error_that_names_its_layer(kind: str):
    model = Tied(READS[kind]).requires_grad_(False)
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    bank = bank_on(model, ["embed", "fc"])
    ids = torch.randint(9, (2, 3))
    for names in ("a", ["a", "b"], ["a", None]):
        refused(model, bank, names, ids, match=r"The weight of '(embed|fc)' was read \(.*while adapters of a bank")
    assert all(value.equal(plain[name]) for name, value in model.state_dict().items())
    model.read = lambda model, h: h
    bare = model(ids)
    with bank.use(None):
        assert model(ids).equal(bare)
    outputs = alone(model, bank, ids)
    with bank.use(["a", "b"]):
        assert close_to(model(ids), picked(outputs, ["a", "b"]))
    model.read = READS["a product"]
    assert close_to(model(ids), bare @ plain["fc.weight"].T)
    with bank.folded("b"):  # which is in the weight
        assert close_to(model(ids), outputs["b"] @ model.fc._parameters["weight"].T)
    bank.close()
    assert type(model.fc) is nn.Linear
