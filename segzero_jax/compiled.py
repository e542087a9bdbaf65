"""JAX's persistent compilation cache: a resumed run does not recompile its programs."""

from pathlib import Path

import jax

_HERE = "~/.cache/segzero_jax_compiled"


def keep_compiled() -> None:
    """Makes JAX cache compiled TPU and GPU programs, in ``~/.cache/segzero_jax_compiled`` unless configured otherwise.

    Call it before the first program. Only the first of several processes writes: for the others to read, the folder
    must be shared, ``JAX_COMPILATION_CACHE_DIR=gs://bucket/path``. CPU programs are not cached: each is for one kind of
    processor and compiles quickly.
    """
    if jax.default_backend() != "cpu" and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path(_HERE).expanduser()))
