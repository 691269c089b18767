"""Logits -> what is stored of them, against float64; the two-level top-k against torch.topk."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from bakery.teachers.distributions import BLOCK, WORTH_BLOCKS, largest, summarize


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_two_levels_find_what_torch_finds(data):
    """Few distinct values, so that ties stand within blocks, across blocks and at the last place."""
    k = data.draw(st.integers(1, 4))
    columns = k * WORTH_BLOCKS + data.draw(st.integers(0, 2 * BLOCK))
    values = st.sampled_from([-np.inf, -2.0, -1.0, 0.0, 0.5])
    x = torch.from_numpy(data.draw(arrays(np.float32, (2, columns), elements=values, fill=values)))
    for place in data.draw(st.lists(st.integers(0, columns - 1), max_size=6)):
        x[:, place] = 1.0  # as a rule fewer than k: the others are among many equals
    found, ids = largest(x, k)
    assert torch.equal(found, x.topk(k).values)
    assert torch.equal(x.gather(1, ids), found)
    assert [len(set(row)) for row in ids.tolist()] == [k, k]


def test_the_largest_in_the_last_columns_and_in_one_block():
    x = torch.zeros(3, WORTH_BLOCKS * 3 + 5)
    assert x.shape[1] % BLOCK
    x[0, [-1, -2, 7]] = torch.tensor([3.0, 2.0, 1.0])
    x[1, [64, 65, 127]] = torch.tensor([1.0, 3.0, 2.0])
    x[2, [0, 700, -1]] = torch.tensor([1.0, 2.0, 3.0])
    values, ids = largest(x, 3)
    end = x.shape[1]
    assert ids.tolist() == [[end - 1, end - 2, 7], [65, 127, 64], [end - 1, 700, 0]]
    assert values.tolist() == [[3.0, 2.0, 1.0]] * 3


def reference(logits_NV, labels_N, k, vocab_size, temperatures):
    logits_NV = logits_NV.double().numpy()
    logp_NV = logits_NV - np.logaddexp.reduce(logits_NV, axis=1, keepdims=True)
    ids_NK = np.argsort(-logp_NV[:, :vocab_size], axis=1, kind="stable")[:, :k]
    outside = np.ones(logp_NV.shape, bool)
    np.put_along_axis(outside, ids_NK, False, 1)
    tail_N = np.logaddexp.reduce(np.where(outside, logp_NV, -np.inf), axis=1)
    token_N = np.take_along_axis(logp_NV, labels_N.numpy()[:, None], 1)[:, 0]
    norms = [np.logaddexp.reduce(logp_NV / t, axis=1) for t in temperatures]
    return ids_NK, np.take_along_axis(logp_NV, ids_NK, 1), tail_N, token_N, np.stack(norms, 1)


# Width, vocabulary, k, and how much likelier the padding of the output is.
CASES = {
    "small": (40, 37, 5, 0.0),
    "in blocks": (2100, 2100, 4, 0.0),
    "in blocks, padded": (2100, 2050, 4, 0.0),
    "the padding is likely": (40, 37, 5, 9.0),
    "all support": (40, 40, 40, 0.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("spread", [1.0, 40.0])  # at 40 the rest is some e^-100 of the mass
def test_a_summary_is_that_of_the_dense_softmax(case, spread):
    width, vocab_size, k, padding = CASES[case]
    generator = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(6, width, generator=generator)
    logits[:, vocab_size:] += padding * spread
    labels = torch.randint(0, vocab_size, (6,), generator=generator)
    ids, logprobs, tail, token, norms = reference(logits, labels, k, vocab_size, (0.5, 2.0))
    summary = summarize(logits.clone(), labels, k, vocab_size, (0.5, 2.0))
    assert summary.ids_NK.tolist() == ids.tolist()
    tolerance = 2e-6 * spread + 2e-6 * float(logits.abs().max())
    for name, found, expected in (
        ("logprobs", summary.logprobs_NK, logprobs),
        ("tail", summary.tail_N, tail),
        ("token", summary.token_N, token),
        ("log_norm", summary.log_norm_NT, norms),
    ):
        np.testing.assert_allclose(found.numpy(), expected, atol=tolerance, rtol=0, err_msg=name)
    if case == "all support":
        assert torch.isneginf(summary.tail_N).all()
