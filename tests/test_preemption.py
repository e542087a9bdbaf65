"""Signals become a note that the run reads between phases."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from fake_reward_server import free_port

from segzero_jax.preemption import Preemption, Stopped


@pytest.mark.parametrize(("number", "interrupted"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_waits_for_the_next_check(number: int, interrupted: bool) -> None:
    said: list[str] = []
    with Preemption() as preemption:
        preemption.begin(said.append)
        preemption.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(said) == 1, "one word for all that follow"
        for _ in range(2):
            with pytest.raises(Stopped) as stopped:
                preemption.check()
            assert stopped.value.interrupted == interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_ended_the_reader_of_the_log_too_is_obeyed(number: int) -> None:
    """As Ctrl-C does to ``train 2>&1 | tee log``: the line about it has no reader any more."""
    code = (
        "import signal, sys, time\n"
        "from segzero_jax.pods import ALONE\n"
        "from segzero_jax.preemption import Preemption, Stopped\n"
        "from segzero_jax.terminal import write_line\n"
        "say = lambda text: write_line(sys.stderr, text)\n"
        "with Preemption() as preemption:\n"
        "    preemption.begin(say)\n"
        "    say('ready')\n"
        "    try:\n"
        "        while True: time.sleep(0.01); preemption.check()\n"
        "    except Stopped:\n"
        "        print('saved', flush=True)\n"
        "sys.exit(ALONE.leave(0, 'stopped'))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stderr.readline() == "ready\n"
        child.stderr.close()
        child.send_signal(number)
        assert child.stdout.read() == "saved\n"
    assert child.returncode == 0


@pytest.mark.parametrize(("count", "number"), [(1, signal.SIGINT), (2, signal.SIGINT), (1, signal.SIGTERM)])
def test_a_signal_to_one_process_stops_all_that_have_joined(count: int, number: int) -> None:
    """As on a TPU VM, alone or of a pod: whoever got it knows that it was Ctrl-C."""
    code = (
        "import sys, time, jax\n"
        "from segzero_jax.preemption import Preemption, Stopped\n"
        f"jax.distributed.initialize(sys.argv[1], {count}, int(sys.argv[2]))\n"
        f"with Preemption(alone={count == 1}) as preemption:\n"
        "    preemption.begin(lambda text: None)\n"
        "    print('ready', flush=True)\n"
        "    try:\n"
        "        while True: time.sleep(0.01); preemption.check()\n"
        "    except Stopped as stopped:\n"
        "        print(stopped, flush=True)\n"
    )
    command = [sys.executable, "-c", code, f"localhost:{free_port()}"]
    children = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for index in range(count)
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        children[0].send_signal(number)
        said = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count
    first = "Ctrl-C\n" if number == signal.SIGINT else "SIGTERM\n"
    assert [out for out, _ in said] == [first, "SIGTERM\n"][:count], said


def test_before_the_training_one_that_has_joined_alone_ends_where_it_is() -> None:
    """A TPU VM waits for its reward server like any machine: JAX, which listens there too, has nobody to agree with."""
    code = (
        "import sys, time, jax\n"
        "from segzero_jax.preemption import Preemption, Stopped\n"
        "jax.distributed.initialize(sys.argv[1], 1, 0)\n"
        "with Preemption(alone=True):\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        for _ in range(6000): time.sleep(0.01)\n"  # A signal just before a sleep is looked at after it.
        "    except Stopped as stopped:\n"
        "        print(stopped, flush=True)\n"
    )
    command = [sys.executable, "-c", code, f"localhost:{free_port()}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGTERM)
        assert child.communicate(timeout=30)[0] == "SIGTERM\n"
        assert child.returncode == 0


def test_a_signal_within_a_writing_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    """Python lets nobody write where the signal has interrupted a writing."""

    def refused(text: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with Preemption() as preemption:
        preemption.begin(refused)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped):
            preemption.check()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_heard_where_whoever_started_the_run_holds_them_back(number: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    try:
        with Preemption() as preemption:
            preemption.begin(lambda text: None)
            os.kill(os.getpid(), number)
            with pytest.raises(Stopped):
                preemption.check()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Preemption() as preemption:
        preemption.begin(lambda text: None)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_before_the_training_a_signal_ends_the_run_where_it_is(number: int, ends: type[BaseException]) -> None:
    with Preemption() as preemption:
        with pytest.raises(ends), contextlib.suppress(Exception):  # No library takes it for an error of its own.
            os.kill(os.getpid(), number)
        preemption.begin(lambda text: None)
        with pytest.raises(Stopped) as stopped:
            preemption.check()  # Also where a library has swallowed it.
        assert stopped.value.interrupted == (number == signal.SIGINT)


def test_signals_mean_what_they_meant_before_once_the_run_is_over() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), Preemption():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
