"""``python -m segzero_jax.infer --demo``: a Gradio page for asking a policy; it loads nothing from other hosts."""

import contextlib
import errno
import io
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before Gradio is imported: otherwise it asks its makers for the newest version and reports this one to them.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
import jax
import numpy as np
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from segzero_jax.answering import Answered, Picture, answer_question, reasoning_so_far
from segzero_jax.asking import Loaded
from segzero_jax.decoding import UNDECODABLE
from segzero_jax.options import say
from segzero_jax.patches import ImageError
from segzero_jax.processor import PromptTooLong
from segzero_jax.reward_channel import RewardServerError
from segzero_jax.segmenting import Segmenter

_HOST = "127.0.0.1"
_READABLE = ("PNG", "JPEG", "MPO", "WEBP")
_FONTS = ["system-ui", "sans-serif"]
_TROUBLE = (ImageError, PromptTooLong, RewardServerError)
# With this the browser refuses anything that Gradio's page would load from other hosts (fonts, a script for embedding).
_ONLY_FROM_HERE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self' data:; worker-src 'self' blob:"
)

# (image, question) to the states of a growing answer: the text so far, then the answer.
Ask = Callable[[Picture, str], Iterator[str | Answered]]


class OnlyFromHere:
    """Sends a Content-Security-Policy with every response (ASGI middleware)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = _ONLY_FROM_HERE
            await send(message)

        await self._app(scope, receive, with_policy)


def make_ask(loaded: Loaded, segmenter: Segmenter) -> Ask:
    """Returns a function that asks a policy, one question at a time, on the current ambient mesh."""
    mesh, alone = jax.sharding.get_mesh(), threading.Lock()

    def ask(picture: Picture, question: str) -> Iterator[str | Answered]:
        grown: queue.SimpleQueue[str | Answered | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                with alone, jax.set_mesh(mesh):
                    grown.put(answer_question(loaded, picture, question, segmenter, watch=grown.put))
            except BaseException as error:  # raised in the waiting thread
                grown.put(error)

        threading.Thread(target=work, daemon=True).start()
        while True:
            item = grown.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Answered):
                return

    return ask


def make_page(ask: Ask, policy: str, masks: bool = True) -> gr.Blocks:
    """The page: takes an image and a question; shows the reasoning as it grows, the drawing, the mask and JSON.

    Args:
      policy: its name.
      masks: whether masks are made.
    """

    def respond(image: dict[str, Any] | None, question: str | None) -> Iterator[tuple[Any, ...]]:
        # API callers need not upload a file: an image in a data: URL has no path.
        path, question = (image or {}).get("path"), str(question or "").strip()
        if path is None or not question.strip(" \t\r\n."):
            raise gr.Error("A picture and a question are needed, such as 'the red circle'.", print_exception=False)
        try:
            for state in ask(_uploaded(path), question):
                if isinstance(state, Answered) and state.scaled():
                    gr.Info(state.scaled())
                yield _shown(state)
        except _TROUBLE as error:
            raise gr.Error(str(error), print_exception=False) from None

    with gr.Blocks(title="segzero-jax", analytics_enabled=False) as page:
        mask_maker = "SAM 2 makes the mask" if masks else "no masks are made (`--server=none`)"
        gr.Markdown(f"## Ask about an image\nThe policy `{policy}` reasons and points; {mask_maker}.")
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="filepath", label="picture", sources=["upload", "clipboard"])
                question = gr.Textbox(label="question", placeholder="the red circle")
                button = gr.Button("Ask", variant="primary")
            with gr.Column():
                drawn = gr.Image(label="answer", format="png", interactive=False)
                reasoning = gr.Textbox(label="reasoning", lines=3, interactive=False)
                with gr.Accordion("mask and numbers", open=False):
                    mask = gr.Image(label="mask", format="png", interactive=False)
                    numbers = gr.JSON(label="answer as JSON")
        outputs = [reasoning, drawn, mask, numbers]
        # Gradio's own preprocessing would open the file, with a traceback if it is not an image, and might rewrite it.
        # It would also check that the file was uploaded, which ``_uploaded`` does here.
        triggers = [button.click, question.submit]
        gr.on(triggers, respond, [image, question], outputs, api_name="ask", preprocess=False)
    return page


def _uploaded(path: str) -> Picture:
    """The file as uploaded; converted to PNG if the policy does not take its format.

    Raises:
      ImageError: it cannot be read, or is not an upload: a request may name any file of this machine.
    """
    try:
        data = Path(path).read_bytes() if is_in_or_equal(path, get_upload_folder()) else None
    except (OSError, ValueError):  # deleted, a folder, or an invalid file name
        data = None
    if data is None:
        raise ImageError("the picture: was not uploaded to this page")
    # A damaged file is left as it is: reading it reports the damage.
    with contextlib.suppress(*UNDECODABLE), Image.open(io.BytesIO(data)) as image:
        if image.format not in _READABLE:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            data = buffer.getvalue()
    return Picture.read(data, "the picture")


def _shown(state: str | Answered) -> tuple[Any, ...]:
    """Reasoning, drawing, mask and JSON of an answer, or of a response so far."""
    if isinstance(state, str):
        return reasoning_so_far(state), None, None, None
    said = state.said.thinking.strip() if state.said.thinking is not None else state.text.strip()
    mask = None if state.mask is None else Image.fromarray(state.mask.astype(np.uint8) * 255)
    return said, state.drawn(), mask, state.row()


def check_port(port: int) -> None:
    """Raises OSError, with a one-line message, if the port is not free on this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like the page's server: a released port is free
        try:
            probe.bind((_HOST, port))
        except OSError as error:
            raise OSError(_no_port(port, "taken" if error.errno == errno.EADDRINUSE else error.strerror)) from None


def _no_port(port: int, why: str | None) -> str:
    return f"--port={port}: {why}; choose another"


def launch(page: gr.Blocks, port: int, wait: bool = True) -> str:
    """Serves the page on this machine; returns its address, immediately if ``wait`` is False.

    Raises:
      OSError: the port is taken.
    """
    theme = gr.themes.Base(font=_FONTS, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = page.launch(
            server_name=_HOST,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            theme=theme,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(OnlyFromHere)]},
        )
    except OSError:  # Gradio's advice is for callers of launch()
        raise OSError(_no_port(port, "taken")) from None
    say(f"open {address}")
    if wait:
        page.block_thread()
    return address


def serve(loaded: Loaded, segmenter: Segmenter, port: int) -> None:
    """Serves the page until it is stopped."""
    launch(make_page(make_ask(loaded, segmenter), loaded.name, segmenter.makes_masks), port)
