"""Models by hub id: what is asked of the hub, what lies in its cache, and one line where neither has it."""

import errno
import importlib
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
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from segzero_jax import asking, hub, train
from segzero_jax.checkpoint import STORAGE_FAILED
from segzero_jax.mesh import make_mesh
from segzero_jax.model import load_hf
from segzero_jax.model.weights import CheckpointError, read_dims
from segzero_jax.plan.step import find_dims
from segzero_jax.processor import Processor
from segzero_jax.saved_policy import load_policy

ROOT = Path(__file__).parents[1]
# What the library makes its calls with, by the name that it has now.
httpx: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
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


def test_every_reader_takes_a_hub_id_and_the_hub_is_asked_once_for_settings_and_once_for_weights(
    asked: list[dict[str, Any]],
) -> None:
    with jax.set_mesh(make_mesh("1x1")):
        _, dims = load_hf("someone/a-policy_7B.v2")
        assert dims == read_dims("toy")
        _, again, config = load_policy("someone/a-policy_7B.v2", "float32")
        assert (again, config) == (dims, None)
        loaded = asking.load(asking.find_checkpoint("someone/a-policy_7B.v2"))
    assert loaded.config.model.path == "someone/a-policy_7B.v2"
    assert loaded.config.data.image_size == 840, "asked as released checkpoints are"
    assert Processor.load("someone/a-policy_7B.v2", 112, "toy", 64).image_id == 502
    assert [(question["repo"], question["revision"]) for question in asked] == [("someone/a-policy_7B.v2", None)] * 2


def test_a_revision_is_pinned_behind_an_at_sign(asked: list[dict[str, Any]]) -> None:
    read_dims(f"someone/policy@{COMMIT}")
    read_dims("someone/policy@refs/pr/3")
    assert [question["revision"] for question in asked] == [COMMIT, "refs/pr/3"]
    assert {question["repo"] for question in asked} == {"someone/policy"}


def test_a_slash_at_the_end_is_part_of_no_id(asked: list[dict[str, Any]]) -> None:
    read_dims("someone/policy/")
    read_dims("someone/policy@refs/pr/3/")
    assert [(question["repo"], question["revision"]) for question in asked] == [
        ("someone/policy", None),
        ("someone/policy", "refs/pr/3"),
    ]
    assert find_dims("Qwen/Qwen2.5-VL-7B-Instruct/") == find_dims("Qwen/Qwen2.5-VL-7B-Instruct")


def test_only_the_files_of_a_checkpoint_are_downloaded(asked: list[dict[str, Any]]) -> None:
    hub.model_directory("someone/policy")
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in asked[-1]["allow_patterns"])  # noqa: E731
    needed = ["config.json", "generation_config.json", "model-00001-of-00005.safetensors", "merges.txt", "LICENSE"]
    needed += ["model.safetensors.index.json", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja"]
    assert [name for name in needed if not wanted(name)] == []
    assert [name for name in ("pytorch_model.bin", "model.gguf", "README.md", "optimizer.pt") if wanted(name)] == []


def test_dimensions_and_tokenizer_are_had_without_the_weights(asked: list[dict[str, Any]]) -> None:
    """A plan, a preflight and a start's first checks download no more."""
    assert find_dims("someone/policy") == read_dims("toy")
    Processor.load("someone/policy", 112, "toy", 64)
    (question,) = asked
    wanted = lambda name: any(fnmatch(name, pattern) for pattern in question["allow_patterns"])  # noqa: E731
    assert wanted("config.json")
    assert wanted("tokenizer.json")
    assert not wanted("model-00001-of-00005.safetensors")


def test_weights_are_of_the_commit_that_the_settings_are_of(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / COMMIT).mkdir()
    monkeypatch.setattr(
        hub, "snapshot_download", lambda repo, **options: asked.append(options) or str(tmp_path / COMMIT)
    )
    hub.model_directory("someone/policy@v2", weights=False)
    hub.model_directory("someone/policy@v2")
    assert [question["revision"] for question in asked] == ["v2", COMMIT]


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
        with pytest.raises(CheckpointError, match=r"no config\.json there; .* a hub id such as "):
            read_dims(path)
    assert asked == []


def answered(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    """What the library makes of the hub's answer."""
    request = httpx.Request("GET", "https://huggingface.co/api/models/someone/policy")
    return kind(f"{status}:\nno policy", response=httpx.Response(status, request=request))


def nor_cached(why: Exception | None) -> LocalEntryNotFoundError:
    """What it makes of a hub that it could not ask, and a cache without the model."""
    error = LocalEntryNotFoundError("Cannot find a snapshot\nof that model: see HF_HUB_OFFLINE")
    error.__cause__ = why
    return error


NO, AWAY = 2, STORAGE_FAILED


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (nor_cached(None), NO),
        (nor_cached(OfflineModeIsEnabled("HF_HUB_OFFLINE=1")), NO),
        (nor_cached(httpx.ConnectError("no\nroute")), AWAY),
        (nor_cached(answered(503)), AWAY),
        (nor_cached(answered(403)), NO),
        (HFValidationError("Repo id must be\nalphanumeric"), NO),
        (answered(404, RepositoryNotFoundError), NO),
        (answered(401, GatedRepoError), NO),
        (answered(404, RevisionNotFoundError), NO),
        (answered(429), AWAY),
        (httpx.ReadTimeout("no\nword"), AWAY),
        (ConnectionError("no\nroute"), AWAY),
        (OSError(errno.ENOSPC, "No space left on device"), AWAY),
    ],
    ids=lambda value: f"{type(value).__name__} {value.__cause__ or value}"[:60] if isinstance(value, Exception) else "",
)
def test_a_hub_that_gives_nothing_is_one_line_and_one_that_may_yet_has_its_exit_code(
    error: Exception,
    code: int,
    asked: list[dict[str, Any]],
    tmp_path: Path,
    data_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whoever starts runs again must not take a hub that is overloaded for a mistake."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    options = ["--model.path=someone/policy@main", f"--run.dir={tmp_path / 'run'}", "--reward.server=none"]
    options.append(f"--data.dir={data_dir}")
    assert train.main(options) == code
    said = capsys.readouterr().err
    assert said.startswith(
        "segzero_jax.train: model.path=someone/policy@main: no such directory, and the Hugging Face hub gave no such "
    )
    assert type(error).__name__ in said
    assert len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


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
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--run.dir=run", "--reward.server=none", f"--data.dir={data_dir}"]
    assert train.main(["--model.path=runs/mistyped", *options]) == 2
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


def test_a_repository_is_named_without_revision_and_slash(tmp_path: Path) -> None:
    for given in ("org/name", "org/name/", "org/name@v1", "org/name@refs/pr/1/"):
        assert hub.repository(given) == "org/name"
    assert hub.repository(str(tmp_path)) == str(tmp_path)
    assert hub.repository("toy") == "toy"
