"""The version of the running code, kept in checkpoints so that a run resumed with other code reports it."""

import functools
import hashlib
import subprocess
from pathlib import Path
from typing import NamedTuple

from segzero_jax import __version__

_PACKAGE = Path(__file__).parent
_ROOT = _PACKAGE.parent


class Code(NamedTuple):
    """The version of the code.

    Attributes:
      version: package version.
      commit: commit of the checkout it runs from, or the one that ``tpu/setup.sh`` recorded; empty if unknown.
      source: sixteen hexadecimal digits that depend on every line of the package, independent of git.
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
            return ""  # git is missing or does not respond.
        return git.stdout.strip()
    written = _ROOT / ".revision"
    return written.read_text().strip() if written.is_file() else ""
