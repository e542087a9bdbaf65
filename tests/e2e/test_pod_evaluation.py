"""An evaluation on two hosts leaves the files of one process, also after a stop in the middle."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from box_server import BoxServer, serving
from fake_reward_server import free_port
from xla_flags import QUICK

from reward_server import reward_pb2

ROOT = Path(__file__).parents[2]
HOSTS, QUESTIONS, BATCH, SAMPLES = 2, 10, 4, 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Ten questions in batches of four: the last batch is filled up.
OPTIONS = ["--dataset", "toy/val", f"--limit={QUESTIONS}", f"--batch={BATCH}", "--mesh=2x2"]
OPTIONS += [f"--samples={SAMPLES}", "--checkpoint=toy", "--oracle"]
ROWS = Path("toy-val/toy/samples.jsonl")


class CountingServer(BoxServer):
    """Knows how often it was asked."""

    asked = 0

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        self.asked += 1
        return super().Score(request, context)


@pytest.fixture
def server() -> Iterator[tuple[CountingServer, str]]:
    counting = CountingServer()
    with serving(counting) as address:
        yield counting, address


def start(out: Path, data_dir: str, address: str, host: dict[str, str]) -> subprocess.Popen[str]:
    """One process of an evaluation."""
    own = [f"--out={out}", f"--data-dir={data_dir}", f"--server={address}"]
    return subprocess.Popen(
        [sys.executable, "-m", "segzero_jax.evaluate", *OPTIONS, *own],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | host,
        text=True,
    )


def start_pod(out: Path, data_dir: str, address: str, count: int = HOSTS) -> list[subprocess.Popen[str]]:
    """The hosts write to ``out/INDEX``."""
    pod = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    return [start(out / str(i), data_dir, address, pod | {"JAX_PROCESS_ID": str(i)}) for i in range(count)]


def stop_midway(out: Path, hosts: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    """Sends the first host a signal once it has kept some answers; all end, and say how to go on."""
    while not (out / "0" / ROWS).exists() or not (out / "0" / ROWS).stat().st_size:
        assert hosts[0].poll() is None, hosts[0].communicate()
        time.sleep(0.05)
    hosts[0].send_signal(number)
    stopped = ends(hosts)
    assert [code for code, _, _ in stopped] == [130] * len(hosts)
    assert all("stopped; the same command goes on" in err[-1] for _, _, err in stopped)


def ends(hosts: list[subprocess.Popen[str]]) -> list[tuple[int, list[str], list[str]]]:
    """Exit code, standard output and our lines of standard error, of every host."""
    found = []
    for host in hosts:
        out, err = host.communicate(timeout=600)
        assert "Traceback" not in err, err
        ours = [line for line in err.splitlines() if line.startswith("python -m")]
        found.append((host.returncode, out.splitlines(), ours))
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def test_two_hosts_leave_what_one_process_leaves(
    server: tuple[CountingServer, str], data_dir: str, tmp_path: Path
) -> None:
    counting, address = server
    ((code, _, err),) = ends([start(tmp_path / "alone", data_dir, address, {})])
    assert (code, err, counting.asked) == (0, [], 2 * QUESTIONS)  # Policy and oracle.
    expected = files(tmp_path / "alone")
    assert len(expected[str(ROWS)].splitlines()) == QUESTIONS * SAMPLES

    hosts = start_pod(tmp_path, data_dir, address)
    stop_midway(tmp_path, hosts, signal.SIGINT)
    counting.asked = 0

    ended = ends(start_pod(tmp_path, data_dir, address))
    assert [(code, err) for code, _, err in ended] == [(0, [])] * HOSTS
    assert ended[0][1][-1] == f"wrote {tmp_path}/0/results.json, {tmp_path}/0/index.html"
    # What Gloo prints comes from several threads, one within another's line.
    assert not [line for line in ended[1][1] if "toy" in line], "the first host speaks for all"
    assert files(tmp_path / "0") == expected
    assert not (tmp_path / "1").exists()
    assert counting.asked <= 2 * QUESTIONS - BATCH, "what was kept is not asked again"


def test_sigterm_stops_it_where_jax_listens_for_it_too(
    server: tuple[CountingServer, str], data_dir: str, tmp_path: Path
) -> None:
    """As on every TPU machine, be it alone: systemd would wait five minutes, then kill it."""
    stop_midway(tmp_path, start_pod(tmp_path, data_dir, server[1], 1), signal.SIGTERM)
