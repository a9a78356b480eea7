"""What each form in which DynaKV stores keys and values does to a recorded run's attention: docs/storage.md has it.

The first half of the run's tokens are packed and unpacked as they would be for clusters, and queries of the second half
attend to them, to all of them: nothing is lost here but by the form.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoConfig

from kvsched.dynakv.entries import CODES, EntryForm, packing_of
from kvsched.dynakv.rotary import rates_of
from kvsched.hub import fetch_model
from kvsched.trace import LayerTrace, Trace

from .machine import keep

AS_THEY_COME = ", keys as they come"
"""Neither turned back nor centred: what 8 bits would be without that."""

FORMS = ("float16", "bfloat16", *CODES, *(f"{name}{AS_THEY_COME}" for name in CODES))

KEYS, QUERIES, FIRST = 1024, 8, 256
"""Keys that take part, queries that ask, evenly spaced; and the first keys, which a stream is centred on."""


def stored(layer: LayerTrace, form: str, rates: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Keys and values `[H, KEYS, D]` of a layer as the storage gives them back, and the bytes of a token.

    Args:
        form: of `FORMS`; rates: of the model's rotary embedding.
    """
    heads, tokens, width = layer.keys.shape
    entry = EntryForm(width, layer.values.shape[2], torch.float32, layer.keys.device)
    plain = form.endswith(AS_THEY_COME)
    packing = packing_of(form.removesuffix(AS_THEY_COME), entry, heads, () if plain else rates)
    entries = torch.cat([layer.keys, layer.values], dim=-1).float()
    if not plain:
        first = torch.arange(FIRST).expand(heads, -1)
        packing.begin(entries[:, :FIRST], first, first >= 0)
    at = torch.linspace(0, tokens // 2 - 1, KEYS).long().expand(heads, -1)
    stream = torch.arange(heads).unsqueeze(1)
    packed = packing.pack(entries[stream, at], at, stream)
    keys, values = entry.apart(packing.unpack(packed, at, stream))
    return keys, values, packed[:, 0].nbytes


def errors(layer: LayerTrace, scaling: float, rates: Sequence[float]) -> dict[str, dict[str, Any]]:
    """For each form the divergence of attention's weights, in nats, and the relative error of its output, by head."""
    heads, tokens, width = layer.keys.shape
    asking = torch.linspace(tokens // 2, tokens - 1, QUERIES).long()
    query = layer.queries[:, asking].float().view(heads, -1, width)
    keys, values, _ = stored(layer, "float32", rates)
    expected = (query @ keys.mT * scaling).log_softmax(-1)
    output = expected.exp() @ values
    found = {}
    for form in FORMS:
        keys, values, size = stored(layer, form, rates)
        got = (query @ keys.mT * scaling).log_softmax(-1)
        off = (got.exp() @ values - output).square().sum(-1).mean(-1) / output.square().sum(-1).mean(-1)
        divergence = (expected.exp() * (expected - got)).sum(-1).mean(-1)
        found[form] = {"bytes": size, "kl": divergence.tolist(), "error": off.sqrt().tolist()}
    return found


def table(layers: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What is printed and documented of a result, over all heads."""
    lines = ["| storage | bytes a token | KL, mean | KL, worst head | output, mean | output, worst head |"]
    lines.append("| --- " * 6 + "|")
    for form in FORMS:
        kl, error = (torch.tensor([rows[form][name] for rows in layers.values()]) for name in ("kl", "error"))
        size = sum(rows[form]["bytes"] for rows in layers.values())
        numbers = f"{kl.mean():.5f} | {kl.max():.4f} | {error.mean():.1%} | {error.max():.1%}"
        lines.append(f"| {form} | {size} | {numbers} |")
    return "\n".join(lines)


def main(
    trace_path: Annotated[Path, typer.Argument(metavar="TRACE", help="A run that `kvsched trace record` recorded.")],
    model: Annotated[str | None, typer.Option(help="Name or folder of the model that ran; its configuration.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")] = None,
) -> None:
    """Compare all forms on every layer of a trace."""
    trace = Trace.open(trace_path)
    rates = rates_of(AutoConfig.from_pretrained(fetch_model(model)), "full_attention")
    layers = {str(number): errors(trace.layer(number), trace.scaling, rates) for number in trace.layers}
    typer.echo(table(layers))
    if json_path is not None:
        result = {"model": trace.model, "tokens": trace.tokens, "keys": KEYS, "queries": QUERIES, "layers": layers}
        keep(json_path, "storage_bench", result)
        typer.echo(f"\nwritten to {json_path}")


if __name__ == "__main__":
    typer.run(main)
