"""Every test sees sixteen virtual CPU devices, so sharded code paths run as they do on a mesh."""

import itertools
import os
from pathlib import Path

from xla_flags import QUICK

_FLAGS = ["--xla_force_host_platform_device_count=16", QUICK]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
# "cuda" is asked for by whoever runs the tests of kernels on a GPU.
if os.environ.get("JAX_PLATFORMS") != "cuda":
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402  (after the environment)
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# Programs run one after another: on two cores, sixteen devices behind a queue of dependent programs can lock up.
jax.config.update("jax_cpu_enable_async_dispatch", False)
# Fewer optimizations, for the same reason; how programs are partitioned stays the same.
jax.config.update("jax_disable_most_optimizations", True)

# Machines that run tests are shared: how long one example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


@pytest.hookimpl(trylast=True)  # Of what is left when others have been deselected.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts what takes longest first, in each process its part of it; the others keep their order.

    Processes begin with equal runs of the list, the first ones rounded down (``worksteal`` of pytest-xdist).
    """
    longest = [item for item in items if item.get_closest_marker("longest")]
    others = iter([item for item in items if not item.get_closest_marker("longest")])
    processes, total, dealt = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")), len(items), []
    for process in range(processes):
        room = (total - len(dealt)) // (processes - process)
        first = longest[process::processes]
        dealt += [*first, *itertools.islice(others, max(0, room - len(first)))]
    items[:] = [*dealt, *others]


@pytest.fixture(scope="session")
def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a session."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session", autouse=True)
def compiled_once(shared_dir: Path) -> None:
    """What one test process has compiled, the others read, and so do the programs that they start.

    Many tests begin a run of the same shapes, and each run's programs are new to JAX.
    """
    kept = {
        "jax_compilation_cache_dir": str(shared_dir / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        # With a limit, JAX reads and writes under a lock: no process comes upon a file that is half written.
        "jax_compilation_cache_max_size": 2**34,
    }
    for name, value in kept.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture(scope="session")
def data_dir(shared_dir: Path) -> str:
    """Where the toy data set lies, built once for all workers of a session."""
    from segzero_jax.data.pipeline import open_split  # Few tests need it.

    folder = shared_dir / "data"
    open_split("toy", "train", folder)
    return str(folder)
