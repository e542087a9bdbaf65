"""A pod on one machine: four processes with two virtual devices each train the toy run as one process does.

Each process is a host of its own: it reads its rows, sends its own reward calls, and one of them writes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_reward_server import Fake, free_port, serving
from xla_flags import QUICK

from segzero_jax.hub import TOY

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests/pod_host.py"
HOSTS, STEPS, CALLS = 4, 3, 8
PROFILE = ["--profile=3"]
pytestmark = pytest.mark.timeout(1800)  # Eight devices on two cores, up to four processes that compile.
# A prompt for every device, as in the presets: reference and update are split by prompt over the whole mesh.
OPTIONS = ["--mesh=4x2", f"--train.steps={STEPS}", "--train.batch_size=8", "--train.micro_batch_size=8"]
OPTIONS += ["--train.checkpoint_every=1", "--rollout.group_size=4", "--rollout.max_response_tokens=48"]
OPTIONS += ["--rollout.max_batches=2", "--eval.examples=8", "--eval.samples=4", "--data.eval_splits=[val]"]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Compiles fast rather than well."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


def start(
    run: Path,
    data_dir: str,
    server: str,
    environment: dict[str, str],
    name: str = "one",
    more: Sequence[str] = (),
    cwd: Path = ROOT,
) -> subprocess.Popen[str]:
    """One process of a run; its standard error goes to a file beside the run directory."""
    options = [*OPTIONS, f"--run.dir={run}", f"--data.dir={data_dir}", f"--reward.server={server}", *more]
    with (run.parent / f"{run.name}-{name}.err").open("a") as err:
        return subprocess.Popen(
            [sys.executable, str(HOST), *options],
            stdout=subprocess.DEVNULL,
            stderr=err,
            cwd=cwd,
            env=environment,
            text=True,
        )


@contextmanager
def pod(run: Path, data_dir: str, server: str, environment: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": str(HOSTS)}
    hosts = [
        start(run, data_dir, server, environment | variables | {"JAX_PROCESS_ID": str(index)}, str(index), PROFILE)
        for index in range(HOSTS)
    ]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.wait()


def ends(hosts: list[subprocess.Popen[str]]) -> list[int]:
    return [host.wait(timeout=1200) for host in hosts]


def lines(file: Path) -> list[dict]:
    # The last line may be half-written.
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def said(run: Path, host: int) -> list[str]:
    """Our own lines of a host's standard error."""
    text = (run.parent / f"{run.name}-{host}.err").read_text()
    return [line for line in text.splitlines() if line.startswith("segzero_jax.train: ")]


def outcome(run: Path) -> tuple[list[dict], list[list[dict]], list[dict]]:
    """All that a run computed: metrics without times, rollouts, evaluations."""
    metrics = [
        {key: value for key, value in row.items() if not key.startswith("time/") and key != "tokens_per_second"}
        for row in lines(run / "metrics.jsonl")
    ]
    rollouts = [lines(run / "rollouts" / f"{row['step']}.jsonl") for row in metrics]
    return metrics, rollouts, lines(run / "evaluations.jsonl")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_dir: str, environment: dict[str, str]) -> tuple[Path, Fake]:
    """A run on four hosts from start to end, and what its reward server was asked."""
    run, fake = tmp_path_factory.mktemp("whole") / "run", Fake()
    with serving(fake) as server, pod(run, data_dir, server, environment) as hosts:
        assert ends(hosts) == [0] * HOSTS, said(run, 0)
    return run, fake


@pytest.mark.slow
@pytest.mark.longest
def test_four_hosts_train_as_one(
    whole: tuple[Path, Fake], tmp_path: Path, data_dir: str, environment: dict[str, str]
) -> None:
    """Sums over hosts are added in another order than within a process, so numbers agree to float32."""
    run, fake = whole
    with serving(Fake()) as server:
        assert start(tmp_path / "run", data_dir, server, environment).wait(timeout=1200) == 0
    metrics, rollouts, evaluations = outcome(run)
    expected, expected_rollouts, expected_evaluations = outcome(tmp_path / "run")
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 1))
    for row, other in zip(metrics, expected, strict=True):
        assert row.keys() == other.keys()
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert all(row["grad_norm"] > 1e-2 for row in metrics), "the responses should differ in their rewards"
    # What was said, and what it was worth, is the same to the letter and in the same order.
    assert rollouts == expected_rollouts
    assert evaluations == expected_evaluations
    # No call is made twice: one a question of the two evaluations, one a prompt of each batch that was sampled.
    calls = [request.request_id for request in fake.seen]
    batches = [row["dynamic_sampling/batches"] for row in metrics]
    assert len(calls) == (2 + sum(batches)) * CALLS
    assert max(batches) > 1
    assert [said(run, host) for host in range(HOSTS)] == [[]] * HOSTS
    # Each host's trace is its own, though all share the disk.
    traces = (run / "profile").glob("*/plugins/profile/*/perfetto_trace.json.gz")
    assert sorted(path.parents[3].name for path in traces) == [f"host_{index}" for index in range(HOSTS)]


def test_hosts_with_a_disk_each_stop_before_weights_are_loaded(
    tmp_path: Path, data_dir: str, environment: dict[str, str]
) -> None:
    """Their first start: none has a checkpoint that another lacks."""
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    runs = [tmp_path / f"disk{index}/run" for index in range(2)]
    for run in runs:
        run.parent.mkdir()
    hosts = [
        start(run, data_dir, "none", environment | variables | {"JAX_PROCESS_ID": str(index)}, str(index))
        for index, run in enumerate(runs)
    ]
    assert ends(hosts) == [2, 2]
    for index, run in enumerate(runs):
        (line,) = said(run, index)
        assert f"{runs[1]}/checkpoints: what host 0 (" in line
        assert line.endswith("run.checkpoint_dir has to be storage that all hosts share, such as gs://bucket/path")
        assert not run.exists(), "a run that did not begin leaves nothing"


def test_weights_that_one_host_cannot_read_end_all_with_its_reason(
    tmp_path: Path, data_dir: str, environment: dict[str, str]
) -> None:
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    disks = [tmp_path / "0", tmp_path / "1"]
    for disk in disks:
        shutil.copytree(TOY, disk / "model")
    damaged = disks[1] / "model/model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    hosts = [
        start(
            *(tmp_path / "run", data_dir, "none", environment | variables | {"JAX_PROCESS_ID": str(index)}, str(index)),
            ["--model.path=model"],
            disk,
        )
        for index, disk in enumerate(disks)
    ]
    assert ends(hosts) == [2, 2]
    (first,), (second,) = (said(tmp_path / "run", host) for host in range(2))
    assert "model/model-00002-of-00002.safetensors: cut short: " in second
    assert re.fullmatch(r"segzero_jax.train: host 1 \(.*\) stopped: (.*)", first)[1] == second.partition(": ")[2]
