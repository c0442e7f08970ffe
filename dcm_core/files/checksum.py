"""The checksum of our own files: CRC-32 of every tensor and of what the file says of them.

It depends on names, dtypes, shapes and values and not on their order, so that a tool may rewrite the header.
"""

import json
import zlib
from collections.abc import Mapping, Sequence

# The metadata entry, and what stands in it until all tensors are written.
CHECKSUM = "dcm.checksum"
EMPTY = "crc32:00000000"

# Formats whose metadata nobody else writes to.
OWN_FORMAT = "dcm-"


class Checksum:
    """Adds up the tensors of one file as they come.

    Args:
        metadata: the file's. Entries that other tools add to LoRAs and models do not count.
    """

    def __init__(self, metadata: Mapping[str, str]):
        own = metadata.get("format", "").startswith(OWN_FORMAT)
        self._parts = {
            f"metadata {name}": value
            for name, value in metadata.items()
            if name != CHECKSUM and (own or name.startswith("dcm."))
        }

    def add(self, key: str, dtype: str, shape: Sequence[int], data: bytes | memoryview) -> None:
        """Add a tensor, its values as they lie in the file."""
        self._parts[f"tensor {key}"] = f"{dtype} {list(shape)} {zlib.crc32(data):08x}"

    def __str__(self) -> str:
        return f"crc32:{zlib.crc32(json.dumps(self._parts, sort_keys=True).encode()):08x}"
