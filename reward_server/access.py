"""Access control: TLS, client certificates, a bearer token, and the addresses allowed without them."""

import hmac
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

# Probes cannot send a token, and health reveals no data.
_OPEN_TO_ALL = "/grpc.health.v1.Health/"


class AccessError(ValueError):
    """The certificate or token files, or the address, cannot be used; the message is one line."""


@dataclass(frozen=True)
class Access:
    """Access settings.

    Attributes:
      tls_cert, tls_key: PEM files of the server's certificate chain and its key.
      client_ca: PEM file of the authorities whose clients may connect; without one any client may.
      token: the token required for every call except health checks; empty for no token.
      insecure: allow non-loopback addresses without TLS.
    """

    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None
    token: str = ""
    insecure: bool = False

    @property
    def tls(self) -> tuple[Path, Path] | None:
        return (self.tls_cert, self.tls_key) if self.tls_cert and self.tls_key else None

    def credentials(self) -> grpc.ServerCredentials | None:
        """gRPC's TLS credentials, None for plain text. Raises AccessError if the files cannot be used."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise AccessError("--tls-cert and --tls-key: one is given, expected both or neither")
        if self.tls_cert is None or self.tls_key is None:
            if self.client_ca:
                raise AccessError("--client-ca: given without --tls-cert and --tls-key, which it needs")
            return None
        # Checked with Python's ssl, since gRPC only logs an invalid file and continues.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        files = str(self.tls_cert), str(self.tls_key)
        for option, file in (("--tls-cert", self.tls_cert), ("--tls-key", self.tls_key)):
            # ssl does not report which of the two files it could not read.
            _load(f"{option}={file}", file.read_bytes)
        _load("--tls-cert, --tls-key", lambda: context.load_cert_chain(*files, password=_no_passphrase))
        if self.client_ca:
            _load("--client-ca", lambda: context.load_verify_locations(str(self.client_ca)))
        return grpc.ssl_server_credentials(
            [(self.tls_key.read_bytes(), self.tls_cert.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )

    def check_address(self, host: str) -> None:
        """Raises AccessError for a non-loopback host without TLS, unless ``insecure``, or for an unknown host name."""
        if self.tls is None and not self.insecure and not _is_loopback(host):
            raise AccessError(
                f"--host={host}: reachable by others and without TLS: give --tls-cert and --tls-key, "
                "or --insecure inside a network that you trust"
            )


def bracketed(host: str) -> str:
    """A host as gRPC expects it before a port: IPv6 addresses in brackets."""
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def read_token(path: Path) -> str:
    """The token in a file, without surrounding white space. Raises AccessError."""
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"--token-file={path}: cannot be read: {error}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise AccessError(f"--token-file={path}: expected one token of printable ASCII characters")
    return token


class TokenCheck(grpc.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without the token in their metadata ``authorization: Bearer TOKEN``."""

    def __init__(self, token: str, note: Callable[[str, str], None]) -> None:
        """``note`` is called for each refused call with the method's full name, as received, and the caller."""
        self._expected = f"Bearer {token}".encode()
        self._note = note

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method.startswith(_OPEN_TO_ALL):
            return continuation(details)
        brought = [value for name, value in details.invocation_metadata if name == "authorization"]
        if len(brought) == 1 and hmac.compare_digest(brought[0].encode(), self._expected):
            return continuation(details)

        def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> None:
            self._note(details.method, context.peer())
            reason = "expected the metadata 'authorization: Bearer TOKEN' with this server's token"
            context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)

        # Handled as a stream, whatever the method: for a unary request, gRPC would hold a thread of the shared pool
        # until the request arrives, and an unauthorised caller need not send one.
        return grpc.stream_unary_rpc_method_handler(refuse)


def _load(what: str, load: Callable[[], object]) -> None:
    try:
        load()
    except (OSError, ssl.SSLError) as error:
        raise AccessError(f"{what}: cannot be used: {getattr(error, 'strerror', None) or error}") from None


def _no_passphrase() -> str:
    """Raises OSError when ssl asks for an encrypted key's passphrase, since gRPC loads the key again without one."""
    raise OSError("the key is encrypted; expected one without a passphrase")


def _is_loopback(host: str) -> bool:
    """Whether all addresses of a host (IPv6 with or without brackets) are loopback addresses.

    Raises AccessError: the name has no address.
    """
    try:
        found = socket.getaddrinfo(host.strip("[]"), None)
    except OSError as error:
        raise AccessError(f"--host={host}: no address of that name: {error.strerror or error}") from None
    return all(ipaddress.ip_address(entry[4][0]).is_loopback for entry in found)
