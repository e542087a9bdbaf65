"""What a preflight finds before a run does, on one host and on several."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import question_sources as sources
from fake_reward_server import Fake, free_port, serving
from orbax.checkpoint._src.path import gcs_utils

from reward_server import reward_pb2
from segzero_jax import config as configs
from segzero_jax import preflight
from segzero_jax.checkpoint import Checkpoints
from segzero_jax.config import Config
from segzero_jax.data import build
from segzero_jax.grpo import TrainState
from segzero_jax.hub import TOY
from segzero_jax.identity import Identity
from segzero_jax.mesh import make_mesh
from segzero_jax.model.dims import RELEASED
from segzero_jax.pods import Pod
from segzero_jax.preflight import CHECKS, CheckFailed
from segzero_jax.run_dir import open_run

ROOT = Path(__file__).parents[1]


def config(folder: Path, **changes: object) -> Config:
    given = {"mesh": "4x4", "run.dir": str(folder / "runs/new"), "reward.server": "none", **changes}
    return configs.replace(Config(), **given)


class Neighbour(Pod):
    """The second of two hosts; what the first one says is in the test's hands."""

    def __init__(self, **said: str) -> None:
        super().__init__()
        self.index, self.count, self.names, self.said = 1, 2, ["a", "b"], said

    def exchange(self, what: str, said: str, deadline_s: float = 0.0) -> list[str]:
        return [self.said.get(what.replace(" ", "_"), said), said]


def failure(name: str, given: Config, pod: Pod | None = None) -> str:
    with pytest.raises(CheckFailed) as error:
        CHECKS[name](given, pod or Pod())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setitem(CHECKS, "versions", stopped)
    assert preflight.main(["--reward.server=none"]) == 130
    assert capsys.readouterr().err == "segzero_jax.preflight: stopped before all was checked\n"


def test_all_is_well_and_nothing_is_left_behind(
    tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(checkpoint="abcdef0123456789")
    with serving(fake) as address:
        assert preflight.run(config(tmp_path, **{"reward.server": address, "data.dir": data_dir}), Pod()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24].split(maxsplit=1)[1].strip() for line in lines[:-1]] == list(CHECKS)
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert "the same on 1 host" in lines[1]
    assert "16 x cpu as 4x4, and they sum up to 16" in lines[2]
    assert "toy: 2048 questions to train on, 4 splits to evaluate" in lines[4]
    assert f"fake, checkpoint abcdef012345,  at {address} (): a mask in 0." in lines[-2]
    assert lines[-1] == "all is well"
    assert list(tmp_path.iterdir()) == []


def test_every_failure_is_told_and_counted(tmp_path: Path, data_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"mesh": "2x3", "reward.server": f"127.0.0.1:{free_port()}", "reward.timeout_s": 0.1}
    assert preflight.run(config(tmp_path, **changes, **{"data.dir": data_dir}), Pod()) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("FAILED")] == ["model", "reward"]
    assert "cannot be split evenly over tensor = 3" in lines[3]
    assert "unreachable" in lines[-2]
    assert lines[-1] == "2 of 9 checks failed"


def test_a_mesh_larger_than_the_job(tmp_path: Path) -> None:
    assert "needs 64 devices, this job has 16" in failure("devices", config(tmp_path, mesh="8x8"))


def test_hosts_with_other_code(tmp_path: Path) -> None:
    other = preflight._versions() | {"code": "0123"}
    said = failure("versions", config(tmp_path), Neighbour(versions=json.dumps(other)))
    assert said.startswith("code is 0123 on host 0 (a), ")
    assert said.endswith(" on host 1 (b): tpu/setup.sh")


def test_hosts_with_other_options(tmp_path: Path) -> None:
    """Directories are a host's own."""
    here, there = config(tmp_path), config(tmp_path, **{"run.dir": "elsewhere", "data.workers": 3})
    assert CHECKS["options"](here, Neighbour(options=told(there))) == "the same on 2 hosts"
    said = failure("options", here, Neighbour(options=told(configs.replace(there, **{"train.lr": 0.5}))))
    assert (
        said == "train.lr is 0.5 on host 0 (a), 0.0001 on host 1 (b); expected the same command and code on all hosts"
    )


def told(given: Config) -> str:
    """What a host with this configuration says of its options."""
    heard: list[str] = []

    class Listening(Pod):
        def exchange(self, what: str, said: str, deadline_s: float = 0.0) -> list[str]:
            heard.append(said)
            return [said]

    CHECKS["options"](given, Listening())
    return heard[0]


def save(given: Config, *steps: int) -> None:
    with jax.set_mesh(make_mesh("1x1")), Checkpoints(Path(given.run.dir) / "checkpoints") as checkpoints:
        for step in steps:
            state = TrainState({"w": jnp.ones(3)}, {}, jnp.int32(step))  # type: ignore[arg-type]
            checkpoints.save(step, state, {}, given, Identity("", None))
        checkpoints.wait()


class TestCheckpoints:
    def test_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        said = failure("checkpoints", config(tmp_path, **{"run.checkpoint_dir": f"{tmp_path}/file/inside"}))
        assert said.startswith(f"{tmp_path}/file/inside: cannot be written to: ")

    def test_in_a_bucket_that_may_not_be_asked_what_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(path: object) -> bool:
            raise LookupError("403 GET b/BUCKET: no storage.buckets.get access")

        monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", refuse)
        said = failure("checkpoints", config(tmp_path))
        assert said.endswith(
            "checkpoints: cannot be listed: LookupError: 403 GET b/BUCKET: no storage.buckets.get access"
        )
        assert not list(tmp_path.rglob("probe*"))

    def test_that_each_host_keeps_for_itself(self, tmp_path: Path) -> None:
        said = failure("checkpoints", config(tmp_path), Neighbour(checkpoint_probe="f00"))
        assert "what host 0 (a) writes there is not seen here; run.checkpoint_dir has to be storage that all" in said
        assert not list(tmp_path.rglob("probe*"))

    def test_whose_best_is_misspelt(self, tmp_path: Path) -> None:
        said = failure("checkpoints", config(tmp_path, **{"train.keep_best": "val/greedy/gIoU"}))
        assert said.startswith("train.keep_best=val/greedy/gIoU: expected ")

    def test_of_another_run(self, tmp_path: Path) -> None:
        given = config(tmp_path)
        save(given, 1, 2)
        CHECKS["checkpoints"](configs.replace(given, **{"train.steps": 9}), Pod())
        another = configs.replace(given, **{"train.lr": 0.5})
        lines = f"{tmp_path}/runs/new/checkpoints/2: written with another configuration (train.lr differs); "
        assert failure("checkpoints", another).startswith(lines)
        shutil.rmtree(tmp_path / "runs/new/checkpoints/2/run")
        assert "checkpoints/1: written with another configuration (train.lr differs)" in failure("checkpoints", another)

    def test_are_not_read_for_that(self, tmp_path: Path) -> None:
        """They may be 83 GB."""
        save(config(tmp_path), 1)
        for item in ("policy", "optimizer"):
            shutil.rmtree(tmp_path / "runs/new/checkpoints/1" / item)
        CHECKS["checkpoints"](config(tmp_path), Pod())
        assert "(train.lr differs)" in failure("checkpoints", config(tmp_path, **{"train.lr": 0.5}))

    def test_are_none_yet_of_another_run(self, tmp_path: Path) -> None:
        given = config(tmp_path)
        (open_run(given) / "metrics.jsonl").touch()
        CHECKS["checkpoints"](given, Pod())
        said = failure("checkpoints", configs.replace(given, **{"train.lr": 0.5}))
        assert said.startswith(
            f"run.dir={tmp_path}/runs/new: holds a run already, with another configuration (train.lr"
        )

    def test_of_a_run_with_a_damaged_line(self, tmp_path: Path) -> None:
        given = config(tmp_path)
        (open_run(given) / "metrics.jsonl").write_text("3.5\n")
        assert "metrics.jsonl:1: expected a JSON object" in failure("checkpoints", given)

    def test_of_a_run_that_is_going_on_stay(self, tmp_path: Path) -> None:
        kept = tmp_path / "runs/new/checkpoints/7.orbax-checkpoint-tmp-0"  # a save that has begun
        kept.mkdir(parents=True)
        CHECKS["checkpoints"](config(tmp_path), Pod())
        assert list(kept.parent.iterdir()) == [kept]


class TestDisks:
    @pytest.fixture(autouse=True)
    def half_a_gib_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**29))

    def test_that_do_not_take_the_run(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        said = failure("disks", config(tmp_path, **{"run.dir": str(tmp_path / "file/run")}))
        assert said == f"run.dir={tmp_path}/file/run: cannot be written to: Not a directory"
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]

    def test_that_are_full(self, tmp_path: Path) -> None:
        assert "0.5 GiB free, " in failure("disks", config(tmp_path))

    def test_that_batches_go_through_between_processes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """64 MiB in a container, unless told otherwise; two batches a process, 16 prompts of 840 x 840 pixels each."""
        usage = shutil._ntuple_diskusage
        small = lambda path: usage(2**50, 0, 2**26 if Path(path) == Path("/dev/shm") else 2**50)  # noqa: E731
        monkeypatch.setattr(shutil, "disk_usage", small)
        changes = {"data.workers": 2, "data.image_size": 840, "train.batch_size": 16}
        said = failure("disks", config(tmp_path, **changes))
        needed = 2 * 2 * 16 * 3600 * 1176 * 4 / 2**30
        assert said.startswith(f"/dev/shm: 0.1 GiB free, {needed:.1f} GiB are needed: {needed:.1f} for batches between")
        assert CHECKS["disks"](config(tmp_path, **changes | {"data.workers": 0}), Pod())

    @pytest.mark.parametrize(
        ("changes", "count", "bytes_each"),
        [
            ({}, 3, 12),
            ({"train.moment_dtype": "bfloat16"}, 3, 10),
            ({"train.keep_checkpoints": 4, "train.keep_best": "reward/mean"}, 6, 12),
        ],
    )
    def test_that_keep_checkpoints(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], count: int, bytes_each: int
    ) -> None:
        monkeypatch.setattr(preflight, "read_dims", lambda path: RELEASED["Qwen/Qwen2.5-VL-7B-Instruct"])
        billions = 8.292
        wanted = count * bytes_each * billions * 1e9 / 2**30
        said = failure("disks", config(tmp_path, **changes))
        found = re.search(rf"([\d.]+) for {count} checkpoints \(train.keep_checkpoints, run.checkpoint_dir\)", said)
        assert found, said
        assert float(found[1]) == pytest.approx(wanted, rel=1e-3)

    def test_that_keep_some_already(self, tmp_path: Path) -> None:
        folder = tmp_path / "runs/new/checkpoints/5"
        folder.mkdir(parents=True)
        needed = {need.what: need.size for need in preflight._needs(config(tmp_path))}
        (folder / "policy").write_bytes(bytes(1000))
        less = {need.what: need.size for need in preflight._needs(config(tmp_path))}
        assert sum(needed.values()) - sum(less.values()) == 1000
        os.truncate(folder / "policy", 2**40)  # Of a run that kept more.
        assert min(need.size for need in preflight._needs(config(tmp_path))) == 0, "no room for the others"

    def test_that_cannot_be_looked_at(self, tmp_path: Path) -> None:
        place = tmp_path / ("x" * 300)
        assert failure("disks", config(tmp_path, **{"data.dir": str(place)})) == (
            f"{place}: cannot be looked at: File name too long"
        )

    def test_that_keep_none(self, tmp_path: Path) -> None:
        bucket = config(tmp_path, **{"run.checkpoint_dir": "gs://bucket/run"})
        assert "checkpoints" not in failure("disks", bucket)


class TestModel:
    def test_that_cannot_be_had(self, tmp_path: Path) -> None:
        said = failure("model", config(tmp_path, **{"model.path": "org/none"}))
        assert said.startswith("model.path=org/none: not in the cache, and the hub does not answer: ")

    def test_of_which_the_cache_has_no_weights(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a plan or a preflight has left it."""
        shutil.copy(TOY / "config.json", tmp_path)
        monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
        said = failure("model", config(tmp_path, **{"model.path": "org/some"}))
        assert said.startswith("model.path=org/some: not in the cache, and the hub does not answer: ")

    def test_of_which_the_cache_has_a_part(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = {"config.json": 1, "1.safetensors": 20, "2.safetensors": 300, "other.bin": 4000}
        found = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=sizes[name]) for name in sizes])
        monkeypatch.setattr(preflight, "HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: found))
        here = {"config.json": "/a/config.json", "1.safetensors": "/a/1.safetensors"}
        monkeypatch.setattr(preflight, "try_to_load_from_cache", lambda repo, name, revision: here.get(name))
        needed = {need.what: need.size for need in preflight._needs(config(tmp_path, **{"model.path": "org/some"}))}
        assert needed["the model"] == 300

    def test_without_tokenizer(self, tmp_path: Path) -> None:
        shutil.copytree(TOY, tmp_path / "model")
        (tmp_path / "model/tokenizer.json").unlink()
        given = config(tmp_path, **{"model.path": str(tmp_path / "model")})
        assert "no tokenizer or picture settings for it" in failure("model", given)

    def test_without_weights(self, tmp_path: Path) -> None:
        shutil.copytree(TOY, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))
        said = failure("model", config(tmp_path, **{"model.path": str(tmp_path / "model")}))
        assert said == f"{tmp_path}/model: no *.safetensors file there"


class TestData:
    def test_that_is_built(self, tmp_path: Path) -> None:
        source = sources.solution_parquet(tmp_path / "source")
        assert build.main(["r", f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
        given = config(tmp_path, **{"data.name": "r", "data.dir": str(tmp_path), "data.eval_splits": []})
        assert CHECKS["data"](given, Pod()) == "r: 6 questions to train on, 0 splits to evaluate"
        said = failure("data", given, Neighbour(data='{"r/train": "other"}'))
        assert said.startswith("r/train: checksum other on host 0 (a), ")
        assert said.endswith(" on host 1 (b); build it on all hosts from the same source, in the same way")

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"rollout.max_prompt_tokens": 20}, "rollout.max_prompt_tokens="),
            ({"reward.recipe": "seg_zero_strict", "data.prompt": "seg_zero"}, "have not exactly one object"),
            ({"data.eval_splits": ["held/test"]}, "are about pictures of held/test"),
        ],
    )
    def test_that_training_refuses(self, tmp_path: Path, changes: dict[str, object], said: str) -> None:
        for name, source in {
            "r": sources.solution_parquet(tmp_path / "source", multiple=True),
            "held": sources.mask_parquet(tmp_path / "held", first=1000),
        }.items():
            assert build.main([name, f"--source={source}", f"--data-dir={tmp_path}", "--workers=1"]) == 0
        given = {"data.name": "r", "data.dir": str(tmp_path), "data.eval_splits": [], "rollout.max_prompt_tokens": 999}
        assert said in failure("data", config(tmp_path, **given | changes))

    def test_that_is_not(self, tmp_path: Path) -> None:
        said = failure("data", config(tmp_path, **{"data.name": "refCOCOg_9k_840", "data.dir": str(tmp_path)}))
        assert "python -m segzero_jax.data.build refCOCOg_9k_840" in said


@pytest.mark.parametrize("absent", ["torch", "sam2"])
def test_a_local_reward_server_without_its_packages(
    absent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = config(tmp_path, **{"reward.server": "local"})
    assert CHECKS["reward servers"](given, Pod()) == "local: starts with the run and loads toy"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == absent else find(name))
    said = failure("reward servers", given)
    assert said.startswith(f"reward.server=local: {absent} is not installed: ")
    assert said.endswith("; or reward.server=none or host:port")


def test_one_of_several_reward_servers_that_is_away(tmp_path: Path) -> None:
    with serving(Fake()) as address:
        given = config(tmp_path, **{"reward.server": f"{address},127.0.0.1:{free_port()}", "reward.timeout_s": 0.1})
        assert "continuing without reward server 127.0.0.1:" in failure("reward servers", given)


def test_a_reward_server_that_makes_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(request: reward_pb2.SegmentRequest, context: object) -> reward_pb2.SegmentResponse:
        failed = reward_pb2.CandidateMask(status=reward_pb2.Status(code=13, message="out of memory"))
        return reward_pb2.SegmentResponse(request_id=request.request_id, candidates=[failed])

    fake = Fake()
    monkeypatch.setattr(fake, "Segment", fail)
    with serving(fake) as address:
        said = failure("reward servers", config(tmp_path, **{"reward.server": address}))
    assert said == f"reward server {address}: out of memory"


def test_reward_functions_that_are_not_there_or_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "functions_of_preflight.py").write_text("def short(answer):\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    given = config(tmp_path, **{"reward.functions": ["functions_of_preflight:short"]})
    assert CHECKS["reward functions"](given, Pod()) == "functions_of_preflight:short"
    assert CHECKS["reward functions"](config(tmp_path), Pod()) == "none"
    said = failure("reward functions", given, Neighbour(reward_functions=json.dumps({"short": "0123"})))
    assert said.startswith("reward.functions: the file of short on host 1 (b) is not that on host 0 (a)")
    absent = config(tmp_path, **{"reward.functions": ["functions_of_preflight:long"]})
    assert "has no function long" in failure("reward functions", absent)


def test_a_reward_server_with_another_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a b")
    with serving(Fake()) as address:
        given = config(tmp_path, **{"reward.server": address, "reward.token_file": str(token)})
        assert "expected one word" in failure("reward servers", given)


def test_two_hosts_check_together(tmp_path: Path, data_dir: str) -> None:
    variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2", "XLA_FLAGS": ""}
    words = [sys.executable, "-m", "segzero_jax.preflight", "--mesh=2x2", f"--run.dir={tmp_path}/run"]
    hosts = [
        subprocess.Popen(
            [*words, "--reward.server=none", f"--data.dir={data_dir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=os.environ | variables | {"JAX_PROCESS_ID": str(i)},
        )
        for i in range(2)
    ]
    first, second = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert "on 2 hosts" in first
    assert "4 x cpu as 2x2, and they sum up to 4" in first
    assert first.splitlines()[-1] == "all is well"
    assert "all is well" not in second
    assert not (tmp_path / "run").exists()
