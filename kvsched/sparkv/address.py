"""What a published chunk is called, and why its name can be trusted.

A chunk's address is a SHA-256 chain over everything its keys and values depend on: the model (weights, buffers such as
RoPE frequencies, configuration), the layout version, the codec, and every token id from the start of the sequence with
its position. Equal addresses therefore mean equal KV; another model, dtype, RoPE setting or tokenizer never matches.

With a tenant's secret every link of the chain is an HMAC under a key derived from it. Addresses are then as good as
random to everybody else: who does not know the secret can neither name a tenant's chunks nor find out, by guessing
tokens, what the tenant has published.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from .forward import kv_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..config import SparKVConfig

LAYOUT_VERSION: Literal[1] = 1
"""Raised whenever the bytes of a chunk object change their meaning."""

_SAMPLES = 4096
# No codec makes more of a layer than this: some share of the tensors' bytes, and room for what a small chunk carries.
_EXPANSION, _OVERHEAD = 2, 1 << 16
# Settings that say where a model came from or how it is run, not what it computes.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
_fingerprints: weakref.WeakKeyDictionary[PreTrainedModel, str] = weakref.WeakKeyDictionary()


def fingerprint(model: PreTrainedModel) -> str:
    """64 hex digits that name a model's exact parameters, buffers and configuration.

    Every tensor enters with its name, shape, dtype, the wrapping integer sum of all its bytes and a strided sample of
    them: about 0.1 s for a gigabyte, where hashing every byte takes a second. It tells honest models apart, fine-tunes
    of a single layer included; it is no defence against someone who crafts a collision.
    The answer is remembered for as long as the model lives.
    """
    if model not in _fingerprints:
        config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_summary(tensor.detach()))
        _fingerprints[model] = digest.hexdigest()
    return _fingerprints[model]


def _summary(tensor: torch.Tensor) -> bytes:
    raw = tensor.cpu().contiguous().flatten().view(torch.uint8)
    whole = raw.numel() // 8 * 8
    total = int(raw[:whole].view(torch.int64).sum()) if whole else 0
    sample = raw[:: max(1, raw.numel() // _SAMPLES)]
    return total.to_bytes(8, "little", signed=True) + sample.numpy().tobytes() + raw[whole:].numpy().tobytes()


def refinement_address(address: str, header_sha256: str) -> str:
    """The address of a chunk's refinement, as hard to guess as `address` itself.

    It depends on the header of the object that it refines, and so on every byte of that: residuals are never added to
    what another publisher rounded differently.
    """
    return hashlib.sha256(f"{address} {header_sha256} refinement".encode()).hexdigest()


def derive_key(tenant_secret: str | None, purpose: Literal["address", "manifest"]) -> bytes:
    """The key for one purpose, 32 bytes: HMAC-SHA256 of the purpose under the secret; empty without a secret.

    One secret can serve both purposes because neither key tells anything about the other or about the secret.
    """
    return hmac.digest(tenant_secret.encode(), f"kvsched {purpose}".encode(), "sha256") if tenant_secret else b""


def chain(
    model_fingerprint: str, codec: str, chunk_tokens: int, token_ids: torch.Tensor, key: bytes = b""
) -> list[str]:
    """Addresses of the whole chunks of a sequence, each 64 hex digits.

    Args:
        model_fingerprint: from `fingerprint`.
        codec: name of the codec the chunks are written with.
        chunk_tokens: tokens in a chunk; a last part shorter than that has no address.
        token_ids: `[n]`, integers.
        key: from `derive_key`; without one anybody who knows the tokens can compute the addresses.
    """
    ids = token_ids.detach().cpu().to(torch.int64).numpy().astype("<i8")
    root = f"kvsched {LAYOUT_VERSION} {model_fingerprint} {codec} {chunk_tokens}"
    link = hmac.digest(key, root.encode(), "sha256")
    addresses = []
    for start in range(0, len(ids) - chunk_tokens + 1, chunk_tokens):
        position = start.to_bytes(8, "little")
        link = hmac.digest(key, link + position + ids[start : start + chunk_tokens].tobytes(), "sha256")
        addresses.append(link.hex())
    return addresses


@dataclass(frozen=True)
class Prefix:
    """The whole chunks of one token sequence, as one model and one tenant's configuration name and bound them.

    Args:
        fingerprint: of the model.
        codec, chunk_tokens: of the configuration.
        addresses: one a chunk.
        payload_limits: for each layer, first layer first, the bytes that its payload in a chunk can have at most.
        key: signs manifests; empty without a tenant.
    """

    fingerprint: str
    codec: str
    chunk_tokens: int
    addresses: tuple[str, ...]
    payload_limits: tuple[int, ...]
    key: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel, config: SparKVConfig, token_ids: torch.Tensor) -> Prefix:
        """The prefix of `token_ids` `[n]`."""
        name, tokens = fingerprint(model), config.chunk_tokens
        addresses = chain(name, config.codec, tokens, token_ids, derive_key(config.tenant_secret, "address"))
        numbers = [2 * heads * head_dim * tokens for heads, head_dim in kv_shapes(model.config)]
        limits = tuple(_EXPANSION * count * model.dtype.itemsize + _OVERHEAD for count in numbers)
        key = derive_key(config.tenant_secret, "manifest")
        return cls(name, config.codec, tokens, tuple(addresses), limits, key)

    def first(self, chunks: int) -> Prefix:
        """The prefix of its first `chunks` chunks."""
        return replace(self, addresses=self.addresses[:chunks])
