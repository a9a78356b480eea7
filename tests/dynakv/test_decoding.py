"""Every way in which generate() decodes without code from a hub: the same tokens as with transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

OPTIONS = {"budget": 10_000, "sinks": 4, "recent": 12, "max_cluster_size": 12, "dram": "500kB", "io_threads": 2}


def contrastive_search(
    model: PreTrainedModel, input_ids: torch.Tensor, *, past_key_values: Any, use_cache: bool, **_: Any
) -> torch.Tensor:
    """Of the likeliest next tokens the one least like what was said: rows are repeated, tried at once, and one kept.

    transformers moved its own to a hub; this is what it asks of a cache.
    """
    rows, tried_at_once = len(input_ids), 3
    output = model(input_ids, past_key_values=past_key_values, use_cache=use_cache, output_hidden_states=True)
    logits, said = output.logits[:, -1], output.hidden_states[-1]
    for _ in range(25):
        share, token = logits.softmax(-1).topk(tried_at_once)
        past_key_values.batch_repeat_interleave(tried_at_once)
        output = model(
            token.view(-1, 1), past_key_values=past_key_values, use_cache=use_cache, output_hidden_states=True
        )
        tried, before = output.hidden_states[-1], said.repeat_interleave(tried_at_once, dim=0)
        likeness = torch.cosine_similarity(before, tried, dim=-1).amax(1).view(rows, tried_at_once)
        best = (0.4 * share - 0.6 * likeness).argmax(1, keepdim=True)
        kept = torch.arange(rows) * tried_at_once + best[:, 0]
        past_key_values.batch_select_indices(kept)
        logits, said = output.logits[kept, -1], torch.cat([said, tried[kept]], dim=1)
        input_ids = torch.cat([input_ids, token.gather(1, best)], dim=1)
    return input_ids


@pytest.mark.parametrize(
    ("rows", "way"),
    [
        pytest.param(2, {"do_sample": True, "num_return_sequences": 2}, id="sampling"),
        pytest.param(2, {"do_sample": True, "num_beams": 3, "num_return_sequences": 2}, id="sampled beams"),
        pytest.param(1, {"prompt_lookup_num_tokens": 4}, id="prompt lookup"),
        pytest.param(1, {"assistant_early_exit": 1}, id="early exit"),
        pytest.param(1, {"assistant_early_exit": 1, "do_sample": True}, id="sampled early exit"),
        pytest.param(1, {"guidance_scale": 1.5}, id="guidance"),
        pytest.param(2, {"custom_generate": contrastive_search}, id="contrastive search"),
    ],
)
def test_same_tokens_however_it_decodes(tiny_model, rows, way):
    model = tiny_model("qwen2", num_hidden_layers=2)
    ids = torch.randint(3, 40, (rows, 90), generator=torch.Generator().manual_seed(0))
    answers = []
    for cache in ({}, {"cache_implementation": "dynakv", "cache_config": OPTIONS}):
        torch.manual_seed(0)
        answers.append(model.generate(ids, **{"do_sample": False, "max_new_tokens": 25, **way, **cache}))
    assert torch.equal(*answers)


@pytest.mark.parametrize(
    "way",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[5]]},
    ],
    ids=["contrastive search", "DoLa", "groups of beams", "constrained beams"],
)
def test_what_transformers_moved_to_a_hub_is_refused_by_it(tiny_model, way):
    """When it is not, it belongs into the test above."""
    model, ids = tiny_model("qwen2", num_hidden_layers=1), torch.arange(3, 20).unsqueeze(0)
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        model.generate(ids, cache_implementation="dynakv", cache_config=OPTIONS, do_sample=False, **way)
