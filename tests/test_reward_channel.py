"""Encryption and tokens against real handshakes: who is let in, who is not, and what the user reads then."""

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from authority import Authority
from fake_reward_server import Fake, assert_take_turns, serving

from segzero_jax.config import RewardConfig
from segzero_jax.reward_channel import Access, RewardServerError, RewardServiceAway, read_access
from segzero_jax.reward_client import RewardClient
from segzero_jax.reward_messages import ScoreRequest
from segzero_jax.types import Frame

GROUP = ScoreRequest("a", b"picture", Frame(5, 6), (), ((),))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A server's certificate for 127.0.0.1 and "rewards", a client's, and those of an authority nobody knows."""
    folder = tmp_path_factory.mktemp("certificates")
    ours, other = Authority(folder / "ours"), Authority(folder / "other")
    made = SimpleNamespace(folder=folder, ca=ours.ca, other_ca=other.ca)
    made.server_cert, made.server_key = ours.sign("rewards", "rewards", "127.0.0.1")
    made.client_cert, made.client_key = (ours.client_cert, ours.client_key)
    made.foreign_cert, made.foreign_key = (other.client_cert, other.client_key)
    made.token, made.wrong, made.empty = folder / "token", folder / "wrong", folder / "empty"
    made.token.write_text("open-sesame\n")
    made.wrong.write_text("close-sesame\n")
    made.empty.touch()
    ours.lock(made.client_key)
    return made


def encrypted(files: SimpleNamespace, client_ca: Path | None = None) -> grpc.ServerCredentials:
    pair = (files.server_key.read_bytes(), files.server_cert.read_bytes())
    roots = client_ca.read_bytes() if client_ca else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=client_ca is not None)


class Doorkeeper(grpc.ServerInterceptor):
    """Refuses every call without the token but, as many servers do, those that ask for its health."""

    def __init__(self, health_is_free: bool) -> None:
        self._health_is_free = health_is_free

    def intercept_service(self, continuation: Callable, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        handler = continuation(details)
        if ("authorization", "Bearer open-sesame") in [tuple(entry) for entry in details.invocation_metadata]:
            return handler
        if self._health_is_free and details.method.startswith("/grpc.health"):
            return handler

        def refuse(request: object, context: grpc.ServicerContext) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no such token")

        streams = handler.response_streaming
        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(refuse, handler.request_deserializer, handler.response_serializer)


def access(server: str = "127.0.0.1:1", **paths: Path | str) -> Access:
    return read_access(RewardConfig(server=server, **{key: str(path) for key, path in paths.items()}))


def answered(address: str, given: Access) -> None:
    """Starts as a trainer does, then asks for a score."""
    with RewardClient(address, 10, access=given) as client:
        client.wait_until_serving(0.5)
        assert client.score([GROUP]).result()[0][0].error == ""


def refused(address: str, given: Access, *parts: str) -> None:
    """The start ends soon with one line that holds all these parts."""
    with RewardClient(address, 10, access=given) as client, pytest.raises(RewardServerError) as error:
        client.wait_until_serving(0.5)
    assert "\n" not in str(error.value)
    for part in (f"reward server {address}: ", *parts):
        assert part in str(error.value)


def test_tls(files: SimpleNamespace) -> None:
    with serving(Fake(), credentials=encrypted(files)) as address:
        answered(address, access(address, ca_file=files.ca))
        answered(address, access(address, ca_file=files.ca, tls_name="rewards"))
        refused(address, access(address, ca_file=files.other_ca), "CERTIFICATE_VERIFY_FAILED", "reward.ca_file")
        refused(address, access(address, ca_file=files.ca, tls_name="other"), "another name", "reward.tls_name")
        refused(address, Access(), "if it is served with TLS, set reward.ca_file")
    with serving(Fake()) as address:
        refused(address, access(address, ca_file=files.ca), "answers in plain text", "reward.ca_file")


def test_a_wrong_certificate_ends_the_wait_at_once(files: SimpleNamespace) -> None:
    with serving(Fake(), credentials=encrypted(files)) as address:
        given = access(address, ca_file=files.other_ca)
        with RewardClient(address, 10, access=given) as client, pytest.raises(RewardServerError) as error:
            client.wait_until_serving(300)
        assert "waited" not in str(error.value)


def test_a_connection_cut_in_its_handshake_is_waited_for(files: SimpleNamespace) -> None:
    """What a balancer without servers does, or a server that dies as it starts: no fault of a certificate."""
    given = access(ca_file=files.ca)
    with socket.create_server(("127.0.0.1", 0)) as door:

        def close_each() -> None:
            with contextlib.suppress(OSError):  # The door's own end.
                while True:
                    door.accept()[0].close()

        thread = threading.Thread(target=close_each)
        thread.start()
        address = f"127.0.0.1:{door.getsockname()[1]}"
        refused(address, given, "is it restarting?", "(waited 0.5 s)")
        door.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_several_servers_share_a_name(files: SimpleNamespace) -> None:
    fakes = [Fake(), Fake()]
    credentials = encrypted(files)
    with serving(fakes[0], credentials=credentials) as first, serving(fakes[1], credentials=credentials) as second:
        both = f"{first},{second}"
        with RewardClient(both, 10, access=access(both, ca_file=files.ca)) as client:
            assert len(client.wait_until_serving(30)) == 2
            assert_take_turns(fakes, lambda: client.score([GROUP]).result())


def test_mutual_tls(files: SimpleNamespace) -> None:
    with serving(Fake(), credentials=encrypted(files, client_ca=files.ca)) as address:
        own = {"cert_file": files.client_cert, "key_file": files.client_key}
        answered(address, access(address, ca_file=files.ca, **own))
        refused(address, access(address, ca_file=files.ca), "reward.cert_file and reward.key_file")
        foreign = {"cert_file": files.foreign_cert, "key_file": files.foreign_key}
        refused(address, access(address, ca_file=files.ca, **foreign), "reward.cert_file and reward.key_file")


@pytest.mark.parametrize(("tls", "health_is_free"), [(True, True), (False, True), (False, False)])
def test_token(files: SimpleNamespace, tls: bool, health_is_free: bool) -> None:
    credentials = encrypted(files) if tls else None
    more = {"ca_file": files.ca} if tls else {}
    with serving(Fake(), credentials=credentials, interceptors=[Doorkeeper(health_is_free)]) as address:
        answered(address, access(address, token_file=files.token, **more))
        wrong = access(address, token_file=files.wrong, **more)
        refused(address, wrong, "no such token", "reward.token_file holds another token")
        refused(address, access(address, **more), "asks for a token", "set reward.token_file")
        with RewardClient(address, 1, access=wrong) as client:
            with pytest.raises(RewardServerError) as error:
                client.score([GROUP]).result()
            assert isinstance(error.value, RewardServiceAway) != health_is_free, "unknown health is like none"
            assert "reward.token_file holds another token" in client.state()
            assert "sesame" not in client.state() + repr(wrong), "a secret is never shown"


@pytest.mark.parametrize(
    ("server", "paths", "parts"),
    [
        ("a:1", {"ca_file": "absent"}, ("reward.ca_file=", "absent: No such file")),
        ("a:1", {"ca_file": "empty"}, ("reward.ca_file=", "is empty")),
        ("a:1", {"ca_file": "."}, ("reward.ca_file=", "Is a directory")),
        ("a:1", {"ca_file": "ours/ca.pem", "cert_file": "client.pem"}, ("reward.key_file", "both or neither")),
        ("a:1", {"cert_file": "client.pem", "key_file": "client.key"}, ("expected reward.ca_file beside",)),
        # gRPC would take what follows for a server that is away.
        ("a:1", {"ca_file": "token"}, ("reward.ca_file=", "token: holds no certificates in PEM: ")),
        ("a:1", {"ca_file": "ours/rewards_key.pem"}, ("reward.ca_file=", "rewards_key.pem: holds no certificates")),
        (
            "a:1",
            {"ca_file": "ours/ca.pem", "cert_file": "ours/client.pem", "key_file": "ours/rewards_key.pem"},
            ("reward.cert_file=", "reward.key_file=", "rewards_key.pem: no certificate and its key in PEM: "),
        ),
        (
            "a:1",
            {"ca_file": "ours/ca.pem", "cert_file": "ours/client.pem", "key_file": "token"},
            ("no certificate and its key in PEM",),
        ),
        (
            "a:1",
            {"ca_file": "ours/ca.pem", "cert_file": "ours/client.pem", "key_file": "ours/locked.pem"},
            ("locked.pem: the key is encrypted; expected one without a passphrase",),
        ),
        ("a:1,b:1", {"ca_file": "ours/ca.pem"}, ("a:1,b:1", "several hosts", "expected reward.tls_name")),
        ("local", {"ca_file": "ours/ca.pem"}, ("expected reward.server=host:port",)),
        ("a:1", {"token_file": "token"}, ("a:1", "plain text", "set reward.ca_file")),
        ("localhost:1,a:1", {"token_file": "token"}, ("plain text",)),
        ("localhost:1", {"token_file": "empty"}, ("reward.token_file=", "is empty")),
        ("localhost:1", {"token_file": "ours/ca.pem"}, ("reward.token_file=", "one word of printable ASCII")),
    ],
)
def test_what_does_not_go_together_is_one_line(
    files: SimpleNamespace, server: str, paths: dict[str, str], parts: tuple[str, ...]
) -> None:
    with pytest.raises(RewardServerError) as error:
        access(server, **{key: files.folder / name for key, name in paths.items()})
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
