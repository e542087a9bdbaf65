"""A run whose reward servers die under it: it goes on, or stops in good order and is resumed, with the same rewards."""

import errno
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import orbax.checkpoint as ocp
import pytest
from fake_reward_server import Fake, free_port, running, serving

from reward_server import reward_pb2
from segzero_jax import train
from segzero_jax.data.batches import WorkerLost
from segzero_jax.pods import Pod

ROOT = Path(__file__).parents[2]
SMALL = ["--train.batch_size=4", "--train.micro_batch_size=4", "--rollout.group_size=2"]
SMALL += ["--eval.examples=4", "--eval.samples=2", "--data.eval_splits=[val]"]
CALLS_OF_A_STEP = CALLS_OF_AN_EVALUATION = 4


def run(directory: Path, data_dir: str, *arguments: str) -> int:
    return train.main([*SMALL, f"--data.dir={data_dir}", f"--run.dir={directory}", *arguments])


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def outcome(directory: Path) -> tuple[list[dict], list[list[dict]], list[dict]]:
    """All that a run computed: metrics without times, rollouts, evaluations."""
    metrics = [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_second"}
        for row in lines(directory / "metrics.jsonl")
    ]
    rollouts = [lines(directory / "rollouts" / f"{row['step']}.jsonl") for row in metrics]
    return metrics, rollouts, lines(directory / "evaluations.jsonl")


@contextmanager
def toy_server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The real server as a process; it may be loading still."""
    command = [sys.executable, "-m", "reward_server", "--model", "toy", "--port", "0", "--threads", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    assert child.stdout is not None
    try:
        yield child, json.loads(child.stdout.readline())["listening"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.slow
def test_one_of_two_servers_is_killed_and_the_rewards_stay(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after: list[int] = []
    with ExitStack() as stack:
        (doomed, first), (_, second) = [stack.enter_context(toy_server()) for _ in range(2)]
        send = train.Scorer.send

        def send_and_kill(self: train.Scorer, examples: list, *rest: object, **more: object) -> object:
            pending = send(self, examples, *rest, **more)
            step = len(lines(tmp_path / "two/metrics.jsonl")) if (tmp_path / "two/metrics.jsonl").exists() else 0
            if step == 1 and not killed_after:
                killed_after.append(step)
                doomed.kill()  # SIGKILL, while the calls of step 2 are on their way
                doomed.wait()
            return pending

        steps = "--train.steps=2"
        monkeypatch.setattr(train.Scorer, "send", send_and_kill)
        assert run(tmp_path / "two", data_dir, steps, f"--reward.server={first},{second}") == 0
        monkeypatch.undo()
        assert doomed.returncode == -9
        assert killed_after == [1]
        assert run(tmp_path / "one", data_dir, steps, f"--reward.server={second}") == 0
    assert outcome(tmp_path / "two") == outcome(tmp_path / "one")
    assert [row["missing_scores"] for row in outcome(tmp_path / "two")[0]] == [0, 0]


@pytest.fixture
def three_steps(
    tmp_path: Path, data_dir: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., int]:
    """Starts a run of three steps with its checkpoints elsewhere; the first time, something happens in the second."""
    options = ["--reward.server=none", "--train.steps=3", "--data.eval_splits=[]"]
    options += [f"--run.checkpoint_dir={tmp_path / 'elsewhere'}", "--train.checkpoint_every=9"]
    write = train.MetricsWriter.write_step

    def start(happens: Callable[[], None] | None = None, because: str = "") -> int:
        if happens is None:
            return run(tmp_path / "run", data_dir, *options)

        def write_step(self: train.MetricsWriter, step: int, numbers: dict) -> None:
            if step == 2:
                happens()
            write(self, step, numbers)

        with monkeypatch.context() as patch:
            patch.setattr(train.MetricsWriter, "write_step", write_step)
            code = run(tmp_path / "run", data_dir, *options)
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"segzero_jax.train: run.dir={tmp_path / 'run'}: cannot be written to: {because}")
        assert last.endswith("; the last finished step is saved")
        return code

    return start


@pytest.mark.slow
def test_a_full_disk_under_the_run_directory_loses_no_finished_step(
    tmp_path: Path, three_steps: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints lie elsewhere; weeks of rollouts fill this one."""

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run/metrics.jsonl"))

    assert three_steps(full, because="[Errno 28] No space") == 7
    assert three_steps() == 0
    assert "going on after step 2" in capsys.readouterr().err
    assert [row["step"] for row in lines(tmp_path / "run/metrics.jsonl")] == [1, 3]


@pytest.mark.slow
def test_a_run_directory_that_is_renamed_loses_no_finished_step(
    tmp_path: Path, three_steps: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "run"
    assert three_steps(lambda: directory.rename(tmp_path / "away"), because="[Errno 2] No such file") == 7
    assert not directory.exists()
    (tmp_path / "away").rename(directory)
    assert three_steps() == 0
    assert "going on after step 2" in capsys.readouterr().err
    assert [row["step"] for row in lines(directory / "metrics.jsonl")] == [1, 2, 3]


RUN = Path("runs/one")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), f"run.dir={RUN}: cannot be written to: [Errno 28] No space"),
        (OSError(errno.ESTALE, "Stale file handle"), f"run.dir={RUN}: cannot be written to: [Errno 116] Stale"),
        (OSError(errno.EIO, "Input/output error", "data/one"), "[Errno 5] Input/output error: 'data/one'; "),
        (FileNotFoundError(errno.ENOENT, "No such file", f"{RUN}/rollouts/3.jsonl.tmp"), f"run.dir={RUN}: cannot be"),
        (FileExistsError(errno.EEXIST, "File exists", RUN / "rollouts"), f"run.dir={RUN}: cannot be written to: "),
        (FileNotFoundError(errno.ENOENT, "No such file", "runs/one-more/x"), None),
        (OSError("image file is truncated"), None),
    ],
)
@pytest.mark.parametrize("saves", [True, False])
def test_a_disk_that_is_lost_is_one_line_and_the_last_step_is_saved(
    error: OSError, told: str | None, saves: bool
) -> None:
    keeper = LastKeeper(saves)
    expected = OSError if told is None else train.StorageError
    with pytest.raises(expected) as raised, train._last_step_saved(keeper, keeper, RUN, Pod()):  # type: ignore[arg-type]
        raise error
    if told is None:
        assert raised.value is error
        assert keeper.seen == []
    else:
        assert str(raised.value).startswith(told)
        ending = "the last finished step is saved" if saves else "steps since the last checkpoint are lost"
        assert str(raised.value).endswith(f"; {ending}")
        assert keeper.seen == ["last save begins", "kept", "last save ends"]


def test_the_save_after_a_lost_process_of_the_data_is_a_last_save_too() -> None:
    """``watch.kill_after_s`` would end it as a phase that hangs."""
    keeper = LastKeeper(True)
    with pytest.raises(WorkerLost), train._last_step_saved(keeper, keeper, RUN, Pod()):  # type: ignore[arg-type]
        raise WorkerLost("a process was killed")
    assert keeper.seen == ["last save begins", "kept", "last save ends"]


class LastKeeper:
    """Notes what becomes of the last save; the keeper and the watch in one."""

    def __init__(self, saves: bool) -> None:
        self.saves = saves
        self.seen: list[str] = []

    def keep(self) -> bool:
        self.seen.append("kept")
        return self.saves

    @contextmanager
    def last_save(self) -> Iterator[None]:
        self.seen.append("last save begins")
        yield
        self.seen.append("last save ends")


@pytest.mark.slow
def test_a_service_that_goes_away_again_and_again(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the evaluation before training, in step 2, in the evaluation after it: nothing is lost, nothing differs."""
    port = free_port()
    options = ["--train.steps=2", f"--reward.server=127.0.0.1:{port}", "--reward.timeout_s=1"]
    options += ["--reward.checkpoint_after_s=1", "--reward.patience_s=5"]
    with serving(Fake(), port=port):
        assert run(tmp_path / "whole", data_dir, *options) == 0

    parts = tmp_path / "parts"
    for answered, saved, more in (
        (0, "0", []),
        (CALLS_OF_AN_EVALUATION + CALLS_OF_A_STEP, "1", ["--resume"]),
        (CALLS_OF_A_STEP, "2", ["--resume"]),
    ):
        capsys.readouterr()
        with leaving_after(answered, port) as address:
            assert run(parts, data_dir, *options, *more) == 3
        said = capsys.readouterr().err.splitlines()
        assert any(line.startswith("waiting for scores since ") for line in said)
        assert any(line.startswith("the last finished step is saved") for line in said)
        assert re.match(rf"segzero_jax.train: no scores for \d+ s: reward server {address}: unreachable", said[-1])
        assert "gave up, --resume" in said[-1]
        assert max(path.name for path in (parts / "checkpoints").glob("[0-9]*")) == saved

    # A start that finds nobody has waited as long as the run would have, and is as patient a failure.
    assert run(parts, data_dir, *options, "--resume") == 3
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"segzero_jax.train: reward server {address}: unreachable")
    assert said[-1].endswith("(waited 5 s)")
    assert run(tmp_path / "new", data_dir, *options) == 3
    assert capsys.readouterr().err.endswith("(waited 1 s)\n"), "whoever has mistyped it is told soon"
    with serving(Fake(checkpoint="5a" * 32), port=port):
        assert run(parts, data_dir, *options) == 2
    assert "its rewards came from SAM 2 checkpoint (unnamed), reward.server=" in capsys.readouterr().err
    with serving(Fake(), port=port):
        assert run(parts, data_dir, *options) == 0
        assert run(parts, data_dir, *options) == 0
    assert "all 2 steps are done, checkpoints are in " in capsys.readouterr().out
    assert outcome(parts) == outcome(tmp_path / "whole")


@contextmanager
def leaving_after(answered: int, port: int) -> Iterator[str]:
    """A server that is gone once it was asked more often than this."""
    fake = Fake()
    with running(fake, port=port) as (address, server, _):

        def leave(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
            if len(fake.seen) > answered:
                server.stop(None)

        fake.before = leave
        yield address


@pytest.mark.slow
def test_dropped_groups_are_counted_and_a_step_without_scores_teaches_nothing(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake()

    def before(request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> None:
        step = (len(fake.seen) - 1 - CALLS_OF_AN_EVALUATION) // CALLS_OF_A_STEP
        if step == 0 and not hung:
            hung.append(request.request_id)
        if request.request_id in hung and step < 2:
            context.abort(grpc.StatusCode.INTERNAL, "stumbled")
        if len(written(tmp_path)) == 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "image: not to my taste")

    hung: list[str] = []
    fake.before = before
    with serving(fake) as address:
        options = [f"--reward.server={address}", "--reward.missing=drop", "--reward.timeout_s=2"]
        assert run(tmp_path, data_dir, "--train.steps=2", "--train.checkpoint_every=1", *options) == 0
    first, second = lines(tmp_path / "metrics.jsonl")
    assert (first["missing_scores"], second["missing_scores"]) == (2, 8)
    assert (first["reward/mean"] is not None, second["reward/mean"]) == (True, None)
    assert "loss" in first
    assert "loss" not in second
    dropped = [row for row in lines(tmp_path / "rollouts/1.jsonl") if row["id"] == hung[0]]
    assert [(row["reward"], row["advantage"], row["components"]) for row in dropped] == [(None, 0.0, {})] * 2
    assert "stumbled" in dropped[0]["error"]
    said = capsys.readouterr().err
    assert "step 1: 1 of 4 groups are left out, they have no scores: reward server" in said
    assert "step 2: this step makes no update, its groups have no scores: image: not to my taste" in said
    before_step, after_step = (policy(tmp_path / f"checkpoints/{step}/policy") for step in (1, 2))
    assert before_step.keys() == after_step.keys()
    for name, value in before_step.items():
        np.testing.assert_array_equal(value, after_step[name], err_msg=name)


def written(directory: Path) -> list[dict]:
    file = directory / "metrics.jsonl"
    return lines(file) if file.exists() else []


def policy(path: Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        return {name: np.asarray(value) for name, value in reader.restore(path).items()}
