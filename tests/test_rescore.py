"""The rescore command: same rows, new rewards; and on a bad line nothing but one line of text."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segzero_jax import rewards
from segzero_jax.rescore import main

SOLUTION = '[{"bbox_2d": [10,10,59,59], "point_2d": [30,30]}]'
GOOD = f"<think>left.</think><answer>{SOLUTION}</answer>"
ROWS = [
    {"step": 3, "id": "a", "text": GOOD, "solution": SOLUTION, "mask_iou": 0.75, "reward": -1.0, "advantage": 0.5},
    {"step": 3, "id": "b", "text": "no \u2028 \ud800 answer", "solution": SOLUTION, "mask_iou": 0.0, "components": {}},
]


def write(path: Path, rows: list[dict], end: str = "\n") -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + end)
    return path


def run(source: Path, target: Path, *more: str, recipe: str = "vision_reasoner") -> list[dict]:
    main(["--recipe", recipe, "--input", str(source), "--output", str(target), *more])
    return [json.loads(line) for line in target.read_text().split("\n")[:-1]]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_rows_keep_their_fields_and_gain_the_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    for before, after in zip(ROWS, found, strict=True):
        score = rewards.score("vision_reasoner", before["text"], before["solution"])
        assert after == {**before, "reward": score.total, "components": score.components}
    assert [row["reward"] for row in found] == [7, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    out = tmp_path / "out.jsonl"
    assert capsys.readouterr().out == f"wrote 2 rows to {out}: vision_reasoner, mean reward 4 of at most 7\n"


def test_empty_lines_are_no_rows_and_are_counted_in_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl")
    apart = tmp_path / "apart.jsonl"
    apart.write_text("\n" + "\n \n".join((tmp_path / "in.jsonl").read_text().splitlines()) + "\n\n")
    assert run(apart, tmp_path / "again.jsonl") == whole
    apart.write_text("\n\n{}\n")
    capsys.readouterr()
    arguments = ["--recipe=vision_reasoner", f"--input={apart}", f"--output={tmp_path}/out.jsonl"]
    assert f"{apart}:3: text is missing" in refused(capsys, arguments)


def test_the_mask_iou_flags_weigh_the_stored_scores(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    found = run(source, tmp_path / "a.jsonl", "--mask-iou-weight", "2", "--mask-iou-mode=tiered")
    assert [row["reward"] for row in found] == [7 + 2 * 3, 1]
    assert found[0]["components"]["mask_iou"] == 3
    found = run(source, tmp_path / "b.jsonl", recipe="sam_r1")
    assert [row["reward"] for row in found] == [1 + 1 + 3, 0]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_the_last_line_counts_with_and_without_its_newline(tmp_path: Path, end: str) -> None:
    assert len(run(write(tmp_path / "in.jsonl", ROWS, end), tmp_path / "out.jsonl")) == 2


def test_a_file_can_be_rescored_in_place(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", ROWS)
    once = run(source, source)
    assert run(source, source) == once


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "recursion"),
        ('{"text": "x"}', "solution is missing"),
        (json.dumps({"solution": SOLUTION}), "text is missing"),
        (json.dumps({"text": None, "solution": SOLUTION}), "text: expected a string, got NoneType"),
        ('{"text": "x", "solution": []}', "solution: expected a string, got list"),
        ('{"text": "x", "solution": "a cat\\nor two"}', "solution: expected "),
        (json.dumps({"text": "x", "solution": SOLUTION, "mask_iou": None}), "mask_iou is missing"),
        (json.dumps({"text": "x", "solution": SOLUTION}), "mask_iou is missing"),
        (json.dumps({"text": "x", "solution": SOLUTION, "mask_iou": 1.5}), "mask_iou=1.5: expected a number from 0"),
        (json.dumps({"text": "x", "solution": SOLUTION, "mask_iou": "1"}), "mask_iou: expected a number or null"),
        (json.dumps({"text": "x", "solution": SOLUTION, "mask_iou": True}), "mask_iou: expected a number or null"),
        (json.dumps({"text": "x", "solution": SOLUTION, "mask_iou": 0.5, "kl": float("nan")}), "NaN is not a finite"),
        ('{"kl": 1e999}', "1e999 is not a finite"),
        ('{"text": "\udcff"}', "utf-8"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps(ROWS[0]), line, json.dumps(ROWS[1]), ""]
    source.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    target.write_text("old\n")
    error = refused(capsys, ["--recipe", "sam_r1", "--input", str(source), "--output", str(target)])
    assert f"{source}:2: " in error
    assert message in error
    assert target.read_text() == "old\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "grpo"], "recipe 'grpo': expected one of seg_zero_soft"),
        (["--mask-iou-weight", "-1"], "mask_iou_weight=-1.0: expected"),
        (["--mask-iou-weight", "nan"], "mask_iou_weight=nan: expected"),
        (["--mask-iou-mode", "hard"], "mask_iou_mode='hard': expected one of raw"),
        (["--recipe", "sam_r1", "--mask-iou-weight", "1"], "weight=1: recipe sam_r1 weighs its mask IoU itself"),
        (["--recipe", "sam_r1", "--mask-iou-mode=raw"], "mode=raw: recipe sam_r1 weighs its mask IoU itself"),
        (["--mask-iou-mode", "tiered"], "--mask-iou-mode=tiered: expected --mask-iou-weight above 0 beside it"),
        (["--input", "absent.jsonl"], "--input=absent.jsonl: No such file"),
        (["--input", "."], "--input=.: Is a directory, expected a file of JSON lines"),
        (["--recipe"], "--recipe: expected one argument"),
        (["--output", "absent/out.jsonl"], "--output=absent/out.jsonl: expected a file in a folder that exists"),
        (["--output", "."], "--output=.: expected a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("in.jsonl"), ROWS)
    given = ["--recipe", "vision_reasoner", "--input", "in.jsonl", "--output", "out.jsonl", *flags]
    assert message in refused(capsys, given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_pipe_is_not_replaced_by_a_file_and_a_link_is_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, pipe, link, target = (tmp_path / name for name in ("in.jsonl", "pipe", "link", "target.jsonl"))
    write(source, ROWS)
    os.mkfifo(pipe)
    arguments = ["--recipe", "vision_reasoner", "--input", str(source), "--output"]
    assert f"--output={pipe}: expected a file" in refused(capsys, [*arguments, str(pipe)])
    assert pipe.is_fifo()
    target.write_text("old\n")
    link.symlink_to(target)
    assert len(run(source, link)) == len(ROWS)
    assert link.is_symlink()
    assert len(target.read_text().splitlines()) == len(ROWS)


@pytest.mark.parametrize(("module", "missing"), [("rescore", "--recipe, --input, --output"), ("report", "RUN")])
def test_what_is_missing_is_one_line(module: str, missing: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"segzero_jax.{module}"], capture_output=True, text=True, check=False)
    expected = f"the following arguments are required: {missing}; --help lists the options"
    assert done.returncode == 2
    assert re.fullmatch(rf"python -m segzero_jax\.{module}: {expected}\n", done.stderr), done.stderr


def test_an_empty_file_is_not_silently_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n")
    arguments = ["--recipe", "sam_r1", "--input", str(source), "--output", str(tmp_path / "out.jsonl")]
    assert f"{source}: no rows, expected a JSON object on each line" in refused(capsys, arguments)


def test_the_command_starts_without_jax_or_torch(tmp_path: Path) -> None:
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    program = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('segzero_jax.rescore', run_name='__main__')\n"
        "finally:\n"
        "    loaded = {'jax', 'torch', 'flax', 'transformers'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    arguments = ["--recipe", "vision_reasoner", "--input", str(source), "--output", str(target)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(target.read_text().splitlines()) == 2
