"""Answers prompts through a press of NVIDIA's kvpress, in an environment of its own: `kvpress_peer` starts it there.

Reads one JSON object from standard input: `model`, a folder; `press`, a class of kvpress; `budget`, the share of the
prompt's tokens that it keeps; `prompts`, each a list of token ids, the most tokens to generate, and texts that end an
answer. Writes one JSON line for each prompt. Prompts are prefilled but for their last token, as `measure` does it.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache


@torch.no_grad()
def read(model: Any, cache: Any, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities `[n, vocabulary]` of what follows each of `ids`, which stand at `start` in the text."""
    rows = []
    for place, token in enumerate(ids, start):
        logits = model(
            input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[place]])
        ).logits
        rows.append(logits[0, -1].log_softmax(-1))
    return torch.stack(rows)


@torch.no_grad()
def prefill(model: Any, press: Any, ids: list[int]) -> tuple[Any, float]:
    """A cache of the prompt, as the press leaves it, and the seconds that it took."""
    begin, cache = time.perf_counter(), DynamicCache()
    with press(model):
        model.model(input_ids=torch.tensor([ids]), past_key_values=cache)
    return cache, time.perf_counter() - begin


def answer(model: Any, tokenizer: Any, cache: Any, prompt: list[int], most: int, until: list[str]) -> list[int]:
    """Greedy tokens after a prompt whose last token is not in the cache yet; the cache is left as it was."""
    tokens: list[int] = []
    last, end = prompt[-1], model.generation_config.eos_token_id
    while len(tokens) < most and last not in (end if isinstance(end, list) else [end]):
        last = int(read(model, cache, [last], len(prompt) - 1 + len(tokens)).argmax())
        tokens.append(last)
        if any(text in tokenizer.decode(tokens) for text in until):
            break
    for layer in cache.layers:
        kept = layer.keys.shape[2] - len(tokens)
        layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
    return tokens


def main() -> None:
    """Answer what stands in standard input."""
    asked = json.load(sys.stdin)
    model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(asked["model"])
    whole = getattr(kvpress, asked["press"])(compression_ratio=0.0)
    press = getattr(kvpress, asked["press"])(compression_ratio=1 - asked["budget"])
    for prompt, most, until in asked["prompts"]:
        cache, prefill_seconds = prefill(model, whole, prompt[:-1])
        reference = answer(model, tokenizer, cache, prompt, most, until)
        ahead, start = [prompt[-1], *reference[:-1]], len(prompt) - 1
        full = read(model, cache, ahead, start)
        cache, pressed_seconds = prefill(model, press, prompt[:-1])
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        begin = time.perf_counter()
        own = answer(model, tokenizer, cache, prompt, most, until)
        seconds = time.perf_counter() - begin + max(0.0, pressed_seconds - prefill_seconds)
        pressed, tokens = read(model, cache, ahead, start), torch.tensor(reference)[:, None]
        kl = (full.exp() * (full - pressed)).sum(-1).clamp_min(0)
        row = {
            "tokens": own,
            "reference": reference,
            "logprob": pressed.gather(1, tokens)[:, 0].tolist(),
            "full_logprob": full.gather(1, tokens)[:, 0].tolist(),
            "kl": kl.tolist(),
            "prefill_seconds": prefill_seconds,
            "seconds": seconds,
            "dram_bytes": held,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
