"""What runs on a machine itself, beside fakes: tpu/worker.sh under systemd, tpu/gke/pod.sh in a pod."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import question_sources

from segzero_jax.config import Config
from segzero_jax.data import build
from segzero_jax.data.pipeline import open_split

ROOT = Path(__file__).parents[2]


def tool(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


class Machine:
    """A TPU machine with the code on it: what systemd, the bucket and the metadata say is in the test's hands."""

    def __init__(self, folder: Path, number: int = 0) -> None:
        self.root = folder / "segzero-jax"
        self.bin, self.calls = folder / "bin", folder / "calls"
        (self.root / "tpu").mkdir(parents=True)
        shutil.copy(ROOT / "tpu/worker.sh", self.root / "tpu")
        for name in ("constraints.txt", "pyproject.toml"):
            (self.root / name).write_text("what is installed")
        self.archive = folder / "segzero-jax.tar.gz"
        self.unpack()
        self.calls.write_text("")
        record = f'echo "${{0##*/}} $*" >>{self.calls}\n'
        tool(self.bin, "sudo", '"$@"')
        tool(self.bin, "systemd-run", record)
        # The bucket: a folder, or a file with what gcloud says instead.
        self.stored, self.trouble = folder / "stored", folder / "trouble"
        self.sets, self.place = folder / "sets", folder / ".cache/segzero_jax/question_set"
        tool(
            self.bin,
            "gcloud",
            f'{record}words="$*" place={self.stored}\n'
            "if [[ $words == *gs://b/data/question_set/* ]]; then\n"
            f"  name=${{words#*question_set/}} && place={self.sets}/${{name%%[ /]*}}\n"
            "fi\n"
            "if [[ $2 == ls ]]; then\n"
            f"  [[ ! -e {self.trouble} ]] || {{ cat {self.trouble} >&2; exit 1; }}\n"
            '  [[ -e $place ]] || { echo "ERROR: One or more URLs matched no objects." >&2; exit 1; }\n'
            "elif [[ $* == *rsync*gs://b/n/run\\ * || $* == *rsync*gs://b/data/* ]]; then\n"
            '  cp -r $place/. "${@: -1}"; [[ ! -e $place/breaks-off ]]\n'
            "fi",
        )
        tool(
            self.bin,
            "curl",
            f"[[ $* == *Metadata-Flavor:Google*/agent-worker-number && ! -e {folder}/no-metadata ]] && echo {number}",
        )
        tool(
            folder / ".local/bin",
            "uv",
            f"{record}[[ $1 != venv ]] || {{ mkdir -p .venv/bin; cp $0 .venv/bin/python; }}",
        )
        self.unit("inactive", "dead", 0, 0)
        self.environment = os.environ | {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(folder), "USER": "me"}

    def unpack(self, *files: str) -> None:
        """A commit with these files, where tpu/setup.sh leaves it."""
        with tarfile.open(self.archive, "w:gz") as archive:
            archive.add(self.root, self.root.name, recursive=False)
            for name in ("tpu", "tpu/worker.sh", "constraints.txt", "pyproject.toml", *files):
                path = self.root / name
                path.parent.mkdir(exist_ok=True, parents=True)
                path.touch()
                archive.add(path, f"{self.root.name}/{name}", recursive=False)

    def unit(self, active: str, sub: str, how: int, code: int) -> None:
        """What systemd says of the training; ``how`` it ended as waitid's si_code, ``code`` as its si_status."""
        answers = (
            f"case $* in *ActiveState*) echo {active} ;; *SubState*) echo {sub} ;;\n"
            f"*ExecMainCode*) echo {how} ;; *ExecMainStatus*) echo {code} ;; esac"
        )
        tool(self.bin, "systemctl", f'[[ $1 == show ]] || echo "systemctl $*" >>{self.calls}\n{answers}')

    def worker(self, *words: str) -> tuple[int, str]:
        self.calls.write_text("")
        script = self.root / "tpu/worker.sh"
        done = subprocess.run([script, *words], capture_output=True, text=True, env=self.environment, timeout=60)
        return done.returncode, done.stdout + done.stderr

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


INSTALL = ("install", "abc", "gs://b/data")
EVALUATE = ("evaluate", "gs://b/n", "evaluate/n", "--dataset", "my set/val")
START = ("start", "gs://b/n", "runs/n", "--mesh=4x4", "--data.name=two words")


class TestWorker:
    def test_is_set_up_once_a_version(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        assert machine.worker("state") == (0, "worker 0: segzero new\n")
        assert machine.worker(*START)[0] == 2
        assert machine.worker("install", "abc")[0] == 0
        venv, packages = machine.called()
        assert venv.startswith("uv venv")
        assert "--constraint constraints.txt --editable .[tpu]" in packages
        assert machine.worker("state") == (0, "worker 0: segzero idle\n")
        assert machine.worker("install", "def")[0] == 0
        assert machine.called() == []
        assert (machine.root / ".revision").read_text() == "def\n"
        (machine.root / "constraints.txt").write_text("something else")
        machine.worker("install", "ghi")
        assert len(machine.called()) == 2

    def test_is_set_up_by_one_at_a_time(self, tmp_path: Path) -> None:
        """Where a connection breaks, gcloud asks again while the first is still at it."""
        machine = Machine(tmp_path)
        uv = tmp_path / ".local/bin/uv"
        uv.write_text(uv.read_text() + "sleep 0.3\n")
        with ThreadPoolExecutor() as pool:
            assert list(pool.map(lambda _: machine.worker("install", "abc"), range(2))) == [(0, "")] * 2
        assert [call.split()[1] for call in machine.called()] == ["venv", "pip"]

    def test_is_new_again_where_another_version_could_not_be_set_up(self, tmp_path: Path) -> None:
        """Its code is there by then, and the packages are still those of the version before."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        (machine.root / "constraints.txt").write_text("something else")
        tool(tmp_path / ".local/bin", "uv", "exit 1")
        assert machine.worker("install", "def")[0] == 1
        assert machine.worker("state") == (0, "worker 0: segzero new\n")
        assert machine.worker(*START)[0] == 2
        machine.unit("active", "running", 0, 0)
        assert machine.worker("state") == (0, "worker 0: segzero running\n"), "what runs goes on"
        # Some packages may be the new ones by now, so the version before is set up anew as well.
        (machine.root / "constraints.txt").write_text("what is installed")
        assert machine.worker("install", "abc")[0] == 1

    def test_keeps_of_an_earlier_version_what_it_made_itself(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.unpack("segzero_jax/kept.py", "segzero_jax/gone.py", "two words/gone", "gone.py")
        machine.worker("install", "abc")
        made = ("runs/n/metrics.jsonl", "segzero_jax/cache.pyc", "train.log", ".run")
        for name in made:
            (machine.root / name).parent.mkdir(exist_ok=True, parents=True)
            (machine.root / name).touch()
        machine.unpack("segzero_jax/kept.py", "segzero_jax/more.py")
        assert machine.worker("install", "def")[0] == 0
        assert {path.name for path in machine.root.rglob("gone*")} == set()
        for name in (*made, "segzero_jax/kept.py", "segzero_jax/more.py", "tpu/worker.sh", ".venv/bin/python"):
            assert (machine.root / name).exists(), name

    @pytest.mark.parametrize(
        ("unit", "word"),
        [
            (("active", "running", 0, 0), "running"),
            (("deactivating", "stop-sigterm", 0, 0), "running"),
            (("active", "exited", os.CLD_EXITED, 0), "done"),
            (("failed", "failed", os.CLD_EXITED, 3), "failed 3"),
            (("failed", "failed", os.CLD_KILLED, signal.SIGKILL), "failed 137"),
            # Not an end with code 2 or 5, which babysit leaves to people.
            (("active", "exited", os.CLD_KILLED, signal.SIGINT), "failed 130"),
            (("failed", "failed", os.CLD_DUMPED, signal.SIGTRAP), "failed 133"),
            (("inactive", "dead", 0, 0), "idle"),
        ],
    )
    def test_tells_what_systemd_knows(self, unit: tuple[str, str, int, int], word: str, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.unit(*unit)
        assert machine.worker("state") == (0, f"worker 0: segzero {word}\n")
        code, said = machine.worker(*START)
        assert (code, "runs already" in said) == ((2, True) if word == "running" else (0, False))

    def test_checks_and_builds_with_the_variables_of_the_training(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        tool(machine.root / ".venv/bin", "python", 'echo "$HF_TOKEN|$WORDS|$PLAIN|$*"')
        assert machine.worker("preflight", "--mesh=4x4", "two words") == (
            0,
            "|||-m segzero_jax.preflight --mesh=4x4 two words\n",
        )
        # As SECRETS of the settings brings it.
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets/segzero.env").write_text(
            "# of the hub\nHF_TOKEN=hf_$x\n\nWORDS=\"two words\"\n; x\nPLAIN= a 'b' "
        )
        assert machine.worker(*INSTALL, "set") == (0, "hf_$x|two words|a 'b'|-m segzero_jax.data.build set\n")
        tool(machine.root / ".venv/bin", "python", "exit 3")
        assert machine.worker("preflight")[0] == 3

    def test_checks_nothing_beside_a_training(self, tmp_path: Path) -> None:
        """Both would take the same ports and chips, and the training would end with the check."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.unit("active", "running", 0, 0)
        runs = "tpu/worker.sh: runs already; tpu/run.sh --stop ends it\n"
        assert machine.worker("preflight", "--mesh=4x4") == (2, runs)
        assert machine.called() == []

    def test_starts_nothing_beside_a_preflight(self, tmp_path: Path) -> None:
        """Whoever asked for it may have hung up, which the machine is not told."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        tool(machine.root / ".venv/bin", "python", f"touch {tmp_path}/checks; exec sleep 60")
        script = machine.root / "tpu/worker.sh"
        child = subprocess.Popen([script, "preflight"], env=machine.environment)
        deadline = time.monotonic() + 30
        while not (tmp_path / "checks").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        checks = "tpu/worker.sh: a preflight still runs; tpu/run.sh --stop ends it\n"
        for words in (START, EVALUATE, ("preflight",)):
            assert machine.worker(*words) == (2, checks)
            assert not [line for line in machine.called() if line.startswith("systemd-run")]
        assert machine.worker("stop")[0] == 0
        assert child.wait(timeout=30) == -signal.SIGTERM
        assert machine.worker(*START)[0] == 0
        assert machine.worker("stop") == (0, "")

    def test_names_an_evaluation_and_which_worker_it_is(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path, number=3)
        machine.worker("install", "abc")
        for start, what in ((START, ""), (EVALUATE, "evaluation "), (START, "")):
            machine.unit("inactive", "dead", 0, 0)
            assert machine.worker(*start)[0] == 0
            assert machine.worker("state") == (0, "worker 3: segzero idle\n")
            for unit, word in (
                (("active", "exited", os.CLD_EXITED, 0), "done"),
                (("failed", "failed", os.CLD_EXITED, 2), "failed 2"),
                (("active", "running", 0, 0), "running"),
            ):
                machine.unit(*unit)
                assert machine.worker("state") == (0, f"worker 3: segzero {what}{word}\n")
        (tmp_path / "no-metadata").touch()
        assert machine.worker("state") == (0, "worker ?: segzero running\n")

    def test_has_nothing_to_stop_once_systemd_has_forgotten_it(self, tmp_path: Path) -> None:
        """After a restart of the machine, or an earlier stop: systemctl's own answer would be a failure."""
        machine = Machine(tmp_path)
        for loaded, stops in (("loaded", ["systemctl stop segzero"]), ("not-found", [])):
            tool(
                machine.bin,
                "systemctl",
                f"[[ $1 != show ]] || {{ echo {loaded}; exit; }}\n"
                f'echo "systemctl $*" >>{machine.calls}\n[[ {loaded} == loaded ]] || exit 5',
            )
            assert machine.worker("stop") == (0, "")
            assert machine.called() == stops

    @pytest.mark.parametrize("code", [0, 7])
    def test_tells_where_a_training_that_was_stopped_has_not_been_saved(self, code: int, tmp_path: Path) -> None:
        """systemctl calls its stop a success, and what comes next may be ``tpu/delete.sh``."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        ended = "failed" if code else "inactive"
        tool(
            machine.bin,
            "systemctl",
            f"[[ $1 != stop ]] || touch {tmp_path}/stopped\n"
            f"active=active sub=running; [[ ! -e {tmp_path}/stopped ]] || active={ended} sub={ended}\n"
            f"case $* in *ActiveState*) echo $active ;; *SubState*) echo $sub ;;\n"
            f"*ExecMainCode*) echo {os.CLD_EXITED:d} ;; *ExecMainStatus*) echo {code} ;; esac",
        )
        found, said = machine.worker("stop")
        assert found == (1 if code else 0), said
        assert ("ended with failed 7, so its last step may not be saved" in said) == bool(code)
        assert machine.worker("stop")[0] == 0, "once told"

    def test_starts_the_training_under_systemd(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path, number=3)
        machine.worker("install", "abc")
        assert machine.worker(*START) == (0, "")
        (run,) = [line for line in machine.called() if line.startswith("systemd-run")]
        assert run.endswith("/.venv/bin/python -m segzero_jax.train --mesh=4x4 --data.name=two words")
        assert "--uid=me" in run
        assert "KillMode=mixed" in run
        assert "LimitMEMLOCK=infinity" in run
        assert f"--property=EnvironmentFile=-{tmp_path}/secrets/segzero.env" in run
        # It saves at a shutdown, over the network.
        assert "--property=After=network.target network-online.target" in run, (
            "it saves at a shutdown, over the network"
        )
        assert f"--setenv=JAX_COMPILATION_CACHE_DIR={START[1]}/compiled" in run

    def test_evaluates_under_systemd_and_keeps_what_is_written(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        assert machine.worker(*EVALUATE)[0] == 2
        machine.worker("install", "abc")
        machine.stored.mkdir()
        (machine.stored / "samples.jsonl").write_text("of a machine that is gone")
        assert machine.worker(*EVALUATE) == (0, "")
        calls = machine.called()
        run = next(line for line in calls if line.startswith("systemd-run") and "--unit=segzero " in line)
        assert run.endswith("/.venv/bin/python -m segzero_jax.evaluate --dataset my set/val")
        assert [line for line in calls if "rsync" in line] == [
            "gcloud storage rsync --recursive gs://b/n/evaluate evaluate/n.part"
        ]
        machine.worker("copy")
        (copy,) = machine.called()
        assert copy.endswith(" evaluate/n gs://b/n/evaluate")
        assert machine.worker(*EVALUATE) == (0, "")
        assert not [line for line in machine.called() if "rsync" in line], "its own are newer"

    def test_ends_a_copy_that_still_runs_before_the_next_timer_gets_its_name(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.worker(*START)
        calls = machine.called()
        (stop,) = [line for line in calls if line.startswith("systemctl stop")]
        assert stop.split()[2:] == ["segzero", "segzero-copy.timer", "segzero-copy.service"]
        timer = next(line for line in calls if "--unit=segzero-copy " in line)
        assert "--timer-property=AccuracySec=1s" in timer, "systemd's own is a minute"
        assert calls.index(stop) < calls.index(timer)

    def test_keeps_the_runs_files_in_the_bucket(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.worker(*START)
        assert [line.split()[:3] for line in machine.called() if line.startswith("gcloud")] == [
            ["gcloud", "storage", "ls"]
        ]
        assert sum(line.startswith("systemd-run") for line in machine.called()) == 2, "the training and the timer"
        machine.worker("copy")
        assert machine.called() == [], "there are no files yet"
        (machine.root / "runs/n").mkdir(parents=True)
        machine.worker("copy")
        assert machine.called() == [], "what there is, is of a process that does not write the run's files"
        (machine.root / "runs/n/config.yaml").touch()
        machine.worker("copy")
        (copy,) = machine.called()
        assert copy.endswith("--exclude=^checkpoints/.* runs/n gs://b/n/run")
        (machine.root / ".run").write_text("STORE=gs://b/n DIR=runs/n\n")  # Of an earlier commit, whose training runs.
        machine.worker("copy")
        assert machine.called() == [copy]

    def test_takes_the_files_of_a_machine_that_is_gone(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.stored.mkdir()
        for name in ("config.yaml", "metrics.jsonl"):
            (machine.stored / name).write_text(name)
        (machine.root / "runs/n").mkdir(parents=True)
        (machine.root / "runs/n/stacks-0.txt").touch()  # Of a start that came to nothing.
        assert machine.worker(*START) == (0, "")
        assert (machine.root / "runs/n/metrics.jsonl").read_text() == "metrics.jsonl"
        machine.worker(*START)
        assert not [line for line in machine.called() if "rsync" in line], "its own are newer"

    @pytest.mark.parametrize("trouble", ["the list cannot be read", "the copy breaks off"])
    def test_starts_nothing_on_half_of_a_run(self, tmp_path: Path, trouble: str) -> None:
        """What lies on the machine is copied to the bucket a minute later, in the place of what is there."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        machine.stored.mkdir()
        (machine.stored / "config.yaml").touch()
        blocked = machine.trouble if trouble == "the list cannot be read" else machine.stored / "breaks-off"
        blocked.write_text("ERROR: HTTPError 503: Service Unavailable\n")
        for _ in range(2):
            code, said = machine.worker(*START)
            assert code == 1
            assert ("gs://b/n/run: cannot be read now, so nothing is started: ERROR" in said) == (
                blocked == machine.trouble
            )
            assert not [line for line in machine.called() if line.startswith("systemd-run")]
            machine.worker("copy")
            assert machine.called() == []
        blocked.unlink()
        (machine.stored / "metrics.jsonl").write_text("a line")
        assert machine.worker(*START) == (0, "")
        assert (machine.root / "runs/n/metrics.jsonl").read_text() == "a line"
        assert [path.name for path in (machine.root / "runs").iterdir()] == ["n"]

    def test_does_not_take_itself_for_another_where_nobody_tells_which_it_is(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        (tmp_path / "no-metadata").touch()
        code, said = machine.worker(*START)
        assert (code, said) == (
            1,
            "tpu/worker.sh: the metadata server does not tell which worker this is; try again\n",
        )
        assert not [line for line in machine.called() if line.startswith("systemd-run")]


class TestData:
    """What ``worker.sh install`` does about data sets."""

    def test_what_the_bucket_has_not_is_built_from_the_hub(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        assert machine.worker(*INSTALL, "refCOCOg_9k_840", "ReasonSeg") == (0, "")
        calls = [line for line in machine.called() if line.startswith("python")]
        assert calls == [f"python -m segzero_jax.data.build {name}" for name in ("refCOCOg_9k_840", "ReasonSeg")]

    def test_a_set_of_ones_own_is_copied_where_the_training_looks_for_it(self, tmp_path: Path) -> None:
        """With the real command that compares it with its checksums."""
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        tool(machine.root / ".venv/bin", "python", f'cd {ROOT} && exec {sys.executable} "$@"')
        mine, source = tmp_path / "mine", question_sources.lines(tmp_path / "s")
        assert build.main(["mugs", f"--source={source}", f"--data-dir={mine}", "--workers=1"]) == 0
        shutil.copytree(mine / "question_set/mugs", machine.sets / "mugs")
        assert machine.worker(*INSTALL, "mugs") == (0, "mugs: all files are as they were built\n")
        assert Config().data.dir == "~/.cache/segzero_jax"
        assert list(open_split("mugs", "train", machine.place.parent)) == list(open_split("mugs", "train", mine))
        assert [path.name for path in machine.place.parent.iterdir()] == ["question_set"]
        assert machine.worker(*INSTALL, "mugs") == (0, "")
        assert not [line for line in machine.called() if "rsync" in line], "it is there"

    @pytest.mark.parametrize("trouble", ["the list cannot be read", "the copy breaks off", "a file has changed"])
    def test_half_a_set_is_none_and_the_machine_stays_new(self, trouble: str, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        (machine.sets / "mugs").mkdir(parents=True)
        (machine.sets / "mugs/build.json").touch()
        machine.worker("install", "abc")
        broken = {
            "the list cannot be read": machine.trouble,
            "the copy breaks off": machine.sets / "mugs/breaks-off",
            "a file has changed": tmp_path / "changed",
        }[trouble]
        broken.write_text("ERROR: HTTPError 503: Service Unavailable\n")
        tool(machine.root / ".venv/bin", "python", f"[[ $* != *--check* || ! -e {tmp_path}/changed ]]")
        for _ in range(2):
            code, said = machine.worker(*INSTALL, "mugs")
            assert code == 1
            assert ("mugs: cannot be read now, so this machine is not set up: ERROR" in said) == (
                trouble == "the list cannot be read"
            )
            assert ("gs://b/data/question_set/mugs: not whole; copy it" in said) == (trouble == "a file has changed")
            assert not (machine.place / "mugs").exists()
            assert machine.worker("state") == (0, "worker 0: segzero new\n")
        broken.unlink()
        assert machine.worker(*INSTALL, "mugs")[0] == 0
        assert [path.name for path in (machine.place / "mugs").iterdir()] == ["build.json"]
        assert machine.worker("state") == (0, "worker 0: segzero idle\n")

    def test_a_set_that_is_nowhere_says_where_it_was_looked_for(self, tmp_path: Path) -> None:
        machine = Machine(tmp_path)
        machine.worker("install", "abc")
        tool(machine.root / ".venv/bin", "python", "exit 2")
        code, said = machine.worker(*INSTALL, "mugs")
        assert (code, said) == (2, "tpu/worker.sh: mugs: not in gs://b/data/question_set/mugs, and not built here\n")


class Pod:
    """tpu/gke/pod.sh beside a trainer that a line of bash stands for."""

    def __init__(self, folder: Path, trainer: str, before: str = "", what: str = "train", **variables: str) -> None:
        """``before`` is done by the shell that becomes pod.sh."""
        self.run, self.store = folder / "run-files", folder / "bucket/n"
        tool(folder / "bin", "python", trainer)
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        made = {"PATH": path, "STORE": str(self.store), "DIR": str(self.run), "TPU_WORKER_ID": "0", **variables}
        command = f"{before}\nexec {ROOT}/tpu/gke/pod.sh {what} --mesh=4x4"
        self.child = subprocess.Popen(["bash", "-c", command], env=os.environ | made, start_new_session=True)

    def end(self) -> int:
        self.child.wait(timeout=30)
        try:
            for _ in range(100):
                os.killpg(self.child.pid, 0)
                time.sleep(0.02)
        except ProcessLookupError:
            return self.child.returncode
        os.killpg(self.child.pid, signal.SIGKILL)
        pytest.fail("a part of it goes on")

    def wait_for(self, file: Path) -> None:
        deadline = time.monotonic() + 30
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


# Saves when it is told to stop, as the trainer does, and exits with 0.
SAVES = """
mkdir -p $DIR
trap "sleep 0.3; echo saved >$DIR/saved; exit 0" TERM
touch $DIR/here
while :; do sleep 0.05; done
"""


class TestPod:
    @pytest.mark.parametrize("works", [True, False])
    def test_may_lock_as_much_memory_as_tpus_ask_for(
        self, works: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The script's own shell cannot raise the limit, which prlimit can where the pod has the capability."""
        change = '[[ $* == "--pid $PPID --memlock=unlimited:unlimited" ]] && touch $STORE.raised'
        tool(tmp_path / "bin", "prlimit", change if works else "exit 1")
        (tmp_path / "bucket").mkdir()
        pod = Pod(tmp_path, "ulimit -l", before="ulimit() { [[ $# == 1 ]] && echo 64; }; export -f ulimit")
        assert pod.end() == 0
        assert (tmp_path / "bucket/n.raised").exists() == works
        said = capfd.readouterr().err
        assert (
            "no more than 64 KiB of memory can be locked; if TPUs want more: capability SYS_RESOURCE" in said
        ) != works

    @pytest.mark.parametrize(
        ("what", "stored", "module"),
        [("train", "run", "segzero_jax.train --run.dir="), ("evaluate", "evaluate", "segzero_jax.evaluate --out=")],
    )
    def test_trains_or_evaluates(self, what: str, stored: str, module: str, tmp_path: Path) -> None:
        pod = Pod(tmp_path, 'mkdir -p $DIR; echo "$@" >$DIR/given', what=what)
        assert pod.end() == 0
        assert (pod.store / stored / "given").read_text() == f"-m {module}{pod.run} --mesh=4x4\n"

    def test_does_not_guess_what_to_do(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        pod = Pod(tmp_path, f"touch {tmp_path}/started", what="")
        assert pod.end() == 2
        assert capfd.readouterr().err == "tpu/gke/pod.sh: '--mesh=4x4': expected train or evaluate, then its options\n"
        assert not (tmp_path / "started").exists()

    @pytest.mark.parametrize("code", [0, 2, 3])
    def test_passes_the_trainers_exit_code_on(self, code: int, tmp_path: Path) -> None:
        pod = Pod(tmp_path, f"mkdir -p $DIR; echo line >$DIR/metrics.jsonl; exit {code}")
        assert pod.end() == code
        assert (pod.store / "run/metrics.jsonl").read_text() == "line\n"

    def test_is_not_done_when_it_was_told_to_stop(self, tmp_path: Path) -> None:
        pod = Pod(tmp_path, SAVES)
        pod.wait_for(pod.run / "here")
        pod.child.send_signal(signal.SIGTERM)
        assert pod.end() == 75
        assert (pod.store / "run/saved").exists(), "it waits until the trainer has saved"

    def test_takes_the_files_of_the_pod_before(self, tmp_path: Path) -> None:
        stored = tmp_path / "bucket/n/run"
        stored.mkdir(parents=True)
        (stored / "metrics.jsonl").write_text("earlier\n")
        pod = Pod(tmp_path, "echo later >>$DIR/metrics.jsonl")
        assert pod.end() == 0
        assert (stored / "metrics.jsonl").read_text() == "earlier\nlater\n"

    def test_starts_nothing_on_half_of_a_run(self, tmp_path: Path) -> None:
        stored = tmp_path / "bucket/n/run"
        stored.mkdir(parents=True)
        (stored / "metrics.jsonl").write_text("earlier\n")
        tool(tmp_path / "bin", "cp", f'{shutil.which("cp")} "$@"; [[ -e {tmp_path}/mended ]]')
        for _ in range(2):
            pod = Pod(tmp_path, f"touch {tmp_path}/started")
            assert pod.end() == 1
            assert not (tmp_path / "started").exists()
        (tmp_path / "mended").touch()
        pod = Pod(tmp_path, "echo later >>$DIR/metrics.jsonl")
        assert pod.end() == 0
        assert (stored / "metrics.jsonl").read_text() == "earlier\nlater\n"

    def test_starts_nothing_where_the_bucket_cannot_be_reached(self, tmp_path: Path) -> None:
        """An earlier run's files would seem not to be there, and be overwritten later."""
        (tmp_path / "bucket").touch()
        pod = Pod(tmp_path, f"touch {tmp_path}/started")
        assert pod.end() == 1
        assert not (tmp_path / "started").exists()

    @pytest.mark.parametrize("place", [{"TPU_WORKER_ID": "1"}, {"MEGASCALE_SLICE_ID": "1"}])
    def test_leaves_the_bucket_to_the_first_process(self, place: dict[str, str], tmp_path: Path) -> None:
        pod = Pod(tmp_path, "mkdir -p $DIR; touch $DIR/mine", **place)
        assert pod.end() == 0
        assert not pod.store.exists()

    def test_copies_while_the_trainer_runs(self, tmp_path: Path) -> None:
        pod = Pod(tmp_path, SAVES, COPY_EVERY_S="0.1")
        pod.wait_for(pod.store / "run/here")
        pod.child.send_signal(signal.SIGTERM)
        assert pod.end() == 75

    def test_ends_in_the_middle_of_a_copy(self, tmp_path: Path) -> None:
        tool(tmp_path / "bin", "cp", f'{shutil.which("cp")} "$@"; touch {tmp_path}/copied; sleep 0.5')
        line = "mkdir -p $DIR; echo line >$DIR/metrics.jsonl"
        pod = Pod(tmp_path, f"{line}; while [[ ! -e {tmp_path}/copied ]]; do sleep 0.02; done", COPY_EVERY_S="0.1")
        assert pod.end() == 0

    def test_gives_copies_the_time_of_what_was_copied(self, tmp_path: Path) -> None:
        pod = Pod(tmp_path, "mkdir -p $DIR; echo line >$DIR/metrics.jsonl; sleep 0.1")
        assert pod.end() == 0
        times = [(place / "metrics.jsonl").stat().st_mtime_ns for place in (pod.run, pod.store / "run")]
        assert times[0] == times[1]
