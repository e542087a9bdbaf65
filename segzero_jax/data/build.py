"""Builds a data set from its source: ``python -m segzero_jax.data.build NAME --source DIR``.

The form of the source is detected from its files; docs/data.md lists where to get the papers' data sets. The same
command resumes an interrupted build.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from segzero_jax.config import Config, ConfigError
from segzero_jax.config.reading import OneLineParser, count
from segzero_jax.data import builder
from segzero_jax.data.builder import Plan
from segzero_jax.data.forms.finding import find_form
from segzero_jax.data.forms.form import Form, SourceError
from segzero_jax.data.held_out import LeakError, check_leaks
from segzero_jax.data.hub_sets import HUB
from segzero_jax.data.records import BUILT, built_directory, index_path
from segzero_jax.hub import HubError, data_directory
from segzero_jax.local_path import check_folder, home_path, local_path


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="segzero_jax.data.build",
        description="Builds a data set that data.name can then name. The same command goes on after an interruption.",
        epilog="Exit codes: 0 built; 2 a mistake to be corrected; 130 stopped.",
    )
    parser.add_argument("name", help=f"what the data set is called, such as {', '.join(HUB)} or one of your own")
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="DIR",
        help="a directory, or ids of data sets on the Hugging Face hub; the papers' sets know their own",
    )
    parser.add_argument(
        "--images", type=home_path, metavar="DIR", help="where the pictures lie, when not below the source"
    )
    parser.add_argument("--data-dir", default=Config().data.dir, metavar="DIR", help="data.dir (%(default)s)")
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="NAME/SPLIT",
        help="further built splits whose pictures must not be in the training split; its own are checked anyway",
    )
    parser.add_argument("--drop-leaks", action="store_true", help="leave such training questions out")
    parser.add_argument("--rebuild", action="store_true", help="replace a built set whose source has changed")
    parser.add_argument("--check", action="store_true", help="only compare a built set's files with their checksums")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="processes (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    # TFDS warns about every configuration that is not its own.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        data_dir = local_path(args.data_dir, "--data-dir", "build it on a disk and copy it from there")
        for option, places in (("--source", args.source or ()), ("--images", (args.images,) if args.images else ())):
            for place in places:
                local_path(place, option, "copy what is there to a disk first")
        if set("/,") & set(args.name) or args.name in ("", ".", "..", "toy"):
            raise SourceError(f"{args.name or repr(args.name)}: a name of its own is expected, without / and commas")
        check_folder(data_dir / BUILT, f"--data-dir={args.data_dir}")
        return _check(args.name, data_dir) if args.check else _build(args, data_dir)
    except (SourceError, LeakError, HubError, ConfigError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on", file=sys.stderr)
        return 130


def _check(name: str, data_dir: Path) -> int:
    if not built_directory(name, data_dir).is_dir():
        raise SourceError(f"data set {name}: not in {data_dir}")
    damaged = builder.damaged_files(name, data_dir)
    if damaged:
        raise SourceError(f"data set {name}: {'; '.join(damaged)}; build it again with --rebuild")
    print(f"{name}: all files are as they were built")
    return 0


def _build(args: argparse.Namespace, data_dir: Path) -> int:
    name, sources = args.name, args.source or list(HUB.get(args.name, ()))
    if not sources:
        raise SourceError(f"{name}: expected --source DIR; only {', '.join(HUB)} are known to the hub")
    for other in args.against:
        data_set, _, split = other.rpartition("/")
        if not index_path(built_directory(data_set, data_dir), split).is_file():
            raise SourceError(f"--against {other}: expected NAME/SPLIT of a built set in {data_dir}")
    folders = {source: data_directory(source) for source in sources}
    named = {folder: split for source, folder in folders.items() if (split := _split_of(source))}
    # Another program may have downloaded further files of a hub data set into the same cache.
    downloaded = [folder for source, folder in folders.items() if folder != home_path(source)]
    form = find_form(name, list(folders.values()), args.images, named, downloaded)
    plan = builder.make_plan(form)
    before = builder.built_from(name, data_dir)
    if before == plan.digest and not args.rebuild:
        check_leaks(name, data_dir, args.against)
        print(f"{name}: built already, from the same source, in {built_directory(name, data_dir)}")
        return 0
    if before is not None and not args.rebuild:
        raise SourceError(f"{name}: built already, from another source or by an older version; --rebuild replaces it")
    outcome = _with_bar(args, form, plan, data_dir)
    for split, rows in outcome.rows.items():
        print(f"{name}/{split}: {rows} questions")
    if plan.centred:
        print(f"points: {plan.centred} target boxes have neither point_2d nor a mask, their centres are taken")
    for reason, number in outcome.left_out.items():
        print(f"left out: {number} ({reason})")
    if outcome.left_out:
        print(f"which ones: {outcome.directory / 'left_out.jsonl'}")
    return 0


def _split_of(source: str) -> str | None:
    """The split of a hub repository that is a single split, or of a local copy in a folder of its name; else None."""
    name = Path(source.partition("@")[0]).name
    splits = {Path(repo).name: split for repos in HUB.values() for repo, split in repos.items()}
    return splits.get(name)


def _with_bar(args: argparse.Namespace, form: Form, plan: Plan, data_dir: Path) -> builder.Outcome:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(args.name, total=sum(shard.rows for shard in plan.shards))
        return builder.build(
            args.name,
            form,
            plan,
            data_dir,
            args.against,
            args.drop_leaks,
            args.workers,
            progress=lambda rows: bar.advance(task, rows),
            say=console.print,
        )


if __name__ == "__main__":
    sys.exit(main())
