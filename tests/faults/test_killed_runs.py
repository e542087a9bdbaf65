"""A run is killed at any point, on any step, and started again: it ends as if nothing had happened."""

import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fake_reward_server import Fake, serving
from killed_run import Point, Processes, made_once
from same_run import assert_same, lines, scalars

STEPS = 10
OPTIONS = [f"--train.steps={STEPS}", "--train.batch_size=2", "--train.micro_batch_size=1", "--rollout.group_size=2"]
# Four updates a step.
OPTIONS += ["--train.mini_batch_size=1", "--grpo.iterations=2"]
OPTIONS += ["--train.checkpoint_every=2", "--eval.every=5", "--eval.examples=2", "--eval.samples=2"]
OPTIONS += ["--data.eval_splits=[val,heldout_crowd]", "--rollout.max_response_tokens=48"]

# Two chains of ten kills: each process goes on where the one before was killed. In brackets: what the kill comes into.
TRAIN, LOOP, METRICS = "segzero_jax.train", "segzero_jax.loop", "segzero_jax.metrics"
CHAINS = (
    (
        Point("segzero_jax.evaluation:evaluate_split", "before", 2),  # [evaluation before training, second split]
        Point(f"{LOOP}:sample", "after", 1),  # [step 1, nothing saved yet]
        Point("segzero_jax.jsonl:append", "midway", 4, "*/metrics.jsonl"),  # [a line of metrics]
        Point(f"{LOOP}:Scorer.send", "after", 2),  # [scores on their way]
        Point("segzero_jax.manifest:ManifestHandler.finalize", "before", 2),  # [a checkpoint, written and uncommitted]
        Point("segzero_jax.pending_scores:PendingScores.result", "before", 2),  # [waiting for scores]
        Point(f"{METRICS}:MetricsWriter.write_evaluation", "after", 1),  # [between two splits]
        Point(f"{LOOP}:learn", "before", 2),  # [about to update]
        Point("segzero_jax.manifest:ManifestHandler.finalize", "after", 1),  # [a manifest, uncommitted]
        Point("segzero_jax.jsonl:replace", "before", 1, "*/report.html"),  # [all done but the page]
    ),
    (
        Point(f"{LOOP}:learn", "after", 3),  # [updated, not written]
        Point(f"{METRICS}:EventFile.write", "before", 3),  # [in metrics.jsonl, not in TensorBoard]
        Point(f"{LOOP}:policy_logps", "after", 7),  # [the reference policy]
        Point("segzero_jax.jsonl:write", "midway", 1, "*/rollouts/*.jsonl"),  # [the rollouts of a step]
        Point("segzero_jax.keeper:Keeper.save", "after", 1),  # [a save that has begun]
        Point(f"{METRICS}:MetricsWriter.truncate_after", "before", 1),  # [a start, restored]
        Point("segzero_jax.grpo:update", "after", 6),  # [between two updates of a step]
        Point("segzero_jax.jsonl:write", "before", 2, "*/evaluations.jsonl"),  # [answers written, numbers not]
        Point("segzero_jax.checkpoint:Checkpoints.save", "before", 2),  # [about to save]
        Point("segzero_jax.evaluation:evaluate_split", "before", 2),  # [evaluation after training]
    ),
)


@pytest.fixture(scope="module")
def processes(shared_dir: Path) -> Processes:
    return Processes(shared_dir / "killed_runs/compiled")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Fake()) as address:
        yield address


@pytest.fixture(scope="module")
def whole(processes: Processes, server: str, data_dir: str, shared_dir: Path) -> tuple[list[str], Path]:
    """The options of a run, and the run that nothing happened to."""
    options = [*OPTIONS, f"--reward.server={server}", f"--data.dir={data_dir}"]
    run, log = shared_dir / "killed_runs/whole", shared_dir / "killed_runs/whole.log"
    with made_once(run) as mine:
        code = processes.exit_code([*options, f"--run.dir={run}"], log) if mine else 0
    assert code == 0, log.read_text()[-2000:]
    return options, run


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
def test_twenty_kills_leave_no_trace(processes: Processes, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    options, reference = whole

    def chain(number: int) -> Path:
        run = tmp_path / str(number)
        for point in CHAINS[number]:
            log = tmp_path / f"{number}.log"
            code = processes.exit_code([*options, f"--run.dir={run}"], log, point)
            assert code == -signal.SIGKILL, f"{point}: {log.read_text()[-2000:]}"
            written = lines(run / "metrics.jsonl")
            assert written == lines(reference / "metrics.jsonl")[: len(written)], point
        assert processes.exit_code([*options, f"--run.dir={run}"], log) == 0, log.read_text()[-2000:]
        return run

    with ThreadPoolExecutor(len(CHAINS)) as pool:
        for run in pool.map(chain, range(len(CHAINS))):
            assert_same(run, reference, STEPS)
    metrics = lines(reference / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in metrics}) == STEPS, "steps that do not differ would prove little"


@pytest.mark.slow
@pytest.mark.longest
def test_a_machine_that_vanishes_takes_no_line_along(
    processes: Processes, whole: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Its files elsewhere are a copy from before the newest checkpoint, which the next machine goes on from."""
    options, reference = whole
    run, copy = tmp_path / "run", tmp_path / "copy"
    start = [*options, f"--run.dir={run}", f"--run.checkpoint_dir={tmp_path / 'bucket'}"]
    log = tmp_path / "log"
    for point in (Point(f"{LOOP}:learn", "after", 4), Point(f"{LOOP}:learn", "before", 5)):
        if run.exists():
            shutil.copytree(run, copy)  # After three steps, and the evaluation before them.
        assert processes.exit_code(start, log, point) == -signal.SIGKILL
    assert len(lines(copy / "metrics.jsonl")) == 3
    assert max(int(path.name) for path in (tmp_path / "bucket").glob("[0-9]*")) == 6
    shutil.rmtree(run)
    shutil.copytree(copy, run)
    assert processes.exit_code(start, log) == 0, log.read_text()[-2000:]
    assert "lacks" not in log.read_text()
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert lines(run / name) == lines(reference / name)
    assert scalars(run) == scalars(reference)


TERM, INT = signal.SIGTERM, signal.SIGINT
# A signal, how the run ends, the step that it leaves saved, what it says last.
STOPS = (
    (Point(f"{LOOP}:sample", "before", 2, signals=(TERM, TERM)), 0, 1, "stopped by SIGTERM; the same command goes on"),
    (Point(f"{TRAIN}:prepare", "after", 1, signals=(TERM,)), 0, 1, "stopped by SIGTERM; the same command goes on"),
    (
        Point("segzero_jax.checkpoint:Checkpoints.restore", "before", 1, signals=(TERM,)),
        0,
        1,
        "stopped by SIGTERM; the same command goes on",
    ),
    (Point(f"{TRAIN}:prepare", "before", 1, signals=(INT,)), 130, 1, "stopped at once; the same command goes on"),
    (Point(f"{LOOP}:learn", "before", 1, signals=(TERM,)), 0, 2, "stopped by SIGTERM; the same command goes on"),
    (Point("segzero_jax.evaluation:evaluate_split", "after", 1, signals=(INT,)), 130, 5, "stopped by Ctrl-C; the same"),
    (
        Point(f"{LOOP}:Scorer.send", "after", 3, signals=(INT, INT)),
        130,
        6,
        "stopped at once; the same command goes on",
    ),
)


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
def test_a_run_that_is_told_to_stop_saves_its_last_step(
    processes: Processes, whole: tuple[list[str], Path], tmp_path: Path
) -> None:
    """Checkpoints are due at even steps only; a step in flight is given up before its update, finished behind it.

    A start that is told to stop has nothing to save.
    """
    options, reference = whole
    run, log = tmp_path / "run", tmp_path / "log"
    for point, expected, saved, last in STOPS:
        code = processes.exit_code([*options, f"--run.dir={run}"], log, point)
        said = log.read_text()
        assert code == expected, f"{point}: {said[-2000:]}"
        assert max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*")) == saved, point
        assert last in said.splitlines()[-1]
    assert processes.exit_code([*options, f"--run.dir={run}"], log) == 0, log.read_text()[-2000:]
    assert_same(run, reference, STEPS)
