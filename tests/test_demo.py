"""The page of ``infer --demo`` over HTTP: an answer that grows, errors in words, nothing from elsewhere."""

import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from box_server import FRAME, PICTURE, QUESTION, encoded, rotated
from fake_reward_server import free_port
from gradio.utils import get_upload_folder
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from segzero_jax import demo
from segzero_jax.answering import Answered, Picture
from segzero_jax.prompt import parse_answer
from segzero_jax.reward_channel import Access
from segzero_jax.segmenting import Found, Segmenter
from segzero_jax.types import Frame, ObjectPrompt

TEXT = '<think> a circle at top left </think>\n<answer>[{"bbox_2d": [1,2,30,40], "point_2d": [9,9]}]</answer>'
ASKED: list[tuple[tuple[int, int], str]] = []
STORED: list[bytes] = []


def ask(picture: Picture, question: str) -> Iterator[str | Answered]:
    ASKED.append((picture.upright.size, question))
    STORED.append(picture.stored)
    if question == "the server":
        raise demo.RewardServerError("reward server: unreachable")
    yield TEXT[:14]
    yield TEXT
    mask = np.zeros((picture.frame.height, picture.frame.width), bool)
    mask[2:40, 1:30] = True
    objects = (ObjectPrompt((1.0, 2.0, 30.0, 40.0), ((9.0, 9.0),)),)
    seen = Frame(48, 60) if question == "the large" else picture.frame
    found = Found(None, model="boxes", seen=seen)
    yield Answered(picture, question, TEXT, parse_answer(TEXT), True, 112, objects, found, mask)


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    page = demo.make_page(ask, "a policy")
    yield demo.launch(page, free_port(), wait=False)
    page.close()


def test_a_question_is_answered_while_one_watches(address: str, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    path.write_bytes(encoded(PICTURE))
    client = Client(address, verbose=False, analytics_enabled=False)
    job = client.submit(handle_file(path), QUESTION, api_name="/ask")
    said, drawn, mask, numbers = job.result(timeout=60)
    grown = [state[0] for state in job.outputs()]
    assert grown[0] == "a circ"
    assert grown[-1] == said == "a circle at top left"
    assert ASKED[-1] == (PICTURE.size, QUESTION)
    assert Image.open(drawn).size == PICTURE.size
    pixels = np.asarray(Image.open(mask).convert("L"))
    assert (pixels[2:40, 1:30] == 255).all()
    assert pixels.sum() == 255 * 38 * 29
    assert numbers["frame"] == [FRAME.width, FRAME.height]
    assert numbers["objects"] == [{"box": [1, 2, 30, 40], "points": [[9, 9]]}]
    client.predict(handle_file(path), f"  {QUESTION}\n", api_name="/ask")
    assert ASKED[-1] == (PICTURE.size, QUESTION), "without the space around it"
    for question, words in (("", "A picture and a question are needed"), ("the server", "reward server: unreachable")):
        with pytest.raises(AppError, match=words):
            client.predict(handle_file(path), question, api_name="/ask")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("photo.jpg", rotated("JPEG", quality=95)),
        ("photo.jpg", rotated("MPO", quality=95, save_all=True, append_images=[PICTURE])),
        ("grey.png", encoded(PICTURE.convert("L"))),
        ("scene.webp", encoded(PICTURE, "WEBP")),
    ],
    ids=["turned JPEG", "turned MPO", "grey PNG", "WebP"],
)
def test_a_picture_is_asked_about_as_it_was_uploaded(address: str, tmp_path: Path, name: str, data: bytes) -> None:
    """A photograph written again as PNG would be too large for SAM 2's server."""
    (tmp_path / name).write_bytes(data)
    client = Client(address, verbose=False, analytics_enabled=False)
    client.predict(handle_file(tmp_path / name), QUESTION, api_name="/ask")
    assert STORED[-1] == data
    assert ASKED[-1] == (PICTURE.size, QUESTION), "upright"


def test_a_picture_in_another_format_is_asked_about_too(address: str, tmp_path: Path) -> None:
    (tmp_path / "scene.bmp").write_bytes(encoded(PICTURE, "BMP"))
    (tmp_path / "scene.svg").write_text("<svg/>")
    client = Client(address, verbose=False, analytics_enabled=False)
    client.predict(handle_file(tmp_path / "scene.bmp"), QUESTION, api_name="/ask")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(STORED[-1]))), np.asarray(PICTURE))
    whole = encoded(PICTURE, "BMP")
    (tmp_path / "half.bmp").write_bytes(whole[: len(whole) // 2])
    for name in ("scene.svg", "half.bmp"):
        with pytest.raises(AppError, match="the picture: "):
            client.predict(handle_file(tmp_path / name), QUESTION, api_name="/ask")


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.png", b"", "the picture: no image, expected the bytes of a PNG, JPEG or WebP"),
        ("notes.png", b"no picture", "the picture: image cannot be read"),
        ("notes.txt", b"no picture", "the picture: image cannot be read"),
    ],
)
def test_an_upload_that_is_no_picture_is_told_to_whoever_uploaded_it(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, words: str
) -> None:
    """And to nobody else: nothing stands in the terminal."""
    (tmp_path / name).write_bytes(data)
    client = Client(address, verbose=False, analytics_enabled=False)
    with pytest.raises(AppError, match=words):
        client.predict(handle_file(tmp_path / name), QUESTION, api_name="/ask")
    assert "Traceback" not in "".join(capsys.readouterr())


def asked_by_hand(address: str, image: object) -> str:
    """What the page answers to a picture that is named as no client of Gradio's would."""
    call = f"{address}gradio_api/call/ask"
    event = httpx.post(call, json={"data": [image, QUESTION]}).json()["event_id"]
    return httpx.get(f"{call}/{event}", timeout=60).text


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}], ids=["checked by Gradio", "unmarked"])
def test_a_file_of_this_machine_is_no_upload(address: str, tmp_path: Path, meta: dict[str, object]) -> None:
    private = tmp_path / "private.png"
    private.write_bytes(encoded(PICTURE))
    (link := Path(get_upload_folder(), f"{tmp_path.name}.png")).symlink_to(private)
    asked = len(ASKED)
    for path in (private, link):
        assert "event: error" in asked_by_hand(address, {"path": str(path), **meta})
    assert len(ASKED) == asked


def test_what_is_no_upload_any_more_is_told_in_words(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(get_upload_folder())
    for path in (folder / "gone.png", folder, "/etc/hostname", "a\0b"):
        assert "the picture: was not uploaded to this page" in asked_by_hand(address, {"path": str(path)})
    assert "Traceback" not in "".join(capsys.readouterr())


def test_the_page_says_that_sam_saw_the_picture_smaller(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(demo.gr, "Info", told.append)
    (tmp_path / "scene.png").write_bytes(encoded(PICTURE))
    client = Client(address, verbose=False, analytics_enabled=False)
    for question in (QUESTION, "the large"):
        *_, numbers = client.predict(handle_file(tmp_path / "scene.png"), question, api_name="/ask")
    assert numbers["sam_frame"] == [48, 60]
    assert len(told) == 1
    assert told[0].startswith("SAM 2 saw the picture at 48x60")


@pytest.mark.parametrize(("server", "words"), [("none", "no masks are made"), ("local", "SAM 2 makes the mask")])
def test_the_page_says_who_makes_masks(server: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    monkeypatch.setattr(demo, "launch", lambda page, port: pages.append(page))
    demo.serve(SimpleNamespace(name="a policy"), Segmenter(server, Access(), lambda: "toy", print), 1)
    said = str(pages[0].get_config_file())
    assert words in said
    assert ("SAM 2 makes" in said) == (server == "local")


def test_a_port_that_is_taken_is_told_in_a_line() -> None:
    """Also where it was free when the command began."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for attempt in (demo.check_port, lambda port: demo.launch(demo.make_page(ask, "a policy"), port, wait=False)):
            with pytest.raises(OSError, match=f"^--port={port}: taken; choose another$"):
                attempt(port)
    demo.check_port(port)


def test_nothing_comes_from_elsewhere(address: str) -> None:
    """The page's own fonts and no analytics; and the browser is told to load nothing from another place."""
    answer = httpx.get(address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    assert not re.search(r"https?://(?!127\.0\.0\.1)\S*font", httpx.get(f"{address}theme.css").text)
