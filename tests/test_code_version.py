"""Which code it is: told for people by its commit, and compared by its source."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from segzero_jax.code_version import this_code

ROOT = Path(__file__).parents[1]


def code_of(root: Path) -> list[str]:
    """What the package in ``root`` says of itself, in a process that finds no other."""
    script = "from segzero_jax.code_version import this_code; print(*this_code(), sep='|')"
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    return done.stdout.strip().split("|")


def git(root: Path, *words: str) -> str:
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(["git", *who, *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def test_source_and_commit_are_told_wherever_the_package_lies(tmp_path: Path) -> None:
    package = tmp_path / "segzero_jax"
    package.mkdir()
    for name in ("__init__.py", "code_version.py"):
        shutil.copy(ROOT / "segzero_jax" / name, package)
    version, commit, source = code_of(tmp_path)
    assert (version, commit) == (this_code().version, "")
    assert re.fullmatch("[0-9a-f]{16}", source)

    (tmp_path / ".revision").write_text("0123abc\n")  # Of a machine that tpu/setup.sh has set up.
    assert code_of(tmp_path) == [version, "0123abc", source]

    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert code_of(tmp_path) == [version, head, source]
    (tmp_path / "README").write_text("changes nothing that is computed")
    assert code_of(tmp_path)[2] == source
    (package / "code_version.py").rename(package / "elsewhere.py")
    shutil.copy(ROOT / "segzero_jax/code_version.py", package)
    assert code_of(tmp_path)[:2] == [version, head]
    assert code_of(tmp_path)[2] != source, "a change that is not committed is one"


def test_one_line_for_people() -> None:
    code = this_code()._replace(commit="f" * 40)
    assert str(code) == f"{code.version}, commit {'f' * 12}, source {code.source[:8]}"
    assert str(code._replace(commit="")) == f"{code.version}, source {code.source[:8]}"
