import json
import threading

import jax
import jax.numpy as jnp
import pytest

from segzero_jax import train
from segzero_jax.jsonl import JsonLinesError
from segzero_jax.time_account import CompileClock, PhaseTimer, TimeAccount


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timer(clock):
    return PhaseTimer(clock)


def spend(timer, clock, **seconds):
    for name, value in seconds.items():
        with timer.phase(name):
            clock.now += value


def test_phases_add_up_to_the_time_that_passed(timer, clock):
    for name, seconds in (("rollout", 2.0), ("update", 1.0), ("rollout", 0.5)):
        spend(timer, clock, **{name: seconds})
        clock.now += 0.25
    assert timer.take() == {"rollout": 2.5, "update": 1.0, "other": 0.75}
    clock.now += 1.0
    assert timer.take() == {"other": 1.0}


def test_phases_do_not_nest_and_end_on_errors(timer, clock):
    with timer.phase("outer"), pytest.raises(RuntimeError, match="'inner' inside phase 'outer'"), timer.phase("inner"):
        pass

    def fail():
        with timer.phase("failing"):
            clock.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert timer.take()["failing"] == 3.0


def test_the_phase_in_progress_is_seen_from_outside(timer, clock):
    clock.now += 1.0
    assert timer.running() == ("other", 1.0)
    with timer.phase("rollout"):
        clock.now += 4.0
        assert timer.running() == ("rollout", 4.0)
        assert timer.peek() == {"rollout": 4.0, "other": 1.0}
        clock.now += 2.0
    clock.now += 3.0
    assert timer.running() == ("other", 3.0)
    assert timer.take() == {"rollout": 6.0, "other": 4.0}
    clock.now += 0.5
    assert timer.running() == ("other", 0.5), "of what a line holds, nothing is in progress"


def test_compilation_is_no_part_of_the_phase_it_happens_in(timer, clock):
    with timer.phase("update"):
        clock.now += 7.0
        timer.move(5.0, "compile")
        assert timer.running() == ("update", 2.0)
        clock.now += 1.0
    timer.move(0.0, "compile")
    assert timer.take() == {"compile": 5.0, "update": 3.0, "other": 0.0}


def test_what_no_phase_claimed_gets_a_name(timer, clock):
    clock.now += 2.0
    spend(timer, clock, rollout=1.0)
    timer.carry("lost", 10.0)
    timer.name_rest("startup")
    clock.now += 0.5
    assert timer.take() == {"rollout": 1.0, "lost": 10.0, "startup": 2.0, "other": 0.5}
    assert timer.take() == {"other": 0.0}


def test_jax_tells_when_it_compiles():
    """A function traced inside another's trace counts once; what runs afterwards does not count."""
    timer, seen = PhaseTimer(), []
    clock = CompileClock(timer)

    @jax.jit
    def inner(x):
        seen.append(clock.compiling)
        return jnp.sin(x) * 2

    @jax.jit
    def outer(x):
        return inner(x) + jnp.cumsum(x)

    with clock.listening(), timer.phase("update"):
        outer(jnp.ones(3)).block_until_ready()
        assert not clock.compiling
    seconds = timer.take()
    assert seen == [True]
    assert 0 < seconds["compile"] < sum(seconds.values())
    assert seconds["update"] >= 0
    with clock.listening(), timer.phase("update"):
        outer(jnp.ones(3)).block_until_ready()
    assert timer.take().keys() == {"update", "other"}
    jax.jit(lambda x: x + 1)(jnp.ones(3))
    assert timer.take().keys() == {"other"}


def test_what_another_thread_compiles_is_not_counted(timer):
    compilation, done = CompileClock(timer), []
    other = threading.Thread(target=lambda: done.append(float(jax.jit(lambda x: x * 3 + 1)(1.0))))
    with compilation.listening(), timer.phase("rollout"):
        other.start()
        other.join()
        assert done == [4.0]
        assert not compilation.compiling
    assert timer.take().keys() == {"rollout", "other"}


def test_what_is_traced_inside_a_trace_counts_once(timer, clock):
    compilation, event = CompileClock(timer), "/jax/core/compile/jaxpr_trace_duration"
    with compilation.listening(), timer.phase("update"):
        clock.now += 3.0
        jax.monitoring.record_scalar(event, 0.0)
        clock.now += 1.0
        jax.monitoring.record_scalar(event, 1.0)
        clock.now += 2.0
        # JAX's own times are the wall clock's, which is set back an hour meanwhile.
        jax.monitoring.record_event_time_span(event, 1.0, 3.0 - 3600)
        assert compilation.compiling
        clock.now += 2.0
        jax.monitoring.record_event_time_span(event, 0.0, 5.0 - 3600)
        jax.monitoring.record_event_time_span("/jax/another/event", 0.0, 2.0)
        assert not compilation.compiling
    assert timer.take() == {"compile": 5.0, "update": 3.0, "other": 0.0}


def test_a_line_accounts_for_all_time_since_the_last(tmp_path, timer, clock):
    clock.now += 10.0
    timer.name_rest("startup")
    account = TimeAccount(tmp_path, timer, [], [])
    spend(timer, clock, data=1.0, rollout=4.0, reward_wait=1.0, reference=2.0, update=2.0)
    line = account.line(1)
    assert line == {
        **{"time/startup": 10.0, "time/data": 1.0, "time/rollout": 4.0, "time/reward_wait": 1.0},
        **{"time/reference": 2.0, "time/update": 2.0, "time/other": 0.0},
        **{"time/step": 10.0, "time/total": 20.0, "time/data_share": 0.1, "time/goodput": 8 / 20},
    }
    spend(timer, clock, checkpoint=3.0, evaluation=5.0, rollout=8.0)
    clock.now += 4.0
    line = account.line(2)
    assert (line["time/step"], line["time/total"], line["time/goodput"]) == (12.0, 20.0, 16 / 40)


def test_only_the_first_of_several_processes_writes(tmp_path, timer, clock):
    account = TimeAccount(None, timer, [], [])
    spend(timer, clock, rollout=4.0)
    assert account.line(1)["time/goodput"] == 1.0
    account.note()
    assert list(tmp_path.iterdir()) == []


def rows(*totals):
    return [{"step": i, "time/total": t, "time/rollout": t / 2} for i, t in enumerate(totals, 1)]


def resumed(folder, clock, kept, removed, startup=1.0):
    timer = PhaseTimer(clock)
    clock.now += startup
    timer.name_rest("startup")
    account = TimeAccount(folder, timer, kept, removed)
    spend(timer, clock, rollout=5.0)
    return account, timer


def test_work_that_a_restart_repeats_is_lost_and_counted_once(tmp_path, timer, clock):
    """Three lines, a checkpoint after the second, and a kill in the fourth step; then a kill before the next line."""
    account = TimeAccount(tmp_path, timer, [], [])
    for step in (1, 2, 3):
        spend(timer, clock, rollout=5.0, data=5.0)
        account.line(step)
    account.note()
    spend(timer, clock, rollout=3.0)
    account.note()
    clock.now += 1000.0  # nobody runs
    _, timer = resumed(tmp_path, clock, rows(10, 10), rows(10, 10, 10)[2:])
    assert timer.peek() == {"startup": 1.0, "lost": 13.0, "rollout": 5.0, "other": 0.0}
    # Killed again without a note: the account of its start stays, its own six seconds are gone.
    clock.now += 1000.0
    account, _ = resumed(tmp_path, clock, rows(10, 10), [])
    line = account.line(3)
    assert line["time/lost"] == 13.0 + 1.0
    assert line["time/step"] == 5.0
    assert line["time/total"] == 13.0 + 1.0 + 1.0 + 5.0
    assert line["time/goodput"] == pytest.approx((5 + 5 + 5) / (10 + 10 + 20))


def test_what_a_line_already_holds_is_not_counted_again(tmp_path, timer, clock):
    account = TimeAccount(tmp_path, timer, [], [])
    spend(timer, clock, rollout=9.0)
    account.note()
    account.line(1)
    # Killed before the next note: the file speaks of the time before step 1's line.
    account, timer = resumed(tmp_path, clock, rows(9), [])
    assert "lost" not in timer.peek()
    # The same with that line past the checkpoint: lost with the start-up that came to nothing.
    _, timer = resumed(tmp_path, clock, [], rows(9))
    assert timer.peek()["lost"] == 9.0 + 1.0


def test_a_finished_run_that_goes_on_has_lost_nothing(tmp_path, timer, clock):
    account = TimeAccount(tmp_path, timer, [], [])
    spend(timer, clock, rollout=9.0)
    account.line(1)
    spend(timer, clock, checkpoint=1.0, evaluation=20.0)
    account.note(ended=True)
    assert json.loads((tmp_path / "clock.json").read_text())["ended"]
    account, timer = resumed(tmp_path, clock, rows(9), [])
    line = account.line(2)
    assert "time/lost" not in line
    assert (line["time/evaluation"], line["time/checkpoint"], line["time/startup"]) == (20.0, 1.0, 1.0)
    assert line["time/total"] == 27.0
    spend(timer, clock, evaluation=4.0)
    account.note(ended=True)
    # From a checkpoint before its lines, what came after them is repeated as well.
    _, timer = resumed(tmp_path, clock, [], rows(9, 27))
    assert timer.peek()["lost"] == 9.0 + 27.0 + 4.0


def test_a_clock_that_is_no_json_is_one_line(tmp_path, timer):
    (tmp_path / "clock.json").write_text("<<<<<<< HEAD")
    with pytest.raises(JsonLinesError, match=r"clock\.json: expected JSON: .*; delete it, only seconds are lost"):
        TimeAccount(tmp_path, timer, [], [])


def test_what_somebody_did_to_a_file_of_a_run_is_told_in_one_line():
    assert JsonLinesError in train.USER_ERRORS
