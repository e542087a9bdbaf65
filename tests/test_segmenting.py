"""What SAM 2 is shown, and what is said when its server dies."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from box_server import PICTURE, BoxServer, encoded, rotated, serving
from fake_reward_server import free_port
from PIL import Image

from reward_server.codec import decode_image
from segzero_jax import segmenting
from segzero_jax.data import pictures
from segzero_jax.processor import decode_image as decode_picture
from segzero_jax.reward_channel import Access, RewardServiceAway
from segzero_jax.segmenting import Segmenter
from segzero_jax.types import ObjectPrompt

OBJECTS = (ObjectPrompt((1.0, 2.0, 30.0, 40.0), ((9.0, 9.0),)),)


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
    sent = segmenting.as_seen(data, upright)
    assert (sent is data) == (kind is None)
    if kind:
        assert Image.open(io.BytesIO(sent)).format == kind
    difference = np.abs(decode_image(sent).astype(int) - np.asarray(upright))
    assert difference.mean() < (3 if kind == "JPEG" else 1e-9)


def test_what_is_too_large_for_the_server_is_sent_as_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large PNG, upright or not; a JPEG that is small enough stays as it is."""
    turned, upright = rotated("PNG"), encoded(PICTURE)
    photograph = encoded(PICTURE, "JPEG", quality=95)
    monkeypatch.setattr(segmenting, "MAX_BYTES", len(photograph))
    monkeypatch.setattr(pictures, "MAX_BYTES", len(photograph))
    assert len(photograph) < min(len(turned), len(upright))
    for data in (turned, upright):
        sent = segmenting.as_seen(data, decode_picture(data, "it"))
        assert Image.open(io.BytesIO(sent)).format == "JPEG"
        # A scene is noisy, and noise is what JPEG changes most.
        assert np.abs(decode_image(sent).astype(int) - np.asarray(decode_picture(data, "it"))).mean() < 5
    assert segmenting.as_seen(photograph, decode_picture(photograph, "it")) is photograph


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
    assert said[0].startswith(f"going on without reward server {away}: unreachable")


def test_that_no_server_is_there_any_more_is_told_at_once() -> None:
    start = time.monotonic()
    with contextlib.ExitStack() as stack:
        here = stack.enter_context(serving(BoxServer()))
        with Segmenter(here, Access(), lambda: "toy", print) as segmenter:
            segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
            stack.close()
            with pytest.raises(RewardServiceAway, match=f"{here}: unreachable"):
                segmenter("it", encoded(PICTURE), PICTURE, OBJECTS)
    assert time.monotonic() - start < 30
