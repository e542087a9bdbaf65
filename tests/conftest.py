"""Every test sees sixteen virtual CPU devices, so sharded code paths run as they do on a mesh."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As the commands do: the CPU client can lock up behind a queue of dependent programs.
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
