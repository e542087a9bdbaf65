"""``python -m segzero_jax.report RUN``."""

import sys
from collections.abc import Sequence

from segzero_jax.config import OneLineParser
from segzero_jax.local_path import home_path
from segzero_jax.report import RunError, write_report
from segzero_jax.terminal import write_line


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page and prints its path; returns 2, after a one-line message, for a folder that is not a run."""
    parser = OneLineParser(prog="python -m segzero_jax.report", description=__doc__)
    parser.description = "Writes RUN/report.html: one self-contained page with curves, evaluations and rollouts."
    parser.add_argument(
        "run", type=home_path, metavar="RUN", help="a run directory, such as runs/toy; it may still be going on"
    )
    args = parser.parse_args(argv)
    try:
        path = write_report(args.run)
    except (RunError, OSError) as error:
        write_line(sys.stderr, f"{parser.prog}: {error}")
        return 2
    write_line(sys.stdout, f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
