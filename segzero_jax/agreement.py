"""Settings that must be the same on all hosts of a run: otherwise they would silently train on different losses."""

from segzero_jax import config as configs
from segzero_jax.code_version import this_code
from segzero_jax.config import Config, ConfigError
from segzero_jax.pods import Pod

# Keys that may differ between hosts: file locations, use of cores, and server addresses.
_ITS_OWN = ("run.dir", "run.checkpoint_dir", "data.dir", "data.workers", "reward.server", "reward.tls_name")
_ITS_OWN_FILES = ("reward.ca_file", "reward.cert_file", "reward.key_file", "reward.token_file")


def check_alike(config: Config, pod: Pod) -> None:
    """Raises ConfigError on all hosts if one has other options or other code than host 0.

    Data sets, files of reward functions and SAM 2 are compared where they are opened.
    """
    options = configs.flat(config)
    shared = {key: str(value) for key, value in options.items() if key not in (*_ITS_OWN, *_ITS_OWN_FILES)}
    if other := pod.difference("options", {"the code": this_code().source, **shared}):
        name, host, first, theirs = other
        raise ConfigError(
            f"{name} is {first} on {pod.host(0)}, {theirs} on {pod.host(host)}; expected the same command and code on "
            "all hosts"
        )
