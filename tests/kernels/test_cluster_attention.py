"""Attention over clusters in place, as a CPU computes it, against float64 stream by stream."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import FLOAT8, Shape, attention_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvsched_kernels import Pool, Runs, cluster_attention, decode_attention
from kvsched_kernels.cluster_attention import reference

pytestmark = pytest.mark.usefixtures("path")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    streams=st.integers(1, 4),
    group=st.integers(1, 16),
    dim=st.sampled_from([32, 40, 256]),
    most_runs=st.integers(0, 9),
    stored=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int8, FLOAT8]),
    bits=st.sampled_from([None, (4, 2), (16, 16), (8, 4)]),
    clusters=st.integers(0, 30),
    softcap=st.sampled_from([None, 4.0]),
    sinks=st.booleans(),
    corrects=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_equals_the_reference(streams, group, dim, most_runs, stored, bits, clusters, softcap, sinks, corrects, seed):
    shape = Shape(streams, group, dim, 24, most_runs, torch.float32, stored, bits, clusters, softcap, sinks, corrects)
    case = attention_case(shape, seed)
    output, total = cluster_attention(**case)
    wanted, wanted_total = reference(**case)
    torch.testing.assert_close(output.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(total.double(), wanted_total, atol=1e-5, rtol=1e-5)


def test_equals_dense_attention_when_runs_cover_the_pool():
    query, key, value = torch.randn(1, 4, 32), torch.randn(50, 32), torch.randn(50, 16)
    start, size = torch.tensor([20, 0, 40]), torch.tensor([20, 20, 10])
    runs = Runs.of(start, size, torch.tensor([0, 3]), torch.tensor([1]))
    output, total = cluster_attention(query, Pool(key, value), runs, 0.2)
    everything = torch.ones(1, 50, dtype=torch.bool)
    wanted, wanted_total = decode_attention(query, key[None], value[None], everything, 0.2)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(total, wanted_total)


def test_nothing_that_streams_do_not_own_is_seen_whatever_it_holds():
    case = attention_case(Shape(streams=3, most_runs=5), 8)
    case["pool"].key[0], case["pool"].value[0] = float("inf"), float("nan")
    assert cluster_attention(**case)[0].isfinite().all()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["key", "value"])
def test_numbers_that_are_not_finite_stay_in_their_stream(number, side):
    case = attention_case(Shape(streams=3, most_runs=5), 8)
    runs = case["runs"]
    run = int(runs.bounds[1] + runs.before.diff()[runs.bounds[1] : runs.bounds[2]].argmax())
    getattr(case["pool"], side)[runs.start[run], 1] = number
    output, wanted = cluster_attention(**case)[0].double(), reference(**case)[0]
    assert not wanted[1].isfinite().all() or number == float("inf")
    torch.testing.assert_close(output, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert output[[0, 2]].isfinite().all()


def test_what_does_not_belong_together_is_refused():
    case = attention_case(Shape(), 0)
    pool, runs = case["pool"], case["runs"]
    for wrong, message in [
        ({"pool": Pool(pool.key[:, 1:], pool.value)}, "do not belong together"),
        ({"pool": Pool(pool.key, pool.value.half())}, "do not belong together"),
        ({"pool": Pool(pool.key, pool.value, torch.ones(9), torch.ones(9))}, "scales"),
        ({"pool": Pool(pool.key.T.contiguous().T, pool.value)}, "neighbours in memory"),
        ({"runs": replace(runs, bounds=runs.bounds[:-1])}, "streams"),
    ]:
        with pytest.raises(ValueError, match=message):
            cluster_attention(**{**case, **wrong})
