"""The checksum of our own files: CRC-32 of every tensor and of its description.

It depends on names, dtypes, shapes and values but not on their order, so tools may rewrite the header.
"""

import json
import zlib
from collections.abc import Mapping, Sequence

# The metadata entry, and its placeholder until all tensors are written.
CHECKSUM = "dcm.checksum"
EMPTY = "crc32:00000000"

# Formats whose metadata other tools do not change.
OWN_FORMAT = "dcm-"


class Checksum:
    """Adds up the tensors of one file as they come.

    Args:
        metadata: the file's metadata. Entries that other tools add to LoRAs and models do not count.
    """

    def __init__(self, metadata: Mapping[str, str]):
        own = metadata.get("format", "").startswith(OWN_FORMAT)
        self._parts = {
            f"metadata {name}": value
            for name, value in metadata.items()
            if name != CHECKSUM and (own or name.startswith("dcm."))
        }

    def add(self, key: str, dtype: str, shape: Sequence[int], data: bytes | memoryview) -> None:
        """Add a tensor. `data` are its bytes in the file."""
        self._parts[f"tensor {key}"] = f"{dtype} {list(shape)} {zlib.crc32(data):08x}"

    def __str__(self) -> str:
        return f"crc32:{zlib.crc32(json.dumps(self._parts, sort_keys=True).encode()):08x}"
