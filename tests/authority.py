"""Certificates for tests, made anew each time."""

from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization


class Authority:
    """A certificate authority and what it signs, as files in a new folder.

    Attributes:
      ca: its own certificate.
      cert, key: a server's on this machine.
      client_cert, client_key: a client's.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._authority = folder, trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self.cert, self.key = self.sign("server", "localhost", "127.0.0.1")
        self.client_cert, self.client_key = self.sign("client", "trainer@example.org")

    def lock(self, key: Path) -> Path:
        """The same key beside it, as ``locked.pem``, which only a passphrase opens."""
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        locked = serialization.load_pem_private_key(key.read_bytes(), None).private_bytes(
            *form, serialization.BestAvailableEncryption(b"secret")
        )
        path = self._folder / "locked.pem"
        path.write_bytes(locked)
        return path

    def sign(self, name: str, *holds: str) -> tuple[Path, Path]:
        """A certificate for host names, addresses or mail addresses, and its key, in files called ``name``."""
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}_key.pem"
        signed = self._authority.issue_cert(*holds)
        for blob in signed.cert_chain_pems:
            blob.write_to_path(str(cert), append=True)
        signed.private_key_pem.write_to_path(str(key))
        return cert, key
