"""`make demo`: both caches on a real model and a real document, in a few minutes on two cores.

First the time to the first token of a question about a published document, over a shaped link: local prefill, all
streamed, and SparKV. Then a long answer decoded with the whole cache in memory and with DynaKV, whose clusters lie on
flash.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging as transformers_logging

import kvsched
from kvsched.sparkv.cost import DeviceProfile
from kvsched.sparkv.grid import Grid
from kvsched.sparkv.serve import running

from .link import apart, shaped_link
from .machine import keep

# A chapter of the Python language reference that comes with every Python: about 3,200 tokens.
DOCUMENT = "customization"
QUESTION = "In one sentence: when is __init__() not invoked after __new__(), according to the text?"
LONG_QUESTION = "Explain when __del__() is called and what can go wrong in it, with a code example."
SHORT_ANSWER = 24
RTT_MS = 20
CHUNK_TOKENS = 256


class TokenClock(BaseStreamer):
    """Notes when each token comes out of `generate()`; the first call brings the prompt."""

    def __init__(self, bar: tqdm | None = None) -> None:
        self.begin, self.bar = time.perf_counter(), bar
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter() - self.begin)
        if self.bar is not None and len(self.times) > 1:
            self.bar.update()

    def end(self) -> None: ...

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[1]

    @property
    def step(self) -> float:
        """Median seconds a token after the first."""
        return float(torch.tensor(self.times[1:]).diff().median())


def prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[1, n]` of the chat up to the end of the document, and of the rest with `question`."""
    chat = [{"role": "user", "content": f"{topics[DOCUMENT].strip()}\n\n|{question}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    document, rest = text.split(f"|{question}")
    return tuple(tokenizer(part, return_tensors="pt").input_ids for part in (document, question + rest))


def answer(
    model: PreTrainedModel, ids: torch.Tensor, tokens: int, label: str, **cache: Any
) -> tuple[list[int], TokenClock, Cache]:
    """Exactly `tokens` greedy tokens after `ids` `[1, n]`, when each came, and the cache they were decoded with."""
    with tqdm(total=tokens, desc=label, unit="token", file=sys.stderr) as bar:
        clock = TokenClock(bar)
        output = model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            return_dict_in_generate=True,
            **cache,
        )
    return output.sequences[0, ids.shape[1] :].tolist(), clock, output.past_key_values


def first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mbit: float | None) -> dict[str, Any]:
    """Publish the document, then ask about it over a link of `mbit` Mbit/s: three ways, one after the other."""
    document, rest = prompt(tokenizer, QUESTION)
    ids = torch.cat([document, rest], dim=1)
    grid = Grid(document.shape[1] // CHUNK_TOKENS, CHUNK_TOKENS, model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as folder:
        published = kvsched.publish(model, document, store=folder, config={"chunk_tokens": CHUNK_TOKENS})
        computing = float(DeviceProfile.of(model, CHUNK_TOKENS).compute_seconds(grid)[:, -1].sum())
        mbit = mbit or published.bytes_written * 8e-6 / computing
        rows: dict[str, dict[str, Any]] = {}
        link = partial(shaped_link, mbit=mbit, rtt_ms=RTT_MS)
        with apart(partial(running, folder)) as server, apart(partial(link, server)) as store:
            for planner in ("local", "stream", "optimal"):
                options = {"store": store, "chunk_tokens": CHUNK_TOKENS, "planner": planner}
                tokens, clock, cache = answer(
                    model,
                    ids,
                    SHORT_ANSWER,
                    f"first token, {planner}",
                    cache_implementation="sparkv",
                    cache_config=options,
                )
                report = dataclasses.asdict(cache.report())
                del report["timeline"]
                rows[planner] = {"ttft": clock.first, "tokens": tokens, "report": report}
    for row in rows.values():
        row["speedup_over_local"] = rows["local"]["ttft"] / row["ttft"]
        row["equal_tokens"] = equal_share(row["tokens"], rows["local"]["tokens"])
    return {
        "prompt_tokens": ids.shape[1],
        "codec": kvsched.SparKVConfig().codec,
        "link": {"mbit": mbit, "rtt_ms": RTT_MS},
        "published": dataclasses.asdict(published),
        "answer": tokenizer.decode(rows["local"]["tokens"]),
        "rows": rows,
    }


def equal_share(tokens: list[int], expected: list[int]) -> float:
    """How many of two answers' tokens are equal, position by position."""
    return sum(a == b for a, b in zip(tokens, expected, strict=True)) / len(expected)


def long_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int) -> dict[str, Any]:
    """A long answer with the whole cache in memory and with DynaKV, from the same prompt.

    One token that differs lets two texts part for good, so the full cache's answer is also read back to DynaKV: how
    often it would go on with the same token.
    """
    ids = torch.cat(prompt(tokenizer, LONG_QUESTION), dim=1)
    full, full_clock, cache = answer(model, ids, tokens, "long answer, full", past_key_values=DynamicCache())
    full_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    del cache
    with tempfile.TemporaryDirectory(dir=".") as folder:
        options = {"directory": folder, "budget": 256, "dram": "24MiB"}
        dyna, dyna_clock, cache = answer(
            model, ids, tokens, "long answer, dynakv", cache_implementation="dynakv", cache_config=options
        )
        report = cache.report()
        agreed = next_token_agreement(model, cache, full)
        cache.close()
    equal = [a == b for a, b in zip(full, dyna, strict=True)]
    return {
        "prompt_tokens": ids.shape[1],
        "new_tokens": tokens,
        "options": {name: value for name, value in options.items() if name != "directory"},
        "full": {"step": full_clock.step, "cache_bytes": full_bytes},
        "dynakv": {
            "step": dyna_clock.step,
            "cache_bytes": report.dram_bytes,
            "bytes_read_per_token": report.bytes_read / tokens,
            "report": dataclasses.asdict(report),
        },
        "equal_next_tokens": agreed,
        "equal_tokens": sum(equal) / tokens,
        "equal_prefix": equal.index(False) if False in equal else tokens,
        "texts": [tokenizer.decode(full), tokenizer.decode(dyna)],
    }


@torch.no_grad()
def next_token_agreement(model: PreTrainedModel, cache: Cache, expected: list[int]) -> float:
    """How much of `expected` a cache, which has just decoded as many other tokens, gives token by token instead."""
    cache.crop(1 - len(expected))  # the last token of an answer never enters the cache
    agreed = 0
    for token, following in tqdm(list(itertools.pairwise(expected)), desc="long answer, read back", unit="token"):
        logits = model(torch.tensor([[token]]), past_key_values=cache).logits
        agreed += int(logits[0, -1].argmax()) == following
    return agreed / (len(expected) - 1)


def table(sparkv: dict[str, Any], dynakv: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = {"local": "local prefill", "stream": "stream all", "optimal": "sparkv"}
    link = sparkv["link"]
    lines = [
        f"{sparkv['prompt_tokens']} prompt tokens, {link['mbit']:.1f} Mbit/s, {link['rtt_ms']} ms round trip",
        "",
        "| prefill | first token | speed-up | streamed | equal tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for planner, row in sparkv["rows"].items():
        streamed = row["report"]["bytes_streamed"] / 1e6
        lines.append(
            f"| {names[planner]} | {row['ttft']:.1f} s | {row['speedup_over_local']:.2f}x | {streamed:.1f} MB "
            f"| {equal_share(row['tokens'], sparkv['rows']['local']['tokens']):.0%} |"
        )
    full, dyna = dynakv["full"], dynakv["dynakv"]
    lines += [
        "",
        f"{dynakv['new_tokens']} tokens decoded after {dynakv['prompt_tokens']}; dynakv with budget "
        f"{dynakv['options']['budget']}, dram {dynakv['options']['dram']}",
        "",
        "| decode | cache in memory | read from flash a token | a token | equal tokens | same next token |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| full cache | {full['cache_bytes'] / 2**20:.0f} MiB | 0 | {full['step'] * 1e3:.0f} ms | - | - |",
        f"| dynakv | {dyna['cache_bytes'] / 2**20:.0f} MiB | {dyna['bytes_read_per_token'] / 1e6:.2f} MB "
        f"| {dyna['step'] * 1e3:.0f} ms | {dynakv['equal_tokens']:.0%}, the first {dynakv['equal_prefix']} "
        f"| {dynakv['equal_next_tokens']:.0%} |",
    ]
    return "\n".join(lines)


def main(
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write everything measured to this file.")
    ] = None,
    mbit: Annotated[
        float | None, typer.Option(help="Rate of the link; by default streaming takes as long as computing.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Length of the long answer.")] = 128,
) -> None:
    """Show both caches on a real model and a real document."""
    transformers_logging.set_verbosity_error()
    begin = time.perf_counter()
    model, tokenizer = kvsched.load_model()
    sparkv = first_token(model, tokenizer, mbit)
    dynakv = long_answer(model, tokenizer, tokens)
    typer.echo("\n" + table(sparkv, dynakv))
    if json_path is not None:
        result = {
            "seconds": time.perf_counter() - begin,
            "sparkv": sparkv,
            "dynakv": dynakv,
        }
        keep(json_path, "demo", result)
        typer.echo(f"\nwritten to {json_path}")


if __name__ == "__main__":
    typer.run(main)
