"""One of two hosts is killed at any point, or told to stop: started again, the run ends as if nothing had happened.

Hosts have one device each, and the vision tower is frozen, so that all these starts take minutes; more hosts and shared
weights are for ``e2e/test_pod_training.py``. Both hosts write a part of each checkpoint.
"""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_reward_server import Fake, serving
from killed_run import HEARTBEAT_S, Point, Processes, made_once
from same_run import assert_same, lines

pytestmark = [pytest.mark.slow, pytest.mark.longest, pytest.mark.timeout(3600)]
HOSTS, STEPS, LOST = 2, 10, 4
OPTIONS = ["--mesh=2x1x1", f"--train.steps={STEPS}", "--train.batch_size=4", "--train.micro_batch_size=4"]
OPTIONS += ["--rollout.group_size=2", "--rollout.max_response_tokens=48", "--train.checkpoint_every=2"]
OPTIONS += ["--rollout.max_batches=2"]
OPTIONS += ["--eval.examples=4", "--eval.samples=2", "--data.eval_splits=[val]", "--model.freeze_vision=true"]

# Kills, and whom they hit: each start goes on where the one before was cut off. The first host alone writes files
# and commits checkpoints. In brackets: what the kill comes into.
LOOP, METRICS = "segzero_jax.loop", "segzero_jax.metrics"
KILLS = (
    (1, Point("segzero_jax.evaluation:evaluate_split", "before", 1)),  # [evaluation before training]
    (1, Point(f"{LOOP}:sample", "after", 1)),  # [step 1, nothing saved yet]
    (0, Point("segzero_jax.jsonl:append", "midway", 4, "*/metrics.jsonl")),  # [a line of metrics]
    (1, Point(f"{LOOP}:Scorer.send", "after", 2)),  # [scores on their way]
    (0, Point("segzero_jax.manifest:ManifestHandler.finalize", "before", 2)),  # [written and uncommitted]
    (1, Point("segzero_jax.checkpoint:Checkpoints.restore", "before", 1)),  # [a start]
    (1, Point(f"{LOOP}:learn", "before", 2)),  # [about to update: the other is in its collectives]
    (1, Point("segzero_jax.checkpoint:Checkpoints.wait", "before", 2)),  # [waiting for its own part]
    (1, Point("segzero_jax.job:Job.share", "before", 3)),  # [agreeing on the batch]
    (1, Point("segzero_jax.manifest:ManifestHandler.save", "after", 1)),  # [its arrays on their way to the disk]
    (0, Point("segzero_jax.manifest:ManifestHandler.finalize", "after", 1)),  # [a manifest, uncommitted]
    (0, Point(f"{METRICS}:MetricsWriter.write_evaluation", "before", 1)),  # [evaluation after training, unwritten]
)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(Fake()) as address:
        yield address


@pytest.fixture(scope="module")
def processes(shared_dir: Path) -> Processes:
    return Processes(shared_dir / "killed_hosts/compiled")


@pytest.fixture(scope="module")
def whole(processes: Processes, server: str, data_dir: str, shared_dir: Path) -> tuple[list[str], Path]:
    """The options of a run, and the run that nothing happened to."""
    options = [*OPTIONS, f"--reward.server={server}", f"--data.dir={data_dir}"]
    run, logs = shared_dir / "killed_hosts/whole", shared_dir / "killed_hosts/logs"
    with made_once(run) as mine:
        codes = processes.exit_codes([*options, f"--run.dir={run}"], logs, HOSTS) if mine else [0] * HOSTS
    assert codes == [0] * HOSTS, (logs / "0").read_text()[-2000:]
    return options, run


def test_kills_of_one_host_leave_no_trace(processes: Processes, whole: tuple[list[str], Path], tmp_path: Path) -> None:
    options, reference = whole
    run, logs = tmp_path / "run", tmp_path / "logs"
    for killed, point in KILLS:
        codes = processes.exit_codes([*options, f"--run.dir={run}"], logs, HOSTS, point, killed)
        # With the first host JAX's coordination service is gone, and JAX ends the other.
        other = -signal.SIGABRT if killed == 0 else LOST
        expected = [-signal.SIGKILL if host == killed else other for host in range(HOSTS)]
        assert codes == expected, f"{point}: {(logs / '0').read_text()[-2000:]}"
        if killed:
            assert f"host {killed} (" in (logs / "0").read_text().splitlines()[-1]
            assert f"died (no sign of life for {HEARTBEAT_S} s)" in (logs / "0").read_text().splitlines()[-1]
        written = lines(run / "metrics.jsonl")
        assert written == lines(reference / "metrics.jsonl")[: len(written)], point
    codes = processes.exit_codes([*options, f"--run.dir={run}"], logs, HOSTS)
    assert codes == [0] * HOSTS, (logs / "0").read_text()[-2000:]
    assert_same(run, reference, STEPS)
    assert len({row["loss"] for row in lines(reference / "metrics.jsonl")}) == STEPS


def test_sigterm_to_one_saves_both_at_one_step_and_nothing_is_lost(
    processes: Processes, whole: tuple[list[str], Path], tmp_path: Path
) -> None:
    options, reference = whole
    run, logs = tmp_path / "run", tmp_path / "logs"
    # Scores are asked for by the evaluation, by each batch of the first step, and by the second step's first.
    batches = lines(reference / "metrics.jsonl")[0]["dynamic_sampling/batches"]
    told = Point(f"{LOOP}:Scorer.send", "after", 2 + batches, signals=(signal.SIGTERM,))
    codes = processes.exit_codes([*options, f"--run.dir={run}"], logs, HOSTS, told, killed=1)
    said = (logs / "0").read_text()
    assert codes == [0] * HOSTS, said[-2000:]
    assert said.splitlines()[-1] == "segzero_jax.train: stopped by SIGTERM; the same command goes on"
    saved = max(int(path.name) for path in (run / "checkpoints").glob("[0-9]*"))
    # The second step is given up or, had it come to its update, finished.
    assert saved == lines(run / "metrics.jsonl")[-1]["step"] in (1, 2)
    codes = processes.exit_codes([*options, f"--run.dir={run}"], logs, HOSTS)
    assert codes == [0] * HOSTS, (logs / "0").read_text()[-2000:]
    assert_same(run, reference, STEPS)
