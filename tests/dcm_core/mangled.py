"""Files that are damaged, or crafted: what a reader has to read or refuse."""

import json
import struct
import sys
import time
from contextlib import contextmanager, suppress

from hypothesis import strategies as st

from dcm_core.files.writing import write_tensors

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
SIZES = st.sampled_from([-1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**40]) | st.integers(-5, 200)


def mangled(path, tensors, metadata, data):
    """Write a file of these tensors and metadata, then damage it in one of the ways there are."""
    write_tensors(path, tensors, metadata)
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    values = bytes(content[8 + length :])
    if data.draw(st.booleans()):  # files without a checksum are read, too
        header["__metadata__"].pop("dcm.checksum")
    keys = st.sampled_from(sorted(key for key in header if key != "__metadata__"))
    match data.draw(
        st.sampled_from(
            ["cut", "flip", "insert", "length", "header", "entry", "offsets", "key", "metadata", "deep", "many"]
        )
    ):
        case "cut":
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        case "flip":
            for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
                content[place] ^= 1 << data.draw(st.integers(0, 7))
        case "insert":
            place = data.draw(st.integers(0, len(content)))
            content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
        case "length":
            content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
        case "header":
            content = _file(data.draw(JSON), values)
        case "entry":
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[data.draw(keys)][field] = data.draw(
                JSON | st.lists(SIZES, max_size=5) | st.sampled_from(["I64", "BOOL", "F64", "F4"])
            )
            content = _file(header, values)
        case "offsets":
            start = data.draw(SIZES)
            header[data.draw(keys)] |= {
                "shape": data.draw(st.lists(SIZES, max_size=4)),
                "data_offsets": [start, data.draw(SIZES)],
            }
            content = _file(header, values)
        case "key":
            key = data.draw(keys)
            header[data.draw(st.text(max_size=8) | st.just("9" * 5000) | keys)] = header.pop(key)
            content = _file(header, values)
        case "metadata":
            name = data.draw(st.sampled_from(sorted(header["__metadata__"])))
            odd = st.sampled_from(["1e999", "[NaN]", "9" * 5000, "[" * 100_000, '{"a":' * 100_000])
            text = JSON.map(json.dumps) | st.text(max_size=20) | odd
            header["__metadata__"][name] = data.draw(text)
            content = _file(header, values)
        case "deep":
            bracket = data.draw(st.sampled_from([b"[", b'{"a":']))
            text = b'{"a":' + bracket * data.draw(st.sampled_from([50, 200, 100_000]))
            content = struct.pack("<Q", len(text)) + text
        case "many":
            stem = data.draw(st.sampled_from(["0", "blocks", "text", "latent", "expert"]))
            empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(values)] * 2}
            content = _file({**header, **{f"{stem}.{n}": empty for n in range(20_000)}}, values)
    path.write_bytes(content)


def _file(header, values):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def peak():
    """Bytes of memory that the process has had at most, 0 where it cannot be known."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM")).split()[1])


@contextmanager
def timed(seconds=2.0, nbytes=500e6):
    """See that what is done within takes no more, in the process's own time."""
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    began, before = time.process_time(), peak()
    yield
    took, grown = time.process_time() - began, peak() - before
    assert took < seconds, f"{took:.1f} s"
    assert grown < nbytes, f"{grown / 1e6:.0f} MB"
