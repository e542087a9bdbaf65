"""Which code runs: for checkpoints, so that a run that goes on with other code says so."""

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

from segzero_jax import __version__

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent


class Code(NamedTuple):
    """Attributes:
    version: of the package.
    commit: of the checkout it runs from, or that ``tpu/setup.sh`` brought; empty where nobody knows.
    source: sixteen hexadecimal digits that depend on every line of the package, whatever git knows of it.
    """

    version: str
    commit: str
    source: str

    def __str__(self) -> str:
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return f"{self.version}{commit}, source {self.source[:8]}"


@functools.cache
def this_code() -> Code:
    """The code of this process, as its files are at the first call."""
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE)} {len(content)}\n".encode() + content)
    return Code(__version__, _commit(), digest.hexdigest()[:16])


def _commit() -> str:
    if (_ROOT / ".git").exists():
        try:
            git = subprocess.run(
                ["git", "-C", str(_ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""  # No git here, or none that answers.
        return git.stdout.strip()
    written = _ROOT / ".revision"
    return written.read_text().strip() if written.is_file() else ""
