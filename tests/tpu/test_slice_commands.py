"""The commands of tpu/: what a dry run prints, what a fake gcloud is asked, how a mistake is told.

``python tests/tpu/test_slice_commands.py`` writes the golden files anew; look at what changed before you commit them.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
COMMANDS = ("create", "setup", "preflight", "run", "status", "logs", "babysit", "evaluate", "delete")
NEEDED = {"evaluate": ("--", "--dataset", "ReasonSeg/val", "my set/val", "--mesh=4x4")}
SLICES = ("v4:2x2x4", "v5e:4x4", "v5p:2x2x4", "v6e:4x4", "v6e:1x1")
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
# What gcloud itself says each command takes (`gcloud COMMAND --help`), and what all commands take.
FLAGS: dict[str, list[str]] = json.loads((Path(__file__).parent / "gcloud_flags.json").read_text())["commands"]
WIDE = {"--project", "--format", "--quiet", "--filter"}


def settings(folder: Path, **changes: str) -> Path:
    """The example's settings with some lines changed."""
    text = (ROOT / "tpu/settings.example.sh").read_text()
    for key, value in changes.items():
        text, found = re.subn(rf"^{key}=.*$", lambda _, line=f"{key}={value}": line, text, flags=re.MULTILINE)
        assert found == 1, key
    path = folder / "settings.sh"
    path.write_text(text)
    return path


def command(name: str, *options: object, **more: object) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / f"tpu/{name}.sh"), *map(str, options)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT, **more)  # type: ignore[call-overload]


def dry_runs(folder: Path, tpu: str) -> str:
    """All commands' dry runs, without anything that could be called: no gcloud is in reach."""
    path = settings(folder, TPU=tpu, SPOT="no" if tpu == "v5p:2x2x4" else "yes")
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for tool in ("bash", "sed", "git", "dirname", "mktemp", "rm", "cat"):
        if not (tools / tool).exists():
            (tools / tool).symlink_to(shutil.which(tool) or tool)
    lines = []
    for name in COMMANDS:
        options = ("--dry-run", "--settings", path, *NEEDED.get(name, ()))
        done = command(name, *options, env={"PATH": str(tools), "HOME": str(folder)})
        assert (done.returncode, done.stderr) == (0, ""), f"{name}: {done.stderr}"
        lines += [f"## tpu/{name}.sh", done.stdout]
    return "\n".join(lines)


def golden(tpu: str) -> Path:
    return GOLDEN / f"{tpu.replace(':', '-')}.txt"


@pytest.mark.parametrize("tpu", SLICES)
def test_a_dry_run_prints_what_would_be_called(tpu: str, tmp_path: Path) -> None:
    assert dry_runs(tmp_path, tpu) == golden(tpu).read_text()


def test_every_call_is_one_that_gcloud_knows() -> None:
    calls = [line for tpu in SLICES for line in golden(tpu).read_text().splitlines() if line.startswith("gcloud")]
    assert len(calls) > 50
    for line in calls:
        words = shlex.split(line)[1:]
        kind = next(name for name in FLAGS if words[: len(name.split())] == name.split())
        flags = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert flags - set(FLAGS[kind]) - WIDE == set(), line


def test_the_shell_has_nothing_to_say() -> None:
    scripts = sorted((ROOT / "tpu").glob("*.sh"))
    assert len(scripts) > 8
    done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout + done.stderr == ""


def test_data_sets_come_with_what_is_installed(tmp_path: Path) -> None:
    """In one call: a machine is new, and set up once more, until it has them."""
    done = command("setup", "--dry-run", "--settings", settings(tmp_path, DATA="(mugs ReasonSeg)"))
    (install,) = [line for line in done.stdout.splitlines() if "worker.sh" in line]
    assert "worker.sh install REVISION gs://my-bucket/data mugs ReasonSeg'" in install
    done = command("setup", "--dry-run", "--settings", settings(tmp_path, DATA="()"))
    assert "worker.sh install REVISION gs://my-bucket/data'" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_needs_no_settings(name: str) -> None:
    done = command(name, "--help", env=os.environ | {"TPU_SETTINGS": "/nowhere"})
    assert done.returncode == 0
    assert done.stdout.startswith(f"tpu/{name}.sh")
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PROJECT": ""}, "PROJECT is empty"),
        ({"ZONE": "us-west4"}, "ZONE=us-west4: expected a zone such as us-west4-a"),
        ({"NAME": "Seg_Zero"}, "NAME=Seg_Zero: expected small letters"),
        ({"BUCKET": "my-bucket"}, "BUCKET=my-bucket: expected gs://NAME"),
        ({"SPOT": "maybe"}, "SPOT=maybe: expected yes or no"),
        ({"PUBLIC_ADDRESSES": "none"}, "PUBLIC_ADDRESSES=none: expected yes or no"),
        ({"TPU": "v5e-16"}, "TPU=v5e-16: expected v4:AxBxC, v5e:AxB, v5p:AxBxC or v6e:AxB, such as v5e:4x4"),
        ({"TPU": "v5e:3x5"}, "TPU=v5e:3x5: expected"),
        ({"TPU": "v4:4x4"}, "TPU=v4:4x4: expected v4:AxBxC"),
        ({"TPU": "v5p:1x1x1"}, "TPU=v5p:1x1x1: expected a multiple of four chips, such as 2x2x1: a machine has four"),
        ({"SECRETS": "(/nowhere/ca.pem)"}, "SECRETS: /nowhere/ca.pem: no such file"),
        ({"SPOT": " no"}, "no: command not found"),
        ({"SSH_FLAGS": "(--tunnel-through-iap)"}, "SSH_FLAGS: --tunnel-through-iap is not known to gcloud for v5e:4x4"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(changes: dict[str, str], said: str, tmp_path: Path) -> None:
    done = command("setup", "--dry-run", "--settings", settings(tmp_path, **changes))
    assert done.returncode == 2
    assert done.stderr.startswith("setup.sh: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("create", "--wiat"), "create.sh: --wiat: unexpected; --help lists the options"),
        (("delete", "it"), "delete.sh: it: unexpected"),
        (("run", "--train.steps=2"), "run.sh: --train.steps=2: unexpected; options of the training come after --"),
        (
            ("evaluate", "--dataset", "toy"),
            "evaluate.sh: --dataset: unexpected; options of the evaluation come after --",
        ),
        (("evaluate", "--"), "evaluate.sh: nothing to ask; expected -- --dataset NAME/SPLIT --mesh FSDPxTENSOR"),
        (("evaluate", "--", "--dataset", "toy/val", "--out", "x"), "evaluate.sh: --out: where files go follows from"),
        (("run", "--", "--run.dir=runs/x"), "run.sh: --run.dir=runs/x: where files go follows from NAME; take another"),
        (("preflight", "--", "--run.checkpoint_dir", "gs://b/x"), "preflight.sh: --run.checkpoint_dir: where files go"),
        (("run", "--stop", "--wrong"), "run.sh: --wrong: unexpected; --help lists the options"),
        (("logs", "--worker", "first"), "logs.sh: --worker first: expected a number"),
        (("babysit", "--tries"), "babysit.sh: --tries (nothing): expected a number"),
        (("status", "--settings"), "status.sh: --settings: expected a file"),
        (("status", "--settings", "/nowhere"), "status.sh: /nowhere: no such file; copy tpu/settings.example.sh"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    name, *options = words
    done = command(name, "--dry-run", *options, env=os.environ | {"TPU_SETTINGS": str(settings(tmp_path))})
    assert done.returncode == 2
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1


# What makes slices of v6e where another TPU is asked for, and the other way round.
_OTHER_ENGINE = {False: r"instance-groups\ managed", True: r"queued-resources"}


class Cloud:
    """A gcloud that answers from a list of looks and writes down what it is asked.

    Each look at the slice takes the next state, each look at the machines what ``worker.sh state`` would say on them.
    """

    def __init__(self, folder: Path, tpu: str = "v5e:2x2") -> None:
        self.folder = folder
        self.settings = settings(folder, TPU=tpu)
        self.log, self.states, self.machines = (folder / name for name in ("calls", "states", "machines"))
        fake = folder / "bin" / "gcloud"
        fake.parent.mkdir()
        fake.write_text(
            "#!/usr/bin/env bash\n"
            f'echo "$*" >>{self.log}\n'
            # Machines are asked side by side: one after the other takes its line.
            'next() { (flock 9 && take "$1") 9>"$1.turn"; }\n'
            'take() { [[ -s $1 ]] && head -n 1 "$1" && { (($(wc -l <"$1") < 2)) || sed -i 1d "$1"; }; }\n'
            'case "$*" in\n'
            f"  *queued-resources\\ describe*value\\(state.state\\)*|*list-instances*value\\(instanceStatus\\)*)\n"
            f"    state=$(next {self.states})\n"
            '    [[ $state == gone ]] && echo "ERROR: NOT_FOUND: no such thing" >&2 && exit 1\n'
            '    [[ $state == broken ]] && echo "ERROR: connection reset" >&2 && exit 1\n'
            '    tr + "\\n" <<<"$state" ;;\n'
            f"  *queued-resources\\ describe*value\\(state\\)*|*list-errors*) cat {folder}/problem ;;\n"
            "  *tpu-vm\\ describe*)\n"
            f'    [[ ! -e {folder}/no-node ]] || {{ echo "ERROR: NOT_FOUND" >&2; exit 1; }}\n'
            "    echo READY ;;\n"
            f"  *{_OTHER_ENGINE[tpu.startswith('v6e')]}\\ describe*)\n"
            f"    [[ -e {folder}/another ]] || {{ cat {folder}/no-other >&2; exit 1; }} ;;\n"
            f"  *describe*) [[ ! -s {folder}/refused ]] || {{ cat {folder}/refused >&2; exit 1; }} ;;\n"
            "  *basename*) printf 'm-b\\nm-a\\n' ;;\n"
            f"  *worker.sh\\ state*) next {self.machines} ;;\n"
            f"  *storage\\ ls*) next {folder}/saved ;;\n"
            "esac\n"
        )
        fake.chmod(0o755)
        (folder / "no-other").write_text("ERROR: NOT_FOUND: no such thing\n")
        (folder / "problem").touch()

    def play(self, name: str, *options: str, states: list[str], machines: list[str] | None = None) -> tuple[int, str]:
        """Runs a command; gives its exit code and what it said."""
        self.states.write_text("".join(f"{state}\n" for state in states))
        self.machines.write_text("".join(f"{state}\n" for state in machines or []))
        self.log.write_text("")
        done = command(name, "--settings", self.settings, *options, env=self.environment())
        return done.returncode, done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "TPU_LOOK_S": "0"}

    def did(self) -> list[str]:
        """What changed something, in short."""
        verbs = {
            "queued-resources create": "create",
            "queued-resources delete": "delete",
            "managed create": "create",
            "managed delete": "delete group",
            "templates create": "create template",
            "templates delete": "delete template",
            "create workload-policy": "create policy",
            "resource-policies delete": "delete policy",
            "scp": "copy",
            "worker.sh install": "install",
            "worker.sh start": "start",
            "worker.sh stop": "stop",
        }
        calls = self.log.read_text().splitlines()
        return [verb for line in calls for words, verb in verbs.items() if words in line]


QUEUE_READY, MACHINE = "ACTIVE", "segzero {}"


class TestCreate:
    def test_leaves_what_is_there(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        code, said = cloud.play("create", states=["PROVISIONING"])
        assert (code, said) == (0, "create.sh: segzero-7b: is there already, waiting\n")
        assert cloud.did() == []

    def test_waits_until_it_is_ready(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        states = ["gone", "WAITING_FOR_RESOURCES", "broken", "PROVISIONING", "ACTIVE"]
        code, said = cloud.play("create", "--wait", states=states)
        assert (code, said.splitlines()[-1]) == (0, "create.sh: segzero-7b: ready")
        assert cloud.did() == ["create"]

    def test_does_not_touch_a_lost_slice(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        code, said = cloud.play("create", states=["SUSPENDED"])
        assert (code, cloud.did()) == (2, [])
        assert "tpu/delete.sh, then tpu/create.sh" in said

    def test_makes_of_a_group_what_an_earlier_attempt_left_undone(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v6e:4x4")
        assert cloud.play("create", states=["gone"])[0] == 0
        # This gcloud describes policy and template, so they are there, of whatever settings.
        assert cloud.did() == ["delete template", "delete policy", "create policy", "create template", "create"]
        (tmp_path / "refused").write_text("ERROR: The resource 'projects/p/global/x/segzero-7b' was not found\n")
        assert cloud.play("create", states=["gone"])[0] == 0
        assert cloud.did() == ["create policy", "create template", "create"]

    @pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:4x4"])
    def test_makes_nothing_where_gcloud_cannot_say_what_is_there(self, tpu: str, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, tpu)
        (tmp_path / "refused").write_text("ERROR: Reauthentication failed.\n")
        states = ["broken"] if tpu == "v5e:2x2" else ["gone"]  # Of a group, the parts are looked at one by one.
        assert (cloud.play("create", states=states)[0], cloud.did()) == (1, [])

    @pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:4x4"])
    def test_makes_no_second_one_of_another_kind_beside_it(self, tpu: str, tmp_path: Path) -> None:
        """TPU was changed in the settings: the slice from before would go on costing."""
        cloud = Cloud(tmp_path, tpu)
        (tmp_path / "another").touch()
        code, said = cloud.play("create", states=["gone"])
        assert (code, cloud.did()) == (2, [])
        assert said == (
            f"create.sh: segzero-7b: there is a slice of this name, made for another TPU than {tpu}; "
            "tpu/delete.sh deletes it\n"
        )

    @pytest.mark.parametrize(("tpu", "flag"), [("v5e:4x4", "--internal-ips"), ("v6e:4x4", "--no-address")])
    def test_gives_machines_no_public_addresses_where_none_are_wanted(
        self, tpu: str, flag: str, tmp_path: Path
    ) -> None:
        for wanted in ("yes", "no"):
            path = settings(tmp_path, TPU=tpu, PUBLIC_ADDRESSES=wanted)
            calls = command("create", "--dry-run", "--settings", path).stdout.splitlines()
            (call,) = [line for line in calls if "queued-resources create" in line or "templates create" in line]
            assert (flag in call.split()) == (wanted == "no")
            assert flag in FLAGS[next(kind for kind in FLAGS if call.startswith(f"gcloud {kind} "))]


class TestDelete:
    @pytest.mark.parametrize(("tpu", "others"), [("v5e:2x2", ["delete group"]), ("v6e:1x1", ["delete"])])
    def test_leaves_nothing_of_another_tpu_either(self, tpu: str, others: list[str], tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, tpu)
        (tmp_path / "another").touch()
        (tmp_path / "refused").write_text("ERROR: The resource 'projects/p/global/x/segzero-7b' was not found\n")
        code, said = cloud.play("delete", states=[])
        assert (code, cloud.did()) == (0, others), said
        (tmp_path / "refused").unlink()
        cloud.play("delete", states=[])
        assert {"delete template", "delete policy"} <= set(cloud.did()), "a slice of several machines had them"

    def test_takes_an_api_that_was_never_switched_on_for_nothing(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v6e:4x4")
        (tmp_path / "no-other").write_text(
            "ERROR: PERMISSION_DENIED: Cloud TPU API has not been used in project 1 before or it is disabled.\n"
        )
        code, said = cloud.play("delete", states=[])
        assert code == 0, said
        assert cloud.did() == ["delete group", "delete template", "delete policy"]

    @pytest.mark.parametrize("tpu", ["v5e:2x2", "v6e:4x4"])
    def test_says_that_nothing_is_left_once_that_is_known(self, tpu: str, tmp_path: Path) -> None:
        """Whoever is told so stops looking at what goes on costing money."""
        cloud = Cloud(tmp_path, tpu)
        refused = tmp_path / "refused"
        refused.write_text("ERROR: (gcloud.compute) Reauthentication failed. cannot prompt\n")
        code, said = cloud.play("delete", states=[])
        assert (code, cloud.did()) == (1, [])
        assert said.splitlines() == [
            "delete.sh: gcloud: ERROR: (gcloud.compute) Reauthentication failed. cannot prompt",
            "delete.sh: segzero-7b: left as it is, since gcloud cannot tell what exists; run the same command again",
        ]
        refused.write_text("ERROR: (gcloud.compute) The resource 'projects/p/global/x/segzero-7b' was not found\n")
        nothing = (
            "delete.sh: segzero-7b: nothing is left of it in us-west4-a of my-project but gs://my-bucket/segzero-7b"
        )
        assert cloud.play("delete", states=[]) == (0, nothing + "\n")
        assert cloud.did() == []
        refused.write_text("")
        assert cloud.play("delete", states=[]) == (0, nothing + "\n")
        own = "delete" if tpu == "v5e:2x2" else "delete group"
        assert cloud.did() == [own, "delete template", "delete policy"]

    @pytest.mark.parametrize(
        "trouble",
        [
            "/usr/bin/gcloud: line 189: exec: /opt/gone/python3: not found",
            "ERROR: gcloud failed to load: ModuleNotFoundError: No module named 'grpc'",
            "ERROR: (gcloud.compute) Failed to load credential file: [/nowhere/key.json] was not found",
        ],
    )
    def test_does_not_take_a_gcloud_that_is_broken_for_nothing(self, trouble: str, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v6e:4x4")
        (tmp_path / "refused").write_text(f"{trouble}\nand more\n")
        (tmp_path / "no-other").write_text(f"{trouble}\nand more\n")
        code, said = cloud.play("delete", states=[])
        assert (code, cloud.did()) == (1, [])
        assert "left as it is" in said
        assert (trouble in said) == trouble.startswith("ERROR")


class TestMachines:
    def test_of_a_group_are_all_asked(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v6e:2x4")
        code, said = cloud.play("status", states=["RUNNING+RUNNING"], machines=["segzero idle"])
        assert (code, said) == (0, "segzero-7b: ready\nsegzero idle\nsegzero idle\n")
        code, _ = cloud.play("logs", "--worker", "1", states=[""])
        assert code == 0
        asked = [line for line in cloud.log.read_text().splitlines() if "tail" in line]
        assert sorted(line.split()[2] for line in asked) == ["m-a", "m-b"], "names say nothing; each knows its number"
        (shell,) = {line.partition("--command=")[2] for line in asked}
        for number in range(3):
            tool = tmp_path / f"machine-{number}/segzero-jax/tpu/worker.sh"
            tool.parent.mkdir(parents=True)
            tool.write_text(f"#!/bin/sh\necho {number}\n")
            tool.chmod(0o755)
            (tmp_path / f"machine-{number}/segzero-jax/train.log").write_text(f"of {number}\n")
            home = tmp_path / f"machine-{number}"
            done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, cwd=home)
            assert (done.returncode, done.stdout) == (0, "of 1\n" if number == 1 else "")
        code, said = cloud.play("logs", "--worker", "2", states=[""])
        assert (code, said) == (2, "logs.sh: segzero-7b: no worker 2; there are 2\n")

    @pytest.mark.parametrize(
        ("tpu", "state", "word"),
        [
            ("v5e:2x2", "gone", "absent"),
            ("v5e:2x2", "broken", "unknown"),
            ("v5e:2x2", "SUSPENDING", "waiting"),
            ("v5e:2x2", "FAILED", "lost"),
            ("v6e:2x4", "gone", "absent"),
            ("v6e:2x4", "RUNNING", "waiting"),
            ("v6e:2x4", "RUNNING+STAGING", "waiting"),
            ("v6e:2x4", "RUNNING+TERMINATED", "lost"),
            ("v6e:2x4", "STOPPING+RUNNING", "lost"),
        ],
    )
    def test_are_asked_once_the_slice_is_ready(self, tpu: str, state: str, word: str, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, tpu)
        code, said = cloud.play("status", states=[state])
        assert (code, said.splitlines()[0]) == (0, f"segzero-7b: {word}")
        assert ("connection reset" in said) == (state == "broken")
        assert "worker.sh" not in cloud.log.read_text()

    def test_that_are_gone_behind_a_request_that_stands_are_lost(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        (tmp_path / "no-node").touch()
        assert cloud.play("status", states=[QUEUE_READY]) == (0, "segzero-7b: lost\n")
        code, _ = cloud.play("babysit", "--every", "0", "--tries", "1", states=[QUEUE_READY])
        assert code == 1
        assert cloud.did()[0] == "delete", "a new request would meet the old one"

    @pytest.mark.parametrize(
        ("running", "told"), [("RUNNING+RUNNING", True), ("RUNNING+STAGING", False), ("STAGING", False)]
    )
    def test_of_another_number_than_the_settings_have_are_told(self, running: str, told: bool, tmp_path: Path) -> None:
        """They would be waited for without an end, and cost."""
        code, said = Cloud(tmp_path, "v6e:4x4").play("status", states=[running])
        assert (code, said.splitlines()[0]) == (0, "segzero-7b: waiting")
        mistake = "status.sh: segzero-7b: 2 machines run, TPU=v6e:4x4 has 4; if TPU was changed: tpu/delete.sh, or"
        assert (mistake in said) == told

    @pytest.mark.parametrize("tpu", ["v5e:4x4", "v6e:2x4"])
    def test_get_files_one_by_one(self, tpu: str, tmp_path: Path) -> None:
        """For all at once gcloud asks an ssh-agent for its key, and refuses where one runs with other keys."""
        cloud = Cloud(tmp_path, tpu)
        assert cloud.play("setup", states=[""])[0] == 0
        copies = [line.split() for line in cloud.log.read_text().splitlines() if " scp " in line]
        if tpu == "v5e:4x4":
            assert [words[-1] for words in copies] == [f"--worker={number}" for number in range(4)]
        else:
            assert sorted(word for words in copies for word in words if word.endswith(":.")) == ["m-a:.", "m-b:."]

    def test_are_asked_without_taking_what_is_typed(self, tmp_path: Path) -> None:
        """A babysitter in the background would be stopped for reading from its terminal."""
        cloud = Cloud(tmp_path)
        (tmp_path / "bin/gcloud").write_text("#!/usr/bin/env bash\n[[ $* != *ssh* ]] || cat\n")
        words = [ROOT / "tpu/logs.sh", "--settings", cloud.settings]
        done = subprocess.run(words, input="typed", capture_output=True, text=True, env=cloud.environment(), timeout=60)
        assert (done.returncode, done.stdout) == (0, "")

    @pytest.mark.parametrize("trouble", ["gcloud fails", "one is missing"])
    @pytest.mark.parametrize("name", ["setup", "status", "run"])
    def test_are_all_of_a_group_or_none(self, name: str, trouble: str, tmp_path: Path) -> None:
        """What is set up would else be what an earlier command left on them, under a new name."""
        cloud = Cloud(tmp_path, "v6e:2x4")
        fake = tmp_path / "bin/gcloud"
        answer = "echo m-b" if trouble == "one is missing" else "echo 503 >&2; exit 1"
        fake.write_text(fake.read_text().replace("printf 'm-b\\nm-a\\n'", answer))
        code, said = cloud.play(name, states=["RUNNING+RUNNING"])
        assert code != 0
        assert cloud.did() == []
        wrong = "gcloud does not tell which machines it has" if "503" in answer else "has 1 machines, expected 2"
        assert f"{name}.sh: segzero-7b: {wrong}" in said


class TestBabysit:
    def test_brings_a_slice_up_and_sees_the_training_through(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        states = ["gone", "gone", "WAITING_FOR_RESOURCES", *[QUEUE_READY] * 5]
        machines = ["segzero new", "segzero idle", "segzero running", "segzero done"]
        code, said = cloud.play("babysit", "--every", "0", "--", "--train.steps=2", states=states, machines=machines)
        assert (code, cloud.did()) == (0, ["create", "copy", "install", "start"])
        assert "babysit.sh: segzero-7b: the training is done" in said.splitlines()[-1]
        where = "--run.dir=runs/segzero-7b --run.checkpoint_dir=gs://my-bucket/segzero-7b/checkpoints"
        assert f"--mesh=4x4 --train.steps=2 {where}" in cloud.log.read_text()

    @pytest.mark.parametrize("end", ["done", "failed 2", "failed 3"])
    def test_an_evaluation_is_not_the_training(self, tmp_path: Path, end: str) -> None:
        cloud = Cloud(tmp_path)
        words = ("evaluation running", f"evaluation {end}", "running", "done")
        machines = [f"worker 0: segzero {word}" for word in words]
        code, said = cloud.play("babysit", "--every", "0", states=[QUEUE_READY], machines=machines)
        assert (code, cloud.did()) == (0, ["start"]), said

    @pytest.mark.parametrize("other", ["idle", "evaluation done", "evaluation failed 2"])
    def test_an_evaluation_that_runs_on_one_machine_runs(self, tmp_path: Path, other: str) -> None:
        """Machines begin and end one after the other; a training beside it would take its ports."""
        cloud = Cloud(tmp_path, "v6e:2x4")
        looks = [("evaluation running", other), (other, "evaluation running"), ("running", "running"), ("done", "done")]
        machines = [f"worker {number}: segzero {word}" for look in looks for number, word in enumerate(look)]
        code, said = cloud.play("babysit", "--every", "0", states=["RUNNING+RUNNING"], machines=machines)
        assert (code, cloud.did()) == (0, []), said

    def test_ends_once_the_files_are_in_the_bucket_and_says_what_still_costs(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        code, said = cloud.play("babysit", states=[QUEUE_READY], machines=["segzero done"])
        assert code == 0
        assert "worker.sh copy" in cloud.log.read_text().splitlines()[-1]
        assert said.endswith("the training is done; the slice stays, and costs, until tpu/delete.sh\n")

    def test_replaces_a_slice_that_was_taken_away(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        ready = [QUEUE_READY] * 2  # one for the look, one for the status of the machines
        states = [*ready, "SUSPENDED", "gone", "gone", "PROVISIONING", *ready * 3]
        machines = ["segzero running", "segzero new", "segzero idle", "segzero done"]
        code, _ = cloud.play("babysit", "--every", "0", states=states, machines=machines)
        # This gcloud describes template and policy whatever was made.
        gone = ["delete", "delete template", "delete policy"]
        assert (code, cloud.did()) == (0, [*gone, "create", "copy", "install", "start"])

    @pytest.mark.parametrize(("tpu", "state"), [("v5e:2x2", "FAILED"), ("v6e:2x4", "RUNNING+TERMINATED")])
    def test_says_why_a_slice_is_lost_before_it_is_deleted(self, tpu: str, state: str, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, tpu)
        (tmp_path / "problem").write_text("failedData={'message':\n'Quota exceeded'}\n")
        why = "failedData={'message': 'Quota exceeded'}"
        assert why in cloud.play("status", states=[state])[1]
        _, said = cloud.play("babysit", "--every", "0", "--tries", "1", states=[state, "gone", "gone", "gone"])
        assert f"segzero-7b: was taken away or broke ({why}); deleting what is left" in said

    def test_replaces_a_group_with_all_that_belongs_to_it(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v6e:2x4")
        ready = ["RUNNING+RUNNING"] * 2
        states = ["RUNNING+TERMINATED", "gone", "gone", *ready * 2]
        machines = ["segzero idle", "segzero idle", "segzero done", "segzero done"]
        code, _ = cloud.play("babysit", "--every", "0", states=states, machines=machines)
        made = ["create policy", "create template", "create", "start", "start"]
        # This gcloud describes template and policy after they were deleted as well.
        again = ["delete template", "delete policy"]
        assert (code, cloud.did()) == (0, ["delete group", *again, *again, *made])

    def test_starts_a_crashed_training_again(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        machines = ["segzero failed 137", "segzero running", "segzero failed 3", "segzero running", "segzero done"]
        code, _ = cloud.play("babysit", "--every", "0", states=[QUEUE_READY], machines=machines)
        assert (code, cloud.did()) == (0, ["stop", "start", "stop", "start"])

    @pytest.mark.parametrize("of_training", [2, 5])
    def test_leaves_to_people_what_they_must_put_right(self, tmp_path: Path, of_training: int) -> None:
        cloud = Cloud(tmp_path)
        machines = [f"segzero failed {of_training}"]
        code, said = cloud.play("babysit", "--every", "0", states=[QUEUE_READY], machines=machines)
        assert (code, cloud.did()) == (1, [])
        assert f"exit code {of_training}; put it right" in said

    def test_shows_what_the_machine_said_whose_training_has_failed(self, tmp_path: Path) -> None:
        """A file may be missing on one of them alone, while the first waits for it."""
        cloud = Cloud(tmp_path, "v5e:4x4")
        fake = tmp_path / "bin/gcloud"
        fake.write_text(
            fake.read_text().replace(
                "  *worker.sh\\ state", "  *--worker=2*tail*) echo no such token ;;\n  *worker.sh\\ state"
            )
        )
        said = "+".join(f"worker {n}: segzero {'failed 2' if n == 2 else 'running'}" for n in range(4))
        fake.write_text(fake.read_text().replace(f"next {cloud.machines} ;;", f'next {cloud.machines} | tr + "\\n" ;;'))
        code, said = cloud.play("babysit", "--every", "0", states=[QUEUE_READY], machines=[said])
        assert code == 1
        assert said.splitlines()[-1].endswith("until tpu/delete.sh): worker 2: no such token")

    def test_gives_up_a_training_that_does_not_stay_up(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path)
        options = ("--every", "0", "--tries", "3")
        code, said = cloud.play("babysit", *options, states=[QUEUE_READY], machines=["segzero failed 1"])
        assert (code, cloud.did()) == (1, ["stop", "start"] * 3)
        assert "gave up" in said.splitlines()[-1]

    def test_tries_anew_after_each_checkpoint_however_long_the_training_runs(self, tmp_path: Path) -> None:
        """One whose reward server is gone runs for an hour, in which it waits for it, again and again."""
        cloud = Cloud(tmp_path)
        steady = [*["segzero running"] * 10, "segzero failed 3"]
        options = ("--every", "0", "--tries", "1")
        saved = tmp_path / "saved"
        saved.write_text("gs://my-bucket/segzero-7b/checkpoints/9/\ngs://my-bucket/segzero-7b/checkpoints/10/\n")
        code, _ = cloud.play("babysit", *options, states=[QUEUE_READY], machines=[*steady * 2, "segzero done"])
        assert (code, cloud.did()) == (0, ["stop", "start"] * 2)
        code, said = cloud.play("babysit", *options, states=[QUEUE_READY], machines=steady * 3)
        assert (code, cloud.did()) == (1, ["stop", "start"])
        assert "gave up: did something 1 times without a new checkpoint" in said.splitlines()[-1]
        # Nor does one count that is taken away after a few looks each time, but has saved.
        saved.write_text("".join(f"gs://my-bucket/segzero-7b/checkpoints/{step}/\n" for step in range(11, 14)))
        brief = [*["segzero running"] * 3, "segzero failed 4"]
        code, _ = cloud.play("babysit", *options, states=[QUEUE_READY], machines=[*brief * 4, "segzero done"])
        assert (code, cloud.did()) == (0, ["stop", "start"] * 4)

    def test_counts_machines_that_do_not_answer(self, tmp_path: Path) -> None:
        cloud = Cloud(tmp_path, "v5e:4x4")
        code, said = cloud.play(
            "babysit", "--every", "0", "--tries", "2", states=[QUEUE_READY], machines=["segzero running"]
        )
        assert (code, cloud.did()) == (1, [])
        assert "segzero-7b: 1 of 4 machines answer\n" in said

    def test_says_why_machines_do_not_answer(self, tmp_path: Path) -> None:
        """A key, a firewall, a role: whoever comes back after a weekend has this log alone."""
        cloud = Cloud(tmp_path)
        fake = tmp_path / "bin/gcloud"
        refusal = "ERROR: Required compute.projects.get permission"
        fake.write_text(fake.read_text().replace(f"next {cloud.machines} ;;", f'echo "{refusal}" >&2; exit 1 ;;'))
        code, said = cloud.play("babysit", "--every", "0", "--tries", "1", states=[QUEUE_READY])
        assert (code, cloud.did()) == (1, [])
        assert f"babysit.sh: segzero-7b: 0 of 1 machines answer: {refusal}\n" in said

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("busy", ["", "queued-resources describe", "worker.sh state"])
    def test_may_be_stopped_at_any_moment(self, busy: str, number: int, tmp_path: Path) -> None:
        """While it sleeps, and while gcloud hangs."""
        cloud = Cloud(tmp_path)
        if busy:
            fake = tmp_path / "bin/gcloud"
            begins = f"{{ echo $$ >>{tmp_path}/pids; exec sleep 30; }}"
            slow = f'echo "$*" >>{cloud.log}\n[[ $* != *{shlex.quote(busy)}* ]] || {begins}\n'
            fake.write_text(fake.read_text().replace(f'echo "$*" >>{cloud.log}\n', slow))
        cloud.states.write_text(f"{QUEUE_READY}\n")
        cloud.machines.write_text("segzero running\n")
        words = [ROOT / "tpu/babysit.sh", "--settings", cloud.settings, "--every", "600"]
        child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=cloud.environment())
        deadline = time.monotonic() + 30
        while (busy or "worker.sh state") not in (cloud.log.read_text() if cloud.log.exists() else ""):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        child.send_signal(number)
        _, said = child.communicate(timeout=20)
        assert child.returncode == 130
        assert "stopped; slice and training go on" in said
        assert cloud.did() == []
        # What it had called ends with it.
        pids = (tmp_path / "pids").read_text().split() if busy else []
        assert bool(pids) == bool(busy)
        while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.05)


if __name__ == "__main__":
    import tempfile

    for tpu in SLICES:
        with tempfile.TemporaryDirectory() as folder:
            golden(tpu).write_text(dry_runs(Path(folder), tpu))
