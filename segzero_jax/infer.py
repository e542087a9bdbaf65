"""``python -m segzero_jax.infer --image F --query T``: the policy thinks and points, SAM 2 makes the mask.

The policy sees the image upright and squashed to its own size; its answer is rescaled to the pixels of the upright
image, which SAM 2 also sees. The files of an answer are written together, at its end.
"""

import argparse
import importlib.util
import io
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from segzero_jax.answering import Answered, Picture, answer_question, reasoning_so_far
from segzero_jax.asking import default_sam, find_checkpoint, load
from segzero_jax.config import ConfigError, OneLineParser
from segzero_jax.data.forms.form import unique
from segzero_jax.local_path import check_folder, home_path, local_path
from segzero_jax.mesh import MeshError, make_mesh, parse_mesh, prepare_cpu
from segzero_jax.model.weights import CheckpointError
from segzero_jax.options import (
    above_zero,
    access_from,
    add_policy_options,
    add_server_options,
    complain,
    say,
    seed,
    shown,
)
from segzero_jax.patches import ImageError
from segzero_jax.processor import Processor, PromptTooLong
from segzero_jax.reward_channel import RewardServerError
from segzero_jax.segmenting import Segmenter, greet
from segzero_jax.terminal import lasting, write_line

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".jfif", ".jp2", ".tif", ".tiff")
_OVERLAY = "_overlay.png"
_NAME_BYTES = 255  # limit on a file name, on Linux and macOS


class InferError(ValueError):
    """Input that cannot be answered; the message is one line."""


# Errors that a user can cause; anything else is a bug and keeps its traceback.
_USER_ERRORS = (
    *(InferError, ConfigError, MeshError, CheckpointError, ImageError, PromptTooLong),
    *(RewardServerError, OSError),
)


class Reasoning:
    """Prints a response's reasoning while it grows: a watcher for ``respond``."""

    def __init__(self) -> None:
        self._printed = ""

    def __call__(self, text: str) -> None:
        """Prints the new part of the response so far."""
        thought, out = reasoning_so_far(text), lasting(sys.stdout)
        if thought and not self._printed:
            out.write("thinking: ")
        out.write(shown(thought[len(self._printed) :]))
        out.flush()
        self._printed = thought

    def end(self) -> None:
        """Ends the line, if there is one."""
        if self._printed:
            write_line(sys.stdout, "")


def write_together(folder: Path, files: dict[str, bytes | None]) -> None:
    """Writes files, by name, each atomically; if one cannot be written, none is. Makes the folder.

    Deletes files whose content is None: one left from an earlier answer would pass for this one's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: content for name, content in files.items() if content is not None}
    temporary = {name: folder / (name + _unfinished()) for name in contents}
    try:
        for name, content in contents.items():
            temporary[name].write_bytes(content)
        for name in files.keys() - contents.keys():
            (folder / name).unlink(missing_ok=True)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _unfinished() -> str:
    return f".{os.getpid()}.tmp"


def find_pictures(path: Path) -> list[Path]:
    """The image, or a folder's images sorted by name, without hidden files. Raises InferError if there is none.

    On foreign file systems macOS leaves a ``._a.jpg`` beside each ``a.jpg``, which is not an image.
    """
    if not path.exists():
        raise InferError(f"--image={path}: no such file, expected a PNG, JPEG or WebP, or a folder of them")
    if not path.is_dir():
        return [path]
    named = (file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and not file.name.startswith("."))
    found = sorted(file for file in named if file.is_file())
    if not found:
        raise InferError(f"--image={path}: no picture in this folder, expected files in {', '.join(_SUFFIXES)}")
    others = sorted(file.name for file in path.iterdir() if file.suffix.lower() in _OTHER_SUFFIXES)
    if others:
        say(f"skipped {len(others)} images that are not PNG, JPEG or WebP, such as {others[0]}")
    return found


def find_questions(queries: Sequence[str], file: Path | None) -> list[str]:
    """The questions given one by one, then those of a file, one per line. Raises InferError if there is none."""
    questions = list(queries)
    if file is not None:
        try:
            # Not splitlines(), which also splits at characters within a question, such as U+2028.
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise InferError(f"--queries={file}: expected UTF-8 text, a question on each line: {error}") from None
        except OSError as error:
            raise InferError(
                f"--queries={file}: {error.strerror}, expected a file with one question per line"
            ) from None
        questions += [line.strip() for line in lines if line.strip(" \t\r.")]
    if not questions:
        raise InferError(f"--queries={file}: no question in it, expected one on each line" if file else _NO_QUESTION)
    return questions


_NO_QUESTION = "no question, expected --query T (also several times), or --queries FILE"


def run(args: argparse.Namespace) -> None:
    """Runs the command: writes the files, or serves the page of ``--demo``."""
    paths, questions = [], []
    if args.demo:
        from segzero_jax.demo import check_port  # Gradio is an extra

        check_port(args.port)
    else:
        paths, questions = find_pictures(args.image), find_questions(args.query, args.queries)
    names = stems(paths)
    _check_names(paths, names, len(questions))
    once = read_through(paths)
    access = access_from(args)
    greet(args.server, access)
    name = find_checkpoint(args.checkpoint)
    say(f"policy: {name}" + ("" if args.checkpoint else " (the default: runs/toy once it has a checkpoint, else toy)"))
    with jax.set_mesh(make_mesh(args.mesh)):
        loaded = load(name, args.image_size, args.prompt, args.repetition_penalty)
        check_lengths(questions, loaded.processor)
        with Segmenter(args.server, access, lambda: args.sam or default_sam(loaded.config), say) as segmenter:
            if args.demo:
                from segzero_jax.demo import serve  # Gradio is an extra

                serve(loaded, segmenter, args.port)
                return
            for path, own in zip(paths, names, strict=True):
                picture = Picture.read(once[path] if path in once else path.read_bytes(), str(path))
                for number, question in enumerate(questions, 1):
                    if len(paths) * len(questions) > 1:
                        say(f"\n{path}: {question}")
                    reasoning = Reasoning()
                    drawn_from = (args.seed or 0) if args.sample else None
                    try:
                        answered = answer_question(
                            loaded, picture, question, segmenter, drawn_from, args.temperature, reasoning
                        )
                    finally:
                        reasoning.end()  # an error message starts on a new line
                    _say_answer(answered, loaded.config.rollout.max_response_tokens)
                    stem = own + (f"_{number}" if len(questions) > 1 else "")
                    _write(answered, Path(args.out).expanduser(), stem, name)


def read_through(paths: Sequence[Path]) -> dict[Path, bytes]:
    """Checks that all images can be read, before the policy is loaded. Raises ImageError or OSError.

    Returns:
      The bytes of those that can be read only once, such as a pipe; the others might not fit in memory.
    """
    once = {}
    for path in paths:
        data = path.read_bytes()
        Picture.read(data, str(path))
        if not path.is_file():
            once[path] = data
    return once


def check_lengths(questions: Sequence[str], processor: Processor) -> None:
    """Raises PromptTooLong if a question is too long, before others have been answered."""
    limit = processor.max_prompt_tokens
    counts = processor.count_tokens(questions).tolist() if questions else []
    for number, (question, tokens) in enumerate(zip(questions, counts, strict=True), 1):
        if tokens > limit:
            raise PromptTooLong(
                f"question {number} of {len(questions)}, {question[:40]!r}...: prompt of {tokens} tokens, those of the "
                f"picture included, expected at most max_prompt_tokens={limit}; ask it in fewer words, or with a "
                "shorter --prompt"
            )


def stems(paths: Sequence[Path]) -> list[str]:
    """The stems of the file names written for each image, all distinct.

    A stem is the image's name without its extension; with it (``a-png``) if another image has the same stem, and with a
    number appended if that name is taken.
    """
    shared = Counter(path.stem for path in paths)
    return unique([path.stem if shared[path.stem] == 1 else path.name.replace(".", "-") for path in paths])


def _check_names(paths: Sequence[Path], names: Sequence[str], questions: int) -> None:
    """Raises InferError if an image's name leaves no room for the suffixes of its files."""
    ending = (f"_{questions}" if questions > 1 else "") + _OVERLAY
    for path, stem in zip(paths, names, strict=True):
        over = len(os.fsencode(stem + ending + _unfinished())) - _NAME_BYTES
        if over > 0:
            raise InferError(f"--image={path}: the name is {over} bytes too long for STEM{ending}; rename the picture")


def _write(answered: Answered, out: Path, stem: str, checkpoint: str) -> None:
    mask = None if answered.mask is None else _png(Image.fromarray(answered.mask.astype(np.uint8) * 255))
    row = answered.row() | {"checkpoint": checkpoint}
    files = {
        stem + _OVERLAY: _png(answered.drawn()),
        f"{stem}_mask.png": mask,
        f"{stem}.json": (json.dumps(row, indent=1, allow_nan=False) + "\n").encode(),
    }
    write_together(out, files)
    say("wrote " + ", ".join(str(out / name) for name, content in files.items() if content is not None))


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _say_answer(answered: Answered, limit: int) -> None:
    cut = "" if answered.finished else f" (cut at {limit} tokens)"
    if not answered.said.readable:
        say(f"answer: malformed{cut}, there is nothing to segment; the policy said: {answered.text.strip()}")
    elif not answered.objects:
        say("answer: no such object in the picture")
    for obj in answered.objects:
        points = " and ".join(_numbers(point) for point in obj.points)
        say(f"answer: box {_numbers(obj.box)}, point {points}, in pixels of the picture")
    found, mask = answered.found, answered.mask
    if found.error:
        say(f"mask: none, SAM 2 refused the answer: {found.error}")
    elif not answered.said.readable:
        say("mask: none, the answer could not be read")
    elif mask is None:
        say("mask: none was asked for (--server=none)")
    else:
        by = f", SAM 2 ({found.model}) expects an IoU of {found.model_score:.2f}" if found.model else ""
        say(f"mask: {mask.sum()} of {mask.size} pixels{by}")
    if answered.scaled():
        say(answered.scaled())


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _query(text: str) -> str:
    if not text.strip(" \t\r\n."):
        raise argparse.ArgumentTypeError(f"expected a question such as 'the red circle', got {text!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):  # Python's surrogate escapes of bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {text!r}")
    return text.strip()


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 65535")
    return int(text)


def _mesh(text: str) -> str:
    try:
        data, fsdp, tensor = parse_mesh(text)
    except MeshError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if data * fsdp != 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1xTENSOR, such as 1x{data * fsdp * tensor}: one picture")
    return text


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m segzero_jax.infer",
        description="Asks a policy for something in a picture: it thinks and points, SAM 2 makes the mask. "
        "Writes STEM_overlay.png, STEM_mask.png (0 and 255) and STEM.json, STEM being the picture's name; several "
        "questions are numbered, STEM_1_overlay.png.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", type=home_path, metavar="F", help="a PNG, JPEG or WebP, or a folder of them")
    add("--query", action="append", default=[], type=_query, metavar="T", help="what to find; may be given often")
    add("--queries", type=home_path, metavar="FILE", help="more questions, one a line")
    add("--demo", action="store_true", help="a web page on this machine in place of --image and --query")
    add("--port", type=_port, default=7860, metavar="N", help="of --demo [%(default)s]")
    add(
        "--checkpoint",
        metavar="D",
        help="a run directory, one of its checkpoints/STEP, a Hugging Face directory or hub id, or toy "
        "[the newest checkpoint of runs/toy, else toy]",
    )
    add("--out", default="infer", metavar="DIR", help="where files are written; made if need be [%(default)s]")
    add_server_options(parser)
    add_policy_options(parser)
    add("--sample", action="store_true", help="draw the answer instead of taking the most probable tokens")
    add("--temperature", type=above_zero, metavar="X", help="of --sample [the run's own, or 1]")
    add("--seed", type=seed, metavar="N", help="of --sample [0]")
    add("--mesh", default="1x1", type=_mesh, help="1xTENSOR: a large policy on several devices [%(default)s]")
    return parser


def _check_together(parser: OneLineParser, args: argparse.Namespace) -> None:
    """Exits with an error if options conflict."""
    if not args.sample and (args.temperature is not None or args.seed is not None):
        parser.error("--temperature and --seed require --sample")
    asked = args.image is not None or bool(args.query) or args.queries is not None
    if args.demo and asked:
        parser.error("--demo asks on its page: expected neither --image nor --query nor --queries beside it")
    if args.demo and importlib.util.find_spec("gradio") is None:
        parser.error(
            "--demo: needs Gradio, which is not installed: in a clone, pip install -c constraints.txt -e '.[demo]'"
        )
    if not args.demo and args.image is None:
        parser.error("the following arguments are required: --image")
    if not args.demo and not args.query and args.queries is None:
        parser.error(_NO_QUESTION)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code. On bad input: 2, one line, nothing written."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check_together(parser, args)
    try:
        check_folder(local_path(args.out, "--out", "write to a disk and copy it from there"), f"--out={args.out}")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns about read-only access, which is intended.
        prepare_cpu(args.mesh)
        run(args)
    except _USER_ERRORS as error:
        return complain(parser, error)
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
