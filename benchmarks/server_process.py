"""A reward server in its own process, for benchmarks."""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc

_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
_STARTUP_S, _LOOK_S = 900, 0.2


@dataclass(frozen=True)
class Server:
    """A running server: its address, pid, gRPC stub, and the URL of its metrics page."""

    address: str
    pid: int
    stub: reward_pb2_grpc.RewardServiceStub
    metrics_url: str

    def metric(self, name: str) -> float:
        """A metric of the server; 0 if it has no value yet."""
        with urllib.request.urlopen(self.metrics_url, timeout=60) as page:
            lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
        return float(lines.get(f"segzero_reward_{name}", 0))


@contextmanager
def server_process(options: list[str]) -> Iterator[Server]:
    """Runs ``python -m reward_server`` with these options until the end of the block; yields it once it serves.

    Raises RuntimeError with its last log line if it ends before.
    """
    command = [sys.executable, "-m", "reward_server", "--port", "0", "--metrics-port", "0", *options]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as child,
    ):
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise _ended(child, log)
            listening = json.loads(line)
            with grpc.insecure_channel(listening["listening"]) as channel:
                _await_serving(channel, child, log)
                stub = reward_pb2_grpc.RewardServiceStub(channel)
                yield Server(listening["listening"], child.pid, stub, f"http://{listening['metrics']}/metrics")
        finally:
            child.terminate()


def _await_serving(channel: grpc.Channel, child: "subprocess.Popen[str]", log: IO[str]) -> None:
    """Polls until the server is ready: a call with wait_for_ready would not notice that the server has ended."""
    health = health_pb2_grpc.HealthStub(channel)
    asked = health_pb2.HealthCheckRequest(service=_SERVICE)
    until = time.monotonic() + _STARTUP_S
    while time.monotonic() < until:
        try:
            if health.Check(asked, timeout=60).status == health_pb2.HealthCheckResponse.SERVING:
                return
        except grpc.RpcError as error:
            # It was listening already, so it must be exiting.
            raise _ended(child, log) from error
        time.sleep(_LOOK_S)
    raise RuntimeError(f"the reward server does not serve after {_STARTUP_S} s")


def _ended(child: "subprocess.Popen[str]", log: IO[str]) -> RuntimeError:
    code = child.wait(timeout=60)
    log.seek(0)
    last = (log.read().strip().splitlines() or ["it logged nothing"])[-1]
    return RuntimeError(f"the reward server ended with code {code}: {last}")
