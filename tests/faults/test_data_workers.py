"""Processes that make batches are killed, or told to stop along with their trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SMALL = ["--train.batch_size=4", "--train.micro_batch_size=4", "--rollout.group_size=2", "--reward.server=none"]
SMALL += ["--rollout.max_response_tokens=16", "--data.eval_splits=[]", "--train.steps=500", "--data.workers=2"]


def trainer(run: Path, data_dir: str) -> "subprocess.Popen[str]":
    """A run with two workers, in a process group of its own."""
    command = [sys.executable, "-m", "segzero_jax.train", *SMALL, f"--data.dir={data_dir}", f"--run.dir={run}"]
    environment = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=16", "device_count=1")}
    log = (run.parent / "log").open("w")
    return subprocess.Popen(command, stderr=log, stdout=log, text=True, env=environment, start_new_session=True)


def wait_for_steps(run: Path, count: int, child: "subprocess.Popen[str]") -> None:
    deadline, metrics = time.monotonic() + 300, run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert child.poll() is None, (run.parent / "log").read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(child: "subprocess.Popen[str]") -> list[int]:
    found = []
    for children in Path("/proc").glob(f"{child.pid}/task/*/children"):
        for pid in children.read_text().split():
            command = Path("/proc", pid, "cmdline").read_text()
            if "spawn_main" in command:
                found.append(int(pid))
    return found


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has asked after."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def saved(run: Path) -> int:
    return max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_one_that_is_killed_ends_the_run_with_its_last_step_saved(tmp_path: Path, data_dir: str) -> None:
    """As by a kernel that is out of memory. It dies in the middle of a message, too, whose rest never comes."""
    run = tmp_path / "run"
    child = trainer(run, data_dir)
    try:
        wait_for_steps(run, 2, child)
        workers = workers_of(child)
        os.kill(workers[0], signal.SIGKILL)
        assert child.wait(timeout=120) == 4
    finally:
        child.kill()
    said = (tmp_path / "log").read_text()
    assert said.splitlines()[-1] == (
        "segzero_jax.train: a process that makes batches has ended (signal 9), perhaps out of memory or of /dev/shm; "
        "the same command goes on, with fewer data.workers"
    )
    assert "Traceback" not in said
    assert saved(run) == len((run / "metrics.jsonl").read_text().splitlines())
    deadline = time.monotonic() + 30
    while any(map(runs, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_all_is_the_trainers_to_obey(number: int, code: int, tmp_path: Path, data_dir: str) -> None:
    run = tmp_path / "run"
    child = trainer(run, data_dir)
    try:
        wait_for_steps(run, 2, child)
        os.killpg(child.pid, number)
        assert child.wait(timeout=120) == code
    finally:
        child.kill()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith("; the same command goes on")
    assert saved(run) == len((run / "metrics.jsonl").read_text().splitlines())
