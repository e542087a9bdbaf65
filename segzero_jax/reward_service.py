"""The reward service that ``reward.server`` means: none, a local one that lives as long as the run, or servers afar."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import jax

from segzero_jax.config import Config
from segzero_jax.local_server import local_server
from segzero_jax.reward_channel import Access
from segzero_jax.reward_client import RewardClient

_START_PATIENCE_S = 300.0


@contextlib.contextmanager
def reward_service(config: Config, access: Access, run_dir: Path) -> Iterator[RewardClient | None]:
    """A client of the reward server that ``reward.server`` means, None for "none"; a local one is stopped after it."""
    reward = config.reward
    with contextlib.ExitStack() as stack:
        if reward.server == "none":
            yield None
            return
        local = reward.server == "local"
        address = reward.server
        if local:
            advice = "go on with --resume, or set reward.server=none to train without mask scores"
            log = run_dir / "reward_server.log"
            address = stack.enter_context(local_server(reward.local_model, log, if_it_dies=advice))
        client = stack.enter_context(RewardClient(address, reward.timeout_s, wait_for_ready=not local, access=access))
        client.wait_until_serving(_START_PATIENCE_S if local else reward.timeout_s, say=_say)
        yield client


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
