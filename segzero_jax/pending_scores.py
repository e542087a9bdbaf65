"""Pending scores: calls that are sent, sent again if they fail, and collected in order."""

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import grpc

from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.reward_connection import RewardConnection, too_large
from segzero_jax.reward_messages import CandidateScore, ScoreRequest, ServerInfo, refusal, score_request, split

# How often a wait without answers polls, and the minimum pause before a call is sent again.
_TICK_S = 1.0
# A server that failed at one group this often, while the service answered others, will fail at it again.
_STRIKES = 5
# A server's message if a device has too little memory for a call.
_NO_MEMORY = "out of memory"


class Listener(Protocol):
    """Is told of the progress of a patient wait, see ``patience.Patience``."""

    def begin(self) -> None:
        """A wait begins."""

    def heard(self) -> None:
        """An answer came."""

    def silent(self, why: Callable[[], str]) -> None:
        """No answer came for another second; ``why`` asks for the servers' state. Raises to end the wait."""


class PendingScores:
    """Pending calls. Dropping the object does not cancel them; ``cancel`` does."""

    def __init__(
        self,
        connection: RewardConnection,
        servers: Sequence[ServerInfo],
        state: Callable[[Iterable[str]], str],
        groups: Sequence[ScoreRequest],
        masks: int,
    ) -> None:
        """Sends all groups; see ``RewardClient.score``.

        Args:
          servers: a group is split into as many calls as the most limited of them needs.
          state: returns the state of the servers, given how calls have failed.
        """
        self._connection, self._state = connection, state
        parts = [split(group, i < masks, servers) for i, group in enumerate(groups)]
        self._counts = [len(group) for group in parts]
        # From here on indexed by request.
        self._requests = [score_request(part, i < masks) for i, group in enumerate(parts) for part in group]
        self._calls: dict[int, Any] = {}
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._answers: dict[int, list[CandidateScore]] = {}
        self._failed: set[int] = set()  # Sent again at the next tick.
        self._reasons: dict[int, str] = {}  # Why the last call of each unanswered request failed.
        self._strikes: Counter[int] = Counter()
        self._heard = False  # Whether any answer has come: before that, the service is to blame, not a group.
        self._start = time.monotonic()
        for i, request in enumerate(self._requests):
            problem = too_large(request)
            if problem:
                self._answers[i] = refusal(request, problem)
            else:
                self._send(i)

    def done(self) -> bool:
        """Whether no call is pending any more."""
        return all(call.done() for call in self._calls.values())

    def cancel(self) -> None:
        """Cancels all calls that have not been answered."""
        for call in self._calls.values():
            call.cancel()

    def result(self, patience: Listener | None = None, drop: bool = False) -> list[list[CandidateScore]]:
        """Waits for all answers: per group, in order, one score per candidate.

        A group that the server refuses (a damaged image, a mask of another size) has the reason in every score; with
        patience, so does one at which it fails repeatedly while it answers others, or for which its device still has
        too little memory after the client's timeout.

        Args:
          patience: unanswered calls are sent again until this raises; without it, a failed call ends the wait.
          drop: with patience, a group that is still not answered after the client's timeout is given up, with the
            reason in every score, provided that another group was answered: a service that is away is waited for.

        Raises:
          RewardServiceAway: the service went away or took too long.
          RewardServerError: it does not agree with this client: version, token, an answer to something else, or one
            from another SAM 2 checkpoint, or in another dtype, than before.
        """
        if patience is not None:
            patience.begin()
        try:
            while len(self._answers) < len(self._requests):
                try:
                    i = self._ended.get(timeout=_TICK_S)
                except queue.Empty:
                    if patience is not None:
                        patience.silent(lambda: self._state(self._reasons.values()))
                    self._send_again()
                else:
                    late = time.monotonic() - self._start >= self._connection.timeout_s
                    self._collect(i, late, patience)
                    if drop and late and self._heard and len(self._answers) + len(self._failed) == len(self._requests):
                        self._give_up(self._failed)
        except RewardServerError:
            self.cancel()
            raise
        answers = (self._answers[i] for i in range(len(self._requests)))
        return [[score for _ in range(count) for score in next(answers)] for count in self._counts]

    def _send(self, i: int) -> None:
        self._calls[i] = self._connection.start_score(self._requests[i])
        self._calls[i].add_done_callback(lambda _: self._ended.put(i))

    def _send_again(self) -> None:
        if self._failed and not self._heard:
            self._start = time.monotonic()  # The service was away: every group's timeout restarts.
            self._connection.look_up()
        for i in self._failed:
            self._send(i)
        self._failed.clear()

    def _collect(self, i: int, late: bool, patience: Listener | None) -> None:
        """Takes the answer of a call that has ended, or notes that it failed. Without patience a failure is raised."""
        call = self._calls[i]
        try:
            self._answers[i] = self._connection.scores(self._requests[i], call)
        except RewardServiceAway as error:
            if patience is None or self._connection.is_lost(call):
                raise
            self._reasons[i] = str(error)
            self._failed.add(i)
            self._strikes[i] += self._heard and call.code() == grpc.StatusCode.INTERNAL
            # Another process may hold the memory, but not forever.
            no_memory = self._heard and late and _NO_MEMORY in (call.details() or "")
            if self._strikes[i] >= _STRIKES or no_memory:
                self._give_up([i])
        else:
            self._reasons.pop(i, None)
            self._heard = True
            if patience is not None:
                patience.heard()

    def _give_up(self, numbers: Iterable[int]) -> None:
        """Makes the reason of the failure the answer."""
        for i in tuple(numbers):
            self._answers[i] = refusal(self._requests[i], self._reasons.pop(i))
            self._failed.discard(i)
