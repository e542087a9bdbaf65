"""What a run keeps of itself: the state after the last finished step, saved when it is due and when the run must end.

A save that fails (a full disk, a bucket out of reach) is said and counted; training goes on, and the next save tries
again.
"""

from collections.abc import Callable
from typing import Any

from segzero_jax.checkpoint import Checkpoints, SaveError
from segzero_jax.config import Config
from segzero_jax.grpo import TrainState
from segzero_jax.identity import Identity


class Keeper:
    """Holds the last finished step, the only one that a run is resumed from.

    Attributes:
      failed: saves that have failed since this run started.
    """

    def __init__(
        self, checkpoints: Checkpoints, config: Config, identity: Identity, say: Callable[[str], None]
    ) -> None:
        """Nothing is finished yet.

        Args:
          checkpoints: where saves go.
          config, identity: saved with every step.
          say: says a line to whoever watches.
        """
        self.failed = 0
        self._checkpoints = checkpoints
        self._config = config
        self._identity = identity
        self._say = say
        self._finished: tuple[int, TrainState, dict[str, Any]] | None = None
        self._problem = ""

    def finished(self, step: int, state: TrainState, data: dict[str, Any]) -> None:
        """Notes what the next save writes.

        Args:
          step: updates done.
          state: after them; may be donated once the next save has returned or the next step is in its update.
          data: position of the data iterator behind this step's batch.
        """
        self._finished = step, state, data

    def save(self) -> None:
        """Begins to save the last finished step; writing goes on beside the training. A failure is said, not raised."""
        assert self._finished is not None, "a step has to be finished first"
        self._attempt(self._checkpoints.wait)
        step, state, data = self._finished
        self._attempt(lambda: self._checkpoints.save(step, state, data, self._config, self._identity))

    def keep(self) -> bool:
        """Saves the last finished step, unless that is done; returns once it is on the disk, False if it is not."""
        self.save()
        self._attempt(self._checkpoints.wait)
        assert self._finished is not None
        return self._checkpoints.latest == self._finished[0]

    def keep_or_fail(self) -> None:
        """Like ``keep``, for the end of a run. Raises SaveError: the last finished step is lost."""
        if not self.keep():
            newest = self._checkpoints.latest
            left = "there is no checkpoint" if newest is None else f"the newest checkpoint is of step {newest}"
            raise SaveError(f"the last finished step is not saved: {self._problem}; {left}")

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except SaveError as error:
            self.failed += 1
            self._problem = str(error)
            self._say(f"checkpoint not written: {error}; training goes on, the next save tries again")
