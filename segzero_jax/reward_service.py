"""The reward service given by ``reward.server``: none, a local one that lives as long as the run, or remote servers.

"local" is one server per machine: if several processes of a run share a machine, the first of them starts it for all.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from segzero_jax.config import Config
from segzero_jax.local_server import local_server
from segzero_jax.pods import Pod
from segzero_jax.reward_channel import Access
from segzero_jax.reward_client import RewardClient
from segzero_jax.terminal import write_line

_START_PATIENCE_S = 300.0


@contextlib.contextmanager
def reward_service(
    config: Config, access: Access, run_dir: Path, pod: Pod, patience_s: float
) -> Iterator[RewardClient | None]:
    """A client of the reward server given by ``reward.server``, None for "none"; a local one is stopped at exit.

    Raises:
      RewardServerError: a local server did not start, or a remote one does not match.
      RewardServiceAway: no remote server serves after ``patience_s``.
    """
    who = f"{pod.host(pod.index)}: " if pod.count > 1 else ""  # Each host may ask servers of its own.
    say = lambda text: write_line(sys.stderr, f"{who}{text}")  # noqa: E731
    reward = config.reward
    with contextlib.ExitStack() as stack:
        if reward.server == "none":
            yield None
            return
        local = reward.server == "local"
        address = reward.server
        if local:
            starter = pod.names.index(pod.names[pod.index])
            if starter == pod.index:
                advice = "go on with --resume, or set reward.server=none to train without mask scores"
                log = run_dir / ("reward_server.log" if pod.first else f"reward_server_{pod.index}.log")
                address = stack.enter_context(local_server(reward.local_model, log, if_it_dies=advice))
            address = pod.exchange("local reward servers", address)[starter]
        client = stack.enter_context(RewardClient(address, reward.timeout_s, wait_for_ready=not local, access=access))
        timeout_s = _START_PATIENCE_S if local else patience_s
        client.wait_until_serving(timeout_s, say=say, everyone_s=reward.timeout_s)
        yield client
