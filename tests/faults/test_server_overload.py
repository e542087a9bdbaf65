"""More work than the device does: refused with a hint, dropped when late or unwanted, and health stays on the line."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from sam_calls import group_request, serving

from reward_server import reward_pb2, reward_pb2_grpc, validation
from reward_server.segmenter import Embedding, Segmenter
from reward_server.server import SERVICE_NAME, RewardServer, Settings

SMALL = Settings(max_batch=1, max_delay_s=0, max_queue=3)
WAIT_S = 60


class Gate:
    """Holds the device at its first encoding until it is opened, and notes how many pictures were encoded."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.encoded: list[int] = []
        self._embed = segmenter.embed

    def embed(self, images: list[np.ndarray]) -> list[Embedding]:
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        self.encoded.append(len(images))
        return self._embed(images)


@pytest.fixture
def held(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[RewardServer, reward_pb2_grpc.RewardServiceStub, Gate, grpc.Future]]:
    """A server, a small one unless a test has settings of its own, whose device is held by a first call."""
    segmenter = Segmenter.load("toy", "cpu")
    with serving(getattr(request, "param", SMALL), [segmenter]) as (server, stub):
        gate = Gate(segmenter)
        segmenter.embed = gate.embed
        first = stub.Score.future(group_request(0, request_id="first"), timeout=WAIT_S)
        assert gate.entered.wait(WAIT_S)
        yield server, stub, gate, first
        gate.opened.set()


def depth(server: RewardServer) -> int:
    return int(server.metrics.registry.get_sample_value("segzero_reward_queue_depth"))


def until(condition: object, what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def test_a_full_queue_pushes_back_and_health_still_answers(held: tuple) -> None:
    server, stub, gate, first = held
    waiting = [stub.Score.future(group_request(i, request_id=str(i)), timeout=WAIT_S) for i in (1, 2, 3)]
    until(lambda: depth(server) == 3, "three calls wait")
    for _ in range(50):
        with pytest.raises(grpc.RpcError) as refused:
            stub.Score(group_request(4), timeout=WAIT_S)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == "3 requests are waiting, the queue is full"
    trailing = dict(refused.value.trailing_metadata())
    pushback_ms = int(trailing["grpc-retry-pushback-ms"])
    assert 50 <= pushback_ms <= 5000
    (detail,) = rpc_status.from_call(refused.value).details
    hint = error_details_pb2.RetryInfo()
    assert detail.Unpack(hint)
    assert hint.retry_delay.ToMilliseconds() == pushback_ms
    with grpc.insecure_channel(server.address) as channel:
        asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=WAIT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    gate.opened.set()
    assert [call.result().request_id for call in (first, *waiting)] == ["first", "1", "2", "3"]


@pytest.mark.parametrize("held", [replace(SMALL, max_queue=40)], indirect=True)
def test_each_that_may_wait_has_its_place(held: tuple) -> None:
    """However many may: who finds no thread is neither counted nor refused."""
    server, stub, _, _ = held
    asked = group_request(1, 0)
    calls = [stub.Score.future(asked, timeout=WAIT_S) for _ in range(40)]
    until(lambda: depth(server) == 40, "all wait")
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(asked, timeout=WAIT_S)
    assert refused.value.details() == "40 requests are waiting, the queue is full"
    for call in calls:
        call.cancel()


def test_calls_whose_picture_is_being_decoded_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst would otherwise take every thread, and nobody would be left to refuse or to answer for health."""
    decoding, decode = threading.Event(), validation.decode_image

    def slow(data: bytes) -> np.ndarray:
        assert decoding.wait(WAIT_S)
        return decode(data)

    monkeypatch.setattr(validation, "decode_image", slow)
    with serving(SMALL) as (server, stub), grpc.insecure_channel(server.address) as channel:
        calls = [stub.Score.future(group_request(i), timeout=WAIT_S) for i in range(100)]
        until(lambda: sum(call.done() for call in calls) == 97, "all but three are refused")
        asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
        assert health_pb2_grpc.HealthStub(channel).Check(asked, timeout=WAIT_S).status == 1
        assert depth(server) == 3
        decoding.set()
        codes = [call.code() for call in calls]
        assert codes.count(grpc.StatusCode.OK) == 3
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 97


def test_grpcs_own_retries_obey_the_hint(held: tuple) -> None:
    server, stub, gate, first = held
    waiting = [stub.Score.future(group_request(i), timeout=WAIT_S) for i in (1, 2, 3)]
    until(lambda: depth(server) == 3, "three calls wait")
    policy = {
        "maxAttempts": 5,
        "initialBackoff": "50s",
        "maxBackoff": "50s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
    }
    config = {"methodConfig": [{"name": [{"service": SERVICE_NAME}], "retryPolicy": policy}]}
    options = [("grpc.service_config", json.dumps(config)), ("grpc.per_rpc_retry_buffer_size", 2**25)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        late = reward_pb2_grpc.RewardServiceStub(channel).Score.future(group_request(5), timeout=40)
        refused = 'segzero_reward_requests_total{code="RESOURCE_EXHAUSTED",method="Score"}'
        name, labels = "segzero_reward_requests_total", {"code": "RESOURCE_EXHAUSTED", "method": "Score"}
        registry = server.metrics.registry
        until(lambda: registry.get_sample_value(name, labels), refused)
        gate.opened.set()
        # Its own backoff would pass the deadline: only the server's hint brings it back in time.
        assert len(late.result().candidates) == 8
    for call in (first, *waiting):
        call.result()


def test_calls_that_are_late_or_cancelled_never_reach_the_device(held: tuple) -> None:
    server, stub, gate, first = held
    late = stub.Score.future(group_request(1), timeout=0.3)
    cancelled = stub.Score.future(group_request(2), timeout=WAIT_S)
    good = stub.Score.future(group_request(3), timeout=WAIT_S)
    until(lambda: depth(server) == 3, "three calls wait")
    cancelled.cancel()
    with pytest.raises(grpc.RpcError) as refused:
        late.result()
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    registry, name = server.metrics.registry, "segzero_reward_requests_total"
    for code in ("DEADLINE_EXCEEDED", "CANCELLED"):
        labels = {"code": code, "method": "Score"}
        until(lambda labels=labels: registry.get_sample_value(name, labels) == 1, f"{code} is counted")
    gate.opened.set()
    assert len(first.result().candidates) == len(good.result().candidates) == 8
    assert gate.encoded == [1, 1]


def test_room_is_free_again_for_who_comes_after_them(held: tuple) -> None:
    server, stub, gate, _ = held
    gone = [stub.Score.future(group_request(i), timeout=WAIT_S) for i in (1, 2, 3)]
    until(lambda: depth(server) == 3, "three calls wait")
    for call in gone:
        call.cancel()
    registry, name = server.metrics.registry, "segzero_reward_requests_total"
    labels = {"code": "CANCELLED", "method": "Score"}
    until(lambda: (registry.get_sample_value(name, labels) or 0) == 3, "all are counted")
    calls = [stub.Score.future(group_request(i), timeout=WAIT_S) for i in (1, 2, 3)]
    until(lambda: depth(server) == 3, "three calls wait")
    for call in calls:
        call.cancel()
    until(lambda: (registry.get_sample_value(name, labels) or 0) == 6, "all are counted")
    after = stub.Score.future(group_request(6), timeout=WAIT_S)
    until(lambda: depth(server) == 1, "the cancelled ones are gone")
    gate.opened.set()
    assert len(after.result().candidates) == 8
    assert gate.encoded == [1, 1]


def test_a_fault_of_the_server_is_told_without_its_details(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (_, stub):

        def broken(*_: object) -> object:
            raise ZeroDivisionError("a secret path")

        monkeypatch.setattr("reward_server.service.job_from", broken)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Score(group_request(0))
        assert refused.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in refused.value.details()
        monkeypatch.undo()
        assert isinstance(stub.Score(group_request(0)), reward_pb2.ScoreResponse)
