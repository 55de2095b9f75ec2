from __future__ import annotations

import pytest

from lightning_lora.engine import fused


@pytest.fixture
def p(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The probability of dropout, and up to how many elements it is drawn at once (see `fused_step.every_rate`)."""
    probability, few = request.param
    monkeypatch.setattr(fused, "_FEW", few)
    return probability
