"""Views of a file: the tensors it holds, without memory of their own."""

import os
import sys

import pytest
import torch

from dcm_core.errors import CheckpointError
from dcm_core.files.checkpoint import recognise, semantic_state_dict
from dcm_core.files.mapped import views
from dcm_core.files.tensor_file import DTYPES, TensorFile
from dcm_core.files.writing import write_tensors


def bits(tensor):
    return tensor.reshape(-1).view(torch.uint8)


def test_every_dtype(tmp_path):
    tensors = {
        name: torch.arange(24 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 3, 4)
        for name, dtype in sorted(DTYPES.items(), key=lambda item: -item[1].itemsize)
        if dtype is not torch.bool
    }
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "BOOL": torch.tensor([True, False])}
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    found = views(TensorFile(tmp_path / "x.safetensors"))
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(bits(found[key]), bits(tensor)), key


def test_odd_addresses(tmp_path):
    tensors = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.arange(5.0),
        "c": torch.ones(2, dtype=torch.float8_e4m3fn),
    }
    write_tensors(tmp_path / "x.safetensors", tensors, {})
    found = views(TensorFile(tmp_path / "x.safetensors"))
    assert all(torch.equal(bits(found[key]), bits(tensor)) for key, tensor in tensors.items())


def test_a_file_without_tensors(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {}, {})
    assert views(TensorFile(tmp_path / "x.safetensors")) == {}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs names that are bytes")
def test_a_name_that_is_no_text(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff.safetensors")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(4)}, {})
    os.rename(tmp_path / "x.safetensors", path)
    assert views(TensorFile(os.fsdecode(path)))["a"].tolist() == [1, 1, 1, 1]


def test_the_file_stays_as_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)}, {})
    before = path.read_bytes()
    views(TensorFile(path))["a"].zero_()
    assert path.read_bytes() == before


def test_a_file_that_changed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(4)}, {})
    changed, shorter, gone = TensorFile(path), TensorFile(path), TensorFile(path)
    write_tensors(path, {"b": torch.ones(8)}, {})
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        views(changed)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        views(shorter)
    path.unlink()
    with pytest.raises(CheckpointError, match="Was the file moved"):
        views(gone)


def test_of_a_model_only_fused_tensors_take_memory(family, save, release):
    file = TensorFile(save(release))
    contents = recognise(file)
    expected, found = semantic_state_dict(file, contents), semantic_state_dict(file, contents, tensors=views(file))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    made = {name for name, pieces in contents.matched.items() if len(pieces) > 1 or pieces[0].swap_halves}
    places = {tensor.untyped_storage().data_ptr() for name, tensor in found.items() if name not in made}
    assert len(places) == 1, "one mapping"
    assert all(found[name].untyped_storage().nbytes() == found[name].nbytes for name in made)
