"""What a run says must not end it: readers leave, terminals hang up, the disk of a log fills up."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest

from segzero_jax.metrics import MetricsWriter
from segzero_jax.terminal import lasting, write_line


class Gone(io.StringIO):
    """A terminal that hangs up after so many writes."""

    def __init__(self, after: int, number: int = errno.EIO) -> None:
        super().__init__()
        self.left, self.number = after, number

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, "gone")
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE, errno.ENOSPC, errno.EBADF])
def test_what_cannot_be_written_raises_nothing(number: int) -> None:
    stream = Gone(1, number)
    write_line(stream, "read")
    write_line(stream, "not read")
    assert stream.getvalue() == "read\n"


def test_a_stream_that_is_closed_or_was_never_there_takes_everything() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        write_line(stream, "nobody")
        assert not lasting(stream).isatty()


def test_a_character_that_the_stream_has_no_bytes_for_is_a_question_mark() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    write_line(stream, "5.1 ± 0.1")
    assert raw.getvalue() == b"5.1 ? 0.1\n"


@pytest.mark.parametrize("after", [0, 3, 6])
def test_a_run_goes_on_without_its_terminal(tmp_path: Path, after: int) -> None:
    with MetricsWriter(tmp_path, 10, show_progress=True, stream=Gone(after)) as metrics:
        for step in range(1, 11):
            metrics.message("a line")
            metrics.write_step(step, {})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("where", [">/dev/full", "| true", ">&-"])
def test_a_process_that_has_done_its_work_ends_well(where: str) -> None:
    work = "import sys, time; time.sleep(0.3)"  # Meanwhile the reader leaves.
    code = f"{work}\nfrom segzero_jax.terminal import write_line\nwrite_line(sys.stdout, 'done')"
    script = f'set -o pipefail; {sys.executable} -c "$CODE" {where}'
    done = subprocess.run(["bash", "-c", script], env={"CODE": code}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
