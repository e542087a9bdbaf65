"""Hosts of a run that were started differently say so before anything is learnt."""

import pytest
from thread_pod import on_hosts

from segzero_jax import agreement
from segzero_jax import config as configs
from segzero_jax.agreement import check_alike
from segzero_jax.code_version import Code
from segzero_jax.config import Config, ConfigError
from segzero_jax.pods import ALONE, Pod


def started(pod: Pod, *changes: dict[str, object]) -> None:
    check_alike(configs.replace(Config(), **changes[pod.index]), pod)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.lr": 0.5}, "train.lr is 0.0001 on host 0 (w-0), 0.5 on host 1 (w-1)"),
        ({"seed": 7, "run.dir": "elsewhere"}, "seed is 0 on host 0 (w-0), 7 on host 1 (w-1)"),
        ({"eval.examples": 8}, "eval.examples is 64 on host 0 (w-0), 8 on host 1 (w-1)"),
        ({"model.lora_rank": 4}, "model.lora_rank is 0 on host 0 (w-0), 4 on host 1 (w-1)"),
    ],
)
def test_other_options_on_one_host_are_named_on_all(changes: dict[str, object], said: str) -> None:
    for found in on_hosts(2, lambda pod: started(pod, {}, changes)):
        with pytest.raises(ConfigError) as error:
            found.result()
        assert str(error.value) == f"{said}; expected the same command and code on all hosts"


def test_what_is_a_hosts_own_may_differ() -> None:
    own = {"run.dir": "b", "data.dir": "c", "data.workers": 3, "reward.server": "d:1", "reward.ca_file": "e"}
    assert [found.result() for found in on_hosts(3, lambda pod: started(pod, {}, own, {}))] == [None] * 3
    check_alike(Config(), ALONE)


def test_other_code_on_one_host_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its programs would be others, and its collectives might wait for ever."""
    codes = iter([Code("1", "", "aaaa"), Code("1", "", "bbbb")])
    monkeypatch.setattr(agreement, "this_code", lambda: next(codes))
    for found in on_hosts(2, lambda pod: check_alike(Config(), pod)):
        with pytest.raises(ConfigError, match=r"^the code is (aaaa|bbbb) on host 0 \(w-0\), (aaaa|bbbb) on host 1"):
            found.result()
