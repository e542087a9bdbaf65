"""Hosts that agree, wait, stop and die: processes that join a pod and train nothing."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import pytest
from jax._src.distributed import State
from thread_pod import on_hosts

from segzero_jax.pods import PodError, join

ROOT = Path(__file__).parents[2]
HOSTS = 3
BEGIN = """
import sys, time
from segzero_jax.pods import join, HostLost
pod = join("job", "start again")
print("joined", pod.index, pod.count, flush=True)
"""


@contextmanager
def pod(code: str, count: int = HOSTS) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that each run ``code`` as one host of a pod."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(count),
    }
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**environment, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(count)
    ]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.communicate()


def ends(hosts: list[subprocess.Popen[str]]) -> list[tuple[int, list[str], list[str]]]:
    """Exit code, standard output and our lines of standard error of every host."""
    found = []
    for host in hosts:
        out, err = host.communicate(timeout=100)
        assert "Traceback" not in err, err
        found.append((host.returncode, out.splitlines(), [line for line in err.splitlines() if line[:5] == "job: "]))
    return found


def wait_until_joined(hosts: list[subprocess.Popen[str]]) -> None:
    for host in hosts:
        assert host.stdout is not None
        assert host.stdout.readline().startswith("joined")


def test_hosts_tell_each_other_and_end_together() -> None:
    code = """
for round in range(3):
    print(pod.exchange("words", f"{pod.index} says {round}"))
print(pod.exchange("much", str(pod.index) * 3_000_000)[2][-3:])
print(pod.from_first("numbers", lambda: [1, 2, pod.index]))
time.sleep(pod.index)
sys.exit(pod.leave(0, "done"))
"""
    with pod(code) as hosts:
        found = ends(hosts)
    for index, (exit_code, out, said) in enumerate(found):
        assert exit_code == 0
        assert out == [
            f"joined {index} 3",
            *(str([f"{host} says {n}" for host in range(3)]) for n in range(3)),
            "222",
            "[1, 2, 0]",
        ]
        assert said == (["job: done"] if index == 0 else [])


@pytest.mark.parametrize("stopped", [0, 2])
def test_a_host_that_stops_stops_all_with_its_reason(stopped: int) -> None:
    code = f"""
if pod.index == {stopped}:
    sys.exit(pod.leave(3, "no scores for 1 h"))
pod.exchange("scores", "")
"""
    with pod(code) as hosts:
        found = ends(hosts)
    name = re.escape(socket.gethostname())
    assert [code for code, _, _ in found] == [3, 3, 3]
    for index, (_, _, said) in enumerate(found):
        assert len(said) == 1
        expected = "no scores for 1 h" if index == stopped else rf"host {stopped} \({name}\) stopped: no scores for 1 h"
        assert re.fullmatch(f"job: {expected}", said[0])


def test_a_host_that_does_not_come_is_named_with_the_place() -> None:
    code = """
if pod.index == 1:
    time.sleep(60)
try:
    pod.exchange("the update", "", deadline_s=2)
except HostLost as lost:
    sys.exit(pod.leave(4, str(lost)))
"""
    with pod(code) as hosts:
        found = ends([hosts[0], hosts[2]])
    assert [code for code, _, _ in found] == [4, 4]
    line = re.compile(r"job: host 1 \(.*\) did not come to 'the update' within 2 s; start again")
    assert any(line.fullmatch(said) for _, _, lines in found for said in lines)


@pytest.mark.slow
def test_a_dead_host_is_named_and_the_others_end() -> None:
    with pod('pod.exchange("scores", "") if pod.index else time.sleep(1000)') as hosts:
        wait_until_joined(hosts)
        hosts[2].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        found = ends(hosts[:2])
        assert time.monotonic() - killed < 60
    for exit_code, _, said in found:
        assert exit_code == 4
        assert len(said) == 1
        assert re.fullmatch(r"job: host 2 \(.*\) died \(no sign of life for 30 s\); start again", said[0])


def test_alone_without_a_pod() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    code = BEGIN + 'print(pod.exchange("x", "me"), pod.from_first("y", lambda: 5)); sys.exit(pod.leave(2, "bad"))'
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "JAX_PLATFORMS": "cpu"},
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (2, "job: bad\n")
    assert done.stdout.splitlines() == ["joined 0 1", "['me'] 5"]


def test_what_only_the_first_host_can_see_no_other_is_asked(tmp_path: Path) -> None:
    """Its files may be on its disk alone."""
    (tmp_path / "0").write_text("its file")
    hosts = on_hosts(3, lambda pod: pod.from_first("files", lambda: (tmp_path / str(pod.index)).read_text()))
    assert [host.result() for host in hosts] == ["its file"] * 3


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES=four: expected a number"),
        ({"JAX_PROCESS_ID": "²"}, "JAX_PROCESS_ID=²: expected a number"),
        ({}, "JAX_COORDINATOR_ADDRESS=localhost:1: Number of processes must be defined."),
        (
            {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_COORDINATOR_ADDRESS=localhost:1: process_id and num_processes must be nonnegative, "
            "with process_id < num_processes. Got process_id=2, num_processes=2.",
        ),
    ],
)
def test_a_pod_that_is_none_is_refused(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ({"JAX_COORDINATOR_ADDRESS": "localhost:1"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", initialize_elsewhere)
    with pytest.raises(PodError) as error:
        join("job", "")
    assert str(error.value) == message


def initialize_elsewhere(*arguments: Any, **more: Any) -> None:
    """What JAX checks before it connects; here its backend has started already, which it would refuse first."""
    State().initialize(*arguments, **more)
