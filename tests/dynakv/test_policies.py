"""What each policy says of groups, against plain loops."""

from __future__ import annotations

import pytest
import torch

from kvsched import DynaKVCache, DynaKVConfig
from kvsched.dynakv.clusters import ClusterIndex, Clusters
from kvsched.dynakv.layer import DynaKVLayer
from kvsched.dynakv.policies import POLICIES, Policy, pages, policy_named
from kvsched.errors import ConfigError

DIM, CONFIG = 8, DynaKVConfig()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", POLICIES)
def test_groups_cover_what_is_marked_and_none_is_empty(name: str) -> None:
    mask = torch.ones(2, 100, dtype=torch.bool)
    mask[1, :37] = False
    label, count = policy_named(name)(CONFIG).group(drawn(2, 100, DIM), mask)
    assert torch.equal(label >= 0, mask)
    for stream in range(2):
        assert set(label[stream][mask[stream]].tolist()) == set(range(int(count[stream])))


def filled(policy: Policy, keys: torch.Tensor, mask: torch.Tensor) -> ClusterIndex:
    """An index of one stream, with a group for each of `keys` `[N, m, D]`."""
    index = ClusterIndex(1, policy.forms(DIM, DIM), 16, torch.device("cpu"))
    zeros = torch.zeros(len(keys), dtype=torch.long)
    vectors = policy.summarise(keys, keys, mask)
    index.create(Clusters(zeros, mask.sum(1), zeros.float(), vectors), zeros)
    return index


def test_quest_bounds_every_score() -> None:
    keys, mask, query = drawn(5, 16, DIM), torch.rand(5, 16) < 0.7, drawn(1, 3, DIM)
    mask[:, 0] = True
    policy = policy_named("quest")(CONFIG)
    bound = policy.score(query, filled(policy, keys, mask))
    best = (query[0] @ keys.mT).masked_fill(~mask.unsqueeze(1), float("-inf")).amax(-1)
    assert (bound[0] >= best.T - 1e-2).all()


def test_token_topk_takes_the_best_tokens() -> None:
    keys, query = drawn(5, 16, DIM), drawn(1, 3, DIM)
    mask = torch.arange(16) < torch.tensor([16, 16, 16, 16, 3]).unsqueeze(1)
    policy = policy_named("token-topk")(CONFIG)
    index = filled(policy, keys, mask)
    score = policy.score(query, index)
    exact = (query[0] @ keys.flatten(0, 1).T)[None]
    torch.testing.assert_close(score[..., :67], exact[..., :67], atol=2e-2, rtol=1e-2)
    worth = score.sum(1)
    found = policy.choose(worth, index, torch.tensor([[20]]))
    assert found.kept is not None
    chosen = {(int(c), int(o)) for c, row in zip(found.cluster, found.kept, strict=True) for o in row.nonzero()}
    best = worth[0].masked_fill(~mask.flatten(), float("-inf")).topk(20).indices
    assert chosen == {(int(token) // 16, int(token) % 16) for token in best}


def test_a_policy_of_ones_own(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(Policy):
        segment = 16

        def group(self, keys, mask):
            return pages(mask, 16)

    monkeypatch.setitem(POLICIES, "pages", Pages)
    model, ids = tiny_model("qwen2"), torch.arange(3, 153)[None]
    expected = model.generate(ids, max_new_tokens=40, do_sample=False)
    cache = DynaKVCache(model.config, policy="pages", budget=1000)
    assert torch.equal(model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False), expected)
    assert cache.report().clusters > 0
    cache.close()


def test_dense_layers_stay_in_dram_and_unknown_names_are_refused(tiny_model) -> None:
    cache = DynaKVCache(tiny_model("qwen2").config, policy="quest")
    assert [isinstance(layer, DynaKVLayer) for layer in cache.layers] == [False, False, True]
    cache.close()
    with pytest.raises(ConfigError, match="choose one of 'dynakv', 'static'"):
        DynaKVCache(tiny_model("qwen2").config, policy="best")
