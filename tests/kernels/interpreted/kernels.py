"""The Triton kernels against their references, run by Triton's interpreter; `test_interpreted.py` starts this module.

Every address that a kernel loads from or stores to is checked: it must lie in a tensor that it was given.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton.language as tl
from cases import FLOAT8, Shape, attention_case, vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from kvsched_kernels import (
    Pool,
    Runs,
    Vectors,
    choose_clusters,
    cluster_worth,
    dequantize,
    moments,
    nearest,
    quantize,
    rotate,
    update,
)
from kvsched_kernels import two_means as split
from kvsched_kernels.cluster_attention import reference
from kvsched_kernels.gpu import codec, kmeans, select, tokens
from kvsched_kernels.gpu.cluster_attention import cluster_attention

HALF = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def _every_address_is_checked() -> Iterator[None]:
    given_to = interpreter.GridExecutor._init_args_hst
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store
    ranges: list[tuple[int, int]] = []

    def launched(self, args, kwargs):
        ranges.clear()
        for tensor in [*args, *kwargs.values()]:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                ranges.append((tensor.data_ptr(), tensor.data_ptr() + span * tensor.itemsize))
        return given_to(self, args, kwargs)

    def check(pointers, mask):
        width = pointers.get_element_ty().primitive_bitwidth // 8
        address = np.broadcast_to(pointers.data, mask.data.shape)[mask.data.astype(bool)]
        inside = np.zeros(address.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (address >= begin) & (address + max(width, 1) <= end)
        assert inside.all(), "a kernel reached outside its tensors"

    def checked_load(self, pointers, mask, *args):
        check(pointers, mask)
        return load(self, pointers, mask, *args)

    def checked_store(self, pointers, value, mask, *args):
        check(pointers, mask)
        return store(self, pointers, value, mask, *args)

    multiply = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *args):  # the interpreter keeps bfloat16 as whole numbers and would multiply these
        return multiply(self, widened(a), widened(b), *args)

    with pytest.MonkeyPatch.context() as patch:
        # On a CPU the kernels work on the tensors themselves: copying them back would only touch all their memory.
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", launched)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
        patch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)
        yield


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _outputs_are_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned(*shape, **kwargs):
        tensor = empty(*shape, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 85)

    monkeypatch.setattr(torch, "empty", poisoned)


def agree(case, dtype, **launch):
    """The kernel's answer, compared with float64."""
    output, total = cluster_attention(**case, **launch)
    wanted, wanted_total = reference(**case)
    # NaN and infinities must be where the reference has them; a total without a finite value may be either.
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(output.double(), wanted, equal_nan=True, **tolerance)
    finite = wanted_total.isfinite()
    torch.testing.assert_close(total.double()[finite], wanted_total[finite], **tolerance)
    assert (total[~finite].isnan() | total[~finite].isinf()).all()
    return output


@settings(max_examples=40, deadline=None)
@given(
    streams=st.integers(1, 3),
    group=st.integers(1, 16),
    dims=st.sampled_from([(32, 32), (64, 40), (80, 96), (128, 128), (192, 128), (256, 256)]),
    most_runs=st.integers(0, 9),
    stored=st.sampled_from([torch.float32, torch.int8, FLOAT8]),
    bits=st.sampled_from([None, (4, 2), (16, 16), (8, 4)]),
    softcap=st.sampled_from([None, 4.0]),
    sinks=st.booleans(),
    corrects=st.booleans(),
    slices=st.integers(1, 4),
    seed=st.integers(0, 1 << 16),
)
def test_cluster_attention(streams, group, dims, most_runs, stored, bits, softcap, sinks, corrects, slices, seed):
    shape = Shape(streams, min(group, 16 // streams), *dims, most_runs, torch.float32, stored, bits, 20, softcap, sinks,
                  corrects)  # fmt: skip
    agree(attention_case(shape, seed), torch.float32, slices=slices, block=32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("stored", [None, torch.int8, FLOAT8])
def test_cluster_attention_in_half_precision(dtype, stored):
    shape = Shape(group=4, dim=64, value_dim=48, dtype=dtype, stored=stored or dtype, bits=(4, 2))
    agree(attention_case(shape, 3), dtype, slices=2, block=32)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["key", "value"])
def test_numbers_that_are_not_finite_spread_as_in_the_reference(number, side):
    case = attention_case(Shape(streams=3, most_runs=5), 8)
    first = int(case["runs"].bounds[1])
    assert int(case["runs"].before[first + 2] - case["runs"].before[first]) > 1
    row = int(case["runs"].start[first] if case["runs"].before.diff()[first] else case["runs"].start[first + 1])
    getattr(case["pool"], side)[row, 1] = number
    output = agree(case, torch.float32, slices=2, block=32)
    assert output[[0, 2]].isfinite().all()


def test_one_token_and_none():
    key = torch.randn(1, 32)
    bounds = torch.tensor([0, 1, 1])
    one = Runs.of(
        torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long), bounds, torch.zeros(2, dtype=torch.long)
    )
    output, total = cluster_attention(torch.randn(2, 2, 32), Pool(key, key), one, 1.0, slices=3, block=16)
    torch.testing.assert_close(output[0], key.expand(2, -1))
    assert torch.equal(output[1], torch.zeros(2, 32))
    assert total[1].isneginf().all()


def test_offsets_past_two_billion_numbers():
    memory = mmap.mmap(-1, 2**31 + 4096)  # of which a few pages are touched
    # Neither a stride nor a number of rows goes beyond 32 bits, but where the last row begins does.
    far = torch.frombuffer(memory, dtype=torch.int8).as_strided((3, 32), (2**30, 1))
    far[2] = torch.arange(32) + 1
    one = torch.ones(1, dtype=torch.long)
    runs = Runs.of(one * 2, one, torch.tensor([0, 1]), torch.tensor([0]))
    pool = Pool(far, far, *torch.ones(2, 3))
    output, _ = cluster_attention(torch.randn(1, 1, 32), pool, runs, 1.0, slices=1, block=16)
    assert torch.equal(output[0, 0], far[2].float())

    step, centre = torch.ones(3, 1, 1).expand(3, 1, 32), torch.zeros(3, 1, 1).expand(3, 1, 32)
    numbers = codec.code(far.unsqueeze(1), torch.empty(3, 1, 32), None, (step, centre), decode=True)
    assert torch.equal(numbers[:, 0], far.float())

    codes = far.view(torch.uint8).as_strided((1, 3, 32), (1, 2**30, 1))
    means = Vectors(codes, 8, torch.ones(1, 1, 32), torch.zeros(1, 1, 32))
    query, size = torch.full((1, 1, 32), 0.01), torch.ones(1, 3, dtype=torch.uint8)
    worth = select.cluster_worth(query, means, size, 1.0, torch.zeros(1, 1))
    torch.testing.assert_close(worth, torch.tensor([[1.0, 1.0, math.exp(5.28)]]) / (3 + math.exp(5.28)))


@settings(max_examples=15, deadline=None)
@given(
    streams=st.integers(1, 3),
    group=st.integers(1, 7),
    dim=st.sampled_from([32, 40, 128, 256]),
    clusters=st.integers(1, 150),
    bits=st.sampled_from([2, 4, 8, 16]),
    softcap=st.sampled_from([None, 4.0]),
    alone=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_cluster_worth(streams, group, dim, clusters, bits, softcap, alone, seed):
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(0, 5, (streams, clusters), generator=draw, dtype=torch.uint8)
    means = vectors(streams, clusters, dim, bits, torch.float32, size, draw)
    query = torch.randn(streams, group, dim, generator=draw)
    elsewhere = torch.randn(streams, group, generator=draw)
    if alone:
        elsewhere.fill_(float("-inf"))
        size[:, 0] = 1
        means = vectors(streams, clusters, dim, bits, torch.float32, size, draw)
    got = select.cluster_worth(query, means, size, dim**-0.5, elsewhere, softcap)
    wanted = cluster_worth(query, means, size, dim**-0.5, elsewhere, softcap)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    streams=st.integers(1, 3),
    clusters=st.integers(1, 60),
    mass=st.sampled_from([1.0, 0.5]),
    most=st.integers(0, 90),
    seed=st.integers(0, 1 << 16),
)
def test_choose_clusters(streams, clusters, mass, most, seed):
    draw = torch.Generator().manual_seed(seed)
    # Powers of two of different size, so that sums of shares are exact in any order.
    score = torch.stack([torch.randperm(clusters, generator=draw) for _ in range(streams)]) * 2.0**-6
    size = torch.randint(0, 9, (streams, clusters), generator=draw, dtype=torch.uint8)
    budget = torch.randint(0, most + 1, (streams, 1), generator=draw)
    considered = min(int(budget.max()), clusters)
    got = select.choose_clusters(score, size, budget, mass, considered, block=16)
    assert torch.equal(got, choose_clusters(score, size, budget, mass))


@pytest.mark.parametrize("offset", [0.0, 200.0])
@pytest.mark.parametrize(("dim", "clusters", "n"), [(32, 1, 1), (40, 45, 70), (256, 33, 33)])
def test_nearest(offset, dim, clusters, n):
    points, centroid = torch.randn(2, n, dim) + offset, torch.randn(2, clusters, dim) + offset
    mask = torch.rand(2, clusters) < 0.7
    mask[:, 0] = True
    label, distance = kmeans.nearest(points, centroid, mask)
    wanted, exact = nearest(points.double(), centroid.double(), mask)
    torch.testing.assert_close(distance.double(), exact, atol=1e-3, rtol=1e-4)
    assert (label == wanted).float().mean() > 0.98  # as good as equal is as good


def test_a_stream_without_clusters_and_a_point_that_is_no_number():
    points, mask = torch.randn(2, 3, 32), torch.tensor([[False], [True]])
    points[1, 1, 4] = float("nan")
    got, wanted = kmeans.nearest(points, torch.randn(2, 1, 32), mask), nearest(points, torch.randn(2, 1, 32), mask)
    assert torch.equal(got[0], wanted[0])
    assert got[1][0].isinf().all()
    assert got[1][1].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize(("clusters", "n", "dim"), [(5, 70, 40), (3, 0, 32), (9, 1, 256)])
def test_moments_and_update(by_channel, clusters, n, dim):
    points, label = torch.randn(2, n, dim) + 50.0, torch.randint(-1, clusters, (2, n))
    first = kmeans.moments(points, label, clusters, by_channel)
    for got, wanted in zip(first, moments(points.double(), label, clusters, by_channel), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), atol=1e-3, rtol=1e-5)
    more, where = torch.randn(2, 9, dim) + 50.0, torch.randint(-1, clusters, (2, 9))
    after = kmeans.moments(more, where, clusters, by_channel, first)
    for got, wanted in zip(after, update(first, more, where), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize(("m", "dim", "least"), [(2, 32, 0.0), (17, 40, 0.25), (40, 64, 0.0), (9, 256, 0.4)])
def test_two_means(m, dim, least):
    points = torch.randn(4, m, dim)
    points[1] = 1.0  # all alike: cut at the median
    mask = torch.rand(4, m) < 0.8
    mask[:, :2] = True
    points[~mask] = 1e4
    got = kmeans.two_means(points, mask, torch.full((4,), least), 8)
    for one, other, live in zip(got, split(points, mask, least), mask, strict=True):
        # Which of two points is the first centre may hang on the last bit of their distances.
        assert torch.equal(one, other) or torch.equal(one, ~other & live)


@settings(max_examples=15, deadline=None)
@given(
    heads=st.integers(1, 2),
    tokens=st.integers(0, 70),
    form=st.sampled_from([(32, 16), (64, 20), (80, 40), (40, 0)]),
    by_token=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 1 << 16),
)
def test_codec(heads, tokens, form, by_token, dtype, seed):
    (dim, pairs), draw = form, torch.Generator().manual_seed(seed)
    keys = torch.randn(heads, dim, tokens, generator=draw).transpose(1, 2)
    angles = torch.rand(tokens, max(pairs, 1), generator=draw) * 50
    waves = (angles.cos(), angles.sin()) if pairs else None
    if waves is not None:
        turned = codec.code(keys, torch.empty(keys.shape), waves)
        torch.testing.assert_close(turned, rotate(keys, waves), atol=1e-5, rtol=1e-5)
    shape = (heads, tokens, 1) if by_token else (heads, 1, dim)
    step, centre = torch.rand(shape, generator=draw) + 0.1, torch.randint(-9, 9, shape, generator=draw).float()
    scale = step.expand(keys.shape), centre.expand(keys.shape)
    symbols = codec.code(keys, torch.empty(keys.shape, dtype=torch.int16), waves, scale)
    off = (symbols - quantize(keys, step, centre, waves)).abs()
    assert (off <= 1).all()
    assert off.sum() <= 0.01 * off.numel()  # a turned number may lie on the edge between two symbols
    numbers = codec.code(symbols, torch.empty(keys.shape, dtype=dtype), waves, scale, decode=True)
    wanted = dequantize(symbols, step, centre, waves, torch.float64)
    torch.testing.assert_close(numbers.double(), wanted, atol=1e-4 if dtype == torch.float32 else 2e-2, rtol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    streams=st.integers(1, 3),
    group=st.integers(1, 16),
    dim=st.sampled_from([3, 32, 64, 100, 256]),
    bits=st.sampled_from([2, 4, 8, 16]),
    count=st.integers(1, 5),
    largest=st.sampled_from([1, 7, 20, 70]),
    seed=st.integers(0, 1 << 16),
)
def test_token_products(streams, group, dim, bits, count, largest, seed):
    draw = torch.Generator().manual_seed(seed)
    size = torch.randint(0, largest + 1, (streams, count), generator=draw)
    size[0, 0] = largest
    kept = torch.ones(streams, 5 + int(size.sum(1).max()), dtype=torch.uint8)
    residuals = vectors(streams, kept.shape[1], dim, bits, torch.float32, kept, draw)
    first = size.cumsum(1) - size + 2
    query = torch.randn(streams, group, dim, generator=draw)
    got = tokens.token_products(query, residuals, first, size, largest)
    numbers = Vectors(residuals.data, bits, residuals.step, residuals.offset).read(dim).double()
    wanted = torch.zeros(streams, group, count, largest, dtype=torch.double)
    for s in range(streams):
        for nth, (start, many) in enumerate(zip(first[s].tolist(), size[s].tolist(), strict=True)):
            wanted[s, :, nth, :many] = query[s].double() @ numbers[s, start : start + many].T
    torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-5)
