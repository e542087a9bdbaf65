"""A reward server that needs no model: answers what the request says, as fast or as badly as a test wishes.

As a command, ``python tests/fake_reward_server.py PORT [DELAY_S]``, it is a process that a test can kill.
"""

import hashlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
AREA = 255
OPTIONS = (("grpc.max_receive_message_length", 2**25), ("grpc.so_reuseport", 0))


def digest(candidate: reward_pb2.Candidate) -> int:
    """A number from 0 to 255 that depends on every coordinate."""
    return hashlib.sha256(candidate.SerializeToString(deterministic=True)).digest()[0]


class Fake(reward_pb2_grpc.RewardServiceServicer):
    """Keeps what it was asked.

    Attributes:
      inside: a candidate's intersection, of a union of AREA pixels; by default a digest of its objects.
      before: runs at the start of each Score; it may wait, count or abort.
      change: may spoil the answer.
    """

    def __init__(self, version: int = reward_pb2.API_VERSION_CURRENT, checkpoint: str = "", dtype: str = "") -> None:
        self.version = version
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.seen: list[reward_pb2.ScoreRequest] = []
        self.inside = digest
        self.before: Callable[[reward_pb2.ScoreRequest, grpc.ServicerContext], None] = lambda request, context: None
        self.change: Callable[[reward_pb2.ScoreResponse], None] = lambda response: None

    def GetInfo(self, request: reward_pb2.GetInfoRequest, context: grpc.ServicerContext) -> reward_pb2.GetInfoResponse:
        limits = reward_pb2.Limits(image_bytes=5, candidates=7)
        return reward_pb2.GetInfoResponse(
            api_version=self.version, model="fake", checkpoint_sha256=self.checkpoint, dtype=self.dtype, limits=limits
        )

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        self.seen.append(request)
        self.before(request, context)
        response = reward_pb2.ScoreResponse(
            request_id=request.request_id,
            checkpoint_sha256=self.checkpoint,
            dtype=self.dtype,
            api_version=self.version,
        )
        for candidate in request.candidates:
            inside = self.inside(candidate)
            response.candidates.add(intersection=inside, union=AREA, iou=inside / AREA)
        self.change(response)
        return response

    def Segment(self, request: reward_pb2.SegmentRequest, context: grpc.ServicerContext) -> reward_pb2.SegmentResponse:
        response = reward_pb2.SegmentResponse(
            request_id=request.request_id, checkpoint_sha256=self.checkpoint, dtype=self.dtype
        )
        for _ in request.candidates:
            response.candidates.add(mask=reward_pb2.Rle(height=2, width=3, counts="06"), model_score=0.5)
        return response


@contextmanager
def serving(
    fake: Fake,
    status: int = SERVING,
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    options: Sequence[tuple[str, int]] = OPTIONS,
) -> Iterator[str]:
    """Serves on this machine; gives the address."""
    with running(fake, status, port, credentials, interceptors, options) as (address, _, _):
        yield address


@contextmanager
def running(
    fake: Fake,
    status: int = SERVING,
    port: int = 0,
    credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
    options: Sequence[tuple[str, int]] = OPTIONS,
) -> Iterator[tuple[str, grpc.Server, health.HealthServicer]]:
    """Like ``serving``, with the server and its health in the caller's hands."""
    server = grpc.server(ThreadPoolExecutor(16), interceptors=interceptors, options=options)
    reward_pb2_grpc.add_RewardServiceServicer_to_server(fake, server)
    healthy = health.HealthServicer()
    healthy.set(SERVICE, status)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    wanted = f"127.0.0.1:{port}"
    bound = server.add_secure_port(wanted, credentials) if credentials else server.add_insecure_port(wanted)
    server.start()
    try:
        yield f"127.0.0.1:{bound}", server, healthy
    finally:
        server.stop(None).wait()


def assert_take_turns(fakes: Sequence[Fake], ask: Callable[[], object]) -> None:
    """Each gets its share of the calls, once a client is connected to all: before, the first to be there takes more."""
    deadline, begin = time.monotonic() + 30, [len(fake.seen) for fake in fakes]
    while any(len(fake.seen) == count for fake, count in zip(fakes, begin, strict=True)):
        assert time.monotonic() < deadline, "one got no call"
        ask()
    before = [len(fake.seen) for fake in fakes]
    for _ in range(5 * len(fakes)):
        ask()
    taken = [len(fake.seen) - count for fake, count in zip(fakes, before, strict=True)]
    assert sum(taken) == 5 * len(fakes)
    assert min(taken) >= 3


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def main() -> None:
    port, delay_s = int(sys.argv[1]), float(sys.argv[2] if len(sys.argv) > 2 else 0)
    fake = Fake()

    def arrived(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        os.write(1, b"call\n")  # one piece: several threads come here
        time.sleep(delay_s)

    fake.before = arrived
    with serving(fake, port=port) as address:
        print(address, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
