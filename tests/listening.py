"""Which addresses a process listens at, as Linux tells."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path

_LISTEN = "0A"


def listening_addresses(process: int) -> set[str]:
    """Return "address:port" of every TCP socket at which a process listens."""
    sockets = set(_open_files(process))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN and f"socket:[{fields[9]}]" in sockets:
                found.add(_address(fields[1]))
    return found


def _open_files(process: int) -> list[str]:
    folder = Path(f"/proc/{process}/fd")
    found = []
    for name in os.listdir(folder):
        try:
            found.append(os.readlink(folder / name))
        except FileNotFoundError:  # closed meanwhile
            continue
    return found


def _address(text: str) -> str:
    """The kernel prints words of four bytes in the machine's order."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[begin : begin + 8]) for begin in range(0, len(address), 8)]
    packed = b"".join(word[::-1] if sys.byteorder == "little" else word for word in words)
    return f"{ipaddress.ip_address(packed)}:{int(port, 16)}"
