"""Connections whose other end has fallen silent are given up; those that are merely quiet are kept."""

import os
import signal
import time

import pytest
from fake_reward_server import Fake, free_port, serving
from test_client_faults import groups, healthy_scores, process, score_until_called

from reward_server import server
from segzero_jax import reward_channel
from segzero_jax.reward_client import RewardClient

# Times of both sides, this much shorter.
FASTER = 30


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (reward_channel, server):
        options = dict(module._OPTIONS)
        times = [name for name in options if "keepalive_time" in name or "ping_" in name]
        assert len(times) >= 3
        monkeypatch.setattr(
            module, "_OPTIONS", (*(options | {name: options[name] // FASTER for name in times}).items(),)
        )


def test_a_server_that_falls_silent_in_the_middle_of_calls_loses_them_to_another() -> None:
    """Its machine is cut off or frozen: nothing closes the connection, and the deadline is a minute away."""
    asked, fake, port = groups(8), Fake(), free_port()
    expected = healthy_scores(asked)
    with (
        serving(fake, options=server._OPTIONS) as here,
        process(port, delay_s=60) as child,
        RewardClient(f"{here},127.0.0.1:{port}", 60) as client,
    ):
        assert len(client.wait_until_serving(10)) == 2
        sent = score_until_called(client, asked, child)
        os.kill(child.pid, signal.SIGSTOP)
        assert all(pending.result() == expected for pending in sent)
    assert len(fake.seen) == len(sent) * len(asked)


def test_a_call_that_takes_long_is_not_cut_for_the_pings_meanwhile() -> None:
    fake = Fake()
    fake.before = lambda *_: time.sleep(10)
    with serving(fake, options=server._OPTIONS) as address, RewardClient(address, 60) as client:
        client.score(groups(1)).result()
    assert len(fake.seen) == 1, "it was cut, and sent again"
