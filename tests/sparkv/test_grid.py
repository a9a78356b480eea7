from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvsched.sparkv.grid import Grid


def test_spans_tile_the_prefix() -> None:
    grid = Grid(chunks=3, chunk_tokens=16, layers=2)
    covered = [position for chunk in range(3) for position in range(grid.tokens)[grid.span(chunk)]]
    assert covered == list(range(48)) and grid.tokens == 48


@given(st.lists(st.integers(-1, 6), min_size=1, max_size=6))
def test_staircase_is_what_its_definition_says(depths: list[int]) -> None:
    grid = Grid(len(depths), 16, 5)
    in_range = all(0 <= depth <= 5 for depth in depths)
    assert grid.is_staircase(depths) == (in_range and sorted(depths, reverse=True) == depths)


def test_staircase_needs_one_depth_a_chunk() -> None:
    assert not Grid(3, 16, 5).is_staircase([5, 5])
