"""The bytes of a safetensors file with any header, right or wrong."""

import json
import struct


def pack(header, data=b"", length=None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data
