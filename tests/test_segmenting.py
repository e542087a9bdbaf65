"""What SAM 2 is shown, and what is said when its server dies."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from box_server import PICTURE, encoded, rotated
from PIL import Image

from reward_server.codec import decode_image
from segzero_jax import segmenting
from segzero_jax.processor import decode_image as decode_picture
from segzero_jax.reward_channel import Access, RewardServiceAway


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (encoded(PICTURE), None),
        (encoded(PICTURE, "JPEG"), None),
        (encoded(PICTURE.convert("L")), None),
        (rotated("JPEG", quality=95), "JPEG"),
        (rotated("WEBP", lossless=True), "PNG"),
        (encoded(Image.fromarray(np.full((5, 7), 40_000, np.uint16))), "PNG"),
    ],
    ids=["PNG", "JPEG", "grey", "rotated JPEG", "rotated WebP", "16 bits"],
)
def test_only_what_the_server_would_see_otherwise_is_encoded_anew(data: bytes, kind: str | None) -> None:
    upright = decode_picture(data, "it")
    sent = segmenting.as_seen(data, upright)
    assert (sent is data) == (kind is None)
    if kind:
        assert Image.open(io.BytesIO(sent)).format == kind
    difference = np.abs(decode_image(sent).astype(int) - np.asarray(upright))
    assert difference.mean() < (3 if kind == "JPEG" else 1e-9)


def test_a_local_server_that_dies_is_told_in_words_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    @contextmanager
    def dies(model: str, log: Path, **options: object) -> Iterator[str]:
        told.append(options["if_it_dies"])
        raise RewardServiceAway("local reward server died")
        yield

    monkeypatch.setattr(segmenting, "local_server", dies)
    with pytest.raises(RewardServiceAway), segmenting.connected("local", Access(), "toy"):
        pytest.fail("served")
    assert "--server=none" in told[0]
    assert "train" not in told[0]
    assert "--resume" not in told[0]
