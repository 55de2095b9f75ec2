"""Every method against its closed form on dense matrices, written here entry by entry in float64, and against PEFT."""

from __future__ import annotations

import math

import peft.utils.merge_utils as theirs
import pytest
import torch

from lightning_lora.engine.combine import (
    METHODS,
    Term,
    combine,
    compressed,
    concatenated,
    dare,
    dare_ties,
    disjoint_mean,
    dropped,
    ties,
    trimmed,
)

OUT, IN = 7, 5
# Weight, scale and rank of each adapter.
ADAPTERS = [(0.7, 2.0, 2), (-1.3, 0.5, 3), (0.25, 16 / math.sqrt(4), 4)]
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
# The dense methods compute in float32, sums of a few products of size one.
SINGLE = {"rtol": 1e-5, "atol": 1e-5}


def terms_of(adapters=ADAPTERS, lead=(), seed=0):
    torch.manual_seed(seed)
    return [Term(torch.randn(*lead, r, IN), torch.randn(*lead, OUT, r), s, w) for w, s, r in adapters]


def product(combined):
    return combined.B.double() @ combined.A.double()


def dense(terms):
    """w s B A of each, in float64, by definition."""
    return [t.weight * t.scale * torch.einsum("...or,...ri->...oi", t.B.double(), t.A.double()) for t in terms]


@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "groups"])
def test_a_sum_is_exact_and_has_the_sum_of_the_ranks(lead):
    terms = terms_of(lead=lead)
    combined = combine(terms, "sum")
    torch.testing.assert_close(product(combined), sum(dense(terms)), **DOUBLE)
    assert combined.A.shape == (*lead, 9, IN)
    assert combined.error == 0
    assert combined.norm == pytest.approx(float(sum(dense(terms)).norm()), rel=1e-12)


@pytest.mark.parametrize("rank", range(1, 10))
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "groups"])
def test_svd_is_the_best_approximation_of_the_sum_and_knows_its_error(lead, rank):
    terms = terms_of(lead=lead)
    combined = combine(terms, "svd", rank=rank)
    whole = sum(dense(terms))
    U, S, Vh = torch.linalg.svd(whole)
    S[..., rank:] = 0
    best = U[..., :IN] @ torch.diag_embed(S) @ Vh
    torch.testing.assert_close(product(combined), best, rtol=1e-10, atol=1e-10)
    assert combined.A.shape[-2] == min(rank, IN), "no more than the matrix has"
    assert combined.error == pytest.approx(float((whole - best).norm() / whole.norm()), abs=1e-12)
    assert combined.norm == pytest.approx(float(whole.norm()), rel=1e-12)


def test_svd_forms_no_matrix_of_the_size_of_the_weight():
    torch.manual_seed(0)
    n = 400_000  # squared, in float64: 1.28 TB
    terms = [Term(torch.randn(2, n), torch.randn(n, 2), 1.0, w) for w in (1.0, 0.5)]
    combined = compressed(terms, 3)
    rows = torch.arange(0, n, n // 50)
    # Of two random pairs in a space this large the four directions are all but at right angles.
    exact = sum(t.weight * t.B[rows].double() @ t.A[:, rows].double() for t in terms)
    left = exact - combined.B[rows] @ combined.A[:, rows]
    assert 0.2 < combined.error < 0.4
    assert float(left.norm() / exact.norm()) == pytest.approx(combined.error, abs=0.1)


def test_by_default_the_largest_rank_is_kept():
    assert combine(terms_of(), "svd").A.shape == (4, IN)
    assert combine(terms_of(), "ties", density=0.5).A.shape == (4, IN)


def test_one_adapter_times_one_is_that_adapter_by_every_method():
    terms = terms_of([(1.0, 2.0, 3)])
    for method in METHODS:
        combined = combine(terms, method, density=1.0, generator=torch.Generator())
        torch.testing.assert_close(product(combined), dense(terms)[0], **SINGLE)
        assert combined.error < 1e-6, method


def test_a_negative_weight_gives_the_opposite_bit_for_bit():
    (term,) = terms_of([(1.0, 2.0, 3)])
    plus, minus = (concatenated([Term(term.A, term.B, term.scale, w)]) for w in (1.0, -1.0))
    assert torch.equal(minus.A, plus.A)
    assert torch.equal(minus.B, -plus.B)


def test_what_is_added_and_taken_away_is_gone():
    a, b = terms_of([(1.0, 2.0, 3), (0.5, 1.0, 2)])
    back = Term(a.A, a.B, a.scale, -a.weight)
    combined = compressed([a, b, back], 2)
    torch.testing.assert_close(product(combined), dense([b])[0], **DOUBLE)
    assert combined.error < 1e-14


def ties_by_entry(matrices, density):
    """arXiv:2306.01708, algorithm 1, one entry at a time."""
    kept = round(density * matrices[0].numel())
    flat = []
    for matrix in matrices:
        entries = matrix.flatten().tolist()
        threshold = sorted(map(abs, entries), reverse=True)[kept - 1]
        flat.append([x if abs(x) >= threshold else 0.0 for x in entries])
    merged = []
    for values in zip(*flat):
        sign = math.copysign(1.0, sum(values)) if sum(values) else 0.0
        agreeing = [x for x in values if x * sign > 0]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(matrices[0])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "groups"])
def test_ties_is_the_paper_s_algorithm(lead, density):
    terms = terms_of(lead=lead)
    expected = ties_by_entry(dense(terms), density)
    torch.testing.assert_close(ties(terms, density).double(), expected, **SINGLE)
    combined = combine(terms, "ties", density=density, rank=2)
    U, S, Vh = torch.linalg.svd(expected, full_matrices=False)
    best = U[..., :2] @ torch.diag_embed(S[..., :2]) @ Vh[..., :2, :]
    torch.testing.assert_close(product(combined), best, rtol=1e-4, atol=1e-4)
    assert combined.error == pytest.approx(float((expected - best).norm() / expected.norm()), abs=1e-5)


def test_trimming_keeps_the_largest_in_magnitude():
    matrix = torch.tensor([[1.0, -4.0], [3.0, -2.0]])
    assert trimmed(matrix, 0.5).tolist() == [[0, -4], [3, 0]]
    assert trimmed(matrix, 0.01).tolist() == [[0, -4], [0, 0]], "one at least"
    assert torch.equal(trimmed(matrix, 1.0), matrix)
    assert int((trimmed(torch.ones(10, 10), 0.29) != 0).sum()) == 29, "where all are equal, too"


def test_in_a_disjoint_mean_zeros_have_no_vote_and_do_not_count():
    values = torch.tensor([[3.0, 1.0, 1.0, 0.0], [0.0, -2.0, -1.0, 0.0], [1.0, 5.0, 0.0, 0.0]])
    assert disjoint_mean(values).tolist() == [2.0, 3.0, 0.0, 0.0]
    # So an adapter that lacks the module does not dilute the others, and no term is as good as a zero.
    (term,) = terms_of([(1.0, 1.0, 2)])
    zero = Term(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0, 1.0)
    torch.testing.assert_close(ties([term, zero], 0.5), ties([term], 0.5))
    torch.testing.assert_close(concatenated([term, zero]).norm, concatenated([term]).norm)


def test_dare_drops_and_rescales_and_adds():
    terms = terms_of()
    masks = [torch.rand(OUT, IN, generator=g) < 0.4 for g in [torch.Generator().manual_seed(3)] for _ in terms]
    expected = sum(matrix * mask / 0.4 for matrix, mask in zip(dense(terms), masks))
    given = dare(terms, 0.4, torch.Generator().manual_seed(3))
    torch.testing.assert_close(given.double(), expected, **SINGLE)
    assert torch.equal(given, dare(terms, 0.4, torch.Generator().manual_seed(3)))
    assert not torch.equal(given, dare(terms, 0.4, torch.Generator().manual_seed(4)))


def test_dare_changes_nothing_on_average_and_keeps_the_share_it_says():
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    draws = torch.stack([dropped(matrix, 0.3, generator) for _ in range(2000)])
    # Standard error of a mean of 2000 Bernoulli(0.3) / 0.3: 0.034; of 1200 entries none is 5 off.
    assert float((draws.mean(0) / matrix - 1).abs().max()) < 5 * math.sqrt(0.7 / 0.3 / 2000)
    assert float((draws != 0).double().mean()) == pytest.approx(0.3, abs=0.005)
    assert torch.equal(dropped(matrix, 1.0, generator), matrix)


def peft_s(method, terms, weights, *arguments):
    """PEFT's function on the updates without their weights, which it takes by themselves."""
    matrices = [t.dense() / t.weight for t in terms]
    return getattr(theirs, method)(matrices, torch.tensor(weights), *arguments)


def test_peft_agrees_on_the_sum_and_on_ties_with_one_weight():
    terms = terms_of()
    weights = [t.weight for t in terms]
    torch.testing.assert_close(
        product(combine(terms, "sum")).float(), peft_s("task_arithmetic", terms, weights), **SINGLE
    )
    terms = terms_of([(0.6, s, r) for _, s, r in ADAPTERS])
    torch.testing.assert_close(ties(terms, 0.4), peft_s("ties", terms, [0.6] * 3, 0.4), **SINGLE)


def test_peft_agrees_on_dare_with_the_same_draws(monkeypatch):
    def same_draws(tensor, density, rescale):
        return tensor * (torch.rand(tensor.shape, generator=generator) < density) / density

    monkeypatch.setattr(theirs, "random_pruning", same_draws)
    for ours, method in ((dare, "dare_linear"), (dare_ties, "dare_ties")):
        # With one weight: on the election of signs by unequal ones PEFT differs, see below.
        terms = terms_of([(0.6, s, r) for _, s, r in ADAPTERS])
        generator = torch.Generator().manual_seed(5)
        expected = peft_s(method, terms, [0.6] * 3, 0.4)
        torch.testing.assert_close(ours(terms, 0.4, torch.Generator().manual_seed(5)), expected, **SINGLE)


def test_where_weights_have_signs_the_paper_is_followed_and_not_peft():
    """PEFT elects the sign before it applies the weights, so an adapter that is taken away votes for what it adds, and
    where the sum is zero it elects the plus. The paper's task vectors are w dW, and sgn(0) = 0."""
    one = torch.ones(1, 1)
    add, take = Term(one, 3 * one, 1.0, 1.0), Term(one, 2 * one, 1.0, -1.0)
    assert ties([add, take], 1.0).item() == 3.0, "3 wins against -2"
    assert ties_by_entry(dense([add, take]), 1.0).item() == 3.0
    elected = theirs.calculate_majority_sign_mask(torch.stack([3 * one, 2 * one]))
    weighted = torch.stack([3 * one, -2 * one])
    assert theirs.disjoint_merge(weighted, elected).item() == 0.5, "PEFT's: the mean of both"
    cancelling = [Term(one, one, 1.0, 1.0), Term(one, -one, 1.0, 1.0)]
    assert ties(cancelling, 1.0).item() == 0.0
    assert theirs.calculate_majority_sign_mask(torch.tensor([[1.0], [-1.0]])).tolist() == [[True], [False]]


def test_an_update_of_zeros_has_no_error():
    zero = Term(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0, 1.0)
    for method in METHODS:
        combined = combine([zero], method, density=0.5, generator=torch.Generator())
        assert not product(combined).any()
        assert combined.error == combined.norm == 0


def test_half_precision_is_computed_in_float32_or_wider():
    terms = [Term(t.A.bfloat16(), t.B.bfloat16(), t.scale, t.weight) for t in terms_of()]
    assert ties(terms, 0.5).dtype == torch.float32
    torch.testing.assert_close(product(concatenated(terms)), sum(dense(terms)), **DOUBLE)
    assert combine(terms, "ties", rank=2, density=0.5).A.dtype == torch.float32
