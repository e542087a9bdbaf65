"""Signals become a note that the run reads between phases."""

import os
import signal

import pytest

from segzero_jax.preemption import Preemption, Stopped


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_waits_for_the_next_check(number: int, interrupted: bool) -> None:
    said: list[str] = []
    with Preemption(said.append) as preemption:
        preemption.check()
        preemption.check_here()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(said) == 1, "one word for all that follow"
        for check in (preemption.check, preemption.check_here, preemption.check):
            with pytest.raises(Stopped) as stopped:
                check()
            assert stopped.value.interrupted == interrupted


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Preemption(lambda text: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_mean_what_they_meant_before_once_the_run_is_over() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), Preemption(lambda text: None):
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
