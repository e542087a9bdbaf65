"""The connection to reward servers: addresses, encryption, gRPC's own behaviour, and its failures in plain words."""

import json
import re
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from reward_server import reward_pb2
from segzero_jax.config import RewardConfig

SERVICE = reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name
# The largest message in either direction; the server has the same limit.
MESSAGE_BYTES = 32 * 2**20

# A name, an IPv4 address or an IPv6 address in brackets, and a port.
_ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\]):(\d{1,5})")
_PREAMBLE = re.compile(r"^.*last error: (?:[A-Z_]+: )?(?:ipv[46]:\S+ )?")
# gRPC's message if the two sides do not agree. A connection cut in the middle gives "Handshake read failed": a server
# that is starting or dying, or a load balancer without one.
_REFUSED = "handshake failed"
_LOOPBACK = re.compile(r"localhost|127(\.\d+){3}|\[::1\]")
_FAMILIES = ((socket.AF_INET, "ipv4:", "{}:{}"), (socket.AF_INET6, "ipv6:", "[{}]:{}"))
_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    # gRPC does not retry a call larger than this buffer, by default 256 KiB: less than one image. Headers count too.
    ("grpc.per_rpc_retry_buffer_size", 2 * MESSAGE_BYTES),
    # A host that vanished silently is detected within 50 s, in the middle of a long call and between calls. The server
    # allows a ping every 20 s and would close the connection of a client that sends more.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC waits this long for the answer to a ping, whatever the line above sets; by default a minute.
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # By default it can take two minutes until a server that is back is tried again.
    ("grpc.max_reconnect_backoff_ms", 10_000),
    # The servers are nearby; a proxy meant for outside traffic would swallow even calls to localhost.
    ("grpc.enable_http_proxy", 0),
)
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    # A server that is draining, loading or broken reports NOT_SERVING and gets no calls until it serves again.
    "healthCheckConfig": {"serviceName": SERVICE},
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
}
_SPREAD = (("grpc.service_config", json.dumps(_SERVICE_CONFIG)),)
# Its own connection: a shared one that is waiting to reconnect would return its old failure.
_ONE_TRY = (("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1))
# Retrying cannot help: the two sides do not agree.
_FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}


class RewardServerError(RuntimeError):
    """The reward service did not answer as expected; the message is one line that names it and what to do."""


class RewardServiceAway(RewardServerError):
    """The reward service did not answer but may do so later: it is restarting, overloaded, or unreachable."""


@dataclass(frozen=True)
class Access:
    """What a server requires of its clients; ``Access()`` is plain text without a token.

    Attributes:
      ca: PEM certificates of the authorities that a server's certificate is checked against; empty for plain text.
      cert, key: the client's own certificate and private key in PEM, for mutual TLS.
      token: sent with each call as ``authorization: Bearer TOKEN``.
      tls_name: the name that a server's certificate must contain; empty for the host of its address.
    """

    ca: bytes = b""
    cert: bytes = b""
    key: bytes = field(default=b"", repr=False)
    token: str = field(default="", repr=False)
    tls_name: str = ""


def read_access(reward: RewardConfig) -> Access:
    """Reads the files that the configuration names.

    Raises:
      RewardServerError: a file cannot be read, is empty or unusable for TLS, or the settings are inconsistent.
    """
    if reward.ca_file and reward.server in ("local", "none"):
        raise RewardServerError(f"reward.ca_file={reward.ca_file}: expected reward.server=host:port beside it")
    for key in ("cert_file", "key_file", "tls_name"):
        if getattr(reward, key) and not reward.ca_file:
            raise RewardServerError(f"reward.{key}={getattr(reward, key)}: expected reward.ca_file beside it")
    if bool(reward.cert_file) != bool(reward.key_file):
        raise RewardServerError("reward.cert_file and reward.key_file go together: expected both or neither")
    hosts = {host for host, _ in _parsed(reward.server)}
    if reward.token_file and not reward.ca_file and not all(_LOOPBACK.fullmatch(host) for host in hosts):
        raise RewardServerError(
            f"reward.token_file={reward.token_file}: a token to {reward.server} would travel in plain text: "
            "set reward.ca_file, or use a server on this machine"
        )
    if reward.ca_file and len(hosts) > 1 and not reward.tls_name:
        raise RewardServerError(
            f"reward.server={reward.server}: several hosts behind TLS, "
            "expected reward.tls_name, one name that all their certificates hold"
        )
    access = Access(
        ca=_read("ca_file", reward.ca_file),
        cert=_read("cert_file", reward.cert_file),
        key=_read("key_file", reward.key_file),
        token=_token(reward.token_file),
        tls_name=reward.tls_name or (min(hosts).strip("[]") if reward.ca_file else ""),
    )
    if access.ca:
        _check_tls(reward)
    return access


def addresses(targets: str) -> list[str]:
    """The addresses in "host:port[,host:port]". Raises RewardServerError if one has another form."""
    return [f"{host}:{port}" for host, port in _parsed(targets)]


class SpreadChannel:
    """A channel that spreads calls over the servers that report SERVING, and retries what they could not take.

    gRPC takes several addresses only in numeric form. A name without one yet is left out until ``look_up`` finds one.
    """

    def __init__(self, targets: str, access: Access) -> None:
        """Does not connect yet.

        Raises:
          RewardServerError: a target is not host:port, or the targets have no address family in common.
        """
        self._targets, self._access = targets, access
        # If no name resolves, gRPC keeps trying to resolve the first.
        self._target = _spread_target(targets) or targets.partition(",")[0]
        self._opened = [_channel(self._target, access, _SPREAD)]

    @property
    def now(self) -> grpc.Channel:
        """The channel for new calls."""
        return self._opened[-1]

    def look_up(self) -> bool:
        """Resolves the names again; returns whether there is a new address, in which case ``now`` is a new channel.

        Pending calls stay on their channel. Without a new address, the old ones are kept.
        """
        try:
            target = _spread_target(self._targets)
        except RewardServerError:  # Temporary: they had a family in common before.
            return False
        if not target or _numbers(target) <= _numbers(self._target):
            return False
        self._target = target
        # Calls on the channel before the last have been answered, or given up.
        *past, last = self._opened
        self._opened = [last, _channel(target, self._access, _SPREAD)]
        for channel in past:
            channel.close()
        return True

    def close(self) -> None:
        """Closes the connections; pending calls are cancelled."""
        for channel in self._opened:
            channel.close()


def open_probe(address: str, access: Access) -> grpc.Channel:
    """A channel to one server whose calls fail at once if it cannot be reached."""
    return _channel(address, access, _ONE_TRY)


def explained(targets: str, error: grpc.RpcError, late: str, access: Access) -> RewardServerError:
    """A failed call as a one-line error, ``late`` if it timed out: RewardServiceAway if retrying may help."""
    code = error.code()
    line = f"reward server {targets}: {_reason(code, _details(error), late, access)}"
    return RewardServerError(line) if code in _FINAL else RewardServiceAway(line)


def no_answer(timeout_s: float, advice: str) -> str:
    """The message for a call that timed out, with advice for the user."""
    return f"no answer within {timeout_s:g} s: is `python -m reward_server` running there? else {advice}"


def misconfigured(error: grpc.RpcError) -> bool:
    """Whether a server is there but certificates or tokens do not match, so that waiting does not help."""
    return error.code() in _FINAL or _REFUSED in _details(error) or "Verification" in _details(error)


def _reason(code: grpc.StatusCode, details: str, late: str, access: Access) -> str:
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return (
            f"does not speak {SERVICE.rpartition('.')[0]}, which this client does: run the same release on both sides"
        )
    if code == grpc.StatusCode.UNAUTHENTICATED:
        wrong = "reward.token_file holds another token than the server's" if access.token else "set reward.token_file"
        return f"asks for a token ({details}): {wrong}"
    if code == grpc.StatusCode.UNAVAILABLE:
        return f"unreachable ({details}): {_advice(details, access)}"
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return late
    return f"{code.name}: {details}: look at its log"


def _advice(details: str, access: Access) -> str:
    if "WRONG_VERSION_NUMBER" in details:
        return "it answers in plain text: start it with a certificate, or leave reward.ca_file empty"
    if "Verification" in details:
        return "its certificate holds another name: set reward.tls_name"
    if _REFUSED in details:
        return "expected a certificate signed by one in reward.ca_file"
    # A server closes a connection this way if it cannot read its beginning, or if a client certificate is missing.
    if "Socket closed" in details or "reset" in details:
        if not access.ca:
            return "is it restarting? if it is served with TLS, set reward.ca_file"
        return "is it restarting? if it asks for client certificates, check reward.cert_file and reward.key_file"
    return "is `python -m reward_server` running there? else set reward.server"


def _details(error: grpc.RpcError) -> str:
    """gRPC's error message without its preamble."""
    return _PREAMBLE.sub("", " ".join((error.details() or "no reason given").split()))


def _channel(target: str, access: Access, more: Sequence[tuple[str, Any]]) -> grpc.Channel:
    options = [*_OPTIONS, *more]
    if access.tls_name:
        options.append(("grpc.ssl_target_name_override", access.tls_name))
    if access.ca:
        credentials = grpc.ssl_channel_credentials(access.ca, access.key or None, access.cert or None)
    elif access.token:
        # Plain text that gRPC itself restricts to this machine.
        credentials = grpc.local_channel_credentials()
    else:
        return grpc.insecure_channel(target, options)
    if access.token:
        credentials = grpc.composite_channel_credentials(credentials, grpc.access_token_call_credentials(access.token))
    return grpc.secure_channel(target, credentials, options)


def _parsed(targets: str) -> list[tuple[str, int]]:
    if targets in ("local", "none"):
        return []
    found = []
    for address in targets.split(","):
        parts = _ADDRESS.fullmatch(address)
        if not parts or not 0 < int(parts[2]) < 65536:
            raise RewardServerError(f"reward server {address!r}: expected host:port, such as localhost:50051")
        found.append((parts[1], int(parts[2])))
    return found


def _spread_target(targets: str) -> str:
    """gRPC's target for one or several addresses, with those that resolve now; empty if none does.

    A single name is kept: gRPC resolves it itself, spreads calls over all its addresses, and resolves it again when
    they are gone.
    """
    found = _parsed(targets)
    if len(found) == 1:
        return targets
    known = [_resolved(found, family, form) for family, _, form in _FAMILIES]
    numeric = max(known, key=len)
    if len(numeric) < len(set().union(*known)):
        raise RewardServerError(f"reward server {targets}: expected IPv4 or IPv6 throughout")
    if not numeric:
        return ""
    scheme = _FAMILIES[known.index(numeric)][1]
    return scheme + ",".join(sorted({each for some in numeric.values() for each in some}))


def _numbers(target: str) -> set[str]:
    return set(target.removeprefix("ipv4:").removeprefix("ipv6:").split(","))


def _resolved(
    found: Sequence[tuple[str, int]], family: socket.AddressFamily, form: str
) -> dict[tuple[str, int], list[str]]:
    """The numeric addresses of a family, by host and port."""
    numeric = {}
    for host, port in found:
        try:
            entries = socket.getaddrinfo(host.strip("[]"), port, family, socket.SOCK_STREAM)
        except OSError:
            continue
        numeric[host, port] = [form.format(*entry[4][:2]) for entry in entries]
    return numeric


def _read(key: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise RewardServerError(f"reward.{key}={path}: {error.strerror}") from None
    if not content.strip():
        raise RewardServerError(f"reward.{key}={path}: is empty")
    return content


def _check_tls(reward: RewardConfig) -> None:
    """Raises RewardServerError for files that gRPC cannot use, since it would report an unreachable server instead."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca, cert, key = (str(Path(path).expanduser()) for path in (reward.ca_file, reward.cert_file, reward.key_file))
    try:
        context.load_verify_locations(ca)
    except ssl.SSLError as error:
        raise RewardServerError(f"reward.ca_file={reward.ca_file}: holds no certificates in PEM: {error}") from None
    if not reward.cert_file:
        return
    files = f"reward.cert_file={reward.cert_file}, reward.key_file={reward.key_file}"
    try:
        context.load_cert_chain(cert, key, password=_no_passphrase)
    except ssl.SSLError as error:
        raise RewardServerError(f"{files}: no certificate and its key in PEM: {error}") from None
    except OSError as error:
        raise RewardServerError(f"{files}: {error}") from None


def _no_passphrase() -> str:
    """Called if the key is encrypted; gRPC, which loads it again, could not be given a passphrase."""
    raise OSError("the key is encrypted; expected one without a passphrase")


def _token(path: str) -> str:
    token = _read("token_file", path).decode("ascii", "replace").strip()
    # The characters that a header can hold; gRPC would fail each call without naming the file.
    if not all("!" <= character <= "~" for character in token):
        raise RewardServerError(f"reward.token_file={path}: expected one word of printable ASCII")
    return token
