"""SAM 2 for using a policy outside of training: choosing a server, encoding images for it, and requesting masks."""

import contextlib
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from segzero_jax.data.pictures import fit_mask, written
from segzero_jax.data.targets import encode_counts
from segzero_jax.decoding import UNDECODABLE
from segzero_jax.local_server import local_server
from segzero_jax.overlay import decode_mask
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway
from segzero_jax.reward_client import RewardClient
from segzero_jax.types import Frame, ObjectPrompt, RleMask

STARTUP_S = 600.0
_ANSWER_S = 300.0
_HELLO_S = 15.0
# MPO: a JPEG followed by further images, such as a depth or a brightness map; phones store photographs this way.
_PHOTOGRAPHS = ("JPEG", "MPO")


@dataclass(frozen=True)
class Found:
    """SAM 2's result for an answer.

    Attributes:
      mask: mask of the image's size; empty for an answer without objects, None if none was made.
      model_score: SAM 2's own estimate of the IoU; 0 without objects or mask.
      model: the SAM 2 that was asked; empty if none was.
      error: why an answer with objects has no mask.
      seen: the size at which SAM 2 saw the image: its own, or smaller if its server accepts no larger ones. None if it
        was not asked.
    """

    mask: RleMask | None
    model_score: float = 0.0
    model: str = ""
    error: str = ""
    seen: Frame | None = None


def greet(server: str, access: Access) -> None:
    """Raises RewardServerError if a server that runs elsewhere is not reachable; call it before loading a policy."""
    if server not in ("local", "none"):
        with RewardClient(server, _HELLO_S, access=access) as hello:
            hello.info()


@contextlib.contextmanager
def connected(
    server: str,
    access: Access,
    sam: str,
    say: Callable[[str], None],
    advice: str = "try again, a smaller --sam, or --server=none for an answer without a mask",
) -> Iterator[RewardClient]:
    """A client of the server given by ``--server``, "local" or addresses, once it, or one of several, serves.

    A local server is started and stopped; its log is kept if it fails.

    Args:
      sam: the SAM 2 that a local server loads.
      say: is told which servers this waits for.
      advice: what the user can do if a local server dies.
    """
    local = server == "local"
    with contextlib.ExitStack() as stack:
        if local:
            folder = Path(tempfile.mkdtemp(prefix="segzero_sam_"))
            log = folder / "reward_server.log"
            served = local_server(sam, log, startup_timeout_s=STARTUP_S, if_it_dies=advice)
            server, access = stack.enter_context(served), Access()
        late = "choose a smaller --sam" if local else "look at its log"
        client = stack.enter_context(RewardClient(server, _ANSWER_S, not local, access, late))
        client.wait_until_serving(_HELLO_S if local else STARTUP_S, say, everyone_s=0)
        yield client
    if local:
        shutil.rmtree(folder)


class Segmenter:
    """Asks the server given by ``--server``, which is connected to, or started, when it is first needed.

    A local server that has died is restarted for the next answer. Use it as a context manager.
    """

    def __init__(self, server: str, access: Access, sam: Callable[[], str], say: Callable[[str], None]) -> None:
        """Starts nothing yet; ``sam`` returns what a local server loads, ``say`` is told whom this waits for."""
        self._server, self._access, self._sam, self._say = server, access, sam, say
        self._stack = contextlib.ExitStack()
        self._client: RewardClient | None = None

    def __enter__(self) -> "Segmenter":
        self._stack.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)  # type: ignore[arg-type]

    @property
    def makes_masks(self) -> bool:
        """Whether masks are requested at all."""
        return self._server != "none"

    def __call__(self, name: str, stored: bytes, upright: Image.Image, objects: tuple[ObjectPrompt, ...]) -> Found:
        """The mask for an answer's objects, in pixels of the upright image. Raises as ``segment`` does."""
        if not self.makes_masks:
            return Found(None)
        if self._client is None:
            self._client = self._stack.enter_context(connected(self._server, self._access, self._sam(), self._say))
        try:
            return segment(self._client, name, stored, upright, objects)
        except RewardServiceAway as error:
            if self._server == "local":
                self._client = None
                self._stack.__exit__(type(error), error, error.__traceback__)  # raises how it died
            raise


def as_seen(data: bytes, upright: Image.Image, most_bytes: int, most_pixels: int) -> tuple[bytes, Frame] | None:
    """The image for the server, which reads images as stored and drops transparency, and its size there.

    If that is not what the policy sees (a rotation in the EXIF data, transparent or 16-bit pixels), or is too large for
    the server, the image is re-encoded as the policy sees it: as PNG, or as JPEG if it was one or is too large as PNG,
    and scaled down if necessary.

    Returns:
      The encoded image and its size, or None if the server's limits leave no room for any image.
    """
    stored, frame = Image.open(io.BytesIO(data)), Frame(*upright.size)
    if len(data) <= most_bytes and frame.width * frame.height <= most_pixels:
        # If reading it as the server does fails, the policy does not see it as stored.
        with contextlib.suppress(*UNDECODABLE):
            pixels = stored.convert("RGB")
            if pixels.size == upright.size and pixels.tobytes() == upright.tobytes():
                return data, frame
    lossy, room = stored.format in _PHOTOGRAPHS, float(most_pixels)
    while True:
        frame = _within(frame, room)
        if frame.width * frame.height > room:
            return None
        size = (frame.width, frame.height)
        image = written(upright if size == upright.size else upright.resize(size, Image.Resampling.LANCZOS), lossy)
        if len(image) <= most_bytes:
            return image, frame
        if lossy:  # file size is roughly proportional to pixels; a tenth less makes up for the "roughly"
            room = 0.9 * frame.width * frame.height * most_bytes / len(image)
        lossy = True


def _within(frame: Frame, most: float) -> Frame:
    """The size scaled down to at most ``most`` pixels, but at least one; keeps the aspect ratio as far as possible."""
    while 1 < (pixels := frame.width * frame.height) > most:
        shrink = math.sqrt(most / pixels)
        frame = Frame(max(1, int(frame.width * shrink)), max(1, int(frame.height * shrink)))
    return frame


def encode_mask(mask: np.ndarray) -> RleMask:
    """The run-length encoding of a bool ``[height, width]`` mask."""
    return RleMask(mask.shape[0], mask.shape[1], encode_counts(mask))


def segment(
    client: RewardClient, name: str, stored: bytes, upright: Image.Image, objects: tuple[ObjectPrompt, ...]
) -> Found:
    """SAM 2's mask for an answer's objects, in pixels of the upright image, however large that is.

    Args:
      client: client of one or several serving servers.
      name: name of the image, for messages.
      stored: the image file; ``upright`` is what the policy sees of it.
      objects: the objects, in pixels of ``upright``.

    Raises:
      RewardServiceAway: no server serves now, or it took too long.
      RewardServerError: the server speaks another version, answers nonsense, or accepts no image of any size.
    """
    info, frame = client.info(loaded=True), Frame(*upright.size)
    fitting = as_seen(stored, upright, info.max_image_bytes, info.max_image_pixels)
    if fitting is None:
        raise RewardServerError(
            f"{name}: reward server {info.address} takes at most {info.max_image_pixels} pixels in "
            f"{info.max_image_bytes} bytes, expected room for a picture"
        )
    image, seen = fitting
    # The server itself converts coordinates from their frame to pixels of the image it is sent.
    (answer,) = client.segment(image, frame, [objects], id="infer")
    if answer.error:
        return Found(None, model=info.model, error=answer.error, seen=seen)
    mask = answer.mask
    if mask is None or (mask.width, mask.height) != (seen.width, seen.height):
        got = "none" if mask is None else f"{mask.width}x{mask.height}"
        raise RewardServerError(
            f"reward server {info.address}: expected a mask of {seen.width}x{seen.height} pixels, got {got}"
        )
    if seen != frame:
        mask = encode_mask(fit_mask(decode_mask(vars(mask)), frame))
    return Found(mask, answer.model_score, info.model, seen=seen)
