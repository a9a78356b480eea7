"""Progressive streaming: what coarse bases do to the time to the first token, and to the tokens that follow it.

A published text is loaded over a shaped link and the model goes on with the 32 tokens that it would have written on top
of a local prefill. At each of them stand the seconds since the request, the divergence of the next token's distribution
from the local prefill's, and how much of the cache was still coarse. Everything is streamed, so that codecs alone make
the difference.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

import kvsched
from kvsched.config import SparKVConfig
from kvsched.sparkv.cost import DeviceProfile
from kvsched.sparkv.serve import running

from .codec_bench import texts
from .link import apart, shaped_link
from .machine import keep

CODECS = ("balanced", "small", "progressive")
CHUNK_TOKENS, QUERY_TOKENS = 256, 64
RTT_MS = 20.0


@torch.no_grad()
def continuation(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> tuple[list[int], torch.Tensor]:
    """What the model writes greedily after `ids` `[1, n]`, and the log-probabilities `[tokens, vocabulary]` of each."""
    cache, following, found = DynamicCache(config=model.config), ids, []
    for _ in range(tokens):
        found.append(model(following, past_key_values=cache, logits_to_keep=1).logits[0, -1].float().log_softmax(-1))
        following = found[-1].argmax().reshape(1, 1)
    return [int(one.argmax()) for one in found], torch.stack(found)


@torch.no_grad()
def follow(
    model: PreTrainedModel, ids: torch.Tensor, options: dict[str, Any], tokens: list[int], expected: torch.Tensor
) -> dict[str, Any]:
    """Load the prefix of `ids` `[1, n]` and go on with `tokens`, whose log-probabilities should be `expected`."""
    cache, following = kvsched.SparKVCache(model.config, options), ids
    seconds: list[float] = []
    divergence, coarse, begin = [], [], time.perf_counter()
    for token, should in zip(tokens, expected, strict=True):
        if not seconds:
            with cache.loading(model, ids):
                rest = ids[:, cache.get_seq_length() :]
                logits = model(rest, past_key_values=cache, logits_to_keep=1).logits[0, -1]
        else:
            logits = model(following, past_key_values=cache).logits[0, -1]
        seconds.append(time.perf_counter() - begin)
        coarse.append(cache.report().coarse)
        divergence.append(float((should.exp() * (should - logits.float().log_softmax(-1))).sum()))
        following = torch.tensor([[token]])
    report = cache.refine()
    return {
        "seconds": seconds,
        "kl": divergence,
        "coarse": coarse,
        "bytes_streamed": report.bytes_streamed,
        "bytes_refined": report.bytes_refined,
        "fallback": report.fallback,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over the texts: medians of time and bytes, means of divergence."""
    return {
        "ttft": statistics.median(run["seconds"][0] for run in runs),
        "ttft_spread": [min(run["seconds"][0] for run in runs), max(run["seconds"][0] for run in runs)],
        "last_token": statistics.median(run["seconds"][-1] for run in runs),
        "kl_first": statistics.mean(run["kl"][0] for run in runs),
        "kl": statistics.mean(statistics.mean(run["kl"]) for run in runs),
        "kl_worst": max(max(run["kl"]) for run in runs),
        "coarse_tokens": statistics.median(sum(left > 0 for left in run["coarse"]) for run in runs),
        "bytes_streamed": statistics.median(run["bytes_streamed"] for run in runs),
        "bytes_refined": statistics.median(run["bytes_refined"] for run in runs),
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| link | codec | first token | KL, first token | KL, all tokens | still coarse | MB first | MB after |",
        "| --- " * 8 + "|",
    ]
    for name, row in results.items():
        mbit, codec = name.split("/")
        first, after = row["bytes_streamed"] / 1e6, row["bytes_refined"] / 1e6
        lines.append(
            f"| {mbit} Mbit/s | {codec} | {row['ttft']:.2f} s | {row['kl_first']:.5f} | {row['kl']:.5f} "
            f"| {row['coarse_tokens']:.0f} tokens | {first:.2f} | {after:.2f} |"
        )
    return "\n".join(lines)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
    mbits: Annotated[str, typer.Option(help="Rates of the link.")] = "4,16",
    context: Annotated[int, typer.Option(help="Tokens of each text.")] = 1024,
    tokens: Annotated[int, typer.Option(help="Tokens to go on with.")] = 32,
) -> None:
    """Measure time to the first token and the divergence of what follows, with progressive chunks and without."""
    transformers_logging.set_verbosity_error()
    begin = time.perf_counter()
    model, tokenizer = kvsched.load_model()
    runs: dict[str, list[dict[str, Any]]] = {f"{mbit}/{codec}": [] for mbit in mbits.split(",") for codec in CODECS}
    DeviceProfile.of(model, CHUNK_TOKENS)
    with tempfile.TemporaryDirectory() as folder, apart(partial(running, folder)) as server:
        for text, content in tqdm(texts().items(), desc="progressive", unit="text"):
            ids = tokenizer(content, return_tensors="pt").input_ids[:, : context + QUERY_TOKENS]
            following, expected = continuation(model, ids, tokens)
            options = {codec: {"codec": codec, "chunk_tokens": CHUNK_TOKENS} for codec in CODECS}
            for codec in CODECS:
                kvsched.publish(model, ids[:, :context], folder, SparKVConfig.from_dict(options[codec]))
            for name, done in runs.items():
                mbit, codec = name.split("/")
                with apart(partial(shaped_link, server, mbit=float(mbit), rtt_ms=RTT_MS)) as url:
                    asked = {**options[codec], "store": url, "planner": "stream", "stall_timeout": 60.0}
                    done.append({"text": text, **follow(model, ids, asked, following, expected)})
    results = {name: summary(done) for name, done in runs.items()}
    typer.echo(table(results))
    if json_path is not None:
        result = {
            "seconds": time.perf_counter() - begin,
            "context_tokens": context,
            "following_tokens": tokens,
            "chunk_tokens": CHUNK_TOKENS,
            "rtt_ms": RTT_MS,
            "results": results,
            "runs": runs,
        }
        keep(json_path, "progressive_bench", result)
        typer.echo(f"\nwritten to {json_path}")


if __name__ == "__main__":
    typer.run(main)
