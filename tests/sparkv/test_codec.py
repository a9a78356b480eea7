from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsched.errors import ChunkError
from kvsched.sparkv.codec import MAGIC, ChunkHeader, Coder, Lossless
from kvsched.sparkv.quantize import Place
from kvsched.sparkv.rope import Rotation

KEYS = Place(0, "keys", 0)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def layers(dtype: torch.dtype = torch.float32, count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn((2, 16, 8), generator=generator).to(dtype)  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


def lossless(dtype: torch.dtype = torch.float32) -> Coder:
    return Coder("lossless", dtype, Rotation([]))


def payloads(header: ChunkHeader, data: bytes) -> list[bytes]:
    start, found = len(header.to_bytes()), []
    for entry in header.layers:
        found.append(data[start : start + entry.length])
        start += entry.length
    assert start == len(data)
    return found


@given(st.binary(min_size=0, max_size=400), DTYPES)
def test_lossless_keeps_every_bit_pattern(noise: bytes, dtype: torch.dtype) -> None:
    """NaNs with any payload, infinities and denormals included: bytes are compared, not numbers."""
    noise += bytes(-len(noise) % (4 * dtype.itemsize)) or bytes(4 * dtype.itemsize)
    tensor = torch.frombuffer(bytearray(noise), dtype=dtype).reshape(1, -1, 4)
    back = Lossless().decode(Lossless().encode(tensor, KEYS), tuple(tensor.shape), dtype, KEYS)
    assert torch.equal(back.view(torch.uint8), tensor.view(torch.uint8))


def test_lossless_of_a_strided_view() -> None:
    tensor = torch.randn(2, 40, 8)[:, 7:23]
    assert torch.equal(Lossless().decode(Lossless().encode(tensor, KEYS), (2, 16, 8), tensor.dtype, KEYS), tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_chunk_comes_back_whole_layer_by_layer(dtype: torch.dtype) -> None:
    published = layers(dtype)
    header, data = lossless(dtype).encode(48, published)
    assert ChunkHeader.from_bytes(header.to_bytes()) == header
    assert data.startswith(MAGIC) and (header.position, header.tokens) == (48, 16)
    for entry, payload in zip(header.layers, payloads(header, data), strict=True):
        keys, values = lossless(dtype).decode(header, entry, payload)
        assert torch.equal(keys, published[entry.layer][0]) and torch.equal(values, published[entry.layer][1])


def test_the_last_layer_comes_first() -> None:
    header, _ = lossless(torch.float32).encode(0, layers())
    assert [entry.layer for entry in header.layers] == [2, 1, 0]


def test_real_numbers_shrink() -> None:
    keys = torch.randn(2, 256, 64) * 0.02 + 3
    assert len(Lossless().encode(keys, KEYS)) < 0.9 * keys.nbytes


@given(st.data())
def test_no_damaged_payload_is_decoded(data: st.DataObject) -> None:
    header, chunk = lossless(torch.float32).encode(0, layers(count=1))
    payload = bytearray(payloads(header, chunk)[0])
    if data.draw(st.booleans(), "truncate"):
        payload = payload[: data.draw(st.integers(0, len(payload) - 1))]
    else:
        payload[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ChunkError):
        lossless(torch.float32).decode(header, header.layers[0], bytes(payload))


def test_another_dtype_is_refused() -> None:
    header, chunk = lossless(torch.float16).encode(0, layers(torch.float16, count=1))
    with pytest.raises(ChunkError, match="another dtype"):
        lossless(torch.float32).decode(header, header.layers[0], payloads(header, chunk)[0])


@given(st.data())
def test_decoding_noise_is_refused_or_gives_the_right_shape(data: st.DataObject) -> None:
    """Also behind a correct digest nothing but a tensor of the stated shape comes out."""
    payload = bytearray(Lossless().encode(layers(count=1)[0][0], KEYS))
    for _ in range(data.draw(st.integers(1, 8))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    try:
        tensor = Lossless().decode(bytes(payload), (2, 16, 8), torch.float32, KEYS)
    except ChunkError:
        return
    assert tensor.shape == (2, 16, 8)


@given(st.data())
def test_a_damaged_header_is_refused_or_well_formed(data: st.DataObject) -> None:
    head = bytearray(lossless(torch.float32).encode(0, layers())[0].to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        head[data.draw(st.integers(0, len(head) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = ChunkHeader.from_bytes(bytes(head[: data.draw(st.integers(0, len(head)))]))
    except ChunkError:
        return
    assert all(1 <= number <= 1 << 24 for entry in header.layers for number in entry.keys + entry.values)


@pytest.mark.parametrize(
    "field", [b'"version":2', b'"dtype":"float64"', b'"codec":"x"', b'"position":-1', b'"tokens":true']
)
def test_a_header_with_a_foreign_value_is_refused(field: bytes) -> None:
    text = lossless(torch.float32).encode(0, layers())[0].to_bytes()[8:]
    name = field.split(b":")[0]
    start = text.rindex(name)
    stop = min(i for i in (text.find(b",", start), text.find(b"}", start)) if i >= 0)
    changed = text[:start] + field + text[stop:]
    with pytest.raises(ChunkError):
        ChunkHeader.from_bytes(MAGIC + len(changed).to_bytes(4, "little") + changed)
