"""The client of the SAM 2 reward service: calls leave at once, answers are collected later.

One call carries one image and all its candidates, or as many as a server takes at once. gRPC itself spreads calls over
the servers that serve, retries what they could not take and gives up at the deadline; whoever has patience then asks
again.
"""

import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Protocol

import grpc

from reward_server import reward_pb2, reward_pb2_grpc
from segzero_jax.reward_channel import (
    MESSAGE_BYTES,
    Access,
    RewardServerError,
    RewardServiceAway,
    SpreadChannel,
    addresses,
    explained,
    no_answer,
)
from segzero_jax.reward_messages import (
    CandidateScore,
    ScoreRequest,
    Segmentation,
    ServerInfo,
    refusal,
    score_from,
    score_request,
    segment_request,
    segmentation_from,
    split,
)
from segzero_jax.reward_probe import check_same_model, check_version, probe
from segzero_jax.types import Frame, ObjectPrompt

_POLL_S = 0.2
# For the question how a server is: long enough for a busy one, short enough to ask several.
_PROBE_S = 5.0
_INFO_S = 15.0
# How often a wait without answers looks around, and the least pause before a call is sent again.
_TICK_S = 1.0
# A server that failed at one group so often, while the service answered others, will fail at it again.
_STRIKES = 5
# How a server says that a device has too little memory for a call.
_NO_MEMORY = "out of memory"
_PLAIN = Access()


class Listener(Protocol):
    """Whoever waits patiently, see ``patience.Patience``."""

    def begin(self) -> None:
        """A wait begins."""

    def heard(self) -> None:
        """An answer came."""

    def silent(self, why: Callable[[], str]) -> None:
        """No answer came for another second; ``why`` asks the servers how they are. Raises to end the wait."""


class PendingScores:
    """Calls on their way. Dropping it does not cancel them; ``cancel`` does."""

    def __init__(self, client: "RewardClient", groups: Sequence[ScoreRequest], masks: int) -> None:
        self._client = client
        parts = [split(group, i < masks, client.servers) for i, group in enumerate(groups)]
        self._counts = [len(group) for group in parts]
        self._requests = [score_request(part, i < masks) for i, group in enumerate(parts) for part in group]
        self._start = time.monotonic()
        self._calls: dict[int, Any] = {}
        self._answers: dict[int, list[CandidateScore]] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        for i, request in enumerate(self._requests):
            problem = _too_large(request)
            if problem:
                self._answers[i] = refusal(request, problem)
            else:
                self._send(i)

    def done(self) -> bool:
        """Whether no call is on its way any more."""
        return all(call.done() for call in self._calls.values())

    def cancel(self) -> None:
        """Gives up what has not been answered."""
        for call in self._calls.values():
            call.cancel()

    def result(self, patience: Listener | None = None, drop: bool = False) -> list[list[CandidateScore]]:
        """Waits for all answers: per group, in order, one score per candidate.

        A group that the server refuses (a damaged image, a mask of another size) has its reason in every score; so has,
        with patience, one at which it fails time and again while it answers others, or for which its device still has
        too little memory after the client's timeout.

        Args:
          patience: what the service did not answer is asked again, for as long as this does not raise; without it a
            call that has failed is the end.
          drop: with patience, a group that is still not answered after the client's timeout is given up, with the
            reason in every score, provided that another group was answered: a service that is away is waited for.

        Raises:
          RewardServiceAway: the service went away or took too long.
          RewardServerError: it does not agree with this client: version, token, an answer to something else, or one
            by another SAM 2 checkpoint, or in another dtype, than before.
        """
        failed: set[int] = set()  # To be sent again.
        reasons: dict[int, str] = {}  # Why the groups failed last that are still asked for.
        strikes: Counter[int] = Counter()
        heard = False
        if patience is not None:
            patience.begin()
        try:
            while len(self._answers) < len(self._requests):
                try:
                    i = self._ended.get(timeout=_TICK_S)
                except queue.Empty:
                    if patience is not None:
                        patience.silent(lambda: self._client.state(reasons.values()))
                    if failed and not heard:
                        self._start = time.monotonic()  # The service was away: the time of each group begins anew.
                        self._client.look_up()
                    for i in failed:
                        self._send(i)
                    failed.clear()
                    continue
                late = time.monotonic() - self._start >= self._client.timeout_s
                try:
                    self._answers[i] = self._answer(i)
                except RewardServiceAway as error:
                    if patience is None or self._client._is_lost(self._calls[i]):
                        raise
                    reasons[i] = str(error)
                    # Before any answer the service is to blame, not the group.
                    strikes[i] += heard and self._calls[i].code() == grpc.StatusCode.INTERNAL
                    # Somebody else may hold the memory, but not for ever.
                    in_vain = heard and late and _NO_MEMORY in (self._calls[i].details() or "")
                    if strikes[i] >= _STRIKES or in_vain:
                        self._answers[i] = refusal(self._requests[i], reasons.pop(i))
                    else:
                        failed.add(i)
                else:
                    reasons.pop(i, None)
                    heard = True
                    if patience is not None:
                        patience.heard()
                if drop and heard and late and len(self._answers) + len(failed) == len(self._requests):
                    self._answers |= {i: refusal(self._requests[i], reasons[i]) for i in failed}
        except RewardServerError:
            self.cancel()
            raise
        answers = (self._answers[i] for i in range(len(self._requests)))
        return [[score for _ in range(count) for score in next(answers)] for count in self._counts]

    def _send(self, i: int) -> None:
        self._calls[i] = self._client._call(self._requests[i])
        self._calls[i].add_done_callback(lambda _: self._ended.put(i))

    def _answer(self, i: int) -> list[CandidateScore]:
        request = self._requests[i]
        try:
            response = self._calls[i].result()
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.INVALID_ARGUMENT:
                raise self._client._explained(error) from None
            return refusal(request, error.details())
        # The first version did not say.
        check_version(self._client._targets, response.api_version or 1)
        self._client._check_answer(request, response)
        return [score_from(entry, response.target_area) for entry in response.candidates]


class RewardClient:
    """A connection to one or several reward servers, made when first needed. Thread-safe; use as a context manager.

    Attributes:
      timeout_s: how long one call may take.
      servers: what those say of themselves that ``wait_until_serving`` found.
    """

    def __init__(
        self,
        targets: str,
        timeout_s: float,
        wait_for_ready: bool = True,
        access: Access = _PLAIN,
        if_late: str = "raise reward.timeout_s",
    ) -> None:
        """Does not connect yet. Raises RewardServerError as ``SpreadChannel`` does.

        Args:
          targets: "host:port", or several separated by commas: calls go in turn to those that serve.
          timeout_s: how long one call may take, with all its retries.
          wait_for_ready: an unreachable server is waited for until the deadline (it may be restarting); without it,
            calls fail after a few seconds of retries, which is right for a child process that cannot come back.
          access: certificates and token.
          if_late: what the user can do about a server that takes longer than ``timeout_s``.
        """
        self.timeout_s = timeout_s
        self._targets = targets
        self._addresses = addresses(targets)
        self._wait_for_ready = wait_for_ready
        self._access = access
        self._if_late = if_late
        self._channel = SpreadChannel(targets, access)
        self._stub = reward_pb2_grpc.RewardServiceStub(self._channel.now)
        self._model: tuple[str, str] | None = None
        self._met = ""
        self.servers: list[ServerInfo] = []
        self._pinning = threading.Lock()

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def checkpoint_sha256(self) -> str:
        """Whose scores this client takes: SHA-256 of the SAM 2 weights, hexadecimal; empty until one has answered.

        It is known after ``wait_until_serving`` or the first answer, and never changes.
        """
        return self._model[0] if self._model else ""

    @property
    def dtype(self) -> str:
        """What those scores are computed in, by its name; known when ``checkpoint_sha256`` is."""
        return self._model[1] if self._model else ""

    def close(self) -> None:
        """Ends the connection; calls on their way are cancelled."""
        self._channel.close()

    def look_up(self) -> None:
        """Further calls go to what the names of several servers stand for now."""
        if self._channel.look_up():
            self._stub = reward_pb2_grpc.RewardServiceStub(self._channel.now)

    def wait_until_serving(
        self, timeout_s: float, say: Callable[[str], None] | None = None, everyone_s: float = math.inf
    ) -> list[ServerInfo]:
        """Waits until every server has loaded its model; after a while one that serves is enough.

        Args:
          timeout_s: patience.
          say: is told whom this waits for, and who is missing in the end.
          everyone_s: after so long one that serves is enough.

        Returns:
          What those that serve say of themselves.

        Raises:
          RewardServiceAway: none serves after ``timeout_s``.
          RewardServerError: one speaks another version, refuses the token or has an unknown certificate; or they serve
            different models, or another one than before.
        """
        start, told = time.monotonic(), False
        infos: dict[str, ServerInfo] = {}
        while True:
            away = {}
            for address in self._addresses:
                if address not in infos:
                    try:
                        infos[address] = probe(address, self._access, _PROBE_S)
                    except RewardServiceAway as error:
                        away[address] = str(error)
            check_same_model(infos)
            waited_s = time.monotonic() - start
            if not away or waited_s >= timeout_s or (infos and waited_s >= everyone_s):
                break
            if say is not None and not told and waited_s >= _PROBE_S:
                told = True
                say(f"waiting for {'; '.join(away.values())}")
            time.sleep(_POLL_S)
        if not infos:
            raise RewardServiceAway(f"{'; '.join(away.values())} (waited {timeout_s:g} s)")
        if away and say is not None:
            say(f"going on without {'; '.join(away.values())}")
        served = [infos[address] for address in self._addresses if address in infos]
        self._check_model(served[0].checkpoint_sha256, served[0].dtype)
        self.look_up()
        self.servers = served
        return served

    def info(self, loaded: bool = False) -> ServerInfo:
        """What a server that is there says of itself; with ``loaded``, one that serves. Raises RewardServerError."""
        for address in sorted(self._addresses, key=lambda one: one != self._met):  # the last one to answer first
            try:
                info = probe(address, self._access, min(self.timeout_s, _INFO_S), loaded)
            except RewardServiceAway as error:
                last = error
            else:
                self._met = address
                return info
        raise last

    def state(self, failures: Iterable[str] = ()) -> str:
        """How each server is, in one line; takes up to ten seconds for each that is away.

        Args:
          failures: how calls ended. One of each kind is told where a server serves: its health is then not the reason.
        """
        states, serves = [], False
        for address in self._addresses:
            try:
                probe(address, self._access, _PROBE_S)
                states.append(f"reward server {address}: serves")
                serves = True
            except RewardServerError as error:
                states.append(str(error))
        told = dict.fromkeys(failures) if serves else ()
        ends = [f"calls end with: {failure.removeprefix(f'reward server {self._targets}: ')}" for failure in told]
        return "; ".join([*states, *ends])

    def score(self, groups: Sequence[ScoreRequest], masks: int = 0) -> PendingScores:
        """Sends every group to be scored and returns at once.

        Each is one call, or several where it is more than the servers take that ``wait_until_serving`` found.

        Args:
          groups: see ScoreRequest. One that is larger than a message may be is not sent; its scores say so.
          masks: so many of the first groups bring their candidates' masks back too.
        """
        self.look_up()
        return PendingScores(self, groups, masks)

    def segment(
        self, image: bytes, frame: Frame, candidates: Sequence[tuple[ObjectPrompt, ...]], id: str = ""
    ) -> list[Segmentation]:
        """Masks for inference: one per candidate. Waits for the answer.

        Raises:
          RewardServerError: the service went away, took too long, or refuses the image.
        """
        request = segment_request(id, image, frame, candidates)
        problem = _too_large(request)
        if problem:
            raise RewardServerError(f"request {id!r}: {problem}")
        try:
            response = self._stub.Segment(request, timeout=self.timeout_s, wait_for_ready=self._wait_for_ready)
        except grpc.RpcError as error:
            raise self._explained(error) from None
        self._check_answer(request, response)
        return [segmentation_from(entry) for entry in response.candidates]

    def _call(self, request: reward_pb2.ScoreRequest) -> Any:
        return self._stub.Score.future(request, timeout=self.timeout_s, wait_for_ready=self._wait_for_ready)

    def _is_lost(self, call: Any) -> bool:
        """Whether a failed call says that the server cannot come back."""
        return not self._wait_for_ready and call.code() == grpc.StatusCode.UNAVAILABLE

    def _explained(self, error: grpc.RpcError) -> RewardServerError:
        return explained(self._targets, error, no_answer(self.timeout_s, self._if_late), self._access)

    def _check_answer(self, request: Any, response: Any) -> None:
        asked, answered = len(request.candidates), len(response.candidates)
        if (response.request_id, answered) != (request.request_id, asked):
            raise RewardServerError(
                f"reward server {self._targets}: asked {asked} candidates of {request.request_id!r}, "
                f"it answered {answered} of {response.request_id!r}: look at its log"
            )
        self._check_model(response.checkpoint_sha256, response.dtype)

    def _check_model(self, checkpoint: str, dtype: str) -> None:
        """Scores of different weights or dtypes must not meet in one run. Raises RewardServerError."""
        with self._pinning:
            if self._model is None:
                self._model = checkpoint, dtype
        if (checkpoint, dtype) != self._model:
            found, before = (
                f"{_short(sha256)} in {kind or 'no stated dtype'}"
                for sha256, kind in ((checkpoint, dtype), self._model)
            )
            raise RewardServerError(
                f"reward server {self._targets}: answered with SAM 2 checkpoint {found}, the scores before "
                f"came from {before}: serve that one again, or start a new run"
            )


def _too_large(request: reward_pb2.ScoreRequest | reward_pb2.SegmentRequest) -> str:
    size = request.ByteSize()
    return f"{size} bytes, expected at most {MESSAGE_BYTES}: shrink its image" if size > MESSAGE_BYTES else ""


def _short(sha256: str) -> str:
    return sha256[:12] or "(unnamed)"
