"""Options: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsched import DynaKVConfig, SparKVConfig
from kvsched.config import CacheConfig, parse_bytes, parse_duration
from kvsched.errors import ConfigError

CONFIGS = [SparKVConfig, DynaKVConfig]
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_sizes_with_any_unit_and_case(number: int, unit: str, gap: str) -> None:
    for written in (unit, unit.lower(), unit.upper()):
        assert parse_bytes(f"{number}{gap}{written}") == number * UNITS[unit]


@given(st.integers(1, 2**50))
def test_plain_numbers_of_bytes_stay_as_they_are(number: int) -> None:
    assert parse_bytes(number) == number == parse_bytes(str(number))


def test_a_fraction_of_a_unit() -> None:
    assert parse_bytes("1.5GB") == 1_500_000_000


@pytest.mark.parametrize("size", [0, -1, True, 1.5, None, "", "MiB", "64 MiBs", "-3MB", "0GB", "lots"])
def test_what_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_bytes(size)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS)
def test_no_options_are_the_defaults(config: type[CacheConfig]) -> None:
    assert config.from_dict(None) == config.from_dict({}) == config()


@pytest.mark.parametrize(
    ("config", "written", "meant"),
    [
        (SparKVConfig, "chunk_token", "chunk_tokens"),
        (SparKVConfig, "Store", "store"),
        (DynaKVConfig, "budgets", "budget"),
        (DynaKVConfig, "max_cluster", "max_cluster_size"),
    ],
)
def test_an_unknown_option_names_the_nearest(config: type[CacheConfig], written: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"no option '{written}'. Did you mean '{meant}'"):
        config.from_dict({written: 1})


@given(st.text(max_size=20))
def test_every_unknown_option_is_refused_with_all_names(name: str) -> None:
    known = [field.name for field in dataclasses.fields(DynaKVConfig)]
    if name not in known:
        with pytest.raises(ConfigError) as refused:
            DynaKVConfig.from_dict({name: 1})
        assert all(option in str(refused.value) for option in known)


@pytest.mark.parametrize(
    ("config", "option", "value"),
    [
        (SparKVConfig, "codec", "zip"),
        (SparKVConfig, "planner", "fast"),
        (SparKVConfig, "chunk_tokens", 15),
        (SparKVConfig, "chunk_tokens", 256.0),
        (SparKVConfig, "chunk_tokens", True),
        (SparKVConfig, "stall_timeout", 0),
        (SparKVConfig, "stall_timeout", "5"),
        (SparKVConfig, "store", 3),
        (DynaKVConfig, "budget", -1),
        (DynaKVConfig, "sinks", -1),
        (DynaKVConfig, "recent", 0),
        (DynaKVConfig, "dram", "64 apples"),
        (DynaKVConfig, "cluster_size", 0),
        (DynaKVConfig, "max_cluster_size", 1),
        (DynaKVConfig, "io_threads", 0),
        (DynaKVConfig, "storage", "int4"),
    ],
)
def test_an_invalid_value_is_refused(config: type[CacheConfig], option: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        config.from_dict({option: value})
    assert "64 apples" in str(refused.value) if option == "dram" else option in str(refused.value)


def test_a_whole_number_passes_where_a_fraction_is_meant() -> None:
    assert SparKVConfig(stall_timeout=3).stall_timeout == 3


def test_a_folder_may_be_a_path(tmp_path: Path) -> None:
    assert DynaKVConfig(directory=tmp_path).directory == tmp_path


@pytest.mark.parametrize("given_as", [SparKVConfig(store="/a", chunk_tokens=64), {"store": "/a", "chunk_tokens": 64}])
def test_changes_go_on_top_of_options(given_as: object) -> None:
    merged = SparKVConfig.merge(given_as, {"store": "/b"})  # type: ignore[arg-type]
    assert merged == SparKVConfig(store="/b", chunk_tokens=64)


def test_merged_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens"):
        SparKVConfig.merge(SparKVConfig(), {"chunk_tokens": 1})


def test_yaml_holds_the_same_options(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("budget: 512\ndram: 1GiB\nstorage: float16\n")
    assert DynaKVConfig.from_yaml(file) == DynaKVConfig(budget=512, dram="1GiB", storage="float16")


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert SparKVConfig.from_yaml(tmp_path / "empty.yaml") == SparKVConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1\n- 2\n", "should hold a mapping"), ("a: [", "cannot read options"), ("budgt: 1", "Did you mean 'budget'")],
)
def test_yaml_that_is_no_mapping_of_options_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        DynaKVConfig.from_yaml(tmp_path / "bad.yaml")


def test_a_missing_or_binary_yaml_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x80")
    for name in ("none.yaml", "binary.yaml"):
        with pytest.raises(ConfigError, match=name):
            SparKVConfig.from_yaml(tmp_path / name)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30d", 2592000), (" 2 w ", 1209600)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1y", "1e3s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration"):
        parse_duration(text)


def test_secrets_are_not_shown() -> None:
    config = SparKVConfig(token="the-token", tenant_secret="the tenant's secret")
    assert "the-token" not in repr(config) and "tenant's" not in repr(config)
