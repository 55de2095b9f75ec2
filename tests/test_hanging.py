"""The guard ends what hangs, and leaves alone what does not."""

from __future__ import annotations

import signal
import time

import hanging
import pytest
from hanging import no_hang


def test_what_hangs_fails_and_what_ends_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with no_hang(), no_hang():
        pass
    assert signal.alarm(0) == 0
    monkeypatch.setattr(hanging, "PATIENCE", 1)
    with pytest.raises(AssertionError, match="it hangs"), no_hang():
        time.sleep(3600)


def test_a_guard_within_another_leaves_the_outer_one_its_time() -> None:
    with no_hang():
        with no_hang():
            pass
        assert 0 < signal.alarm(0) <= hanging.PATIENCE
