from __future__ import annotations

import gc
import threading

import torch
from hanging import no_hang

from tests.hub.bank_churn import Churn


def test_every_row_is_right_while_adapters_come_go_wait_on_disk_and_return(tmp_path):
    before = threading.active_count()
    with torch.no_grad():
        churn = Churn(120, tmp_path, capacity=24, host_capacity=20)
    with no_hang():
        outcome = churn.run(least={"rows": 2000, "came and went": 100, "prefetched": 100})
    assert not outcome.wrong
    churn.bank.close()
    assert type(churn.base.wide) is torch.nn.Linear
    del churn
    gc.collect()
    assert not list(tmp_path.iterdir())
    assert threading.active_count() <= before + 1, "the thread that prefetches ends by itself"


def test_a_use_that_waits_for_a_slot_of_another_thread_is_told_or_served(tmp_path):
    """As many threads as slots, each with its own adapters: the bank is full most of the time, and never wrong."""
    with torch.no_grad():
        churn = Churn(40, tmp_path, capacity=6, host_capacity=4)
    with no_hang():
        outcome = churn.run(servers=6, least={"rows": 500})
    assert not outcome.wrong
