"""The manifests of tpu/gke as data: fields that JobSet knows, parts that fit together, options that exist."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from reward_server import reward_pb2
from reward_server.__main__ import _parse as server_options
from segzero_jax import config as configs
from segzero_jax.evaluate.__main__ import _parser
from segzero_jax.mesh import parse_mesh
from segzero_jax.watch import DIVERGED

GKE = Path(__file__).parents[2] / "tpu/gke"
SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
# JobSet's v1alpha2 types (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go), as far as they are used.
JOBSET_SPEC = {"failurePolicy", "replicatedJobs", "successPolicy", "network", "suspend", "ttlSecondsAfterFinished"}
FAILURE_POLICY = {"maxRestarts", "rules", "restartStrategy"}
RULE = {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}


def documents(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        for document in yaml.safe_load_all((folder / name).read_text()):
            found[document["kind"]] = document
    return found


class Slice(NamedTuple):
    """A JobSet, its job, its pods and their container."""

    jobset: dict[str, Any]
    job: dict[str, Any]
    pod: dict[str, Any]
    container: dict[str, Any]

    @property
    def options(self) -> list[str]:
        return self.container["args"][1:]

    def value(self, name: str) -> str:
        return next(arg.partition("=")[2] for arg in self.options if arg.startswith(f"--{name}="))

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: entry["value"] for entry in self.container["env"]}


def slice_of(jobset: dict[str, Any]) -> Slice:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return Slice(jobset, job, job["template"]["spec"], container)


KINDS = documents(GKE)
TRAIN, EVALUATE = slice_of(KINDS["JobSet"]), slice_of(documents(GKE / "evaluate")["JobSet"])
SLICES = pytest.mark.parametrize("one", [TRAIN, EVALUATE], ids=["train", "evaluate"])
SERVER_POD = KINDS["Deployment"]["spec"]["template"]
(SERVER,) = SERVER_POD["spec"]["containers"]


@SLICES
def test_the_jobset_is_one_that_jobset_takes(one: Slice) -> None:
    assert one.jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert one.jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert set(one.jobset["spec"]) <= JOBSET_SPEC
    policy = one.jobset["spec"]["failurePolicy"]
    assert set(policy) <= FAILURE_POLICY
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert set(rule) <= RULE
    assert rule["name"].isalnum()
    assert rule["action"] == "FailJobSet"
    assert set(rule["onJobFailureReasons"]) <= REASONS


@pytest.mark.parametrize(("one", "codes"), [(TRAIN, [2, DIVERGED]), (EVALUATE, [2])], ids=["train", "evaluate"])
def test_a_pod_that_fails_fails_the_job_and_what_starting_again_cannot_mend_the_jobset(
    one: Slice, codes: list[int]
) -> None:
    assert one.job["backoffLimit"] == 0
    assert one.pod["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    (rule,) = one.job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": one.container["name"], "operator": "In", "values": codes}


@SLICES
def test_machines_chips_and_mesh_are_the_same_number(one: Slice) -> None:
    width, height = map(int, one.pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = one.container["resources"]["limits"]["google.com/tpu"]
    assert one.job["parallelism"] == one.job["completions"] == width * height // chips
    data, fsdp, tensor = parse_mesh(one.value("mesh"))
    assert data * fsdp * tensor == width * height * one.jobset["spec"]["replicatedJobs"][0]["replicas"]


@SLICES
def test_the_trainer_may_raise_the_limit_of_locked_memory(one: Slice) -> None:
    """Of all capabilities it has that one more, and one program of its image may use it: it is not root."""
    assert one.container["securityContext"] == {"capabilities": {"add": ["SYS_RESOURCE"]}}
    image = (GKE.parent / "Dockerfile").read_text()
    assert "USER trainer" in image
    assert "setcap cap_sys_resource=ep /usr/bin/prlimit" in image
    assert 'ENTRYPOINT ["tpu/gke/pod.sh"]' in image


def address() -> str:
    service = KINDS["Service"]
    return f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def test_the_trainer_understands_its_options() -> None:
    assert TRAIN.container["args"][0] == "train"
    options = [arg.removeprefix("--") for arg in TRAIN.options if not arg.startswith("--config=")]
    config = configs.load(GKE.parents[1] / TRAIN.value("config"), options)
    (builder,) = TRAIN.pod["initContainers"]
    assert builder["command"][1:] == ["-m", "segzero_jax.data.build", config.data.name, f"--data-dir={config.data.dir}"]
    assert builder["image"] == TRAIN.container["image"]
    assert config.reward.server == address()


def test_the_evaluation_understands_its_options_and_is_of_the_trainers_run() -> None:
    assert EVALUATE.container["args"][0] == "evaluate"
    options = _parser().parse_args(EVALUATE.options)
    (builder,) = EVALUATE.pod["initContainers"]
    sets = {name.partition("/")[0] for name in options.dataset}
    assert builder["command"][1:] == ["-m", "segzero_jax.data.build", *sets, f"--data-dir={options.data_dir}"]
    assert builder["image"] == EVALUATE.container["image"] == TRAIN.container["image"]
    assert options.server == address()
    assert [f"{options.checkpoint[0]}/checkpoints"] == [TRAIN.value("run.checkpoint_dir")]
    assert EVALUATE.environment["STORE"] == TRAIN.environment["STORE"]
    assert EVALUATE.pod["nodeSelector"] == TRAIN.pod["nodeSelector"]
    assert EVALUATE.pod["volumes"] == TRAIN.pod["volumes"]


def test_every_volume_that_is_mounted_is_there() -> None:
    for pod in (TRAIN.pod, EVALUATE.pod, SERVER_POD["spec"]):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for one in (TRAIN, EVALUATE):
        mounts = [mount["mountPath"] for mount in one.container["volumeMounts"]]
        assert one.environment["STORE"].startswith(tuple(mounts))
        assert one.environment["DIR"].startswith(tuple(mounts))
        assert one.job["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true", (
            "the bucket's driver asks for it"
        )
        assert one.pod["serviceAccountName"] == KINDS["ServiceAccount"]["metadata"]["name"]


def test_the_service_finds_the_server_and_the_policy_lets_the_trainer_in() -> None:
    labels = SERVER_POD["metadata"]["labels"]
    port = next(port["containerPort"] for port in SERVER["ports"] if port["name"] == "grpc")
    service, policy = KINDS["Service"]["spec"], KINDS["NetworkPolicy"]["spec"]
    assert service["clusterIP"] == "None", "gRPC spreads calls over addresses, which one address would hide"
    assert labels == service["selector"] == policy["podSelector"]["matchLabels"]
    assert labels == KINDS["Deployment"]["spec"]["selector"]["matchLabels"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": port}] == [{"port": service["ports"][0]["port"]}]
    (caller,) = rule["from"][0]["podSelector"]["matchExpressions"]
    names = [one.jobset["metadata"]["name"] for one in (TRAIN, EVALUATE)]
    assert caller == {"key": "jobset.sigs.k8s.io/jobset-name", "operator": "In", "values": names}


def test_probes_ask_for_what_the_server_tells() -> None:
    ready, alive = {"port": 50051, "service": SERVICE}, {"port": 50051}
    probes = [SERVER[name]["grpc"] for name in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert probes == [ready, ready, alive]


def test_servers_that_are_deployed_take_a_gpu_or_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device of those who name none may be the CPU."""
    image = (GKE.parents[1] / "reward_server/Dockerfile").read_text()
    (documented,) = re.findall(r"^#   docker run (?:.*\\\n)?.* segzero-reward ((?:.*\\\n)?.*)$", image, re.MULTILINE)
    (installed,) = re.findall(r'^ENTRYPOINT \["python", "-m", "reward_server", (.*)\]$', image, re.MULTILINE)
    for given in (SERVER["args"], re.sub(r"\\\n#", "", documented).split()):
        monkeypatch.setattr(sys, "argv", ["reward_server", *json.loads(f"[{installed}]"), *given])
        options = server_options()
        assert (options.device, options.host) == ("cuda", "0.0.0.0")


def test_a_new_server_comes_once_the_old_one_is_gone() -> None:
    """With one GPU it would wait for it for ever, with more two checkpoints would score one run."""
    assert KINDS["Deployment"]["spec"]["strategy"] == {"type": "Recreate"}


def test_images_are_those_that_are_named() -> None:
    images = {image["name"] for image in yaml.safe_load((GKE / "images/kustomization.yaml").read_text())["images"]}
    assert images == {TRAIN.container["image"], SERVER["image"]}
    for folder in (GKE, GKE / "evaluate"):
        (component,) = yaml.safe_load((folder / "kustomization.yaml").read_text())["components"]
        assert (folder / component).resolve() == GKE / "images"
