"""Every test sees sixteen virtual CPU devices, so sharded code paths run as they do on a mesh."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402  (after the environment)

# Programs run one after another: on two cores, sixteen devices behind a queue of dependent programs can lock up.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Small programs run once or twice: what counts is how long they compile. Their partitioning stays the same.
jax.config.update("jax_disable_most_optimizations", True)
