"""The checksum of our own files: every change of a file is noticed, or changes nothing."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dcm_core.convert import convert_release
from dcm_core.distill.data.dataset import TensorDataset
from dcm_core.distill.data.dataset_file import write_dataset
from dcm_core.errors import CheckpointError, DCMError
from dcm_core.experts.expert import expert_id
from dcm_core.experts.reader import read_expert
from dcm_core.families import WAN
from dcm_core.files.conditioning import load_conditioning, save_conditioning
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_stream, write_tensors
from dcm_core.inspection.inspect import inspect_file

from ..conftest import make_release


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_it_is_known_by_what_it_is_made_of(tmp_path):
    """CRC-32, as any tool makes it again from the page that says how."""
    import zlib

    path = tmp_path / "x.safetensors"
    write_tensors(
        path, {"b": torch.ones(2), "a": torch.zeros(3, 1, dtype=torch.uint8)}, {"dcm.family": "wan", "other": "x"}
    )
    parts = {
        "metadata dcm.family": "wan",
        "tensor a": f"U8 [3, 1] {zlib.crc32(bytes(3)):08x}",
        "tensor b": f"F32 [2] {zlib.crc32(struct.pack('<2f', 1, 1)):08x}",
    }
    assert metadata(path)["dcm.checksum"] == f"crc32:{zlib.crc32(json.dumps(parts).encode()):08x}"
    file = TensorFile(path)
    assert file.checksum == metadata(path)["dcm.checksum"] and "dcm.checksum" not in file.metadata


def test_every_file_of_ours_has_one(tmp_path, save):
    text = [[torch.ones(1, 2, 3), {}]]
    convert_release(save(make_release(WAN)), tmp_path / "base.safetensors", tmp_path / "expert.safetensors")
    save_conditioning(tmp_path / "text.safetensors", text)
    write_dataset(tmp_path / "data.safetensors", TensorDataset([torch.ones(2, 1, 2, 2)], [text], [0], text))
    for name in ("base", "expert", "text", "data"):
        file = TensorFile(tmp_path / f"{name}.safetensors")
        assert file.checksum
        file.read_all()


def read(path, shapes):
    file = TensorFile(path)
    expert = read_expert(file.read_all(), file.metadata, "detail", WAN, shapes)
    return expert_id(expert), expert.boundary, expert.timesteps


@pytest.fixture
def expert(tmp_path, save):
    """A small expert file, and the shapes of its base."""
    base, expert = tmp_path / "base.safetensors", tmp_path / "expert.safetensors"
    convert_release(save(make_release(WAN)), base, expert)
    shapes = TensorFile(base).shapes
    tensors = load_file(expert)
    # one block is enough to flip bits in
    few = {key: tensor for key, tensor in tensors.items() if ".blocks.0." in key and "attn.q" in key}
    assert {key.rpartition(".")[2] for key in few} == {"weight", "alpha"}
    write_tensors(expert, few, TensorFile(expert).metadata | {"dcm.tensors": str(len(few))})
    return expert, shapes


def test_a_flipped_bit_anywhere_is_noticed_or_changes_nothing(expert):
    path, shapes = expert
    content, whole = path.read_bytes(), read(*expert)
    noticed, unnoticed = 0, set()
    # of every byte one bit
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        try:
            assert read(path, shapes) == whole, f"byte {place} of {len(content)} gives another expert"
            unnoticed.add(place)
        except DCMError:
            noticed += 1
    harmless = range(content.index(b"dcm.checksum"), content.index(b"dcm.checksum") + len("dcm.checksum"))
    assert unnoticed <= {*harmless}, "without its name there is no checksum"
    assert noticed > len(content) - 20


def test_a_file_without_one_is_read(tmp_path, expert):
    path, shapes = expert
    whole = read(path, shapes)
    save_file(load_file(path), path, TensorFile(path).metadata)
    assert TensorFile(path).checksum is None and read(path, shapes) == whole


def test_a_tool_may_write_the_header_anew(expert):
    """Another order, more metadata: the tensors are the same."""
    path, shapes = expert
    whole, tensors, said = read(path, shapes), load_file(path), metadata(path)
    save_file(tensors, path, {"modelspec.title": "mine", **said})
    assert TensorFile(path).checksum and read(path, shapes) == whole
    save_file(tensors, path, said | {"dcm.boundary": "0.5"})
    with pytest.raises(CheckpointError, match=r"expert\.safetensors is damaged: .*checksum"):
        read(path, shapes)
    first = next(key for key, tensor in tensors.items() if tensor.ndim)
    save_file(tensors | {first: tensors[first] * 2}, path, said)
    with pytest.raises(CheckpointError, match=r"expert\.safetensors is damaged: .*checksum"):
        read(path, shapes)


def test_metadata_of_a_conditioning_count_too(tmp_path):
    path = tmp_path / "x.safetensors"
    save_conditioning(path, [[torch.ones(1, 2, 3), {"guidance": 6.0}]])
    path.write_bytes(path.read_bytes().replace(b"6.0", b"5.0"))
    with pytest.raises(CheckpointError, match="checksum"):
        load_conditioning(path)


def test_a_name_that_is_no_text_does_not_spoil_it(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"format": "dcm-latent", "clip": "\udcff.mp4"})
    TensorFile(tmp_path / "x.safetensors").read_all()


def test_metadata_that_look_like_one(tmp_path):
    """The place of the checksum is found all the same."""
    write_tensors(
        tmp_path / "x.safetensors",
        {"a": torch.ones(1)},
        {"dcm.a": 'dcm.checksum":"crc32:00000000', "x": "crc32:00000000"},
    )
    TensorFile(tmp_path / "x.safetensors").read_all()


def test_inspect_alone_verifies_a_base(tmp_path, save):
    base = tmp_path / "base.safetensors"
    convert_release(save(make_release(WAN)), base, tmp_path / "expert.safetensors")
    told = []
    sound = inspect_file(base, progress=lambda *done: told.append(done))
    assert (
        sound.problem is None and sound.checksum == f"{TensorFile(base).checksum}, matches" and "matches" in str(sound)
    )
    assert told[-1][0] == told[-1][1] == sum(map(TensorFile(base).nbytes, TensorFile(base).shapes))
    content = bytearray(base.read_bytes())
    content[-100] ^= 4
    base.write_bytes(content)
    damaged = inspect_file(base)
    assert damaged.checksum is None and "does not match its checksum" in damaged.problem
    assert damaged.layout == sound.layout

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_file(base, progress=stop)


def test_it_is_made_as_the_file_is(tmp_path):
    """Of tensors that come one by one, in a dtype and layout of memory of any kind."""
    tensors = {
        "t": torch.arange(12.0).reshape(3, 4).T,
        "e": torch.ones(1).expand(3, 2),
        "8": torch.ones(3).to(torch.float8_e5m2),
    }
    entries = {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}
    write_stream(tmp_path / "x.safetensors", entries, iter(tensors.items()), {})
    TensorFile(tmp_path / "x.safetensors").read_all()
