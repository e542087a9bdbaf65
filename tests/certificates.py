"""Certificates for tests, made by the openssl command: an authority and what it signs."""

import subprocess
from pathlib import Path


class Authority:
    """Signs certificates; all files are in ``folder``.

    Attributes:
      ca: path of its own certificate.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self.ca = folder / f"{name}.pem"
        _openssl("req", "-x509", *_NEW_KEY, folder / f"{name}.key", "-out", self.ca, "-subj", f"/CN={name}")

    def sign(self, name: str, holds: str = "") -> tuple[Path, Path]:
        """A certificate and its key, valid for a day.

        Args:
          name: of the files, and the certificate's subject.
          holds: the names it is for, such as "DNS:rewards,IP:127.0.0.1".
        """
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        request, names = self._folder / f"{name}.csr", self._folder / f"{name}.names"
        names.write_text(f"subjectAltName={holds or 'DNS:' + name}\n")
        _openssl("req", *_NEW_KEY, key, "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", self.ca, "-CAkey", self._folder / f"{self._name}.key", "-CAcreateserial")
        _openssl("x509", "-req", "-in", request, *signer, "-days", "1", "-extfile", names, "-out", cert)
        return cert, key


_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
