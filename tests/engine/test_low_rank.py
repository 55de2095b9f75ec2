"""Norms, singular values and cuts of products, against the dense matrix and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, IDS, Case

from lightning_lora.engine.layers import pairs
from lightning_lora.engine.low_rank import (
    effective_rank,
    effective_ranks,
    energy_shares,
    product_change,
    product_cosine,
    product_norm,
    singular_values,
    spectrum,
    spectrum_of_product,
    stable_rank,
    stable_ranks,
    stacked_singular_values,
    strength_within,
    subspace_similarity,
)

DOUBLE = {"rtol": 1e-10, "atol": 1e-12}


def factors(*lead, out=7, inputs=5, rank=3):
    torch.manual_seed(0)
    return torch.randn(*lead, out, rank).double(), torch.randn(*lead, rank, inputs).double()


def test_norms_of_products_keep_their_digits_where_products_cancel():
    B, A = factors(out=60, inputs=50)
    assert product_norm(B, A) == pytest.approx(float((B @ A).norm()), rel=1e-12)
    assert product_norm(torch.cat([B, -B], 1), torch.cat([A, A])) < 1e-13 * product_norm(B, A)
    new_A, new_B = A.bfloat16().double(), B.bfloat16().double()
    expected = float((B @ A - new_B @ new_A).norm())
    assert product_change(B, A, new_B, new_A) == pytest.approx(expected, rel=1e-9)
    assert product_change(B, A, B, A) == 0


def test_ranks_that_were_padded_with_zeros_are_no_change():
    B, A = factors()
    padded_B, padded_A = torch.cat([B, torch.zeros(7, 2)], 1), torch.cat([A, torch.zeros(2, 5)])
    assert product_change(B, A, padded_B, padded_A) == 0


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "blocks"])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_cut_is_the_best_approximation_and_knows_what_it_leaves_out(lead, rank):
    torch.manual_seed(0)
    matrix = torch.randn(*lead, 7, 5).double()
    whole = spectrum(matrix)
    cut = whole.cut(rank)
    lost = matrix - cut.B @ cut.A
    assert whole.norm == pytest.approx(float(matrix.norm()))
    assert cut.error == pytest.approx(float(lost.norm() / matrix.norm()), abs=1e-12)
    largest = torch.linalg.matrix_norm(matrix, 2).max()
    assert cut.worst == pytest.approx(float(torch.linalg.matrix_norm(lost, 2).max() / largest), abs=1e-12)
    assert whole.rank_for(cut.error + 1e-12) == rank


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "blocks"])
def test_the_spectrum_of_a_product_is_that_of_the_dense_matrix(lead):
    B, A = factors(*lead)
    own, dense = spectrum_of_product(B, A), torch.linalg.svdvals(B @ A)
    torch.testing.assert_close(own.S, dense[..., :3], **DOUBLE)
    torch.testing.assert_close(own.U @ torch.diag_embed(own.S) @ own.Vh, B @ A, **DOUBLE)
    expected = dense[..., :3].flatten().sort(descending=True).values
    torch.testing.assert_close(singular_values(B, A), expected, **DOUBLE)


def test_ranks_of_spectra_with_a_closed_form():
    equal, one = torch.tensor([2.0, 2, 2, 0]), torch.tensor([5.0, 0, 0])
    assert effective_rank(equal) == pytest.approx(3)
    assert stable_rank(equal) == pytest.approx(3)
    assert effective_rank(one) == stable_rank(one) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0
    two = torch.tensor([3.0, 1.0])  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy))
    assert stable_rank(two) == pytest.approx(10 / 9)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_singular_values_of_a_pair_are_those_of_what_it_changes(case: Case):
    model = case.adapted().double()
    for pair in pairs(model):
        whole = pair.module.delta_weight(pair.parameter).detach()
        own = pair.singular_values()
        torch.testing.assert_close(own.norm(), whole.norm(), **DOUBLE)
        assert not own.requires_grad
        if whole.dim() == 2:
            dense = torch.linalg.svdvals(whole)
            count = min(len(own), len(dense))
            torch.testing.assert_close(own[:count], dense[:count], **DOUBLE)
            assert own.numel() == count or float(own[count:].max()) < 1e-10


def test_many_products_at_once_have_the_spectra_that_each_has_alone():
    B, A = factors(4)
    B[1] = 0  # an untrained one
    A[2, 0, 0] = torch.nan  # a diverged one
    S = stacked_singular_values(B, A)
    for place in (0, 3):
        torch.testing.assert_close(S[place], torch.linalg.svdvals(B[place] @ A[place])[:3], **DOUBLE)
        assert float(effective_ranks(S)[place]) == pytest.approx(effective_rank(S[place]))
        assert float(stable_ranks(S)[place]) == pytest.approx(stable_rank(S[place]))
        assert float(energy_shares(S)[place].sum()) == pytest.approx(1)
    assert not bool(S[1].any())
    assert [float(of(S)[1].sum()) for of in (effective_ranks, stable_ranks, energy_shares)] == [0, 0, 0]
    assert bool(S[2].isnan().all() and effective_ranks(S)[2].isnan())


def test_the_cosine_of_two_products_is_that_of_the_dense_matrices():
    (B, A), (B2, A2) = factors(), factors(rank=2)
    B2 = B2 + 0.3 * B[:, :2]
    expected = torch.cosine_similarity((B @ A).flatten(), (B2 @ A2).flatten(), dim=0)
    assert product_cosine(B, A, B2, A2) == pytest.approx(float(expected), rel=1e-12)
    assert product_cosine(B, A, -B, A) == pytest.approx(-1)
    assert product_cosine(B, A, 0 * B2, A2) == 0


def test_the_similarity_of_subspaces_is_the_paper_s():
    U, V = (torch.linalg.qr(torch.randn(9, k).double()).Q for k in (4, 3))
    phi = subspace_similarity(U, V)
    for i, j in ((1, 1), (2, 3), (4, 2), (4, 3)):
        expected = (U[:, :i].T @ V[:, :j]).norm() ** 2 / min(i, j)
        assert float(phi[i - 1, j - 1]) == pytest.approx(float(expected), rel=1e-12)
    assert subspace_similarity(U, U).diagonal().tolist() == pytest.approx([1] * 4)


def test_a_weight_is_as_strong_within_its_own_directions_as_its_singular_values():
    W = torch.randn(7, 5).double()
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert strength_within(W, U[:, :2], Vh[:2]) == pytest.approx(float(S[:2].norm()))
    assert strength_within(W, U[:, :2], Vh[2:4]) == pytest.approx(0, abs=1e-12)
