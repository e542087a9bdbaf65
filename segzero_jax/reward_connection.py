"""Calls to the reward service: sending them, explaining their failures, and checking their answers."""

import threading
from typing import Any

import grpc

from reward_server import reward_pb2, reward_pb2_grpc
from segzero_jax.reward_channel import MESSAGE_BYTES, Access, RewardServerError, SpreadChannel, explained, no_answer
from segzero_jax.reward_messages import CandidateScore, refusal, score_from
from segzero_jax.reward_probe import check_version


class RewardConnection:
    """A channel to one or several servers that has a deadline for each call. Thread-safe.

    It only accepts answers from one SAM 2 checkpoint in one dtype: the first that it hears of.

    Attributes:
      targets: "host:port", or several separated by commas.
      access: certificates and token.
      timeout_s: timeout of one call, including all its retries.
      model: SHA-256 of the SAM 2 weights, hexadecimal, and the dtype they compute in; None until a server has answered.
    """

    def __init__(self, targets: str, access: Access, timeout_s: float, wait_for_ready: bool, if_late: str) -> None:
        """Does not connect yet. Raises RewardServerError as ``SpreadChannel`` does.

        Args:
          wait_for_ready: whether a call to unreachable servers waits for them until its deadline.
          if_late: what the user can do about a server that takes longer than ``timeout_s``.
        """
        self.targets, self.access, self.timeout_s = targets, access, timeout_s
        self._wait_for_ready, self._if_late = wait_for_ready, if_late
        self._channel = SpreadChannel(targets, access)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel.now)
        self.model: tuple[str, str] | None = None
        self._pinning = threading.Lock()

    def close(self) -> None:
        """Closes the connection; pending calls are cancelled."""
        self._channel.close()

    def look_up(self) -> None:
        """Sends further calls to the addresses that the names of several servers resolve to now."""
        if self._channel.look_up():
            self._stub = reward_pb2_grpc.RewardServiceStub(self._channel.now)

    def start_score(self, request: reward_pb2.ScoreRequest) -> Any:
        """Sends a request and returns the call, a ``grpc.Future``, at once."""
        return self._stub.Score.future(request, timeout=self.timeout_s, wait_for_ready=self._wait_for_ready)

    def scores(self, request: reward_pb2.ScoreRequest, call: Any) -> list[CandidateScore]:
        """The answer to a call, one score per candidate: if the server refuses the request, each has the reason.

        Raises:
          RewardServiceAway: the call failed.
          RewardServerError: the answer is not to the request, or not from the same model as earlier ones.
        """
        try:
            response = call.result()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise self._explained(error) from None
            return refusal(request, error.details())
        # The first version did not report it.
        check_version(self.targets, response.api_version or 1)
        self._check_answer(request, response)
        return [score_from(entry, response.target_area) for entry in response.candidates]

    def segment(self, request: reward_pb2.SegmentRequest) -> reward_pb2.SegmentResponse:
        """Waits for the answer. Raises RewardServerError as ``scores`` does, and if the image is refused."""
        try:
            response = self._stub.Segment(request, timeout=self.timeout_s, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise self._explained(error) from None
        self._check_answer(request, response)
        return response

    def is_lost(self, call: Any) -> bool:
        """Whether a failed call means that the server cannot come back."""
        return not self._wait_for_ready and call.code() == grpc.StatusCode.UNAVAILABLE

    def check_model(self, checkpoint: str, dtype: str) -> None:
        """Raises RewardServerError for other weights or another dtype than before: a run must not mix their scores."""
        with self._pinning:
            if self.model is None:
                self.model = checkpoint, dtype
        if (checkpoint, dtype) != self.model:
            found, before = (
                f"{_short(sha256)} in {kind or 'no stated dtype'}" for sha256, kind in ((checkpoint, dtype), self.model)
            )
            raise RewardServerError(
                f"reward server {self.targets}: answered with SAM 2 checkpoint {found}, the scores before "
                f"came from {before}: serve that one again, or start a new run"
            )

    def _explained(self, error: grpc.RpcError) -> RewardServerError:
        return explained(self.targets, error, no_answer(self.timeout_s, self._if_late), self.access)

    def _check_answer(self, request: Any, response: Any) -> None:
        asked, answered = len(request.candidates), len(response.candidates)
        if (response.request_id, answered) != (request.request_id, asked):
            raise RewardServerError(
                f"reward server {self.targets}: asked {asked} candidates of {request.request_id!r}, "
                f"it answered {answered} of {response.request_id!r}: look at its log"
            )
        self.check_model(response.checkpoint_sha256, response.dtype)


def too_large(request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest) -> str:
    """Why a request cannot be sent; empty if it can."""
    size = request.ByteSize()
    return f"{size} bytes, expected at most {MESSAGE_BYTES}: shrink its image" if size > MESSAGE_BYTES else ""


def _short(sha256: str) -> str:
    return sha256[:12] or "(unnamed)"
