"""Certificates that tests and benchmarks need, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

Pair = tuple[Path, Path]
"""Certificate and key."""


def authority(folder: Path, name: str) -> Pair:
    """One that may issue others."""
    _openssl(folder, "req", "-x509", *_new(name))
    return folder / f"{name}.pem", folder / f"{name}.key"


def issued(folder: Path, by: Pair, name: str, *, expired: bool = False) -> Pair:
    """One for 127.0.0.1."""
    _openssl(folder, "req", *_new(name), out="csr")
    (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1\n")
    dates = ["-days", "-1" if expired else "2"]
    sign = ["-CA", by[0], "-CAkey", by[1], "-in", f"{name}.csr", "-extfile", "extensions"]
    _openssl(folder, "x509", "-req", *map(str, sign), *dates, "-out", f"{name}.pem")
    return folder / f"{name}.pem", folder / f"{name}.key"


def _new(name: str) -> list[str]:
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    return [*curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key"]


def _openssl(folder: Path, *arguments: str, out: str = "") -> None:
    name = next((part.removesuffix(".key") for part in arguments if part.endswith(".key")), "")
    named = ["-out", f"{name}.{out or 'pem'}"] if arguments[0] == "req" else []
    subprocess.run(["openssl", *arguments, *named], cwd=folder, check=True, capture_output=True)
