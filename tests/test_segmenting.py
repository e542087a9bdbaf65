"""What SAM 2 is shown, and what is said when its server dies."""

import contextlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from box_server import FRAME, PICTURE, BoxServer, encoded, rotated, serving
from fake_reward_server import free_port
from PIL import Image

from reward_server.codec import decode_image
from segzero_jax import segmenting
from segzero_jax.data.pictures import written
from segzero_jax.overlay import decode_mask
from segzero_jax.patches import decode_image as decode_picture
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway
from segzero_jax.segmenting import Segmenter, as_seen
from segzero_jax.types import Frame, ObjectPrompt

OBJECTS = (ObjectPrompt((1.0, 2.0, 30.0, 40.0), ((9.0, 9.0),)),)
MOST_BYTES, MOST_PIXELS = 2**24, 16_000_000  # as the real server


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(PICTURE), None),
        (encoded(PICTURE, "JPEG"), None),
        (encoded(PICTURE.convert("L")), None),
        (rotated("JPEG", quality=95), "JPEG"),
        (rotated("MPO", quality=95, save_all=True, append_images=[PICTURE]), "JPEG"),
        (encoded(PICTURE, "MPO", quality=95, save_all=True, append_images=[PICTURE]), None),
        (rotated("WEBP", lossless=True), "PNG"),
        (encoded(Image.fromarray(np.full((5, 7), 40_000, np.uint16))), "PNG"),
    ],
    ids=["PNG", "JPEG", "grey", "rotated JPEG", "rotated MPO", "MPO", "rotated WebP", "16 bits"],
)
def test_only_what_the_server_would_see_otherwise_is_encoded_anew(data: bytes, kind: str | None) -> None:
    upright = decode_picture(data, "it")
    most_bytes = MOST_BYTES if kind else len(data)
    sent, size = as_seen(data, upright, most_bytes, upright.width * upright.height)
    assert size == Frame(*upright.size)
    assert (sent is data) == (kind is None)
    if kind:
        assert Image.open(io.BytesIO(sent)).format == kind
    difference = np.abs(decode_image(sent).astype(int) - np.asarray(upright))
    assert difference.mean() < (3 if kind == "JPEG" else 1e-9)


def test_what_is_too_large_a_file_for_the_server_is_sent_as_jpeg() -> None:
    """A large PNG, upright or not; a JPEG that is small enough stays as it is."""
    turned, upright = rotated("PNG"), encoded(PICTURE)
    photograph, room = encoded(PICTURE, "JPEG", quality=95), len(written(PICTURE, lossy=True))
    assert len(photograph) <= room < min(len(turned), len(upright))
    for data in (turned, upright):
        sent, size = as_seen(data, decode_picture(data, "it"), room, MOST_PIXELS)
        assert size == FRAME
        assert Image.open(io.BytesIO(sent)).format == "JPEG"
        # A scene is noisy, and noise is what JPEG changes most.
        assert np.abs(decode_image(sent).astype(int) - np.asarray(decode_picture(data, "it"))).mean() < 5
    assert as_seen(photograph, decode_picture(photograph, "it"), room, MOST_PIXELS)[0] is photograph


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_larger_than_the_server_takes_is_scaled_down(kind: str) -> None:
    """As little as its limits ask for, in its own shape; a file that is still too large is scaled down further."""
    for data in (encoded(PICTURE, kind, quality=95), rotated(kind, quality=95)):
        sent, size = as_seen(data, PICTURE, MOST_BYTES, 12_000)
        assert (size, Image.open(io.BytesIO(sent)).format) == (Frame(97, 122), kind)
        smaller = np.asarray(PICTURE.resize((97, 122)), int)
        assert np.abs(decode_image(sent).astype(int) - smaller).mean() < 8
        sent, size = as_seen(data, PICTURE, 5000, MOST_PIXELS)
        assert 2500 < len(sent) <= 5000
        assert (size.width, size.height) == decode_image(sent).shape[1::-1]
        assert size.width / size.height == pytest.approx(PICTURE.width / PICTURE.height, rel=0.05)
    for most_bytes, most_pixels in ((0, MOST_PIXELS), (100, MOST_PIXELS), (MOST_BYTES, 0)):
        assert as_seen(data, PICTURE, most_bytes, most_pixels) is None


@pytest.mark.parametrize(("size", "most", "within"), [((1, 5000), 100, (1, 100)), ((3, 7000), 9, (1, 9))])
def test_a_narrow_picture_becomes_short(size: tuple[int, int], most: int, within: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    assert as_seen(encoded(picture), picture, MOST_BYTES, most)[1] == Frame(*within)


def test_the_mask_of_a_picture_that_was_scaled_down_has_its_own_size() -> None:
    """The server is told of the objects where they are in the picture itself; it brings them to what it sees."""
    server = BoxServer(pixels=12_000)
    with serving(server) as here, Segmenter(here, Access(), lambda: "toy", print) as segmenter:
        found = segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
    assert decode_image(server.seen[0].image.data).shape == (122, 97, 3)
    assert (found.seen, found.model, found.model_score) == (Frame(97, 122), "boxes", 0.5)
    mask, wanted = decode_mask(vars(found.mask)), np.zeros((FRAME.height, FRAME.width), bool)
    wanted[2:40, 1:30] = True
    assert mask.shape == wanted.shape
    rows, columns = np.nonzero(mask)
    corners = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
    np.testing.assert_allclose(corners, (2, 40, 1, 30), atol=2)
    assert mask.sum() == (corners[1] - corners[0]) * (corners[3] - corners[2])

    server = BoxServer(pixels=0)
    with serving(server) as here, Segmenter(here, Access(), lambda: "toy", print) as segmenter:
        with pytest.raises(RewardServerError, match=r"^it: reward server .* takes at most 0 pixels in 1048576 bytes"):
            segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
        assert not server.seen


def test_a_local_server_that_dies_is_told_in_words_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    @contextlib.contextmanager
    def dies(model: str, log: Path, **options: object) -> Iterator[str]:
        told.append(options["if_it_dies"])
        raise RewardServiceAway("local reward server died")
        yield

    monkeypatch.setattr(segmenting, "local_server", dies)
    with pytest.raises(RewardServiceAway), segmenting.connected("local", Access(), "toy", print):
        pytest.fail("served")
    assert "--server=none" in told[0]
    assert "train" not in told[0]
    assert "--resume" not in told[0]


def test_of_a_local_server_nothing_is_left_behind_but_the_log_of_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    @contextlib.contextmanager
    def starts(model: str, log: Path, **options: object) -> Iterator[str]:
        log.write_text(model)
        with serving(BoxServer()) as here:
            yield here

    monkeypatch.setattr(segmenting, "local_server", starts)
    with segmenting.connected("local", Access(), "toy", print):
        assert [path.read_text() for path in tmp_path.rglob("*.log")] == ["toy"]
    assert not list(tmp_path.iterdir())
    with pytest.raises(RewardServiceAway), segmenting.connected("local", Access(), "large", print):
        raise RewardServiceAway("local reward server died")
    assert [path.read_text() for path in tmp_path.rglob("*.log")] == ["large"]


def test_a_local_server_that_has_died_is_started_again_for_the_next_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[contextlib.ExitStack] = []

    @contextlib.contextmanager
    def starts(model: str, log: Path, **options: object) -> Iterator[str]:
        log.write_text(model)
        with contextlib.ExitStack() as stack:
            started.append(stack)
            yield stack.enter_context(serving(BoxServer()))

    monkeypatch.setattr(segmenting, "local_server", starts)
    with Segmenter("local", Access(), lambda: "toy", print) as segmenter:
        for _ in range(2):
            assert segmenter("it", encoded(PICTURE), PICTURE, OBJECTS).model == "boxes"
        started[0].close()
        with pytest.raises(RewardServiceAway):
            segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
        assert segmenter("it", encoded(PICTURE), PICTURE, OBJECTS).model == "boxes"
    assert len(started) == 2


def test_one_of_several_servers_is_enough_for_every_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the other one, neither at first nor later."""
    monkeypatch.setattr(segmenting, "STARTUP_S", 60.0)
    said: list[str] = []
    away, start = f"127.0.0.1:{free_port()}", time.monotonic()
    with serving(BoxServer()) as here, Segmenter(f"{away},{here}", Access(), lambda: "toy", said.append) as segmenter:
        for _ in range(3):
            found = segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
            assert (found.model, found.error) == ("boxes", "")
        assert time.monotonic() - start < 30
    assert len(said) == 1
    assert said[0].startswith(f"continuing without reward server {away}: unreachable")


def test_that_no_server_is_there_any_more_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmenting, "STARTUP_S", 60.0)
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(serving(BoxServer()))
        with Segmenter(here, Access(), lambda: "toy", print) as segmenter:
            segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
            stack.close()
            for _ in range(2):
                with pytest.raises(RewardServiceAway, match=f"{here}: unreachable"):
                    segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
    assert time.monotonic() - start < 30
