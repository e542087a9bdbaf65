"""Who may call: TLS, client certificates, tokens, and addresses that are not listened on without them."""

import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from authority import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from sam_calls import group_request

from reward_server import reward_pb2, reward_pb2_grpc, telemetry
from reward_server.access import Access, AccessError, bracketed, read_token
from reward_server.segmenter import Segmenter
from reward_server.server import RewardServer, Settings

SECRET = "s3cret-Token"
# Long enough for a handshake on a busy machine, short enough to wait for one that cannot come.
PATIENCE_S = 20


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "theirs")


def info(channel: grpc.Channel, token: str | None = None) -> reward_pb2.GetInfoResponse:
    metadata = [("authorization", token)] if token is not None else []
    stub = reward_pb2_grpc.RewardServiceStub(channel)
    return stub.GetInfo(reward_pb2.GetInfoRequest(), timeout=PATIENCE_S, metadata=metadata)


def refusal(channel: grpc.Channel, token: str | None = None) -> grpc.StatusCode:
    with channel, pytest.raises(grpc.RpcError) as refused:
        info(channel, token)
    return refused.value.code()


def secure(server: RewardServer, authority: Authority, client: Authority | None = None) -> grpc.Channel:
    """A channel that trusts one authority and shows a certificate of another, or none."""
    credentials = grpc.ssl_channel_credentials(
        root_certificates=authority.ca.read_bytes(),
        private_key=client.client_key.read_bytes() if client else None,
        certificate_chain=client.client_cert.read_bytes() if client else None,
    )
    return grpc.secure_channel(server.address, credentials)


@pytest.fixture(scope="module")
def token_server() -> Iterator[RewardServer]:
    server = RewardServer(Settings(access=Access(token=SECRET), reflection=True))
    server.serve([Segmenter.load("toy", "cpu")])
    yield server
    server.stop()


class TestToken:
    def test_opens_every_call(self, token_server: RewardServer) -> None:
        with grpc.insecure_channel(token_server.address) as channel:
            assert info(channel, f"Bearer {SECRET}").model == "toy"
            answer = reward_pb2_grpc.RewardServiceStub(channel).Score(
                group_request(0), metadata=[("authorization", f"Bearer {SECRET}")]
            )
            assert len(answer.candidates) == 8

    @pytest.mark.parametrize("token", [None, "", "Bearer ", SECRET, "Bearer wrong", f"Bearer {SECRET}x", "Basic x"])
    def test_missing_or_wrong_is_unauthenticated(self, token_server: RewardServer, token: str | None) -> None:
        assert refusal(grpc.insecure_channel(token_server.address), token) is grpc.StatusCode.UNAUTHENTICATED

    def test_twice_is_none(self, token_server: RewardServer) -> None:
        with grpc.insecure_channel(token_server.address) as channel, pytest.raises(grpc.RpcError) as refused:
            reward_pb2_grpc.RewardServiceStub(channel).GetInfo(
                reward_pb2.GetInfoRequest(),
                metadata=[("authorization", "Bearer other"), ("authorization", f"Bearer {SECRET}")],
            )
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert SECRET not in refused.value.details()

    def test_is_not_asked_of_health_checks(self, token_server: RewardServer) -> None:
        with grpc.insecure_channel(token_server.address) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    def test_is_asked_of_who_asks_what_the_service_offers(self, token_server: RewardServer) -> None:
        with grpc.insecure_channel(token_server.address) as channel, pytest.raises(grpc.RpcError) as refused:
            ProtoReflectionDescriptorDatabase(channel).get_services()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED

    @pytest.mark.parametrize("token", [None, "Bearer wrong"])
    def test_strangers_who_send_nothing_keep_nobody_out(self, token: str | None) -> None:
        """More of them than there are threads for calls, each a call that never brings its request."""
        server, silent = RewardServer(Settings(access=Access(token=SECRET))), threading.Event()
        metadata = [("authorization", token)] if token else []

        def nothing() -> Iterator[bytes]:
            silent.wait()
            yield from ()

        try:
            with grpc.insecure_channel(server.address) as theirs, grpc.insecure_channel(server.address) as channel:
                score = theirs.stream_unary("/segzero.reward.v1.RewardService/Score")
                calls = [score.future(nothing(), timeout=PATIENCE_S, metadata=metadata) for _ in range(320)]
                asked = health_pb2.HealthCheckRequest()
                answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=PATIENCE_S / 2)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                assert {call.code() for call in calls} == {grpc.StatusCode.UNAUTHENTICATED}
            labels = {"method": "Score", "code": "UNAUTHENTICATED"}
            assert server.metrics.registry.get_sample_value("segzero_reward_requests_total", labels) == len(calls)
        finally:
            silent.set()
            server.stop()


@pytest.fixture(scope="module")
def tls_server(ours: Authority) -> Iterator[RewardServer]:
    access = Access(tls_cert=ours.cert, tls_key=ours.key, token=SECRET)
    # Everybody's address is no trouble with TLS on.
    server = RewardServer(Settings(host="0.0.0.0", access=access))
    server.address = server.address.replace("0.0.0.0", "127.0.0.1")
    yield server
    server.stop()


class TestTls:
    def test_answers_who_trusts_it_and_has_the_token(self, tls_server: RewardServer, ours: Authority) -> None:
        with secure(tls_server, ours) as channel:
            assert info(channel, f"Bearer {SECRET}").api_version == reward_pb2.API_VERSION_CURRENT
        assert refusal(secure(tls_server, ours), "Bearer wrong") is grpc.StatusCode.UNAUTHENTICATED

    def test_notes_whom_it_refused(
        self, tls_server: RewardServer, ours: Authority, caplog: pytest.LogCaptureFixture
    ) -> None:
        def count(method: str) -> float:
            labels = {"method": method, "code": "UNAUTHENTICATED"}
            return tls_server.metrics.registry.get_sample_value("segzero_reward_requests_total", labels) or 0

        before = count("GetInfo"), count("other")
        assert refusal(secure(tls_server, ours), "Bearer wrong") is grpc.StatusCode.UNAUTHENTICATED
        with secure(tls_server, ours) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/made.Up/Name")(b"", timeout=60)
        # Names that callers make up would fill the registry.
        assert (count("GetInfo"), count("other")) == (before[0] + 1, before[1] + 1)
        assert "GetInfo from ipv4:127.0.0.1:" in caplog.text
        assert "wrong" not in caplog.text, "what was brought may be somebody's token"

    def test_is_not_trusted_by_another_authority(self, tls_server: RewardServer, theirs: Authority) -> None:
        assert refusal(secure(tls_server, theirs)) is grpc.StatusCode.UNAVAILABLE

    def test_does_not_talk_in_plain_text(self, tls_server: RewardServer, ours: Authority) -> None:
        assert refusal(grpc.insecure_channel(tls_server.address)) is grpc.StatusCode.UNAVAILABLE
        # And goes on answering others.
        with secure(tls_server, ours) as channel:
            assert info(channel, f"Bearer {SECRET}").server_version


@pytest.fixture(scope="module")
def mutual_server(ours: Authority) -> Iterator[RewardServer]:
    access = Access(tls_cert=ours.cert, tls_key=ours.key, client_ca=ours.ca)
    server = RewardServer(Settings(access=access))
    yield server
    server.stop()


class TestMutualTls:
    def test_answers_clients_of_its_authority(self, mutual_server: RewardServer, ours: Authority) -> None:
        with secure(mutual_server, ours, client=ours) as channel:
            assert info(channel).api_version == reward_pb2.API_VERSION_CURRENT

    def test_refuses_clients_without_or_with_a_foreign_certificate(
        self, mutual_server: RewardServer, ours: Authority, theirs: Authority
    ) -> None:
        assert refusal(secure(mutual_server, ours)) is grpc.StatusCode.UNAVAILABLE
        assert refusal(secure(mutual_server, ours, client=theirs)) is grpc.StatusCode.UNAVAILABLE


class TestMetricsPage:
    def test_a_silent_connection_keeps_neither_the_page_nor_the_server(
        self, ours: Authority, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Somebody connects to a page with TLS and says nothing, somebody else speaks plain text."""
        server = RewardServer(Settings(access=Access(tls_cert=ours.cert, tls_key=ours.key), metrics_port=0))
        host, port = server.metrics_address.split(":")
        trusts = ssl.create_default_context(cafile=str(ours.ca))
        with socket.create_connection((host, int(port))), socket.create_connection((host, int(port))) as plain:
            plain.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            url = f"https://localhost:{port}/metrics"
            with urllib.request.urlopen(url, timeout=PATIENCE_S, context=trusts) as page:
                assert b"segzero_reward_requests_total" in page.read()
            stopping = threading.Thread(target=server.stop, daemon=True)
            stopping.start()
            stopping.join(PATIENCE_S)
            assert not stopping.is_alive()
        assert capsys.readouterr().err == ""

    def test_a_silent_connection_is_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(telemetry, "_SILENCE_S", 0.1)
        port, stop = telemetry.expose(telemetry.Metrics(), "127.0.0.1", 0, None)
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as silent:
                assert silent.recv(1) == b""
        finally:
            stop()

    def test_one_that_hangs_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        closed, forever = threading.Event(), threading.Event()
        hangs = SimpleNamespace(
            shutdown=forever.wait, server_close=closed.set, server_port=1, RequestHandlerClass=object, socket=None
        )
        thread = threading.Thread(target=forever.wait, daemon=True)
        thread.start()
        monkeypatch.setattr(telemetry, "start_http_server", lambda *_, **__: (hangs, thread))
        monkeypatch.setattr(telemetry, "_STOP_S", 0.1)
        _, stop = telemetry.expose(telemetry.Metrics(), "127.0.0.1", 0, None)
        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE_S)
        assert closed.is_set()
        assert not stopping.is_alive()
        forever.set()


@pytest.mark.parametrize(
    ("host", "expected"),
    [("::1", "[::1]"), ("[fe80::2]", "[fe80::2]"), ("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")],
)
def test_ipv6_addresses_get_brackets(host: str, expected: str) -> None:
    assert bracketed(host) == expected


class TestRefusalsToStart:
    @pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1"])
    def test_in_plain_text_where_others_can_listen_in(self, host: str) -> None:
        with pytest.raises(AccessError, match=f"--host={re.escape(host)}: .*--tls-cert and --tls-key, or --insecure"):
            RewardServer(Settings(host=host))

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "[::1]"])
    def test_not_on_loopback(self, host: str) -> None:
        Access().check_address(host)

    def test_of_a_name_that_is_an_address_of_others_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "192.0.2.1")]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        with pytest.raises(AccessError, match="--host=ours: reachable by others"):
            Access().check_address("ours")
        del found[1]
        Access().check_address("ours")

    def test_not_when_told_so(self) -> None:
        server = RewardServer(Settings(host="0.0.0.0", access=Access(insecure=True)))
        server.stop()

    def test_with_files_that_do_not_fit(self, ours: Authority, theirs: Authority, tmp_path: Path) -> None:
        nonsense = tmp_path / "nonsense.pem"
        nonsense.write_text("nonsense")
        locked = ours.lock(ours.key)
        cases = [
            (Access(tls_cert=ours.cert), "--tls-cert and --tls-key: one is given"),
            (Access(client_ca=ours.ca), "--client-ca: given without --tls-cert"),
            (Access(tls_cert=ours.cert, tls_key=theirs.key), "--tls-cert, --tls-key: cannot be used"),
            (Access(tls_cert=nonsense, tls_key=ours.key), "--tls-cert, --tls-key: cannot be used"),
            (Access(tls_cert=ours.cert, tls_key=locked), "cannot be used: the key is encrypted; expected one without"),
            (Access(tls_cert=tmp_path / "none", tls_key=ours.key), "--tls-cert=.*none: cannot be used: No such file"),
            (Access(tls_cert=ours.cert, tls_key=tmp_path), f"--tls-key={tmp_path}: cannot be used: Is a directory"),
            (Access(tls_cert=ours.cert, tls_key=ours.key, client_ca=nonsense), "--client-ca: cannot be used"),
        ]
        for access, reason in cases:
            with pytest.raises(AccessError, match=reason) as refused:
                RewardServer(Settings(access=access))
            assert "\n" not in str(refused.value)

    def test_with_a_token_that_is_none(self, tmp_path: Path) -> None:
        for content in ("", " \n", "two words", "two\nlines", "tökén"):
            (tmp_path / "token").write_text(content)
            with pytest.raises(AccessError, match="expected one token"):
                read_token(tmp_path / "token")
        with pytest.raises(AccessError, match="cannot be read"):
            read_token(tmp_path / "nowhere")
        (tmp_path / "token").write_text(f"{SECRET}\n")
        assert read_token(tmp_path / "token") == SECRET
