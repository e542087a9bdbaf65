"""A reward server as a process of its own, for benchmarks."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc

_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
_STARTUP_S = 900


@dataclass(frozen=True)
class Server:
    """Attributes: address, pid; stub, to call it; metrics_url, its page of numbers."""

    address: str
    pid: int
    stub: reward_pb2_grpc.RewardServiceStub
    metrics_url: str

    def metric(self, name: str) -> float:
        """A number of the server's, 0 where it has not counted any yet."""
        with urllib.request.urlopen(self.metrics_url, timeout=60) as page:
            lines = dict(line.rsplit(" ", 1) for line in page.read().decode().splitlines() if line[0] != "#")
        return float(lines.get(f"segzero_reward_{name}", 0))


@contextmanager
def server_process(options: list[str]) -> Iterator[Server]:
    """Runs ``python -m reward_server`` with these options until the end of the block; gives it once it serves."""
    command = [sys.executable, "-m", "reward_server", "--port", "0", "--metrics-port", "0", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert child.stdout is not None
        listening = json.loads(child.stdout.readline())
        with grpc.insecure_channel(listening["listening"]) as channel:
            asked = health_pb2.HealthCheckRequest(service=_SERVICE)
            for answer in health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=_STARTUP_S, wait_for_ready=True):
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            yield Server(listening["listening"], child.pid, stub, f"http://{listening['metrics']}/metrics")
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()
