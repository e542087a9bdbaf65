"""A process of a pod on this machine's CPUs. As a command, ``python tests/pod_host.py ARGUMENTS``, it trains."""

import sys
from types import SimpleNamespace
from typing import Any


def write_own_cache() -> None:
    """Has every process write to JAX's compilation cache, not the first alone.

    That suits TPUs, where all compile the same program; a program for CPU names the process that runs it.
    """
    from jax._src import compiler

    real, first = compiler.distributed, SimpleNamespace(global_state=SimpleNamespace(process_id=0))
    write = compiler._cache_write

    def write_own(*arguments: Any) -> None:
        compiler.distributed = first
        try:
            write(*arguments)
        finally:
            compiler.distributed = real

    compiler._cache_write = write_own


if __name__ == "__main__":
    write_own_cache()
    from segzero_jax.train import main

    sys.exit(main(sys.argv[1:]))
