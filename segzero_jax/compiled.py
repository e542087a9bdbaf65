"""Programs that one process compiled, kept for the next: a run that goes on does not compile all over again."""

from pathlib import Path

import jax

_HERE = "~/.cache/segzero_jax_compiled"


def keep_compiled() -> None:
    """Has JAX keep what it compiles for TPUs and GPUs, in ``~/.cache/segzero_jax_compiled`` unless it is told where.

    Call it before the first program. Of several processes the first alone writes: for the others to read, the folder
    has to be one that all share, ``JAX_COMPILATION_CACHE_DIR=gs://bucket/path``. Programs for CPUs are not kept: each
    is for one kind of processor, and soon compiled.
    """
    if jax.default_backend() != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(_HERE).expanduser()))
