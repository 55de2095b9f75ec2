"""All of a model that `inject` may change, to compare before and after."""

from __future__ import annotations

from typing import Any

from torch import nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Values, identities, classes, modes and what is trainable, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        "values": {name: t.detach().clone() for name, t in model.state_dict().items()},
        "identities": {name: id(p) for name, p in parameters.items()},
        "trainable": {name: p.requires_grad for name, p in parameters.items()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "modes": {name: m.training for name, m in model.named_modules()},
        "attributes": {name: set(m.__dict__) for name, m in model.named_modules()},
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raise unless two snapshots are equal, the values bit for bit."""
    for part in before:
        if part != "values":
            assert now[part] == before[part], part
    assert list(now["values"]) == list(before["values"])
    for name, value in before["values"].items():
        assert value.dtype == now["values"][name].dtype
        assert value.equal(now["values"][name]), name
