"""The client of the SAM 2 reward service: calls leave at once, answers are collected later.

One call carries one image and all its candidates. gRPC itself spreads calls over several servers, retries while a
server is unavailable and gives up at the deadline; nothing here loops.
"""

import json
import re
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from reward_server import reward_pb2, reward_pb2_grpc
from segzero_jax.reward_messages import (
    CandidateScore,
    ScoreRequest,
    Segmentation,
    ServerInfo,
    info_from,
    score_from,
    score_request,
    segment_request,
    segmentation_from,
)
from segzero_jax.types import Frame, ObjectPrompt

_SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
_SERVING = health_pb2.HealthCheckResponse.SERVING
_INFO = reward_pb2.GetInfoRequest()
_POLL_S = 0.1
# A name, an IPv4 address or an IPv6 address in brackets, and a port.
_ADDRESS = re.compile(r"(?:[\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})")
_MESSAGE_BYTES = 32 * 2**20
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": _SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
_OPTIONS = [
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_send_message_length", _MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    # gRPC does not retry a call larger than this buffer, by default 256 KiB: less than one picture.
    ("grpc.per_rpc_retry_buffer_size", _MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # The servers are neighbours; a proxy meant for the outside would swallow even calls to localhost.
    ("grpc.enable_http_proxy", 0),
]


class RewardServerError(RuntimeError):
    """The reward service did not answer as agreed; the message is one line that names it and what to do."""


class PendingScores:
    """Calls on their way. Dropping it does not cancel them; ``cancel`` does."""

    def __init__(self, targets: str, timeout_s: float, groups: Sequence[ScoreRequest], calls: Sequence[Any]) -> None:
        self._targets = targets
        self._timeout_s = timeout_s
        self._groups = groups
        self._calls = calls

    def done(self) -> bool:
        """Whether ``result`` would return without waiting."""
        return all(call.done() for call in self._calls)

    def cancel(self) -> None:
        """Gives up what has not been answered."""
        for call in self._calls:
            call.cancel()

    def result(self) -> list[list[CandidateScore]]:
        """Waits for all answers: per group, in order, one score per candidate.

        A group that the server refuses (a damaged image, a mask of another size) has its reason in every score.

        Raises:
          RewardServerError: the service went away, took too long, or answered something else than was asked.
        """
        try:
            return [self._one(group, call) for group, call in zip(self._groups, self._calls, strict=True)]
        except RewardServerError:
            self.cancel()
            raise

    def _one(self, group: ScoreRequest, call: Any) -> list[CandidateScore]:
        try:
            response = call.result()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise _explained(self._targets, error, self._timeout_s) from None
            return [CandidateScore(None, 0, 0, 0.0, None, error.details())] * len(group.candidates)
        _check_answer(self._targets, group.id, len(group.candidates), response)
        return [score_from(entry) for entry in response.candidates]


class RewardClient:
    """A connection to one or several reward servers, made when first needed. Thread-safe; use as a context manager."""

    def __init__(self, targets: str, timeout_s: float, wait_for_ready: bool = True) -> None:
        """Does not connect yet.

        Args:
          targets: "host:port", or several separated by commas: calls go to them in turn.
          timeout_s: how long one call may take, with all its retries.
          wait_for_ready: an unreachable server is waited for until the deadline (it may be restarting); without it,
            calls fail after a few seconds of retries, which is right for a child process that cannot come back.

        Raises:
          RewardServerError: a target is not host:port or, where several are given, its name does not resolve.
        """
        self._targets = targets
        self._timeout_s = timeout_s
        self._wait_for_ready = wait_for_ready
        self._channel = grpc.insecure_channel(_grpc_target(targets), options=_OPTIONS)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel)

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; calls on their way are cancelled."""
        self._channel.close()

    def wait_until_serving(self, timeout_s: float) -> list[ServerInfo]:
        """Waits until every server has loaded its model; returns what each says of itself.

        Raises:
          RewardServerError: one is not serving after ``timeout_s``, or speaks another version.
        """
        deadline = time.monotonic() + timeout_s
        return [_wait_for(address, deadline, timeout_s) for address in self._targets.split(",")]

    def info(self) -> ServerInfo:
        """What the server that answers says of itself. Raises RewardServerError."""
        try:
            response = self._stub.GetInfo(_INFO, timeout=self._timeout_s, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise _explained(self._targets, error, self._timeout_s) from None
        return _checked_info(self._targets, response)

    def score(self, groups: Sequence[ScoreRequest], masks: bool = False) -> PendingScores:
        """Sends every group to be scored, one call each, and returns at once.

        Args:
          groups: see ScoreRequest.
          masks: return the candidates' masks too.

        Raises:
          RewardServerError: a request is larger than a message may be.
        """
        requests = [score_request(group, masks) for group in groups]
        for request in requests:
            _check_size(request.request_id, request.ByteSize())
        calls = [
            self._stub.Score.future(request, timeout=self._timeout_s, wait_for_ready=self._wait_for_ready)
            for request in requests
        ]
        return PendingScores(self._targets, self._timeout_s, tuple(groups), calls)

    def segment(
        self, image: bytes, frame: Frame, candidates: Sequence[tuple[ObjectPrompt, ...]], id: str = ""
    ) -> list[Segmentation]:
        """Masks for inference: one per candidate. Waits for the answer.

        Raises:
          RewardServerError: the service went away, took too long, or refuses the image.
        """
        request = segment_request(id, image, frame, candidates)
        _check_size(id, request.ByteSize())
        try:
            response = self._stub.Segment(request, timeout=self._timeout_s, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise _explained(self._targets, error, self._timeout_s) from None
        _check_answer(self._targets, id, len(candidates), response)
        return [segmentation_from(entry) for entry in response.candidates]


def _grpc_target(targets: str) -> str:
    """gRPC's name for one or several addresses: only a list of numeric ones can be spread over."""
    addresses = targets.split(",")
    for address in addresses:
        found = _ADDRESS.fullmatch(address)
        if not found or not 0 < int(found[1]) < 65536:
            raise RewardServerError(f"reward server {address!r}: expected host:port, such as localhost:50051")
    if len(addresses) == 1:
        return addresses[0]
    numeric = []
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            resolved = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            raise RewardServerError(f"reward server {address}: cannot resolve its name: {error}") from None
        numeric.append("{}:{}".format(*resolved[0][4]))
    return "ipv4:" + ",".join(numeric)


def _wait_for(address: str, deadline: float, timeout_s: float) -> ServerInfo:
    with grpc.insecure_channel(address, options=_OPTIONS) as channel:
        stub, health = reward_pb2_grpc.RewardServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service=_SERVICE)
        try:
            # The version first: a server of another one may well know no service of this name.
            _checked_info(address, stub.GetInfo(_INFO, timeout=_left(deadline), wait_for_ready=True))
            while health.Check(asked, timeout=_left(deadline), wait_for_ready=True).status != _SERVING:
                if time.monotonic() > deadline:
                    raise RewardServerError(
                        f"reward server {address}: still not serving after {timeout_s:g} s, "
                        "its model may be loading: wait longer or look at its log"
                    )
                time.sleep(_POLL_S)
            return _checked_info(address, stub.GetInfo(_INFO, timeout=_left(deadline), wait_for_ready=True))
        except grpc.RpcError as error:
            raise _explained(address, error, timeout_s) from None


def _left(deadline: float) -> float:
    """Seconds until the deadline; never so few that a healthy server could not answer."""
    return max(1.0, deadline - time.monotonic())


def _explained(targets: str, error: grpc.RpcError, timeout_s: float) -> RewardServerError:
    code, details = error.code(), " ".join((error.details() or "").split())
    name = f"reward server {targets}"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        spoken = _SERVICE.rpartition(".")[0]
        return RewardServerError(
            f"{name}: does not speak {spoken}, which this client does: run the same release on both sides"
        )
    if code == grpc.StatusCode.UNAVAILABLE:
        return RewardServerError(
            f"{name}: unreachable ({details}): is `python -m reward_server` running there? else set reward.server"
        )
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return RewardServerError(
            f"{name}: no answer within {timeout_s:g} s: is `python -m reward_server` running there? "
            "else raise reward.timeout_s"
        )
    return RewardServerError(f"{name}: {code.name}: {details}: look at its log")


def _check_answer(targets: str, id: str, candidates: int, response: Any) -> None:
    if (response.request_id, len(response.candidates)) != (id, candidates):
        raise RewardServerError(
            f"reward server {targets}: asked {candidates} candidates of {id!r}, "
            f"it answered {len(response.candidates)} of {response.request_id!r}: look at its log"
        )


def _check_size(id: str, size: int) -> None:
    if size > _MESSAGE_BYTES:
        raise RewardServerError(f"request {id!r}: {size} bytes, expected at most {_MESSAGE_BYTES}: shrink its image")


def _checked_info(address: str, response: reward_pb2.GetInfoResponse) -> ServerInfo:
    if response.api_version != reward_pb2.API_VERSION_CURRENT:
        raise RewardServerError(
            f"reward server {address}: speaks API version {response.api_version}, this client speaks "
            f"{reward_pb2.API_VERSION_CURRENT}: run the same release on both sides"
        )
    return info_from(address, response)
