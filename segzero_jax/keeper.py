"""What a run keeps of itself: the state after the last finished step, saved when it is due and when the run must end.

A save that fails (a full disk, a bucket out of reach) is said and counted; training goes on, and the next save tries
again.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from segzero_jax.checkpoint import Checkpoints, SaveError
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity
from segzero_jax.pods import ALONE, Pod


class Keeper:
    """Holds the last finished step, the only one that a run is resumed from. All hosts of a run save together.

    Attributes:
      failed: saves that have failed since this run started.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        config: Config,
        identity: Identity,
        say: Callable[[str], None],
        pod: Pod = ALONE,
        lines: Callable[[Collection[int]], Mapping[str, Any]] = lambda kept: {},
    ) -> None:
        """Nothing is finished yet.

        Args:
          checkpoints: where saves go.
          config, identity: saved with every step.
          say: says a line to whoever watches.
          pod: the hosts that save together; each knows only why its own part was not written.
          lines: what the run has written last, and of steps that have checkpoints; saved with every step.
        """
        self.failed = 0
        self._checkpoints = checkpoints
        self._config = config
        self._identity = identity
        self._say = say
        self._pod = pod
        self._lines = lines
        self._finished: tuple[int, TrainState, dict[str, Any]] | None = None
        self._problem = ""

    def finished(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Notes what the next save writes.

        Args:
          step: steps done.
          state: after them; may be donated once the next save has returned or the next step is in its update.
          data: position of the data iterator behind this step's batch.
        """
        self._finished = step, state, data

    def save(self) -> bool:
        """Begins to save the last finished step; writing goes on beside the training. A failure is said, not raised.

        Returns:
          Whether all hosts have begun.
        """
        assert self._finished is not None, "a step has to be finished first"
        self._attempt(self._checkpoints.wait)
        step, state, data = self._finished
        return self._attempt(
            lambda: self._checkpoints.save(
                step, state, data, self._config, self._identity, self._lines(self._checkpoints.steps)
            )
        )

    def keep(self) -> bool:
        """Saves the last finished step, unless that is done; returns once it is on the disk, False if it is not."""
        begun = self.save()
        return self._attempt(self._checkpoints.wait) and begun

    def keep_or_fail(self) -> None:
        """Like ``keep``, for the end of a run. Raises SaveError: the last finished step is lost."""
        if not self.keep():
            newest = self._checkpoints.latest
            left = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
            raise SaveError(f"the last finished step is not saved: {self._problem}; {left}")

    def _attempt(self, act: Callable[[], None]) -> bool:
        """Whether it went well on all hosts; of one that it did not, all count and say the failure."""
        problem = ""
        try:
            act()
        except SaveError as error:
            problem = str(error)
        said = self._pod.exchange("a save", problem)
        # Most hosts have but waited, and say the same.
        hosts = {said[host]: self._pod.host(host) for host in reversed(range(len(said))) if said[host]}
        if hosts:
            told = [text if len(said) == 1 else f"{host}: {text}" for text, host in hosts.items()]
            self.failed += 1
            self._problem = "; ".join(told)
            self._say(f"checkpoint not written: {self._problem}; training goes on, the next save tries again")
        return not hosts
