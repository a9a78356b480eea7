"""kvpress as a cache in a process of its own: runs in the environment that `make kvpress` makes, for `peers.KVPressLM`.

A JSON line in, a JSON line out. It says `{"ready": true}` once the model is loaded, then answers

* `{"prefill": [ids], "press": class, "keep": n}`: forgets everything, computes a prompt and lets a press of kvpress
  keep n of its tokens for each KV head. Says `seconds`, how many of them were the press's (`press_seconds`), and the
  bytes of keys and values that are `held`.
* `{"read": [ids], "at": place}`: forgets what was read at this place of the text and behind it, and reads tokens there.
  Says the `logits` after each, float32 `[ids, vocabulary]` in base64, and `held`.

```sh
python -I peers_kvpress.py MODEL DTYPE DEVICE THREADS
```
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from typing import Any

import kvpress
import torch
from transformers import AutoModelForCausalLM, DynamicCache


class PressedCache:
    """A prompt's pruned keys and values, and those of all tokens read since."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache, self._length = DynamicCache(), 0

    @torch.no_grad()
    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks for, and return what is said of it."""
        if "prefill" in asked:
            return self._prefill(asked["prefill"], asked["press"], asked["keep"])
        return self._read(asked["read"], asked["at"])

    def _prefill(self, ids: list[int], name: str, keep: int) -> dict[str, Any]:
        # A press keeps the whole part of length x (1 - ratio); half a token more makes that the number asked for.
        ratio = max(0.0, 1 - (keep + 0.5) / len(ids)) if keep < len(ids) else 0.0
        press, spent = getattr(kvpress, name)(compression_ratio=ratio), 0.0
        compress = press.compress

        def timed(*arguments: Any) -> Any:
            nonlocal spent
            begin = time.perf_counter()
            kept = compress(*arguments)
            spent += time.perf_counter() - begin
            return kept

        press.compress = timed
        self._cache, self._length = DynamicCache(), len(ids)
        begin = time.perf_counter()
        if ids:
            with press(self._model):
                self._model.model(input_ids=self._row(ids), past_key_values=self._cache)
        return {"seconds": time.perf_counter() - begin, "press_seconds": spent, "held": self._held()}

    def _read(self, ids: list[int], at: int) -> dict[str, Any]:
        for layer in self._cache.layers if at < self._length else ():
            kept = layer.keys.shape[2] - (self._length - at)
            layer.keys, layer.values = layer.keys[:, :, :kept], layer.values[:, :, :kept]
        self._length = at + len(ids)
        places = self._row(list(range(at, self._length)))
        found = self._model(input_ids=self._row(ids), past_key_values=self._cache, position_ids=places)
        logits = found.logits[0].float().cpu().numpy().astype("<f4").tobytes()
        return {"logits": base64.b64encode(logits).decode(), "held": self._held()}

    def _row(self, numbers: list[int]) -> torch.Tensor:
        return torch.tensor([numbers], device=self._model.device)

    def _held(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)


def main() -> None:
    """Answer standard input, line by line; all that libraries print goes to standard error."""
    folder, dtype, device, threads = sys.argv[1:]
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, Any]) -> None:
        said.write(json.dumps(answer) + "\n")
        said.flush()

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    say({"ready": True})
    cache = PressedCache(model)
    for line in sys.stdin:
        say(cache.answer(json.loads(line)))


if __name__ == "__main__":
    main()
