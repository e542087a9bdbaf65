"""What a training run prints at its end."""

import re

import numpy as np
import pytest
from fake_run import SPLITS, write_fake_run

from segzero_jax import jsonl
from segzero_jax.record import print_summary


@pytest.mark.parametrize(
    ("steps", "ends"),
    [
        (1, ["step 1"]),
        (2, ["step 1", "step 2"]),
        (3, ["step 1", "step 3"]),
        (6, ["steps 1 to 3", "steps 4 to 6"]),
        (19, ["steps 1 to 9", "steps 11 to 19"]),
        (24, ["steps 1 to 10", "steps 15 to 24"]),
    ],
)
def test_no_step_is_in_both_ends_of_the_mean_reward(tmp_path, capsys, steps, ends):
    write_fake_run(tmp_path / "run", steps=steps, evaluated=())
    print_summary(tmp_path / "run")
    said = capsys.readouterr().out
    assert re.findall(r"in (steps? [\d to]*\d)", said) == ends
    assert said.count("±") == (len(ends) if steps > 3 else 0)
    rewards = [row["reward/mean"] for row in jsonl.read(tmp_path / "run/metrics.jsonl")]
    half = min(10, max(1, steps // 2))
    for part in (rewards[:half], rewards[-half:]):
        error = f"± {np.std(part, ddof=1) / half**0.5:.3f} " if half > 1 else ""
        assert f" {sum(part) / half:.3f} {error}in step" in said


def test_a_run_without_a_scored_step_has_no_mean_reward(tmp_path, capsys):
    write_fake_run(tmp_path / "run", steps=0, evaluated=())
    jsonl.write(tmp_path / "run/metrics.jsonl", [{"step": 1, "reward/mean": None}])
    print_summary(tmp_path / "run")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("masks", "key", "title"), [(True, "giou", "gIoU"), (False, "box_accuracy", "box accuracy")])
def test_the_table_holds_gIoU_or_box_accuracy_where_there_are_no_masks(tmp_path, capsys, masks, key, title):
    write_fake_run(tmp_path / "run", steps=2, evaluated=(0, 2), masks=masks)
    print_summary(tmp_path / "run")
    said = capsys.readouterr().out
    assert re.findall(r"held-out (.*) \[95% interval\]", said) == [title]
    found = jsonl.read(tmp_path / "run/evaluations.jsonl")
    assert len(found) == 2 * 2 * len(SPLITS)
    # The last evaluation is about more questions: what came before is no "before".
    jsonl.write(tmp_path / "run/evaluations.jsonl", [row | {"count": 8 + row["step"]} for row in found])
    print_summary(tmp_path / "run")
    last = capsys.readouterr().out
    assert re.findall(r"│ +- +│ [\d.]+ \[[\d., ]+\] │", last)
    assert last.count("│ - ") == len(found) / 2
    for row in found:
        assert f"{row[key]:.3f} [{row[f'{key}_low']:.3f}, {row[f'{key}_high']:.3f}]" in said
