import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax import jsonl

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4))
def test_whatever_is_written_is_read_back_line_by_line(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    jsonl.write(path, rows)
    assert jsonl.read(path) == rows
    assert len(path.read_bytes().splitlines()) == len(rows)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_numpy_and_dataclasses_have_a_plain_form():
    @dataclasses.dataclass(frozen=True)
    class Prompt:
        box: tuple[float, ...]

    row = {"a": np.float32(0.5), "b": np.arange(2), "c": [Prompt((1.0, 2.0))], "d": np.bool_(True)}
    assert json.loads(jsonl.dump(row)) == {"a": 0.5, "b": [0, 1], "c": [{"box": [1.0, 2.0]}], "d": True}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, -np.inf]), {1}, b"x"])
def test_what_json_cannot_hold_is_refused(value, tmp_path):
    with pytest.raises(jsonl.JsonLinesError, match="expected plain values and finite numbers"):
        jsonl.append(tmp_path / "rows.jsonl", {"x": value})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"x": 1}])
    with pytest.raises(jsonl.JsonLinesError):
        jsonl.write(path, [{"x": 2}, {"x": float("nan")}])
    assert jsonl.read(path) == [{"x": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    path = tmp_path / "rows.jsonl"
    jsonl.write(path, [{"x": 1}])
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        jsonl.write(path, [{"x": 2}])
    assert jsonl.read(path) == [{"x": 1}]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_unfinished_last_line_is_not_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 1}\n{"x": 2')
    assert jsonl.read(path) == [{"x": 1}]


@pytest.mark.parametrize("line", ["{", "[1]", "", '{"x": NaN}', '{"x": 1} {"x": 2}'])
def test_a_damaged_line_is_named(line, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"x": 1}}\n{line}\n{{"x": 3}}\n')
    with pytest.raises(jsonl.JsonLinesError, match=r"rows\.jsonl:2: expected a JSON object"):
        jsonl.read(path)
