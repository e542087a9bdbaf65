"""One self-contained HTML page about a run: ``python -m segzero_jax.report RUN`` writes ``RUN/report.html``.

It reads only the run's files, needs no JAX, and works while the run is in progress.
"""

import os
from pathlib import Path

from segzero_jax import jsonl
from segzero_jax.report.page import build
from segzero_jax.report.run import RunError, read_run

__all__ = ["RunError", "write_report"]


def write_report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run directory and returns its path.

    Raises:
      RunError: the folder is not a run, or one of its files is damaged.
    """
    run = read_run(run_dir)
    path = run.path / "report.html"
    # The trainer may write its final page at the same time.
    jsonl.replace(path, build(run).encode("utf-8", "replace"), f".{os.getpid()}.tmp")
    return path
