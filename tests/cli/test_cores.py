from __future__ import annotations

import os

import pytest

from lightning_lora.cli.process import available_cores

BOUND = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(("quota", "cores"), [("100000 100000", 1), ("50000 100000", 1), ("max 100000", BOUND)])
def test_the_quota_of_a_container_limits_the_cores(tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota + "\n")
    assert available_cores(tmp_path) == cores


def test_without_a_quota_all_cores_that_the_process_is_bound_to_are_used(tmp_path):
    assert available_cores(tmp_path) == BOUND
