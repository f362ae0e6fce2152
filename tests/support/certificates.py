"""Certificates for loopback, made by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    def copy_over(self, other: Pair) -> None:
        """Puts these in the place of others, the certificate first."""
        other.cert.write_bytes(self.cert.read_bytes())
        other.key.write_bytes(self.key.read_bytes())


def make_pair(folder: Path, name: str, authority: Pair | None = None) -> Pair:
    """A certificate for localhost and its key: of `authority`, or its own."""
    if shutil.which("openssl") is None:
        pytest.skip("the openssl command is not installed")
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(pair.cert)]
    if authority:
        command += ["-CA", str(authority.cert), "-CAkey", str(authority.key), "-addext", "basicConstraints=CA:FALSE"]
        command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return pair
