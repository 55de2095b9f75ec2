"""Intruder dimensions, against closed forms and a dense SVD in float64."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case

from lightning_lora import pairs
from lightning_lora.engine.intruders import directions, intruder_dimensions, intruders, is_one_matrix, matrix_of_pair

W = torch.diag(torch.tensor([8.0, 7, 6, 5, 4, 3]))
MIXED = torch.full((6,), 6**-0.5)
"""Its cosine with each singular vector of W is 0.41."""
STRONG = 50 * torch.outer(MIXED, MIXED)


def test_an_intruder_is_a_direction_that_the_base_does_not_have():
    assert intruder_dimensions(W, W, count=4) == 0
    assert intruder_dimensions(W, W + STRONG, count=1) == 1
    assert intruder_dimensions(W, W + STRONG, count=1, threshold=0.4) == 0
    assert intruder_dimensions(W, W + 1e-3 * STRONG, count=4) == 0  # too weak to come to the top
    assert intruder_dimensions(W, W + torch.diag(torch.tensor([9.0, 0, 0, 0, 0, 0])), count=4) == 0  # its own direction


def test_directions_that_are_not_there_are_neither_the_base_s_nor_intruders():
    W = torch.zeros(6, 4)
    assert directions(W).shape == (6, 0)
    assert intruder_dimensions(W, W) == 0
    W[:, 0] = MIXED
    # Both have rank 1: the further vectors of an SVD are arbitrary.
    assert directions(W).shape == (6, 1)
    assert intruder_dimensions(W, 2 * W) == 0
    assert intruder_dimensions(torch.zeros(6, 4), W) == 1


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_what_is_found_are_singular_vectors_of_the_adapted_weight(shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    changed = W + 9 * torch.randn(shape[0], 1) @ torch.randn(1, shape[1])
    U, S, _ = torch.linalg.svd(changed.double(), full_matrices=False)
    base = torch.linalg.svd(W.double(), full_matrices=False).U
    found = intruders(directions(W), changed, count=3, threshold=0.7)
    is_one = (base.mT @ U[:, :3]).abs().amax(0) < 0.7
    assert bool(is_one[0])
    torch.testing.assert_close(found.S, S[:3][is_one], rtol=1e-5, atol=0)  # an SVD in float32
    cosines = (found.U * U[:, :3][:, is_one]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), rtol=1e-5, atol=0)


def test_scaling_leaves_the_part_of_an_update_that_is_at_right_angles():
    torch.manual_seed(0)
    B = torch.randn(6, 3)
    found = intruders(directions(W), W + STRONG, count=1)
    for strength in (0.0, 0.25, 1.0):
        new = found.scaled_in(B, strength)
        U = found.U
        torch.testing.assert_close(U.mT @ new, strength * (U.mT @ B.double()), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(new - U @ (U.mT @ new), B.double() - U @ (U.mT @ B.double()), rtol=1e-5, atol=1e-5)
    assert float(found.U[:, 0].double() @ MIXED.double()) ** 2 > 0.9  # the planted direction, which W turns a little


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_weight_of_a_pair_with_its_adapter_differs_by_its_update(case: Case):
    for pair in pairs(case.adapted()):
        if not is_one_matrix(pair):
            continue
        with torch.no_grad():
            change = matrix_of_pair(pair, adapted=True) - matrix_of_pair(pair)
            whole = pair.module.adapted_weight(pair.parameter) - pair.module.dense_weight(pair.parameter)
        assert change.ndim == 2
        assert float(change.norm()) == pytest.approx(float(whole.norm()), rel=1e-5)
