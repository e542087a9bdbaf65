"""Certificates for tests, made anew each time."""

from pathlib import Path

import trustme


class Authority:
    """A certificate authority with a server's certificate for this machine and a client's, as files."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        authority = trustme.CA()
        server = authority.issue_cert("localhost", "127.0.0.1")
        client = authority.issue_cert("trainer@example.org")
        self.ca, self.cert, self.key = folder / "ca.pem", folder / "cert.pem", folder / "key.pem"
        self.client_cert, self.client_key = folder / "client.pem", folder / "client_key.pem"
        authority.cert_pem.write_to_path(str(self.ca))
        for cert, chain, key in ((server, self.cert, self.key), (client, self.client_cert, self.client_key)):
            for blob in cert.cert_chain_pems:
                blob.write_to_path(str(chain), append=True)
            cert.private_key_pem.write_to_path(str(key))
