"""Models by hub id: what is asked of the hub, what lies in its cache, and one line where neither has it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from segzero_jax import asking, hub, train
from segzero_jax.checkpoint import load_policy
from segzero_jax.mesh import make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.weights import CheckpointError, read_dims
from segzero_jax.processor import Processor

ROOT = Path(__file__).parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What the hub is asked for; it answers every question with the toy policy's directory."""
    questions: list[dict[str, Any]] = []

    def download(repo: str, **options: Any) -> str:
        questions.append({"repo": repo, **options})
        return str(hub.TOY)

    monkeypatch.setattr(hub, "snapshot_download", download)
    hub._download.cache_clear()
    yield questions
    hub._download.cache_clear()


def test_every_reader_takes_a_hub_id_and_the_hub_is_asked_once(asked: list[dict[str, Any]]) -> None:
    with jax.set_mesh(make_mesh("1x1")):
        _, dims = load_hf("someone/a-policy_7B.v2")
        assert dims == read_dims("toy")
        _, again, config = load_policy("someone/a-policy_7B.v2", "float32")
        assert (again, config) == (dims, None)
        loaded = asking.load(asking.find_checkpoint("someone/a-policy_7B.v2"))
    assert loaded.config.model.path == "someone/a-policy_7B.v2"
    assert loaded.config.data.image_size == 840, "asked as released checkpoints are"
    assert Processor.load("someone/a-policy_7B.v2", 112, "toy", 64).image_id == 502
    assert [(question["repo"], question["revision"]) for question in asked] == [("someone/a-policy_7B.v2", None)]


def test_a_revision_is_pinned_behind_an_at_sign(asked: list[dict[str, Any]]) -> None:
    read_dims(f"someone/policy@{COMMIT}")
    read_dims("someone/policy@refs/pr/3")
    assert [question["revision"] for question in asked] == [COMMIT, "refs/pr/3"]
    assert {question["repo"] for question in asked} == {"someone/policy"}


def test_only_the_files_of_a_checkpoint_are_downloaded(asked: list[dict[str, Any]]) -> None:
    hub.model_directory("someone/policy")
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in asked[0]["allow_patterns"])  # noqa: E731
    needed = ["config.json", "generation_config.json", "model-00001-of-00005.safetensors", "merges.txt", "LICENSE"]
    needed += ["model.safetensors.index.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"]
    assert [name for name in needed if not wanted(name)] == []
    assert [name for name in ("pytorch_model.bin", "model.gguf", "README.md", "optimizer.pt") if wanted(name)] == []


def test_directories_are_never_asked_of_the_hub(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(hub.TOY, tmp_path / "models" / "mine")
    for path in ("toy", "models/mine", "./models/mine", tmp_path / "models" / "mine"):
        assert hub.is_checkpoint(path)
        read_dims(path)
    for path in ("./models/other", "../models", "/models/other", "~/models/other", "models", "runs/toy/checkpoints/9"):
        assert not hub.is_checkpoint(path)
        with pytest.raises(CheckpointError, match=r"no config\.json there"):
            read_dims(path)
    assert asked == []


@pytest.mark.parametrize(
    "error",
    [
        LocalEntryNotFoundError("Cannot find a snapshot\nof that model: see HF_HUB_OFFLINE"),
        HFValidationError("Repo id must be\nalphanumeric"),
        HfHubHTTPError.__new__(HfHubHTTPError),
        ConnectionError("no\nroute"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_hub_that_gives_nothing_is_one_line(
    error: Exception, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught, jax.set_mesh(make_mesh("1x1")):
        load_hf("someone/policy@main")
    said = str(caught.value)
    assert said.startswith(
        "model.path=someone/policy@main: no such directory, and the Hugging Face hub gave no such model"
    )
    assert type(error).__name__ in said
    assert "\n" not in said


def cached(home: Path, repo: str) -> Path:
    """The hub's cache on this machine as huggingface_hub leaves it: a branch, and its commit's files."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(hub.TOY, folder / "snapshots" / COMMIT))


def test_the_cache_serves_where_the_hub_cannot_be_reached(tmp_path: Path) -> None:
    """The library itself, offline."""
    snapshot = cached(tmp_path, "someone/policy")
    code = (
        "import sys; from segzero_jax.hub import model_directory, HubError\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(model_directory(name))\n"
        "    except HubError as error: print(error)\n"
    )
    names = ["someone/policy", f"someone/policy@{COMMIT}", "someone/policy@v2", "someone/else"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names],
        cwd=ROOT,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    main, pinned, absent, other = done.stdout.splitlines()
    assert main == pinned == str(snapshot)
    assert absent.startswith("someone/policy@v2: no such directory, and the Hugging Face hub gave no such model")
    assert other.startswith("someone/else: no such directory")
    assert "HF_HUB_OFFLINE" in other


def test_a_mistyped_path_ends_the_command_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--model.path=runs/mistyped", "--run.dir=run", "--reward.server=none"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("segzero_jax.train: model.path=runs/mistyped: no such directory, and the Hugging Face hub")
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_kind_of_model_is_said(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "sam2"}))
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match="model_type 'sam2': expected 'qwen2_5_vl'"):
        read_dims("facebook/sam2.1-hiera-large")
