"""The manifests of tpu/gke as data: fields that JobSet knows, parts that fit together, options that exist."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from reward_server import reward_pb2
from reward_server.__main__ import _parse as server_options
from segzero_jax import config as configs
from segzero_jax.mesh import parse_mesh
from segzero_jax.watch import DIVERGED

GKE = Path(__file__).parents[2] / "tpu/gke"
SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
# JobSet's v1alpha2 types (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go), as far as they are used.
JOBSET_SPEC = {"failurePolicy", "replicatedJobs", "successPolicy", "network", "suspend", "ttlSecondsAfterFinished"}
FAILURE_POLICY = {"maxRestarts", "rules", "restartStrategy"}
RULE = {"name", "action", "onJobFailureReasons", "onJobFailureMessagePatterns", "targetReplicatedJobs"}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}


def documents() -> dict[str, dict[str, Any]]:
    found = {}
    for name in yaml.safe_load((GKE / "kustomization.yaml").read_text())["resources"]:
        for document in yaml.safe_load_all((GKE / name).read_text()):
            found[document["kind"]] = document
    return found


KINDS = documents()
JOBSET = KINDS["JobSet"]
JOB = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
POD = JOB["template"]["spec"]
(TRAIN,) = POD["containers"]
SERVER_POD = KINDS["Deployment"]["spec"]["template"]
(SERVER,) = SERVER_POD["spec"]["containers"]


def test_the_jobset_is_one_that_jobset_takes() -> None:
    assert JOBSET["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert JOBSET["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert set(JOBSET["spec"]) <= JOBSET_SPEC
    policy = JOBSET["spec"]["failurePolicy"]
    assert set(policy) <= FAILURE_POLICY
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert set(rule) <= RULE
    assert rule["name"].isalnum()
    assert rule["action"] == "FailJobSet"
    assert set(rule["onJobFailureReasons"]) <= REASONS


def test_a_pod_that_fails_fails_the_job_and_what_starting_again_cannot_mend_the_jobset() -> None:
    assert JOB["backoffLimit"] == 0
    assert POD["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    (rule,) = JOB["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": TRAIN["name"], "operator": "In", "values": [2, DIVERGED]}


def test_machines_chips_and_mesh_are_the_same_number() -> None:
    width, height = map(int, POD["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = TRAIN["resources"]["limits"]["google.com/tpu"]
    assert JOB["parallelism"] == JOB["completions"] == width * height // chips
    mesh = next(arg.partition("=")[2] for arg in TRAIN["args"] if arg.startswith("--mesh="))
    data, fsdp, tensor = parse_mesh(mesh)
    assert data * fsdp * tensor == width * height * JOBSET["spec"]["replicatedJobs"][0]["replicas"]


def test_the_trainer_may_raise_the_limit_of_locked_memory() -> None:
    """Of all capabilities it has that one more, and one program of its image may use it: it is not root."""
    assert TRAIN["securityContext"] == {"capabilities": {"add": ["SYS_RESOURCE"]}}
    image = (GKE.parent / "Dockerfile").read_text()
    assert "USER trainer" in image
    assert "setcap cap_sys_resource=ep /usr/bin/prlimit" in image


def test_the_trainer_understands_its_options() -> None:
    options = [arg.removeprefix("--") for arg in TRAIN["args"]]
    preset = next(option.partition("=")[2] for option in options if option.startswith("config="))
    config = configs.load(GKE.parents[1] / preset, [o for o in options if not o.startswith("config=")])
    (builder,) = POD["initContainers"]
    assert builder["command"][1:] == ["-m", "segzero_jax.data.build", config.data.name, f"--data-dir={config.data.dir}"]
    assert builder["image"] == TRAIN["image"]
    host, _, port = config.reward.server.partition(":")
    service = KINDS["Service"]
    assert (host, int(port)) == (service["metadata"]["name"], service["spec"]["ports"][0]["port"])


def test_every_volume_that_is_mounted_is_there() -> None:
    for pod in (POD, SERVER_POD["spec"]):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    environment = {entry["name"]: entry["value"] for entry in TRAIN["env"]}
    mounts = [mount["mountPath"] for mount in TRAIN["volumeMounts"]]
    assert environment["STORE"].startswith(tuple(mounts))
    assert environment["RUN_DIR"].startswith(tuple(mounts))
    assert JOB["template"]["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true", (
        "the bucket's driver asks for it"
    )
    assert POD["serviceAccountName"] == KINDS["ServiceAccount"]["metadata"]["name"]


def test_the_service_finds_the_server_and_the_policy_lets_the_trainer_in() -> None:
    labels = SERVER_POD["metadata"]["labels"]
    port = next(port["containerPort"] for port in SERVER["ports"] if port["name"] == "grpc")
    service, policy = KINDS["Service"]["spec"], KINDS["NetworkPolicy"]["spec"]
    assert service["clusterIP"] == "None", "gRPC spreads calls over addresses, which one address would hide"
    assert labels == service["selector"] == policy["podSelector"]["matchLabels"]
    assert labels == KINDS["Deployment"]["spec"]["selector"]["matchLabels"]
    (rule,) = policy["ingress"]
    assert rule["ports"] == [{"port": port}] == [{"port": service["ports"][0]["port"]}]
    caller = rule["from"][0]["podSelector"]["matchLabels"]
    assert caller == {"jobset.sigs.k8s.io/jobset-name": JOBSET["metadata"]["name"]}


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
    images = {image["name"] for image in yaml.safe_load((GKE / "kustomization.yaml").read_text())["images"]}
    assert images == {TRAIN["image"], SERVER["image"]}
