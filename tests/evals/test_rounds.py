from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kvsched.sparkv.store import Store
from kvsched_evals import rounds
from kvsched_evals.rounds import Rounds


def test_what_is_asked_without_waiting_for_an_answer_is_one_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "QUIET_SECONDS", 0.1)
    (tmp_path / "chunks").mkdir()
    (tmp_path / "chunks" / "a").write_bytes(b"content")

    async def ask(store: Store) -> None:
        assert await store.exists(["manifests/a", "chunks/a", "manifests/b"]) == [False, True, False]
        assert (await asyncio.gather(store.get("chunks/a", 100), store.get("chunks/a", 100)))[0] == b"content"

    counted = Rounds(tmp_path)
    with counted.running() as url:
        store = Store(url)
        store.wait(ask(store))
    first, second = counted.rounds
    assert sorted(first) == ["HEAD chunks", "HEAD manifests", "HEAD manifests"]
    assert second == ["GET chunks"] * 2
    assert counted.before_bytes_flow() == {"round_trips": 1, "requests": 3}
    counted.rounds = [["HEAD manifests"]]
    assert counted.before_bytes_flow() == {"round_trips": 1, "requests": 1}
