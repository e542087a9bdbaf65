"""SAM 2 for whoever asks a policy outside of training: which server, what it is shown, what it makes of an answer."""

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
# MPO: a JPEG with further pictures behind it, such as a depth or a brightness map; so telephones store photographs.
_PHOTOGRAPHS = ("JPEG", "MPO")


@dataclass(frozen=True)
class Found:
    """What SAM 2 made of an answer.

    Attributes:
      mask: of the picture's size; empty for an answer without objects, None where nobody made one.
      model_score: SAM 2's own estimate of the IoU; 0 without objects or mask.
      model: who made it; empty without.
      error: why an answer with objects has no mask.
      seen: the size at which SAM 2 saw the picture: its own, or less where its server takes no larger ones. None where
        it was not asked.
    """

    mask: RleMask | None
    model_score: float = 0.0
    model: str = ""
    error: str = ""
    seen: Frame | None = None


def greet(server: str, access: Access) -> None:
    """Raises RewardServerError unless a server that runs elsewhere is there: before anybody waits for a policy."""
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
    """A client of the server that ``--server`` means, "local" or addresses, once it, or one of several, serves.

    A local one is started and stopped; its log is kept if it fails.

    Args:
      sam: what a local server loads.
      say: is told whom this waits for.
      advice: what the user can do if a local one dies.
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
    """Asks the server that ``--server`` means, which is connected to, or started, when it is first needed.

    A local one that has died is started again for the next answer. Use it as a context manager.
    """

    def __init__(self, server: str, access: Access, sam: Callable[[], str], say: Callable[[str], None]) -> None:
        """Nothing is started yet; ``sam`` says what a local server loads, ``say`` whom this waits for."""
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
        """Whether anybody is asked for masks at all."""
        return self._server != "none"

    def __call__(self, name: str, stored: bytes, upright: Image.Image, objects: tuple[ObjectPrompt, ...]) -> Found:
        """The mask for an answer's objects, in pixels of the upright picture; ``segment`` has the errors."""
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
    """The picture for the server, which takes pictures as stored and drops transparency, and its size there.

    Where that is not what the policy sees (a rotation in the EXIF data, transparent or 16-bit pixels), or is too large
    for the server, the picture is encoded anew as it is seen: a JPEG as JPEG, as is what is too large as PNG, scaled
    down where it has to be.

    Returns:
      None where the server's limits leave no room for any picture.
    """
    stored, frame = Image.open(io.BytesIO(data)), Frame(*upright.size)
    if len(data) <= most_bytes and frame.width * frame.height <= most_pixels:
        # Where the server's way of reading it fails, it is not as seen.
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
        if lossy:  # a file's size goes about with its pixels; a tenth less makes up for the "about"
            room = 0.9 * frame.width * frame.height * most_bytes / len(image)
        lossy = True


def _within(frame: Frame, most: float) -> Frame:
    """The size brought down to at most so many pixels, or to a single one; its shape stays as far as that goes."""
    while 1 < (pixels := frame.width * frame.height) > most:
        shrink = math.sqrt(most / pixels)
        frame = Frame(max(1, int(frame.width * shrink)), max(1, int(frame.height * shrink)))
    return frame


def encode_mask(mask: np.ndarray) -> RleMask:
    """A bool ``[height, width]`` mask as run lengths."""
    return RleMask(mask.shape[0], mask.shape[1], encode_counts(mask))


def segment(
    client: RewardClient, name: str, stored: bytes, upright: Image.Image, objects: tuple[ObjectPrompt, ...]
) -> Found:
    """SAM 2's mask for an answer's objects, in pixels of the upright picture, however large that is.

    Args:
      client: of a server that serves, or of several.
      name: of the picture, for messages.
      stored: its file; ``upright`` is what the policy sees of it.
      objects: in pixels of ``upright``.

    Raises:
      RewardServiceAway: no server serves now, or it took too long.
      RewardServerError: it speaks another version, answers nonsense, or takes no picture of any size.
    """
    info, frame = client.info(loaded=True), Frame(*upright.size)
    fitting = as_seen(stored, upright, info.max_image_bytes, info.max_image_pixels)
    if fitting is None:
        raise RewardServerError(
            f"{name}: reward server {info.address} takes at most {info.max_image_pixels} pixels in "
            f"{info.max_image_bytes} bytes, expected room for a picture"
        )
    image, seen = fitting
    # The server itself brings coordinates from the frame that they are in to the pixels of what it is shown.
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
