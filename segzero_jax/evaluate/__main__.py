"""The command. Checkpoints are compared on validation splits; only the chosen one is evaluated on other splits.

On several hosts all ask the same questions, and host 0 scores, writes and prints.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

from segzero_jax import jsonl
from segzero_jax.asking import find_checkpoints
from segzero_jax.config import Config, ConfigError, OneLineParser
from segzero_jax.config.reading import count
from segzero_jax.data.checks import check_same
from segzero_jax.data.pipeline import DataError
from segzero_jax.evaluate.evaluator import Evaluator, How, Questions, open_questions
from segzero_jax.evaluate.results import choose, is_validation, write_results
from segzero_jax.evaluate.work import ORACLE, EvaluateError
from segzero_jax.local_path import check_folder, local_path
from segzero_jax.mesh import MeshError, make_mesh, parse_mesh, prepare_cpu
from segzero_jax.model.weights import CheckpointError
from segzero_jax.options import access_from, add_policy_options, add_server_options, one_line, say, seed
from segzero_jax.patches import ImageError, decode_image
from segzero_jax.pods import HOST_LOST, WHATEVER_IT_TAKES_S, HostLost, Pod, PodError, join
from segzero_jax.report.gallery import Shown, build_gallery
from segzero_jax.reward_channel import RewardServerError, RewardServiceAway
from segzero_jax.segmenting import greet

_USER_ERRORS = (EvaluateError, ConfigError, DataError, MeshError, PodError, CheckpointError, RewardServerError, OSError)
# Options that must be the same on all hosts: the rest only concern host 0, or may differ, such as the data directory.
_ALIKE = ("dataset", "limit", "batch", "samples", "seed", "mesh", "image_size", "prompt", "repetition_penalty")


def run(args: argparse.Namespace, pod: Pod) -> None:
    """Runs the command, from its options to ``results.json`` and the page."""
    check_alike(args, pod)
    sets = [open_questions(name, args.data_dir, args.limit) for name in args.dataset]
    # A split may have several names, such as toy and toy/val.
    sets = list({(one.dataset, one.split): one for one in sets}.values())
    check_same({f"{one.dataset}/{one.split}": one.source.checksum for one in sets}, pod)
    # A run's newest checkpoint may be another one a moment later.
    checkpoints = pod.from_first("checkpoints", lambda: find_checkpoints(args.checkpoint or [None]))
    validation = [questions for questions in sets if is_validation(questions.split)]
    if len(checkpoints) > 1 and not validation:
        raise EvaluateError(
            f"--dataset={' '.join(args.dataset)}: {len(checkpoints)} checkpoints, expected a validation split among "
            "them, such as toy/val: one is chosen there and alone evaluated on other splits"
        )
    access = access_from(args)
    if pod.first:
        greet(args.server, access)
    out = Path(args.out).expanduser()
    chosen = None
    how = How(
        batch=args.batch,
        samples=args.samples,
        seed=args.seed,
        mesh=args.mesh,
        server=args.server,
        access=access,
        sam=args.sam,
        image_size=args.image_size,
        prompt=args.prompt,
        repetition_penalty=args.repetition_penalty,
    )
    with jax.set_mesh(make_mesh(args.mesh)), Evaluator(how, out, pod) as evaluator:
        if len(checkpoints) == 1:
            evaluator.policy(checkpoints[0], sets)
        else:
            for checkpoint in checkpoints:
                evaluator.policy(checkpoint, validation)
            chosen = pod.from_first("the choice", lambda: choose(evaluator.results, checkpoints), WHATEVER_IT_TAKES_S)
            if pod.first:
                say(f"chosen by {chosen['by']} on {', '.join(chosen['on'])}: {chosen['checkpoint']}")
            evaluator.policy(chosen["checkpoint"], [one for one in sets if one not in validation])
        if args.oracle:
            evaluator.oracle(sets)
    if pod.first:
        _write(out, evaluator, sets, chosen, checkpoints[0])
    pod.exchange("the results", "", WHATEVER_IT_TAKES_S)


def check_alike(args: argparse.Namespace, pod: Pod) -> None:
    """Raises EvaluateError on all hosts if one's options differ from host 0's: they would not answer together."""
    if other := pod.difference("options", {name: str(getattr(args, name)) for name in _ALIKE}):
        name, host, first, theirs = other
        raise EvaluateError(
            f"--{name.replace('_', '-')}: {first} on {pod.host(0)}, {theirs} on {pod.host(host)}; expected the same "
            "command on all hosts"
        )


def _write(
    out: Path, evaluator: Evaluator, sets: Sequence[Questions], chosen: dict[str, Any] | None, checkpoint: str
) -> None:
    """Writes the files about all evaluations. Without a choice the page shows ``checkpoint``."""
    path = write_results(out, evaluator.results, chosen)
    page = out / "index.html"
    shown = _shown(evaluator, sets, chosen["checkpoint"] if chosen else checkpoint)
    title = ", ".join(f"{questions.dataset}/{questions.split}" for questions in sets)
    html = build_gallery(title, shown, {"evaluations": evaluator.results, "chosen": chosen})
    jsonl.replace(page, html.encode("utf-8", "replace"))
    say(f"wrote {path}, {page}")


def _shown(evaluator: Evaluator, sets: Sequence[Questions], checkpoint: str) -> list[Shown]:
    """The evaluations shown on the page: those of the only checkpoint, or of the chosen one."""
    found = {
        (one["dataset"], one["split"], one["checkpoint"]): (one, rows)
        for one, rows in zip(evaluator.results, evaluator.rows, strict=True)
    }
    shown = []
    for questions in sets:
        one, rows = found[questions.dataset, questions.split, checkpoint]
        _, ceiling = found.get((questions.dataset, questions.split, ORACLE), (None, []))

        def picture(index: int, asked: Questions = questions) -> Image.Image | None:
            try:
                return decode_image(asked[index].image, asked[index].id)
            except ImageError:
                return None

        shown.append(Shown(one, rows, ceiling, picture, one["options"]["recipe"]))
    return shown


def _mesh(text: str) -> str:
    try:
        parse_mesh(text)
    except MeshError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m segzero_jax.evaluate",
        description="Asks a policy the questions of a data set: gIoU, cIoU, box accuracy, format and no-target rates "
        "with intervals, every answer, and a page of cases. The same command goes on where it was cut off.",
        epilog="Exit codes: 0 done; 2 a mistake to be corrected; 3 the reward service could not be reached; "
        f"{HOST_LOST} another host was lost; 130 stopped.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", required=True, nargs="+", metavar="D", help="NAME or NAME/SPLIT [val], such as toy ReasonSeg/test")
    add("--data-dir", default=Config().data.dir, metavar="DIR", help="where built data sets are kept [%(default)s]")
    add(
        "--checkpoint",
        nargs="+",
        metavar="C",
        help="run directories, their checkpoints/STEP or checkpoints (all), Hugging Face directories, hub ids, or toy; "
        "of several one is chosen on the validation splits [the newest of runs/toy, else toy]",
    )
    add("--out", default="evaluate", metavar="DIR", help="where files are written; made if need be [%(default)s]")
    add("--oracle", action="store_true", help="also what SAM 2 makes of the target boxes and points: its ceiling")
    add("--samples", type=count, default=0, metavar="N", help="draw N answers to each question [one greedy answer]")
    add("--seed", type=seed, default=0, metavar="N", help="of --samples [%(default)s]")
    add("--limit", type=count, metavar="N", help="N questions of each split, one about every image first [all]")
    add("--batch", type=count, default=32, metavar="N", help="questions at once, over the mesh [%(default)s]")
    add("--mesh", default="1x1", type=_mesh, help="FSDPxTENSOR or DATAxFSDPxTENSOR, as in training [%(default)s]")
    add_server_options(parser)
    add_policy_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. On bad input: 2 and one line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.oracle and args.server == "none":
        parser.error("--oracle: asks SAM 2, expected --server=local or host:port, got none")
    pod = Pod(prog=parser.prog)
    try:
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about read-only access, which is intended.
        pod = join(parser.prog, "the same command goes on")
        if jax.distributed.is_initialized():
            # From then on JAX handles SIGTERM for programs that poll it, and the process would not stop.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Only now that all have joined: the others would wait for a host that left before.
        check_folder(local_path(args.out, "--out", "write to a disk and copy it from there"), f"--out={args.out}")
        prepare_cpu(args.mesh, pod.count)
        run(args, pod)
        return pod.leave(0)
    except RewardServiceAway as error:
        return pod.leave(3, one_line(error))
    except HostLost as error:
        return pod.leave(HOST_LOST, one_line(error))
    except _USER_ERRORS as error:
        return pod.leave(2, one_line(error))
    except KeyboardInterrupt:
        return pod.leave(130, "stopped; the same command goes on")
    except BaseException as error:
        pod.await_blame(error)
        pod.leave(1, f"{type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    sys.exit(main())
