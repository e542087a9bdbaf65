"""The client of the SAM 2 reward service: calls are sent at once, answers are collected later.

One call carries one image and all its candidates, or as many as a server takes at once. gRPC itself spreads calls over
the servers that serve, retries what they could not take and gives up at the deadline; a patient caller then sends the
call again.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType

from segzero_jax.pending_scores import PendingScores
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway, addresses
from segzero_jax.reward_connection import RewardConnection, too_large
from segzero_jax.reward_messages import ScoreRequest, Segmentation, ServerInfo, segment_request, segmentation_from
from segzero_jax.reward_probe import check_same_model, probe
from segzero_jax.types import Frame, ObjectPrompt

_POLL_S = 0.2
# Timeout of a health probe: long enough for a busy server, short enough to probe several.
_PROBE_S = 5.0
_INFO_S = 15.0
_PLAIN = Access()


class RewardClient:
    """A connection to one or several reward servers, made when first needed. Thread-safe; use as a context manager.

    Attributes:
      timeout_s: timeout of one call.
      servers: the infos of the servers that ``wait_until_serving`` found.
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
          timeout_s: timeout of one call, including all its retries.
          wait_for_ready: wait for an unreachable server until the deadline (it may be restarting); without it, calls
            fail after a few seconds of retries, which is right for a child process that cannot come back.
          access: certificates and token.
          if_late: what the user can do about a server that takes longer than ``timeout_s``.
        """
        self.timeout_s = timeout_s
        self._connection = RewardConnection(targets, access, timeout_s, wait_for_ready, if_late)
        self._addresses = addresses(targets)
        self._met = ""
        self.servers: list[ServerInfo] = []

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def checkpoint_sha256(self) -> str:
        """SHA-256, hexadecimal, of the SAM 2 weights whose scores this client accepts; empty until a server answers.

        Set by ``wait_until_serving`` or the first answer, and never changes.
        """
        return self._connection.model[0] if self._connection.model else ""

    @property
    def dtype(self) -> str:
        """Name of the dtype that scores are computed in; known when ``checkpoint_sha256`` is."""
        return self._connection.model[1] if self._connection.model else ""

    def close(self) -> None:
        """Closes the connection; pending calls are cancelled."""
        self._connection.close()

    def wait_until_serving(
        self, timeout_s: float, say: Callable[[str], None] | None = None, everyone_s: float = math.inf
    ) -> list[ServerInfo]:
        """Waits until every server has loaded its model; after a while one serving server is enough.

        Args:
          timeout_s: how long to wait at most.
          say: is told which servers this waits for, and which are missing in the end.
          everyone_s: after this long, one serving server is enough.

        Returns:
          The infos of the serving servers.

        Raises:
          RewardServiceAway: no server serves after ``timeout_s``.
          RewardServerError: a server speaks another version, refuses the token or has an unknown certificate; or the
            servers serve different models, or another one than before.
        """
        start, told = time.monotonic(), False
        infos: dict[str, ServerInfo] = {}
        while True:
            away = {}
            for address in self._addresses:
                if address not in infos:
                    try:
                        infos[address] = probe(address, self._connection.access, _PROBE_S)
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
            say(f"continuing without {'; '.join(away.values())}")
        served = [infos[address] for address in self._addresses if address in infos]
        self._connection.check_model(served[0].checkpoint_sha256, served[0].dtype)
        self._connection.look_up()
        self.servers = served
        return served

    def info(self, loaded: bool = False) -> ServerInfo:
        """The info of a reachable server; with ``loaded``, of a serving one. Raises RewardServerError."""
        for address in sorted(self._addresses, key=lambda one: one != self._met):  # the last one to answer first
            try:
                info = probe(address, self._connection.access, min(self.timeout_s, _INFO_S), loaded)
            except RewardServiceAway as error:
                last = error
            else:
                self._met = address
                return info
        raise last

    def state(self, failures: Iterable[str] = ()) -> str:
        """The state of each server, in one line; takes up to ten seconds per unreachable server.

        Args:
          failures: how calls ended. One of each kind is reported if a server serves: then health is not the reason.
        """
        states, serves = [], False
        for address in self._addresses:
            try:
                probe(address, self._connection.access, _PROBE_S)
                states.append(f"reward server {address}: serves")
                serves = True
            except RewardServerError as error:
                states.append(str(error))
        told = dict.fromkeys(failures) if serves else ()
        ends = [
            f"calls end with: {failure.removeprefix(f'reward server {self._connection.targets}: ')}" for failure in told
        ]
        return "; ".join([*states, *ends])

    def score(self, groups: Sequence[ScoreRequest], masks: int = 0) -> PendingScores:
        """Sends every group to be scored and returns at once.

        A group is one call, or several if it exceeds what the servers found by ``wait_until_serving`` accept.

        Args:
          groups: see ScoreRequest. A group over the message size limit is not sent; its scores report that.
          masks: for this many of the first groups, also return the candidates' masks.
        """
        self._connection.look_up()
        return PendingScores(self._connection, self.servers, self.state, groups, masks)

    def segment(
        self, image: bytes, frame: Frame, candidates: Sequence[tuple[ObjectPrompt, ...]], id: str = ""
    ) -> list[Segmentation]:
        """Masks for inference: one per candidate. Waits for the answer.

        Raises:
          RewardServerError: the service went away, took too long, or rejects the image.
        """
        request = segment_request(id, image, frame, candidates)
        problem = too_large(request)
        if problem:
            raise RewardServerError(f"request {id!r}: {problem}")
        return [segmentation_from(entry) for entry in self._connection.segment(request).candidates]
