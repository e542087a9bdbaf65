"""What becomes of a run whose checkpoints cannot be written, with a store that fails on command."""

from typing import Any

import jax.numpy as jnp
import pytest
from thread_pod import on_hosts

from segzero_jax.checkpoint import SaveError
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.keeper import Keeper
from segzero_jax.pods import ALONE, Pod

STATE = TrainState({}, (), jnp.int32(0))  # type: ignore[arg-type]


class Store:
    """Writes in the background as Orbax does: a save that goes wrong is known at the next wait."""

    def __init__(self) -> None:
        self.full, self.closed, self.reason = False, False, "disk: no space left"
        self.steps: list[int] = []
        self.beside: list[tuple[Any, Any]] = []
        self._pending: int | None = None

    @property
    def latest(self) -> int | None:
        return self.steps[-1] if self.steps else None

    def save(self, step: int, state: Any, data: Any, config: Any, identity: Any, lines: Any) -> None:
        self.wait()
        if self.closed:
            raise SaveError(self.reason)
        if step != self.latest:
            self._pending = step
            self.beside.append((data, lines))

    def wait(self) -> None:
        step, self._pending = self._pending, None
        if step is not None and self.full:
            raise SaveError(self.reason)
        if step is not None:
            self.steps.append(step)


class Run:
    def __init__(self, pod: Pod = ALONE) -> None:
        self.store, self.said = Store(), []  # type: ignore[var-annotated]
        arguments = self.store, Config(), Identity("", None), self.said.append, pod
        self.noted: list[int] = []
        lines = lambda kept: {"kept": list(kept)}  # noqa: E731
        self.keeper = Keeper(*arguments, lines=lines, saved=self.noted.append)  # type: ignore[arg-type]

    def finish(self, step: int) -> None:
        self.keeper.finished(step, STATE, {"next_index": 10 * step})


def test_a_failed_save_is_said_and_counted_and_the_next_one_tries_again() -> None:
    run = Run()
    run.finish(1)
    run.keeper.save()
    run.store.full = True
    run.finish(2)
    run.keeper.save()
    assert (run.store.steps, run.said, run.keeper.failed) == (
        [],
        ["checkpoint not written: disk: no space left; training goes on, the next save tries again"],
        1,
    )
    run.store.full = False
    run.finish(3)
    run.keeper.save()
    assert run.keeper.keep()
    assert (run.store.steps, len(run.said), run.keeper.failed) == ([2, 3], 1, 1)


def test_a_save_takes_the_data_s_position_and_the_lines_of_the_checkpoints_that_are_kept_with_it() -> None:
    run = Run()
    for step in (1, 2):
        run.finish(step)
        assert run.keeper.keep()
    assert run.store.beside == [({"next_index": 10}, {"kept": []}), ({"next_index": 20}, {"kept": [1]})]


def test_a_save_is_noted_once_it_is_complete() -> None:
    run = Run()
    run.finish(1)
    assert run.keeper.save()
    assert run.noted == []
    run.finish(2)
    run.keeper.save()
    assert run.noted == [1]
    run.store.full = True
    run.finish(3)
    assert not run.keeper.keep()
    assert run.noted == [1]


def test_what_is_saved_already_is_not_saved_twice() -> None:
    run = Run()
    run.finish(1)
    assert run.keeper.keep()
    assert run.keeper.keep()
    assert run.store.steps == [1]


def test_the_last_step_of_a_run_that_cannot_be_saved_is_an_error() -> None:
    run = Run()
    run.finish(1)
    assert run.keeper.keep()
    run.store.full = True
    run.finish(2)
    run.keeper.save()
    assert not run.keeper.keep()
    with pytest.raises(SaveError) as error:
        run.keeper.keep_or_fail()
    assert str(error.value) == (
        "the last finished step is not saved: disk: no space left; the newest checkpoint is of step 1"
    )
    run.store.full = False
    run.keeper.keep_or_fail()
    assert run.store.steps == [1, 2]


def test_a_save_that_could_not_begin_is_none() -> None:
    run = Run()
    run.finish(1)
    run.store.closed = True
    assert not run.keeper.save()
    assert not run.keeper.keep()
    with pytest.raises(SaveError, match="is not saved: disk: no space left; there is no checkpoint"):
        run.keeper.keep_or_fail()
    assert run.noted == [], "else the next start would look for a checkpoint that never was"


def test_all_hosts_know_why_one_of_them_could_not_write() -> None:
    """The first host writes the log that people read, and has only waited for the others."""

    def act(pod: Pod) -> tuple[bool, bool, int, list[str]]:
        run = Run(pod)
        run.store.full, run.store.reason = True, "disk full" if pod.index == 2 else "not all hosts in time"
        run.finish(1)
        before = run.keeper.keep()
        run.store.full = False
        return before, run.keeper.keep(), run.keeper.failed, run.said

    told = "checkpoint not written: host 0 (w-0): not all hosts in time; host 2 (w-2): disk full; training goes on, "
    for host in on_hosts(4, act):
        assert host.result() == (False, True, 1, [told + "the next save tries again"])


def test_a_save_that_failed_on_one_host_has_failed_on_all() -> None:
    def act(pod: Pod) -> tuple[bool, list[str]]:
        run = Run(pod)
        run.store.full = pod.index == 1
        run.finish(1)
        return run.keeper.keep(), run.said

    told = "checkpoint not written: host 1 (w-1): disk: no space left; training goes on, the next save tries again"
    for host in on_hosts(3, act):
        assert host.result() == (False, [told])
