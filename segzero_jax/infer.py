"""``python -m segzero_jax.infer --image F --query T``: the policy thinks and points, SAM 2 makes the mask.

The policy sees the picture upright and squashed to its own size; its answer is brought to the pixels of the upright
picture, which is also what SAM 2 is shown. All files are written at the end, together.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from pycocotools import mask as coco

from segzero_jax.asking import default_sam, find_checkpoint, load, respond
from segzero_jax.config import ConfigError, OneLineParser, RewardConfig
from segzero_jax.evaluation import mask_row, object_rows
from segzero_jax.frames import rescale_object
from segzero_jax.local_server import local_server
from segzero_jax.mesh import MeshError, make_mesh, parse_mesh, prepare_cpu
from segzero_jax.model.weights import CheckpointError
from segzero_jax.overlay import Marks, decode_mask, draw
from segzero_jax.processor import ImageError, PromptTooLong, decode_image
from segzero_jax.prompt import WORDINGS, Answer, parse_answer
from segzero_jax.reward_channel import Access, RewardServerError, read_access
from segzero_jax.reward_client import RewardClient
from segzero_jax.types import Example, Frame, ObjectPrompt, RleMask

_HELLO_S = 15.0
_STARTUP_S = 600.0
_ANSWER_S = 300.0
_ACCESS = {
    "ca_file": "PEM certificates that vouch for the server's; turns TLS on",
    "cert_file": "own certificate in PEM, for a server that asks for one",
    "key_file": "its private key in PEM",
    "token_file": "holds the word that the server asks for",
    "tls_name": "the name in the server's certificate where it is not the host in --server",
}


class InferError(ValueError):
    """Input that cannot be answered; the message is one line."""


# What a user can get wrong; anything else is a bug and keeps its traceback.
_USER_ERRORS = (
    *(InferError, ConfigError, MeshError, CheckpointError, ImageError, PromptTooLong, RewardServerError),
    OSError,
)


@dataclass(frozen=True)
class Found:
    """What SAM 2 made of an answer.

    Attributes:
      mask: of the picture's size; empty for an answer without objects, None where nobody made one.
      model_score: SAM 2's own estimate of the IoU; 0 without objects or mask.
      model: who made it; empty without.
      error: why an answer with objects has no mask.
    """

    mask: RleMask | None
    model_score: float = 0.0
    model: str = ""
    error: str = ""


def as_seen(data: bytes, upright: Image.Image) -> bytes:
    """The picture for the server, which takes pictures as stored and drops transparency.

    Where that is not what the policy sees (a rotation in the EXIF data, transparent or 16-bit pixels), the picture is
    encoded anew as it is seen: a JPEG as JPEG, since a photograph may be too large for the server as PNG.
    """
    stored = Image.open(io.BytesIO(data))
    pixels = stored.convert("RGB")
    if pixels.size == upright.size and pixels.tobytes() == upright.tobytes():
        return data
    buffer = io.BytesIO()
    if stored.format == "JPEG":
        upright.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        upright.save(buffer, "PNG")
    return buffer.getvalue()


def segment(client: RewardClient, name: str, image: bytes, frame: Frame, objects: tuple[ObjectPrompt, ...]) -> Found:
    """SAM 2's mask for an answer's objects.

    Args:
      client: of a server, waited for until it serves.
      name: of the picture, for messages.
      image: as the server shall see it; ``frame`` is its size.
      objects: in pixels of ``frame``.

    Raises:
      InferError: the picture is larger than the server takes.
      RewardServerError: the server went away, speaks another version, or answers nonsense.
    """
    info = client.wait_until_serving(_STARTUP_S)[0]
    if len(image) > info.max_image_bytes or frame.width * frame.height > info.max_image_pixels:
        raise InferError(
            f"{name}: {frame.width}x{frame.height} pixels in {len(image)} bytes, the reward server takes at most "
            f"{info.max_image_pixels} pixels in {info.max_image_bytes} bytes: shrink the picture"
        )
    (answer,) = client.segment(image, frame, [objects], id="infer")
    if answer.error:
        return Found(None, model=info.model, error=answer.error)
    mask = answer.mask
    if mask is None or (mask.width, mask.height) != (frame.width, frame.height):
        got = "none" if mask is None else f"{mask.width}x{mask.height}"
        raise RewardServerError(
            f"reward server {info.address}: expected a mask of {frame.width}x{frame.height} pixels, got {got}"
        )
    return Found(mask, answer.model_score, info.model)


@contextlib.contextmanager
def _client(server: str, access: Access, sam: str) -> Iterator[RewardClient]:
    """A client of the server that ``--server`` means; a local one is started and stopped, its log kept if it fails."""
    with contextlib.ExitStack() as stack:
        if server != "local":
            yield stack.enter_context(RewardClient(server, _ANSWER_S, access=access))
            return
        folder = Path(tempfile.mkdtemp(prefix="segzero_infer_"))
        address = stack.enter_context(
            local_server(
                sam,
                folder / "reward_server.log",
                threads=0,
                startup_timeout_s=_STARTUP_S,
                if_it_dies="try again, a smaller --sam, or --server=none for an answer without a mask",
            )
        )
        yield stack.enter_context(RewardClient(address, _ANSWER_S, wait_for_ready=False))
    shutil.rmtree(folder)


def _empty_mask(frame: Frame) -> RleMask:
    rle = coco.encode(np.zeros((frame.height, frame.width), np.uint8, order="F"))
    return RleMask(frame.height, frame.width, rle["counts"].decode())


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Writes files, by name, so that each is there whole; where one cannot be written, none is. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            temporary[name].write_bytes(content)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    """One picture and question from the command line to the files."""
    data = _read(args.image)
    picture = decode_image(data, str(args.image))
    frame = Frame(*picture.size)
    example = Example(str(args.image), data, frame, args.query, (), None)
    access = read_access(RewardConfig(server=args.server, **{key: getattr(args, key) for key in _ACCESS}))
    if args.server not in ("local", "none"):
        with RewardClient(args.server, _HELLO_S, access=access) as hello:
            hello.info()  # Nobody should wait for the policy to learn that the server is not there.
    name = find_checkpoint(args.checkpoint)
    _say(f"policy: {name}" + ("" if args.checkpoint else " (the default: runs/toy once it has a checkpoint, else toy)"))
    with jax.set_mesh(make_mesh(args.mesh)):
        loaded = load(name, args.image_size, args.prompt)
        text, finished = respond(loaded, example, (args.seed or 0) if args.sample else None, args.temperature)
    answer = parse_answer(text)
    side = loaded.config.data.image_size
    objects = tuple(rescale_object(obj, Frame(side, side), frame) for obj in answer.objects)
    _say_answer(text, answer, objects, finished, loaded.config.rollout.max_response_tokens)
    found = Found(None)
    if not objects:
        found = Found(_empty_mask(frame))
    elif args.server != "none":
        with _client(args.server, access, args.sam or default_sam(loaded.config)) as client:
            found = segment(client, str(args.image), as_seen(data, picture), frame, objects)
    mask = None if found.mask is None else decode_mask(vars(found.mask))
    _say_mask(found, mask)
    row = {
        "image": str(args.image),
        "question": args.query,
        "text": text,
        "thinking": answer.thinking,
        "well_formed": answer.well_formed,
        "objects": object_rows(objects),
        "frame": [frame.width, frame.height],
        "answer_frame": [side, side],
        "mask": mask_row(found.mask),
        "model_score": found.model_score,
        "sam": found.model,
        "error": found.error,
        "checkpoint": name,
    }
    out, stem = Path(args.out).expanduser(), args.image.stem
    marks = Marks([obj.box for obj in objects], [point for obj in objects for point in obj.points], mask)
    files = {f"{stem}_overlay.png": _png(draw(picture, marks))}
    if mask is not None:
        files[f"{stem}_mask.png"] = _png(Image.fromarray(mask.astype(np.uint8) * 255))
    files[f"{stem}.json"] = (json.dumps(row, indent=1, allow_nan=False) + "\n").encode()
    write_together(out, files)
    _say("wrote " + ", ".join(str(out / name) for name in files))


def _read(path: Path) -> bytes:
    if path.is_dir() or not path.exists():
        raise InferError(f"--image={path}: no such file, expected a PNG, JPEG or WebP")
    return path.read_bytes()


def _say_answer(text: str, answer: Answer, objects: Sequence[ObjectPrompt], finished: bool, limit: int) -> None:
    if answer.thinking is not None:
        _say(f"thinking: {answer.thinking.strip()}")
    cut = "" if finished else f" (cut at {limit} tokens)"
    if not answer.well_formed:
        _say(f"answer: malformed{cut}, there is nothing to segment; the policy said: {text.strip()}")
    elif not objects:
        _say("answer: no such object in the picture")
    for obj in objects:
        points = " and ".join(_numbers(point) for point in obj.points)
        _say(f"answer: box {_numbers(obj.box)}, point {points}, in pixels of the picture")


def _say_mask(found: Found, mask: np.ndarray | None) -> None:
    if found.error:
        _say(f"mask: none, SAM 2 refused the answer: {found.error}")
    elif mask is None:
        _say("mask: none was asked for (--server=none)")
    else:
        by = f", SAM 2 ({found.model}) expects an IoU of {found.model_score:.2f}" if found.model else ""
        _say(f"mask: {mask.sum()} of {mask.size} pixels{by}")


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"


def _say(text: str) -> None:
    """Prints what a model or a file name may have made up; nothing in it steers the terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    print(shown, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _query(text: str) -> str:
    if not text.strip(" \t\r\n."):
        raise argparse.ArgumentTypeError(f"expected a question such as 'the red circle', got {text!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of bytes that are not UTF-8
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, got {text!r}")
    return text


def _server(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("expected local, none or host:port, got nothing")
    return text


def _mesh(text: str) -> str:
    try:
        data, fsdp, tensor = parse_mesh(text)
    except MeshError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if data * fsdp != 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1xTENSOR, such as 1x{data * fsdp * tensor}: one picture")
    return text


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m segzero_jax.infer",
        description="Asks a policy for something in a picture: it thinks and points, SAM 2 makes the mask. "
        "Writes STEM_overlay.png, STEM_mask.png (0 and 255) and STEM.json, STEM being the picture's name.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--image", required=True, type=Path, metavar="F", help="a PNG, JPEG or WebP")
    add("--query", required=True, type=_query, metavar="T", help="what to find, such as 'the red circle'")
    add(
        "--checkpoint",
        metavar="D",
        help="a run directory, one of its checkpoints/STEP, a Hugging Face directory or hub id, or toy "
        "[the newest checkpoint of runs/toy, else toy]",
    )
    add("--out", default="infer", metavar="DIR", help="where files are written; made if need be [%(default)s]")
    add(
        *("--server", "--reward.server"),
        default="local",
        type=_server,
        metavar="S",
        help="who makes the mask: local starts a SAM 2 server, host:port uses one, none does without [%(default)s]",
    )
    for key, meaning in _ACCESS.items():
        add(f"--reward.{key}", dest=key, default="", metavar="F", help=meaning)
    add(
        "--sam",
        metavar="MODEL",
        help="what a local server loads: toy, a hub id or a directory [the run's own, toy for toy, hiera-large]",
    )
    add("--image-size", type=int, metavar="N", help="side of the picture for the policy [the run's; toy 112; 840]")
    add(
        "--prompt",
        choices=tuple(WORDINGS),
        help="wording of the question [the run's own; toy for toy; vision_reasoner]",
    )
    add("--sample", action="store_true", help="draw the answer instead of taking the most probable tokens")
    add("--temperature", type=_above_zero, metavar="X", help="of --sample [the run's own, or 1]")
    add("--seed", type=int, metavar="N", help="of --sample [0]")
    add("--mesh", default="1x1", type=_mesh, help="1xTENSOR: a large policy on several devices [%(default)s]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. On bad input: 2, one line, nothing written."""
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.sample and (args.temperature is not None or args.seed is not None):
        parser.error("--temperature and --seed are of a drawn answer: expected --sample beside them")
    if args.seed is not None and not 0 <= args.seed < 2**32:
        parser.error(f"--seed={args.seed}: expected 0 to {2**32 - 1}")
    try:
        if Path(args.out).expanduser().exists() and not Path(args.out).expanduser().is_dir():
            raise InferError(f"--out={args.out}: is a file, expected a directory")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that a run is only looked at, as is meant.
        prepare_cpu(args.mesh)
        run(args)
    except _USER_ERRORS as error:
        sys.stderr.write(f"{parser.prog}: {_one_line(error)}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{parser.prog}: stopped, nothing written\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
