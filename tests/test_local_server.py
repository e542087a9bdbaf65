"""The reward server as a child process: it comes up, scores, and never outlives its parent."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from processes import has_ended, outliving

from segzero_jax import segmenting
from segzero_jax.data.scenes import make_example_scene
from segzero_jax.local_server import local_server
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest
from segzero_jax.types import Frame, ObjectPrompt

STARTUP_S = 120.0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """Every process that the test starts, in order."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def recording(*args: object, **kwargs: object) -> subprocess.Popen[str]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", recording)
    return started


def request() -> ScoreRequest:
    scene, question = make_example_scene("val", 0)
    item = scene.objects[question.answer]
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "PNG")
    prompt = ObjectPrompt(tuple(map(float, item.box)), (tuple(map(float, item.point)),))
    height, width = scene.image.shape[:2]
    return ScoreRequest("one", file.getvalue(), Frame(width, height), (prompt,), ((prompt,), ()))


def test_serves_stops_and_says_how_it_died(tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    log = tmp_path / "run" / "reward_server.log"
    mine = RewardServerError("of the caller's own")
    seen = []

    def score_and(finish: Callable[[], None]) -> None:
        with (
            local_server("toy", log, startup_timeout_s=STARTUP_S, if_it_dies="sit down") as address,
            RewardClient(address, 60, wait_for_ready=False) as client,
        ):
            seen.append(client.score([request()], masks=1).result())
            assert f"serving toy on {address}" in log.read_text()
            finish()
            client.score([request()]).result()

    def raise_mine() -> None:
        raise mine

    def kill() -> None:
        children[1].kill()
        children[1].wait()

    # While the server lives, errors of the block are the block's.
    with pytest.raises(RewardServerError) as error:
        score_and(raise_mine)
    assert error.value is mine
    assert children[0].returncode == 0
    assert log.read_text().splitlines()[-1].endswith("stopped")

    with pytest.raises(RewardServiceAway) as error:
        score_and(kill)
    message = str(error.value)
    assert message.startswith(f"local reward server died (SIGKILL; {log} ends: ")
    assert "serving toy on" in message
    assert message.endswith("): sit down")
    assert "\n" not in message

    # Two processes give the same numbers: what a resumed run relies on.
    assert seen[0] == seen[1]
    ((same, nothing),) = seen[0]
    assert same.iou > 0.98
    assert (nothing.iou, nothing.error) == (0, "")


def test_says_why_it_did_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    with pytest.raises(RewardServerError) as error, local_server("facebook/sam99", log, startup_timeout_s=STARTUP_S):
        pytest.fail("served")
    assert str(error.value).startswith(f"local reward server did not start (exit code 2; {log} ends: ")
    assert "model 'facebook/sam99': expected toy" in str(error.value)
    assert "Traceback" not in log.read_text()

    # A machine without the extra: this torch stands before the installed one.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RewardServerError) as error, local_server("toy", log, startup_timeout_s=STARTUP_S):
        pytest.fail("served")
    assert "torch is not installed: in a clone, pip install -c constraints.txt -e '.[reward]', then" in str(error.value)
    assert "Traceback" not in log.read_text()


def test_a_start_that_takes_too_long_is_given_up(tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    late = pytest.raises(RewardServerError, match=r"not serving after 0\.2 s")
    with late, local_server("toy", tmp_path / "log", startup_timeout_s=0.2):
        pytest.fail("served")
    assert children[0].returncode is not None


@pytest.mark.parametrize(("model", "threads"), [("toy", "1"), ("facebook/sam2.1-hiera-large", "0")])
def test_only_the_toy_is_held_to_one_thread(
    model: str, threads: str, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    with pytest.raises(RewardServerError), local_server(model, tmp_path / "log", startup_timeout_s=0.2):
        pytest.fail("served")
    arguments = children[0].args
    assert isinstance(arguments, list)
    assert arguments[arguments.index("--model") + 1] == model
    assert arguments[arguments.index("--threads") + 1] == threads


def test_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import time\nfrom segzero_jax.local_server import local_server\n"
        f"with local_server('toy', {str(tmp_path / 'log')!r}, startup_timeout_s={STARTUP_S}) as address:\n"
        "    print(address, flush=True)\n    time.sleep(1000)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    address = parent.stdout.readline().strip()
    (child,) = (int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert address.startswith("127.0.0.1:")
    try:
        assert not outliving([child], 60)
        assert "stopped" in (tmp_path / "log").read_text()
    finally:
        if not has_ended(child):
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--port", "70000"], "reward_server: --port=70000: expected 0 to 65535"),
        (["--threads", "-1"], "reward_server: --threads=-1: expected 0 to 4096"),
        (["--model", "toy", "--port", "0", "--device", "cuda:7"], "reward_server: device 'cuda:7': "),
    ],
)
def test_command_refuses_in_one_line(arguments: list[str], reason: str) -> None:
    done = subprocess.run([sys.executable, "-m", "reward_server", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(reason)
    assert "Traceback" not in done.stderr


def test_whoever_asks_for_masks_is_told_how_it_died_and_gets_another(
    children: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, not after the patience that a server has for its start."""
    monkeypatch.setattr(segmenting, "STARTUP_S", STARTUP_S)
    asked = request()
    picture = Image.open(io.BytesIO(asked.image))
    said: list[str] = []
    with segmenting.Segmenter("local", Access(), lambda: "toy", said.append) as segmenter:
        assert segmenter("it", asked.image, picture, asked.candidates[0]).mask
        children[0].kill()
        children[0].wait()
        start = time.monotonic()
        with pytest.raises(RewardServiceAway, match=r"local reward server died \(SIGKILL; .*--server=none"):
            segmenter("it", asked.image, picture, asked.candidates[0])
        assert time.monotonic() - start < 30
        assert segmenter("it", asked.image, picture, asked.candidates[0]).mask
    assert [child.returncode for child in children] == [-9, 0]
    assert said == []
