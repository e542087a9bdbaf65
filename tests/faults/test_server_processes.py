"""Servers as processes: killed in the middle of a call and started again, stopped under load, many clients at once."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sam_calls import group_request

from benchmarks.soak_reward_server import soak
from reward_server import reward_pb2, reward_pb2_grpc
from reward_server.server import SERVICE_NAME
from segzero_jax.reward_channel import Access, SpreadChannel

WAIT_S = 120


class Process:
    """``python -m reward_server`` with the toy model."""

    def __init__(self, port: int = 0, *options: str) -> None:
        command = [sys.executable, "-m", "reward_server", "--model", "toy", "--threads", "1", "--port", str(port)]
        self.child = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.address = json.loads(self.child.stdout.readline())["listening"]
        self.port = int(self.address.rpartition(":")[2])

    def until_ready(self) -> None:
        with grpc.insecure_channel(self.address) as channel:
            asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            watch = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=WAIT_S, wait_for_ready=True)
            assert any(answer.status == health_pb2.HealthCheckResponse.SERVING for answer in watch)

    def end(self) -> str:
        """Kills it where it still runs; gives its log."""
        if self.child.poll() is None:
            self.child.kill()
        return self.child.communicate(timeout=WAIT_S)[1]


@pytest.fixture
def processes():
    started: list[Process] = []

    def start(port: int = 0, *options: str) -> Process:
        started.append(Process(port, *options))
        return started[-1]

    yield start
    for process in started:
        process.end()


def patient(*addresses: str) -> grpc.Channel:
    """A trainer's channel: it spreads its calls over those that serve, and sends them again while a server is away."""
    return SpreadChannel(",".join(addresses), Access()).now


def scores(stub: reward_pb2_grpc.RewardServiceStub, count: int) -> list[reward_pb2.ScoreResponse]:
    calls = [
        stub.Score.future(group_request(i, request_id=str(i)), timeout=WAIT_S, wait_for_ready=True)
        for i in range(count)
    ]
    return [call.result() for call in calls]


def test_killed_in_the_middle_of_calls_and_started_again(processes) -> None:
    first = processes()
    first.until_ready()
    with patient(first.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        expected = scores(stub, 12)
        # Stopped in the middle: calls are with it, and none is answered.
        os.kill(first.child.pid, signal.SIGSTOP)
        calls = [
            stub.Score.future(group_request(i, request_id=str(i)), timeout=WAIT_S, wait_for_ready=True)
            for i in range(12)
        ]
        time.sleep(0.5)
        assert not any(call.done() for call in calls)
        os.kill(first.child.pid, signal.SIGKILL)
        first.child.wait()
        second = processes(first.port)
        second.until_ready()
        assert [call.result() for call in calls] == expected


def test_stops_where_whoever_started_it_holds_signals_back(processes) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        process = processes()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process.until_ready()
    process.child.terminate()
    assert process.child.wait(WAIT_S) == 0


def test_stops_where_the_system_hands_the_signal_to_another_thread(processes) -> None:
    """As where a library holds signals back in the main thread, which gets them otherwise."""
    process = processes()
    process.until_ready()
    pid = process.child.pid
    blocks = lambda thread: int(re.search(r"SigBlk:\s*(\w+)", (thread / "status").read_text())[1], 16)  # noqa: E731
    hears = [
        int(thread.name)
        for thread in Path(f"/proc/{pid}/task").iterdir()
        if int(thread.name) != pid and not blocks(thread) >> signal.SIGTERM - 1 & 1
    ]
    ctypes.CDLL(None).tgkill(pid, hears[0], signal.SIGTERM)
    assert process.child.wait(WAIT_S) == 0


def test_stopped_under_load_finishes_what_it_has_and_others_take_the_rest(processes) -> None:
    leaves, stays = processes(), processes()
    for process in (leaves, stays):
        process.until_ready()
    answers: list[reward_pb2.ScoreResponse] = []
    stop = threading.Event()

    def load(stub: reward_pb2_grpc.RewardServiceStub, number: int) -> None:
        call = 0
        while not stop.is_set():
            request = group_request((number + call) % 10, request_id=f"{number}/{call}")
            answer = stub.Score(request, timeout=WAIT_S, wait_for_ready=True)
            assert (answer.request_id, len(answer.candidates)) == (request.request_id, 8)
            answers.append(answer)
            call += 1

    with patient(leaves.address, stays.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        failed: list[threading.ExceptHookArgs] = []
        hook, threading.excepthook = threading.excepthook, failed.append
        try:
            threads = [threading.Thread(target=load, args=(stub, number)) for number in range(8)]
            for thread in threads:
                thread.start()
            time.sleep(1.0)
            leaves.child.send_signal(signal.SIGTERM)
            assert leaves.child.wait(WAIT_S) == 0
            before = len(answers)
            deadline = time.monotonic() + WAIT_S
            while len(answers) < before + 20 and time.monotonic() < deadline:
                time.sleep(0.05)
            stop.set()
            for thread in threads:
                thread.join(WAIT_S)
        finally:
            stop.set()
            threading.excepthook = hook
    assert failed == []
    assert len(answers) >= before + 20
    log = leaves.end()
    assert log.splitlines()[-1].endswith("stopped")
    # It had its share, and what it had begun it answered: nothing was cancelled or cut off.
    assert "candidates in" in log
    assert "CANCELLED" not in log
    assert "Traceback" not in log


def test_draining_has_an_end(processes) -> None:
    """A call that would wait ten seconds more for others to batch with does not keep the server: it is cut off."""
    process = processes(0, "--drain-seconds", "0.5", "--max-delay-ms", "10000")
    process.until_ready()
    with grpc.insecure_channel(process.address) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        call = stub.Score.future(group_request(0), timeout=WAIT_S)
        time.sleep(0.5)
        process.child.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as refused:
            call.result()
        assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        assert process.child.wait(WAIT_S) == 0


def test_many_clients_get_each_their_own_answers() -> None:
    found = soak(seconds=3, clients=32, pictures=12)
    assert found["wrong"] == []
    assert found["calls"] == found["served"] >= 32
    assert found["mean_batch"] > 2
