"""The order of clusters on flash, on retrievals whose best order is known."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from kvsched.dynakv.affinity import order


def reads(retrieved: np.ndarray, chain: np.ndarray) -> int:
    """Runs of neighbours over all queries."""
    there = retrieved[:, chain]
    return int(there[:, 0].sum() + (there[:, 1:] & ~there[:, :-1]).sum())


@settings(max_examples=100, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(0, 12), st.integers(1, 20))))
def test_it_is_a_permutation_and_what_nobody_asked_for_is_last(retrieved):
    chain = order(retrieved)
    assert sorted(chain.tolist()) == list(range(retrieved.shape[1]))
    never = np.flatnonzero(~retrieved.any(0)).tolist()
    assert chain.tolist()[retrieved.shape[1] - len(never) :] == never


def test_topics_that_were_shuffled_come_together_again():
    draw = np.random.default_rng(0)
    topic = draw.permutation(np.arange(60) % 6)
    retrieved = np.stack([(topic == query % 6) & (draw.random(60) < 0.8) for query in range(90)])
    assert reads(retrieved, order(retrieved)) <= 2.5 * 90
    assert reads(retrieved, np.arange(60)) > 5 * 90
