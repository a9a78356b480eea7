"""What a published chunk is called, and why its name can be trusted.

A chunk's address is a SHA-256 chain over everything its keys and values depend on: the model (weights, buffers such as
RoPE frequencies, configuration), the layout version, the codec, and every token id from the start of the sequence with
its position. Equal addresses therefore mean equal KV; another model, dtype, RoPE setting or tokenizer never matches.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT_VERSION: Literal[1] = 1
"""Raised whenever the bytes of a chunk object change their meaning."""

_SAMPLES = 4096
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


def chain(model_fingerprint: str, codec: str, chunk_tokens: int, token_ids: torch.Tensor) -> list[str]:
    """Addresses of the whole chunks of a sequence, each 64 hex digits.

    Args:
        model_fingerprint: from `fingerprint`.
        codec: name of the codec the chunks are written with.
        chunk_tokens: tokens in a chunk; a last part shorter than that has no address.
        token_ids: `[n]`, integers.
    """
    ids = token_ids.detach().cpu().to(torch.int64).numpy().astype("<i8")
    link = hashlib.sha256(f"kvsched {LAYOUT_VERSION} {model_fingerprint} {codec} {chunk_tokens}".encode()).digest()
    addresses = []
    for start in range(0, len(ids) - chunk_tokens + 1, chunk_tokens):
        position = np.int64(start).tobytes()
        link = hashlib.sha256(link + position + ids[start : start + chunk_tokens].tobytes()).digest()
        addresses.append(link.hex())
    return addresses
