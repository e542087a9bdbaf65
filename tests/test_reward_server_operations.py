"""What an operator meets: health, metrics, logs, reflection, options, and stubs that say what the proto says."""

import ast
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
import torch
from authority import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from sam2.modeling.sam2_base import SAM2Base
from sam_calls import candidate, group_request, image_message, request_for, scene, serving

from reward_server import __main__ as command
from reward_server import reward_pb2, reward_pb2_grpc, service, validation
from reward_server.access import Access
from reward_server.segmenter import TOY, ModelError, Prompt, Segmenter
from reward_server.server import SERVICE_NAME, RewardServer, Settings
from reward_server.telemetry import JsonLines, Metrics

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SLOW_S = 0.1


def health(channel: grpc.Channel) -> list[int]:
    """Liveness and readiness."""
    stub = health_pb2_grpc.HealthStub(channel)
    return [stub.Check(health_pb2.HealthCheckRequest(service=name)).status for name in ("", SERVICE_NAME)]


class TestHealth:
    def test_is_alive_at_once_and_ready_once_the_model_is_warm(self) -> None:
        server = RewardServer()
        try:
            with grpc.insecure_channel(server.address) as channel:
                stub = reward_pb2_grpc.RewardServiceStub(channel)
                assert health(channel) == [SERVING, NOT_SERVING]
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Score(request_for(scene(), candidate()))
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                assert stub.GetInfo(reward_pb2.GetInfoRequest()).model == ""
                server.serve([Segmenter.load("toy", "cpu")])
                assert health(channel) == [SERVING, SERVING]
                info = stub.GetInfo(reward_pb2.GetInfoRequest())
                assert (info.model, info.device, info.dtype) == ("toy", "cpu", "float32")
                assert info.api_version == reward_pb2.API_VERSION_CURRENT
                assert info.limits.candidates == 256
                assert info.limits.objects == 2048
                weights = (TOY / "model.safetensors").read_bytes()
                assert info.checkpoint_sha256 == hashlib.sha256(weights).hexdigest()
                request = request_for(scene(), candidate())
                scored = stub.Score(request)
                assert (scored.checkpoint_sha256, scored.dtype) == (info.checkpoint_sha256, "float32")
                masks = reward_pb2.SegmentRequest(image=request.image, frame=request.frame)
                segmented = stub.Segment(masks)
                assert (segmented.checkpoint_sha256, segmented.dtype) == (info.checkpoint_sha256, "float32")
        finally:
            server.stop()

    def test_says_when_a_worker_is_dead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        segmenter = Segmenter.load("toy", "cpu")
        with serving(segmenters=[segmenter]) as (server, stub), grpc.insecure_channel(server.address) as channel:
            assert health(channel) == [SERVING, SERVING]

            def dead(*_: object) -> None:
                raise RuntimeError("CUDA error: unspecified launch failure")

            monkeypatch.setattr(segmenter, "embed", dead)
            monkeypatch.setattr(segmenter, "check_alive", dead)
            for _ in range(2):
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Score(group_request(0), timeout=60)
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                assert "the worker of cpu is dead" in refused.value.details()
            assert health(channel) == [NOT_SERVING, NOT_SERVING]

    def test_says_when_a_device_hangs(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        segmenter, wake = Segmenter.load("toy", "cpu"), threading.Event()
        settings = Settings(max_batch_s=0.5, max_batch=1)
        with serving(settings, [segmenter]) as (server, stub), grpc.insecure_channel(server.address) as channel:
            stub.Score(group_request(0))
            embed = segmenter.embed
            monkeypatch.setattr(segmenter, "embed", lambda images: wake.wait(60) and embed(images))
            # One on the device and one in the queue: both are told long before their deadlines.
            for call in [stub.Score.future(group_request(index), timeout=60) for index in (1, 2)]:
                with pytest.raises(grpc.RpcError) as refused:
                    call.result()
                assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
                assert "cpu hangs: a batch gets no further in 0.5 s" in refused.value.details()
            assert health(channel) == [NOT_SERVING, NOT_SERVING]
            assert "cpu hangs: 1 of a batch unanswered after 0.5 s" in caplog.text
            wake.set()  # An answer that comes too late is nobody's any more, and wakes nothing.
            assert health(channel) == [NOT_SERVING, NOT_SERVING]

    def test_goes_on_as_long_as_a_batch_gets_further(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Four requests of one batch in a second each, where nobody may wait more than 3 s for the next answer."""
        segmenter = Segmenter.load("toy", "cpu")
        settings = Settings(max_batch_s=3.0, max_batch=4, max_delay_s=30.0)
        with serving(settings, [segmenter]) as (server, stub), grpc.insecure_channel(server.address) as channel:
            decode = segmenter.decode
            monkeypatch.setattr(segmenter, "decode", lambda *given: time.sleep(1.0) or decode(*given))
            calls = [stub.Score.future(group_request(index), timeout=60) for index in range(4)]
            assert [call.result().target_area > 0 for call in calls] == [True] * 4
            assert server.metrics.registry.get_sample_value("segzero_reward_batch_size_sum") == 4
            assert server.metrics.registry.get_sample_value("segzero_reward_batch_size_count") == 1
            assert health(channel) == [SERVING, SERVING]

    def test_outlives_watchers_that_come_and_go(self) -> None:
        """Every client watches. In one process of its own, which a server that hangs does not take along."""
        with running(["--model", "toy", "--port", "0"]) as child:
            address = json.loads(child.stdout.readline())["listening"]
            asked = health_pb2.HealthCheckRequest()

            def come_and_go(_: int) -> int:
                for _ in range(60):
                    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                        watch = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=20)
                        assert next(watch).status == SERVING
                        watch.cancel()
                return 1

            with ThreadPoolExecutor(8) as pool:
                assert sum(pool.map(come_and_go, range(8))) == 8
            with grpc.insecure_channel(address) as channel:
                until_ready(channel)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=30) == 0

    def test_of_a_port_that_is_taken(self) -> None:
        server = RewardServer()
        try:
            host, _, port = server.address.partition(":")
            taken = f"cannot listen on {server.address}: Address already in use; port 0 picks a free one"
            with pytest.raises(OSError, match=taken):
                RewardServer(Settings(host=host, port=int(port)))
            with pytest.raises(OSError, match=f"cannot listen on {server.address} for metrics: Address already in use"):
                RewardServer(Settings(host=host, port=0, metrics_port=int(port)))
        finally:
            server.stop()

    @pytest.mark.parametrize(
        ("first", "then"), [("127.0.0.1", "localhost"), ("[::1]", "localhost"), ("127.0.0.1", "::")]
    )
    def test_of_a_port_that_is_taken_on_one_of_its_addresses(self, first: str, then: str) -> None:
        """gRPC is content with another one, and callers would meet either server."""
        server = RewardServer(Settings(host=first))
        try:
            port = int(server.address.rpartition(":")[2])
            with pytest.raises(OSError, match="Address already in use; port 0 picks a free one"):
                RewardServer(Settings(host=then, port=port, access=Access(insecure=True)))
        finally:
            server.stop()
        RewardServer(Settings(host=first, port=port)).stop()


def slow_down(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has it take longer for a call than calls wait for it."""
    decode = segmenter.decode
    monkeypatch.setattr(segmenter, "decode", lambda *given: time.sleep(SLOW_S) or decode(*given))


class TestMetrics:
    def test_count_what_was_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        segmenter = Segmenter.load("toy", "cpu")
        with serving(Settings(metrics_port=0), [segmenter]) as (server, stub):
            slow_down(segmenter, monkeypatch)
            refused_one = candidate(Prompt((-9, -9, -1, -1)))
            stub.Score(request_for(scene(), candidate(Prompt((1, 1, 40, 40))), refused_one))
            stub.Score(request_for(scene(), candidate()))
            damaged = request_for(scene())
            damaged.image.CopyFrom(image_message(b"no picture"))
            with pytest.raises(grpc.RpcError):
                stub.Score(damaged)
            stub.GetInfo(reward_pb2.GetInfoRequest())
            with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=60) as page:
                text = page.read().decode()
        lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        expected = {
            'requests_total{code="OK",method="Score"}': 2,
            'requests_total{code="INVALID_ARGUMENT",method="Score"}': 1,
            'requests_total{code="OK",method="GetInfo"}': 1,
            'candidates_total{code="OK"}': 2,
            'candidates_total{code="OUT_OF_RANGE"}': 1,
            "images_encoded_total": 1,
            "cache_hits_total": 1,
            "queue_seconds_count": 2,
            "compute_seconds_count": 2,
            "call_seconds_count": 2,
            'batch_size_bucket{le="1.0"}': 2,
            "out_of_memory_total": 0,
            "queue_depth": 0,
        }
        assert {name: float(lines[f"segzero_reward_{name}"]) for name in expected} == expected
        assert float(lines["segzero_reward_compute_seconds_sum"]) >= 2 * SLOW_S
        assert float(lines["segzero_reward_cache_bytes"]) > 100_000
        # The page ends with its server.
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=5)

    def test_hold_the_memory_of_gpus_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100 + device.index)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200 + device.index)
        metrics = Metrics()
        metrics.watch_memory([torch.device("cuda:0"), torch.device("cpu"), torch.device("cuda:1")])
        found = {
            (sample.name, sample.labels["device"]): sample.value
            for family in metrics.registry.collect()
            for sample in family.samples
            if "gpu_memory" in sample.name
        }
        allocated, reserved = (f"segzero_reward_gpu_memory_{kind}_bytes" for kind in ("allocated", "reserved"))
        expected = {(allocated, "cuda:0"): 100, (allocated, "cuda:1"): 101}
        assert found == expected | {(reserved, "cuda:0"): 200, (reserved, "cuda:1"): 201}


class TestLogs:
    def test_name_the_request_and_how_it_went(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "reward_server")
        segmenter = Segmenter.load("toy", "cpu")
        with serving(segmenters=[segmenter]) as (_, stub):
            slow_down(segmenter, monkeypatch)
            stub.Score(request_for(scene(), candidate(Prompt((1, 1, 40, 40))), request_id="step 3\ngroup 5"))
            hopeless = request_for(scene(), request_id="bad")
            hopeless.ClearField("target")
            with pytest.raises(grpc.RpcError):
                stub.Score(hopeless)
        records = [record for record in caplog.records if hasattr(record, "fields")]
        lines = [json.loads(JsonLines().format(record)) for record in records]
        good, bad = lines
        assert (good["request_id"], good["method"], good["code"]) == ("step 3\ngroup 5", "Score", "OK")
        assert (good["candidates"], good["batch"], good["level"]) == (1, 1, "INFO")
        assert SLOW_S <= good["compute_seconds"] <= good["seconds"]
        assert (bad["request_id"], bad["code"], bad["level"]) == ("bad", "INVALID_ARGUMENT", "WARNING")
        assert bad["message"] == "Score 'bad' refused: INVALID_ARGUMENT: target: missing, expected a mask or objects"
        # A request cannot write lines of its own.
        assert all("\n" not in record.getMessage() for record in records)

    def test_hold_no_more_of_a_name_than_a_request_may_have(self, caplog: pytest.LogCaptureFixture) -> None:
        with serving() as (_, stub):
            with pytest.raises(grpc.RpcError) as refused:
                stub.Score(request_for(scene(), request_id="x" * 2**20))
            assert refused.value.details() == "request_id: 1048576 characters, expected at most 256"
        (record,) = [record for record in caplog.records if hasattr(record, "fields")]
        assert record.fields["request_id"] == "x" * 256
        assert len(JsonLines().format(record)) < 1000

    def test_as_json_hold_tracebacks(self) -> None:
        try:
            raise ValueError("why")
        except ValueError:
            record = logging.makeLogRecord({"msg": "what", "exc_info": sys.exc_info(), "levelname": "ERROR"})
        line = JsonLines().format(record)
        assert "\n" not in line
        assert "ValueError: why" in json.loads(line)["exception"]


class TestReflection:
    def test_tells_what_the_proto_says_only_when_switched_on(self) -> None:
        server = RewardServer(Settings(reflection=True))
        try:
            with grpc.insecure_channel(server.address) as channel:
                described = ProtoReflectionDescriptorDatabase(channel)
                assert SERVICE_NAME in described.get_services()
                found = described.FindFileContainingSymbol(SERVICE_NAME)
                assert found.package == "segzero.reward.v1"
        finally:
            server.stop()
        server = RewardServer()
        try:
            with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as refused:
                ProtoReflectionDescriptorDatabase(channel).get_services()
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        finally:
            server.stop()


class TestModels:
    def test_are_known_by_weights_and_a_configuration_of_ones_own(self, tmp_path: Path) -> None:
        """The same weights at another size make other masks: no client may mix the two."""
        of_weights = hashlib.sha256((TOY / "model.safetensors").read_bytes()).hexdigest()
        assert Segmenter.load("toy", "cpu").checkpoint_sha256 == of_weights
        found = []
        for name, size in (("same", 256), ("smaller", 128), ("smaller_too", 128)):
            shutil.copytree(TOY, tmp_path / name)
            config = tmp_path / name / "config.yaml"
            text, count = re.subn(r"image_size: 256", f"image_size: {size}", config.read_text())
            assert count
            config.write_text(f"# of {name}\n{text}")
            found.append(Segmenter.load(str(tmp_path / name), "cpu").checkpoint_sha256)
        assert found[1] == found[2]
        assert len({of_weights, *found}) == 3
        weights = Segmenter.load(str(TOY / "model.safetensors"), "cpu", str(TOY / "config.yaml")).checkpoint_sha256
        assert weights == of_weights

    def test_that_do_not_fit_a_device_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 MiB.")

        with monkeypatch.context() as busy:
            busy.setattr(SAM2Base, "to", full)
            with pytest.raises(ModelError, match=r"^device 'cpu': cannot take model 'toy': CUDA out of memory\. Tried"):
                Segmenter.load("toy", "cpu")
        segmenter = Segmenter.load("toy", "cpu")
        monkeypatch.setattr(segmenter, "embed", full)
        server = RewardServer()
        try:
            with pytest.raises(ModelError, match=r"^model 'toy': cannot be run: CUDA out of memory\. Tried"):
                server.serve([segmenter])
        finally:
            server.stop()


class TestDevices:
    @pytest.mark.parametrize(
        ("differs", "reason"),
        [
            ({"dtype": "bfloat16"}, "devices: cpu computes in float32, cpu computes in bfloat16; expected one dtype"),
            ({"checkpoint_sha256": "ab" * 32}, "model 'toy': its file changed while it was loaded: cpu "),
        ],
    )
    def test_that_would_give_different_scores_are_not_served(self, differs: dict[str, str], reason: str) -> None:
        first, second = (Segmenter.load("toy", "cpu") for _ in range(2))
        for name, value in differs.items():
            setattr(second, name, value)
        server = RewardServer()
        try:
            with pytest.raises(ModelError, match=re.escape(reason)) as refused:
                server.serve([first, second])
            assert "\n" not in str(refused.value)
            with grpc.insecure_channel(server.address) as channel:
                assert health(channel) == [SERVING, NOT_SERVING]
        finally:
            server.stop()


# A server whose device dies at the first call.
DYING = """
import sys
from reward_server import __main__ as command
from reward_server.segmenter import Segmenter

real = Segmenter.embed

def dead(self, *given):
    if any(server.serves for server in command._servers):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return real(self, *given)

Segmenter.embed = Segmenter.check_alive = dead
sys.exit(command.main())
"""


class TestCommand:
    def test_serves_with_everything_on_and_ends_in_order(self, tmp_path: Path) -> None:
        ours = Authority(tmp_path / "certificates")
        (tmp_path / "token").write_text("abc")
        options = ["--model", "toy", "--port", "0", "--threads", "1", "--device", "cpu,cpu", "--max-batch", "4"]
        options += ["--metrics-port", "0", "--reflection", "--log-json", "--token-file", str(tmp_path / "token")]
        options += ["--host", "0.0.0.0", "--tls-cert", str(ours.cert), "--tls-key", str(ours.key)]
        options += ["--client-ca", str(ours.ca)]
        with running(options) as child:
            listening = json.loads(child.stdout.readline())
            credentials = grpc.ssl_channel_credentials(
                ours.ca.read_bytes(), ours.client_key.read_bytes(), ours.client_cert.read_bytes()
            )
            address = listening["listening"].replace("0.0.0.0", "localhost")
            with grpc.secure_channel(address, credentials) as channel:
                until_ready(channel)
                stub = reward_pb2_grpc.RewardServiceStub(channel)
                token = [("authorization", "Bearer abc")]
                assert stub.GetInfo(reward_pb2.GetInfoRequest(), metadata=token).device == "cpu,cpu"
                stub.Score(group_request(0, request_id="mine"), metadata=token)
                with pytest.raises(grpc.RpcError) as refused:
                    stub.Score(group_request(0))
                assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            url = f"https://{listening['metrics']}/metrics".replace("0.0.0.0", "localhost")
            context = ssl.create_default_context(cafile=ours.ca)
            with pytest.raises((ssl.SSLError, OSError)):  # The page is for clients with a certificate, too.
                urllib.request.urlopen(url, timeout=60, context=context).read()
            with socket.create_connection(("localhost", int(listening["listening"].rpartition(":")[2]))) as plain:
                plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
                plain.recv(1)
            context.load_cert_chain(ours.client_cert, ours.client_key)
            with urllib.request.urlopen(url, timeout=60, context=context) as page:
                assert b'segzero_reward_requests_total{code="OK",method="Score"} 1.0' in page.read()
            child.send_signal(signal.SIGTERM)
            _, errors = child.communicate(timeout=60)
        assert child.returncode == 0
        lines = [json.loads(line) for line in errors.splitlines()]
        assert [line["request_id"] for line in lines if "request_id" in line] == ["mine"]
        assert lines[-1]["message"] == "stopped"

    def test_ends_when_its_device_has_died(self) -> None:
        """Docker and systemd ask nobody for its health: they start again what has ended."""
        with running(["--model", "toy", "--port", "0", "--threads", "1"], ["-c", DYING]) as child:
            with grpc.insecure_channel(json.loads(child.stdout.readline())["listening"]) as channel:
                until_ready(channel)
                with pytest.raises(grpc.RpcError) as told:
                    reward_pb2_grpc.RewardServiceStub(channel).Score(group_request(0))
            assert told.value.code() is grpc.StatusCode.UNAVAILABLE
            _, errors = child.communicate(timeout=60)
        assert child.returncode == 1
        assert "the worker of cpu is dead" in errors
        assert errors.endswith("stopped\n")

    def test_serves_as_its_flags_say(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        made: list[object] = []
        server = SimpleNamespace(address="here:7", metrics_address="here:8", dead=False)
        server.stop = lambda: made.append("stopped")
        server.serve = made.extend
        monkeypatch.setattr(
            "reward_server.server.RewardServer", lambda settings, devices: made.extend((settings, devices)) or server
        )
        monkeypatch.setattr(Segmenter, "load", lambda *given: given)
        monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
        monkeypatch.setattr(command, "_servers", [])
        monkeypatch.setattr(command, "_signals", [signal.SIGTERM])
        options = "--model m.pt --config c.yaml --device cpu,cuda:1 --compile --host ::1 --port 7 --metrics-port 8"
        options += " --reflection --max-batch 3 --max-delay-ms 40 --max-queue 11 --max-batch-seconds 13"
        options += " --cache-mib 17 --drain-seconds 19"
        monkeypatch.setattr(sys, "argv", ["reward_server", *options.split()])
        access = Access(token="abc")
        command._serve(command._parse(), access)
        settings = Settings(
            host="::1",
            port=7,
            access=access,
            max_batch=3,
            max_delay_s=0.04,
            max_queue=11,
            max_batch_s=13,
            cache_bytes=17 * 2**20,
            drain_s=19,
            reflection=True,
            metrics_port=8,
        )
        loaded = [("m.pt", device, "c.yaml", True) for device in ("cpu", "cuda:1")]
        assert made == [settings, 2, *loaded, "stopped"]
        assert json.loads(capsys.readouterr().out) == {"listening": "here:7", "metrics": "here:8"}

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            (["--port", "x"], "reward_server: argument --port: invalid int value: 'x'"),
            (["--max-batch", "0"], "reward_server: --max-batch=0: expected 1 to 256"),
            (["--threads", "99999999999"], "reward_server: --threads=99999999999: expected 0 to 4096"),
            (["--drain-seconds", "nan"], "reward_server: --drain-seconds=nan: expected 0 to 86400"),
            (["--max-batch-seconds", "inf"], "reward_server: --max-batch-seconds=inf: expected 1 to 86400"),
            (["--exit-with-parent", "1"], "reward_server: --exit-with-parent=1: expected this process's parent, "),
            (
                ["--model", "toy", "--device", "hpu", "--port", "0"],
                "reward_server: device 'hpu': expected auto",
            ),
            (["--host", "no.such.invalid"], "reward_server: --host=no.such.invalid: no address of that name"),
            (
                ["--host", "192.0.2.1", "--insecure", "--port", "0"],
                "reward_server: cannot listen on 192.0.2.1:0: Cannot assign requested address",
            ),
            (["--host", "0.0.0.0"], "reward_server: --host=0.0.0.0: reachable by others and without TLS"),
            (["--token-file", "/nowhere"], "reward_server: --token-file=/nowhere: cannot be read"),
            (["--tls-cert", "/nowhere"], "reward_server: --tls-cert and --tls-key: one is given"),
            (["--model", "toy", "--config", "x.yaml", "--port", "0"], "reward_server: config 'x.yaml': only a"),
        ],
    )
    def test_refuses_in_one_line(self, arguments: list[str], reason: str) -> None:
        done = subprocess.run([sys.executable, "-m", "reward_server", *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith(reason)
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("after_s", [0.0, 0.3, 0.7, 1.5, 2.5])
    def test_ends_with_0_whenever_it_is_told_to(self, after_s: float) -> None:
        """While its libraries are imported, which may catch what a signal raises, and while its model is loaded."""
        with running(["--model", "toy", "--port", "0"]) as child:
            status = Path(f"/proc/{child.pid}/status")
            while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> signal.SIGTERM - 1 & 1:
                assert child.poll() is None
                time.sleep(0.005)
            time.sleep(after_s)
            child.send_signal(signal.SIGTERM)
            assert child.wait(timeout=30) == 0


@contextlib.contextmanager
def running(options: list[str], program: Sequence[str] = ("-m", "reward_server")):
    child = subprocess.Popen(
        [sys.executable, *program, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def until_ready(channel: grpc.Channel) -> None:
    """Waits as a client may: by watching."""
    asked = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
    watch = health_pb2_grpc.HealthStub(channel).Watch(asked, timeout=120, wait_for_ready=True)
    assert any(answer.status == SERVING for answer in watch)


def test_every_flag_is_in_the_manual() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "reward_server", "--help"], capture_output=True, text=True, check=True
    )
    flags = set(re.findall(r"--[a-z-]+", shown.stdout)) - {"--help"}
    manual = (Path(__file__).parent.parent / "docs" / "reward_server.md").read_text()
    assert {flag for flag in flags if f"`{flag}" not in manual} == set()


def test_calls_that_nobody_waits_for_leave_the_queue_undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelled while another picture is decoded; and so does a server that stops, with calls in the same place."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    begun, go_on, decode = [], threading.Event(), validation.decode_image
    monkeypatch.setattr(validation, "decode_image", lambda data: begun.append(1) or (go_on.wait(60) and decode(data)))

    def until(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    with serving(Settings(metrics_port=0, drain_s=0.5)) as (server, stub):
        depth = lambda: server.metrics.registry.get_sample_value("segzero_reward_queue_depth")  # noqa: E731
        calls = [stub.Score.future(group_request(i), timeout=60) for i in range(8)]
        until(lambda: depth() == 8 and bool(begun))
        for call in calls:
            call.cancel()
        until(lambda: depth() == 1)
        more = [stub.Score.future(group_request(i), timeout=60) for i in range(8)]
        until(lambda: depth() == 9)
        # The one picture goes on for as long as the others are given.
        threading.Timer(1.5, go_on.set).start()
        server.stop()
        assert {call.exception().code() for call in more} <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
        until(lambda: depth() == 0)
    assert len(begun) == 1


def test_pictures_are_decoded_in_the_order_of_their_calls() -> None:
    """Whoever has looked in vain whether it is still wanted keeps its place; who is not leaves, and holds nobody up."""
    turns, order = service._Turns(1), []

    def take(number: int) -> None:
        with turns.taken(lambda: number != 5) as wanted:
            order.append((number, wanted))

    with turns.taken(lambda: True) as wanted:
        assert wanted
        threads = [threading.Thread(target=take, args=(number,)) for number in range(12)]
        for number, thread in enumerate(threads):
            thread.start()
            while len(turns._waiting) < number + 1 - any(n == 5 for n, _ in order):
                time.sleep(0.001)
        time.sleep(3 * service._LOOK_S)
        assert order == [(5, False)]
    for thread in threads:
        thread.join(timeout=30)
    assert order == [(5, False), *((number, True) for number in range(12) if number != 5)]
    assert (turns._free, len(turns._waiting)) == (1, 0)


def test_a_burst_leaves_a_core_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    most, decode = [0, 0], validation.decode_image

    def slowly(data: bytes) -> np.ndarray:
        most[0] += 1
        most[1] = max(most)
        time.sleep(0.05)
        most[0] -= 1
        return decode(data)

    monkeypatch.setattr(validation, "decode_image", slowly)
    with serving() as (_, stub):
        calls = [stub.Score.future(group_request(i), timeout=60) for i in range(4)]
        assert [call.result().target_area > 0 for call in calls] == [True] * 4
    assert most == [0, 1]


def test_stubs_say_what_the_proto_says() -> None:
    """Reads reward.proto as text and compares every message, field, enum and call with the generated descriptors."""
    text = resources.files("reward_server").joinpath("reward.proto").read_text()
    text = re.sub(r"//.*", "", text)
    assert re.search(r"package ([\w.]+);", text)[1] == reward_pb2.DESCRIPTOR.package
    written = {}
    for name, body in re.findall(r"message (\w+) \{((?:[^{}]|\{[^{}]*\})*)\}", text):
        choice = {f for inner in re.findall(r"oneof \w+ \{([^}]*)\}", body) for f in re.findall(r"(\w+) = \d+;", inner)}
        fields = re.findall(r"(repeated )?(map<\w+, \w+>|[\w.]+) (\w+) = (\d+);", body)
        written[name] = {(f, int(n), kind, bool(many), f in choice) for many, kind, f, n in fields}
    generated = {
        name: {(f.name, f.number, *kind_of(f), f.containing_oneof is not None) for f in message.fields}
        for name, message in reward_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    assert written == generated
    enums = {n: dict(re.findall(r"(\w+) = (\d+);", b)) for n, b in re.findall(r"enum (\w+) \{([^}]*)\}", text)}
    assert enums == {
        name: {value.name: str(value.number) for value in enum.values}
        for name, enum in reward_pb2.DESCRIPTOR.enum_types_by_name.items()
    }
    calls = set(re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\)", text))
    service = reward_pb2.DESCRIPTOR.services_by_name["RewardService"]
    assert calls == {(m.name, m.input_type.name, m.output_type.name) for m in service.methods}
    typed = resources.files("reward_server").joinpath("reward_pb2_grpc.pyi").read_text()
    assert {name for name, _, _ in calls} == set(re.findall(r"(\w+): grpc\.UnaryUnaryMultiCallable", typed))


def kind_of(field: object) -> tuple[str, bool]:
    """A field's type as a proto file writes it, and whether it is repeated."""
    names = {1: "double", 3: "int64", 5: "int32", 8: "bool", 9: "string", 12: "bytes"}
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        key, value = (kind_of(message.fields_by_name[name])[0] for name in ("key", "value"))
        return f"map<{key}, {value}>", False
    return (message.name if message is not None else names[field.type]), field.is_repeated


def test_the_image_holds_every_package_that_the_server_imports() -> None:
    """The image leaves the trainer's dependencies out: what it names itself, and the extra, must be enough."""
    root = Path(__file__).parent.parent
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    named = (root / "reward_server" / "Dockerfile").read_text() + " ".join(project["optional-dependencies"]["reward"])
    installed = {word.lower().replace("_", "-") for word in re.findall(r"[\w-]+", named)} | {"sam2"}
    owners = importlib.metadata.packages_distributions()
    missing = set()
    for path in (root / "reward_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"reward_server"}:
                if not installed & {owner.lower().replace("_", "-") for owner in owners.get(name, [name])}:
                    missing.add(f"{path.name} imports {name}")
    assert missing == set()
