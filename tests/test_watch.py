import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segzero_jax import watch
from segzero_jax.config import ConfigError, WatchConfig
from segzero_jax.metrics import MetricsWriter
from segzero_jax.profiling import Profiler, parse_steps
from segzero_jax.record import update_metrics
from segzero_jax.time_account import PhaseTimer
from segzero_jax.watch import HUNG, CollapseWatch, Diverged, FiniteWatch, HangWatch, Watch

HEALTHY = {
    **{"reward/mean": 4.0, "reward/zero_std_groups": 0.9, "entropy": 0.4, "empty_thinking": 0.5},
    **{"response_length/min": 40, "response_length/max": 41},
}
COLLAPSED = {
    "empty_thinking": {"empty_thinking": 0.51},
    "one_length": {"response_length/max": 40},
    "no_spread": {"reward/zero_std_groups": 1.0},
    "low_entropy": {"entropy": 0.0099},
}


# Updates that are not finite.


def test_skipped_updates_are_told_and_too_many_end_the_run():
    found = FiniteWatch(most=3)
    look = lambda step, skipped, saved=(10, 20, 30): found.look(  # noqa: E731
        step,
        {} if skipped is None else {"update/skipped": skipped, "loss": None if skipped == 1 else 0.5},
        saved,
        "runs/x/checkpoints",
    )
    assert look(21, 1.0) == "step 21: loss or gradient not finite, update skipped (1 in a row; 3 end the run)"
    assert look(22, 1.0).endswith("(2 in a row; 3 end the run)")
    assert look(23, 0.0) == ""
    assert "(1 in a row" in look(24, 1.0)
    # One of several updates was finite, and moved the policy.
    assert look(25, 3.0) == "step 25: loss or gradient not finite in 3 of its updates, skipped"
    assert "(1 in a row" in look(29, 1.0)
    assert look(30, None) == ""  # a step without scores made no update
    assert "(2 in a row" in look(31, 1.0)
    with pytest.raises(Diverged) as error:
        look(32, 1.0)
    assert "step 32" in str(error.value)
    assert "3 steps in a row, from step 29 on; last good checkpoint: runs/x/checkpoints/20;" in str(error.value)
    assert "\n" not in str(error.value)


def test_steps_whose_gradient_alone_is_not_finite_end_the_run_too():
    found = FiniteWatch(most=2)
    overflown = update_metrics([{"loss": 0.1, "grad_norm": float("inf"), "update/skipped": 1.0}])
    assert "(1 in a row; 2 end the run)" in found.look(1, overflown, (), "runs/x")
    with pytest.raises(Diverged):
        found.look(2, overflown, (), "runs/x")


@pytest.mark.parametrize(
    ("saved", "said"), [((), "there is no checkpoint yet"), ((8, 9), "last good checkpoint: runs/x/9;")]
)
def test_without_an_older_checkpoint_the_newest_has_the_same_weights(saved, said):
    with pytest.raises(Diverged, match=said):
        FiniteWatch(most=1).look(7, {"update/skipped": 1.0, "loss": None}, saved, "runs/x")


# Collapse.


@pytest.mark.parametrize("state", COLLAPSED)
def test_a_state_is_an_alarm_once_it_persists_and_is_told_once(state):
    found = CollapseWatch(WatchConfig(alarm_after=3))
    told = []
    for step, bad in enumerate([1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1], start=1):
        row = HEALTHY | (COLLAPSED[state] if bad else {})
        alarms = found.look(row)
        assert alarms.pop(f"alarm/{state}") == int(step in (6, 7, 11)), step
        assert set(alarms.values()) == {0}
        told += found.onsets(step)
    assert [line.partition(":")[0] for line in told] == ["step 6", "step 11"]
    assert told[0].endswith(", for 3 steps now")
    assert all("{" not in line for line in told)


def test_a_step_that_measured_nothing_neither_prolongs_nor_ends_a_state():
    found = CollapseWatch(WatchConfig(alarm_after=2))
    low = HEALTHY | {"entropy": 0.0}
    # Without scores all advantages are 0, and there is no update to know the entropy from.
    unscored = {**HEALTHY, "reward/mean": None, "reward/zero_std_groups": 1.0} | {"entropy": None}
    seen = [found.look(row) for row in (low, unscored, unscored, low)]
    assert [row["alarm/low_entropy"] for row in seen] == [0, 0, 0, 1]
    assert [row["alarm/no_spread"] for row in seen] == [0, 0, 0, 0]


def test_an_alarm_is_not_told_again_by_steps_that_measured_nothing():
    found = CollapseWatch(WatchConfig(alarm_after=2))
    low = HEALTHY | {"entropy": 0.0}
    unscored = HEALTHY | {"reward/mean": None}
    without_update = HEALTHY | {"entropy": None}
    told, alarms = [], []
    for step, row in enumerate((low, low, unscored, without_update, unscored, low), start=1):
        alarms.append(found.look(row)["alarm/low_entropy"])
        told += found.onsets(step)
    assert [line.partition(":")[0] for line in told] == ["step 2"]
    assert alarms == [0, 1, 1, 1, 1, 1]


@given(st.lists(st.sampled_from([*COLLAPSED, "healthy"]), max_size=40), st.integers(0, 40), st.integers(1, 4))
def test_a_restart_changes_no_alarm(states, cut, after):
    steps = [HEALTHY | COLLAPSED.get(state, {}) for state in states]
    whole = CollapseWatch(WatchConfig(alarm_after=after))
    alarms = [whole.look(row) for row in steps]
    again = CollapseWatch(WatchConfig(alarm_after=after))
    for row in steps[:cut]:
        again.look(row)
    assert [again.look(row) for row in steps[cut:]] == alarms[cut:]


# Hanging.


class Scene:
    """A watch whose clock and compiler the test moves."""

    def __init__(self, folder, kill_after_s=0.0, step=0):
        self.now, self.compiling, self.told, self.ended = 0.0, False, [], []
        self.timer = PhaseTimer(lambda: self.now)
        self.stacks = folder / "stacks-0.txt"
        self.watch = HangWatch(
            self.timer,
            lambda: self.compiling,
            self.stacks,
            self.told.append,
            kill_after_s,
            end=self.ended.append,
            step=step,
        )

    def usual(self, steps, **times):
        for step in range(1, steps + 1):
            self.watch.finished(step, {f"time/{name}": seconds for name, seconds in times.items()})

    def stuck(self, phase, *waits):
        """How many lines were told after each of the waits."""
        counts = []
        with self.timer.phase(phase):
            for wait in waits:
                self.now += wait
                self.watch.look()
                counts.append(len(self.told))
        return counts


def test_a_phase_that_takes_ten_usual_steps_is_named_while_it_does(tmp_path):
    scene = Scene(tmp_path)
    scene.usual(5, step=3.0)
    assert scene.stuck("update", 29.0, 1.0, 29.0, 1.0, 10.0) == [0, 1, 1, 2, 2]
    assert scene.told[0] == (
        f"step 6: update has taken 30 s, where whole steps take 3.0 s; the stacks of all threads are in {scene.stacks}"
    )
    assert "1 min 00 s" in scene.told[1]
    stacks = scene.stacks.read_text()
    assert "step 6: update has taken 30 s" in stacks
    assert "test_watch.py" in stacks
    assert scene.stuck("rollout", 31.0) == [3]  # another phase is another matter
    assert scene.ended == []


@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_is_unusual_at_first(tmp_path, steps):
    scene = Scene(tmp_path)
    scene.usual(steps, step=1.0)
    assert scene.stuck("rollout", 1000.0) == [0]
    assert not scene.stacks.exists()


def test_compiling_and_waiting_for_rewards_do_not_hang(tmp_path):
    scene = Scene(tmp_path, kill_after_s=5.0)
    scene.usual(5, step=1.0)
    assert scene.stuck("reward_wait", 1000.0) == [0]
    scene.compiling = True
    assert scene.stuck("update", 1000.0) == [0]
    scene.compiling = False
    assert scene.stuck("update", 4.0) == [0]
    assert scene.ended == []


def test_the_save_that_a_run_ends_with_may_take_its_time(tmp_path):
    """It waits for the disk, as none before it; ended, it would be lost, and met again by the next start."""
    scene = Scene(tmp_path, kill_after_s=60.0)
    scene.usual(5, step=1.0, checkpoint=0.1)
    with scene.watch.paused():
        assert scene.stuck("checkpoint", 70.0) == [0]
    assert scene.ended == []
    assert scene.stuck("checkpoint", 70.0)[0] > 0
    assert scene.ended == [HUNG]


def test_an_evaluation_is_measured_by_evaluations(tmp_path):
    scene = Scene(tmp_path)
    scene.usual(5, step=1.0)
    assert scene.stuck("evaluation", 500.0) == [0]  # the first one: nobody knows
    scene.usual(1, step=1.0, evaluation=60.0)
    assert scene.stuck("evaluation", 599.0, 1.0) == [0, 1]
    assert "where evaluations take 60.0 s" in scene.told[0]


def test_a_process_ends_itself_only_where_it_is_told_to(tmp_path):
    scene = Scene(tmp_path, kill_after_s=20.0, step=7)
    assert scene.stuck("data", 19.0, 2.0)[0] == 0
    assert scene.ended == [HUNG]
    assert "step 8: data has taken 21 s, longer than watch.kill_after_s=20: this ends it" in scene.told[0]


def test_the_thread_looks_and_notes_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    monkeypatch.setattr(watch, "_NOTE_S", 0.02)
    noted, told = threading.Event(), threading.Event()
    timer = PhaseTimer()
    end = lambda code: told.set()  # noqa: E731
    with HangWatch(timer, lambda: False, tmp_path / "s.txt", lambda _: None, 1e-6, note=noted.set, end=end):
        with timer.phase("rollout"):
            assert noted.wait(30)
            assert told.wait(30)
        alive = {thread.name for thread in threading.enumerate()}
    assert "hang watch" in alive
    assert "hang watch" not in {thread.name for thread in threading.enumerate()}


def test_a_full_disk_does_not_end_the_watch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    monkeypatch.setattr(watch, "_NOTE_S", 0.01)
    calls = []

    def note():
        calls.append(time.monotonic())
        raise OSError(28, "No space left on device")

    with HangWatch(PhaseTimer(), lambda: False, tmp_path / "s.txt", lambda _: None, 0.0, note=note):
        while len(calls) < 2:
            time.sleep(0.01)
    assert "hang watch: [Errno 28] No space left on device" in capsys.readouterr().err


def test_a_hang_is_told_and_ended_on_a_full_disk(monkeypatch):
    monkeypatch.setattr(watch, "_LOOK_S", 0.01)
    timer, said, ended = PhaseTimer(), [], []
    with (
        timer.phase("rollout"),
        HangWatch(timer, lambda: False, Path("/dev/full"), said.append, 0.02, end=ended.append),
    ):
        while not ended:
            time.sleep(0.01)
    assert ended[0] == watch.HUNG
    assert "rollout has taken" in said[0]
    assert said[0].endswith("could not be written: [Errno 28] No space left on device")


# All of it.


@pytest.mark.parametrize("done", [False, True])
def test_a_run_that_goes_on_keeps_its_alarms_and_its_clock(tmp_path, done):
    now = 0.0
    timer = PhaseTimer(lambda: now)
    low = HEALTHY | {"entropy": 0.0}
    with MetricsWriter(tmp_path, 10, show_progress=False) as writer:
        for step in range(1, 10):
            writer.write_step(step, low)
        profiler = Profiler(tmp_path / "profile", range(0), timer, writer.message)
        with Watch(WatchConfig(alarm_after=10), tmp_path, timer, writer, [], None, profiler) as found:
            for phase, seconds in (("rollout", 4.0), ("evaluation", 16.0)):
                with found.phase(phase):
                    now += seconds
            line = found.line(10, low, tokens=100)
            if done:
                found.done()
    assert {name for name, raised in line.items() if name.startswith("alarm/") and raised} == {"alarm/low_entropy"}
    assert (line["time/step"], line["time/total"]) == (4.0, 20.0)
    assert line["tokens_per_second"] == 100 / 4.0, "an evaluation is beside the steps"
    assert json.loads((tmp_path / "clock.json").read_text())["ended"] == done


# --profile.


@pytest.mark.parametrize(
    ("text", "first", "last", "steps"),
    [
        ("", 1, 10, range(3, 5)),
        ("", 41, 50, range(43, 45)),
        ("", 1, 3, range(3, 4)),
        ("", 50, 50, range(50, 51)),
        ("7", 1, 10, range(7, 8)),
        ("1-10", 1, 10, range(1, 11)),
        # Started again, after a preemption: what has been made is left out.
        ("5-8", 7, 10, range(7, 9)),
        ("5-6", 7, 10, range(0)),
    ],
)
def test_the_steps_of_a_profile(text, first, last, steps):
    assert parse_steps(text, first, last) == steps


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4", "--profile=4: expected some of steps 1-3, which this run makes"),
        ("0-1", "--profile=0-1: expected some of"),
        ("3-1", "expected FIRST-LAST, such as --profile=3-4"),
        ("a", "--profile=a: expected FIRST-LAST"),
        ("1-2-3", "--profile=1-2-3: expected FIRST-LAST"),
    ],
)
def test_a_profile_of_steps_that_are_not_made_is_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_steps(text, 1, 3)
