"""A run whose gradients break, and one that stops in the middle of a phase: what is kept, said and written down."""

import gzip
import json
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.profiler import ProfileData

from segzero_jax import loop, train, watch

ROOT = Path(__file__).parents[2]
SMALL = ["--train.batch_size=2", "--train.micro_batch_size=2", "--rollout.group_size=2", "--reward.server=none"]
SMALL += ["--eval.examples=2", "--eval.samples=2", "--data.eval_splits=[val]", "--train.checkpoint_every=1"]
PHASES = ("data", "rollout", "reference", "reward_wait", "update", "checkpoint")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        items = [reader.restore(checkpoint / item) for item in ("policy", "optimizer")]
    return {name: np.asarray(value) for item in items for name, value in item.items()}


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_one_that_hangs_says_where(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command: five healthy steps, of which two are profiled and the fifth hangs in its rollout; then NaN."""
    run = tmp_path / "run"
    monkeypatch.setattr(watch, "_LEAST_S", 0.0)
    monkeypatch.setattr(watch, "_LOOK_S", 0.02)
    reference, sample = loop.policy_logps, loop.sample
    calls, asleep = {"reference": 0, "sample": 0}, []

    def broken_reference(*arguments: object, **named: object) -> jax.Array:
        calls["reference"] += 1
        logps = reference(*arguments, **named)
        return logps if calls["reference"] <= 5 else logps * np.float32(np.nan)

    def slow_sample(*arguments: object, **named: object) -> object:
        calls["sample"] += 1
        begun = time.monotonic()
        # As long as it takes the watch to speak; a run that nobody watches would end here too, and fail below.
        while calls["sample"] == 5 and "rollout has taken" not in "".join(asleep) and time.monotonic() < begun + 60:
            time.sleep(0.05)
            asleep.append(capsys.readouterr().err)
        return sample(*arguments, **named)

    monkeypatch.setattr(loop, "policy_logps", broken_reference)
    monkeypatch.setattr(loop, "sample", slow_sample)
    options = [*SMALL, f"--data.dir={data_dir}", f"--run.dir={run}", "--train.steps=9", "--watch.max_skipped=3"]
    assert train.main([*options, "--train.keep_checkpoints=4", "--profile=3-4"]) == watch.DIVERGED

    said = "".join(asleep) + capsys.readouterr().err
    assert "step 5: rollout has taken" in said
    stacks = (run / "stacks-0.txt").read_text()
    assert "step 5: rollout has taken" in stacks
    assert "in slow_sample" in stacks
    assert "step 6: loss or gradient not finite, update skipped (1 in a row; 3 end the run)" in said
    assert "step 7: loss or gradient not finite, update skipped (2 in a row; 3 end the run)" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("segzero_jax.train: step 8: loss or gradient not finite in 3 steps in a row, from step 6 on")
    assert f"last good checkpoint: {run}/checkpoints/5;" in last

    rows = lines(run / "metrics.jsonl")
    assert [row["update/skipped"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (
        [row["loss"] is None for row in rows] == [row["grad_norm"] is None for row in rows] == [False] * 5 + [True] * 3
    )
    good, skipped, before = (weights(run / f"checkpoints/{step}") for step in (5, 7, 4))
    for name, value in good.items():
        np.testing.assert_array_equal(value, skipped[name], err_msg=name)
    assert any((value != before[name]).any() for name, value in good.items())
    documented(rows)
    account(rows)
    profile(run)


def documented(rows: list[dict]) -> None:
    manual = (ROOT / "docs/monitoring.md").read_text()
    for key in {key for row in rows for key in row} - {"step"}:
        shown = key.removeprefix("alarm/") if key.startswith("alarm/") else key
        component = key.startswith("reward/") and key not in ("reward/mean", "reward/std", "reward/zero_std_groups")
        assert component or f"`{shown}`" in manual, key


def account(rows: list[dict]) -> None:
    """Phases add up to the whole, every time."""
    for row in rows:
        times = {key: value for key, value in row.items() if key.startswith("time/")}
        total, share = times.pop("time/total"), times.pop("time/goodput")
        step, data = times.pop("time/step"), times.pop("time/data_share")
        assert sum(times.values()) == pytest.approx(total)
        assert 0 < step <= total
        assert 0 < share < 1
        assert data == pytest.approx(times["time/data"] / step)
    assert rows[0]["time/compile"] > rows[0]["time/step"]
    assert rows[0]["time/startup"] > 0
    assert rows[0]["time/evaluation"] > 0
    assert rows[1]["time/checkpoint"] > 0
    assert "time/profile" in rows[2]
    assert "time/lost" not in rows[2]


def profile(run: Path) -> None:
    """Both forms of the trace hold the two steps by number and their phases by name."""
    (folder,) = (run / "profile/plugins/profile").iterdir()
    (xplane,) = folder.glob("*.xplane.pb")
    found = [
        event for plane in ProfileData.from_file(str(xplane)).planes for line in plane.lines for event in line.events
    ]
    assert [dict(event.stats)["step_num"] for event in found if event.name == "step"] == [3, 4]
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        perfetto = json.load(file)["traceEvents"]
    steps = [event for event in perfetto if event.get("name") == "step"]
    assert [event["args"]["step_num"] for event in steps] == ["3", "4"]
    for phase in PHASES:
        assert sum(event.name == phase for event in found) == 2, phase
        spans = [event for event in perfetto if event.get("name") == phase]
        for span, step in zip(spans, steps, strict=True):
            assert step["ts"] <= span["ts"], phase
            assert span["ts"] + span["dur"] <= step["ts"] + step["dur"] + 1e-3, phase
