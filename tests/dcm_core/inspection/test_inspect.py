"""What a file is, told to a person or a program."""

import json
from dataclasses import asdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from dcm_core.errors import CheckpointError
from dcm_core.experts.match import Target
from dcm_core.families import FAMILIES
from dcm_core.files.metadata import level_entries
from dcm_core.files.tensor_file import TensorFile
from dcm_core.inspection.inspect import inspect_file
from dcm_core.pair import make_pair

from ..conftest import release_shapes


def test_release(family, save, release):
    found = inspect_file(save(release))
    assert found.family == family.title and "release" in found.layout
    assert found.experts == ("semantic", "detail")
    assert (found.ranks, found.tensors, found.dtypes) == ((8,), len(release), {"bfloat16": len(release)})
    assert float(found.boundary) == family.preset.boundary
    assert json.loads(found.timesteps) == list(family.preset.timesteps)
    assert found.gigabytes == pytest.approx(sum(tensor.nbytes for tensor in release.values()) / 1e9)
    assert (found.problem, found.unplaced) == (None, ())
    text = str(found)
    for word in (family.title, "semantic, detail", "bfloat16", "8", f"{family.preset.boundary:g}"):
        assert word in text


def test_our_files(family, converted):
    base, expert = map(inspect_file, converted)
    assert (base.family, base.experts, base.layout) == (family.title, ("semantic",), "native layout")
    assert (expert.experts, float(expert.boundary)) == (("detail",), family.preset.boundary)
    assert expert.ranks == (8,), "of one update, not of the stacked file"
    assert float(expert.alpha) == 16
    assert json.loads(expert.timesteps) == list(family.preset.timesteps)
    assert expert.family == family.title
    assert (expert.problem, expert.unplaced) == (None, ())


def test_an_expert_of_two_models(save, converted):
    pair = make_pair({"semantic": (1.0, 2.0), "detail": (1.0, 3.0)}, 0.875, (1000.0,))
    assert inspect_file(converted[1]).two_models is None
    found = inspect_file(save(load_file(converted[1]), "half.safetensors", level_entries(0.875, (1000.0,), pair)))
    assert found.two_models == pair.id and f"two models: {pair.id}" in str(found)


def test_a_damaged_file_of_ours_is_described(converted, tmp_path):
    content = bytearray(converted[1].read_bytes())
    content[-1] ^= 1
    (path := tmp_path / "damaged.safetensors").write_bytes(content)
    found = inspect_file(path)
    assert "is damaged: its content does not match its checksum" in found.problem and found.checksum is None
    assert "matches" in inspect_file(converted[1]).checksum


def test_plain_diffusers(family, save, base):
    found = inspect_file(save(base))
    assert (found.family, found.experts, found.ranks, found.problem) == (family.title, (), (), None)
    assert "diffusers layout" in found.layout


def test_half_a_release_is_described(family, save, release):
    key = next(key for key in release if ".lora_B." in key)
    del release[key]
    found = inspect_file(save(release))
    assert "1 tensor is missing" in found.problem and key in found.problem
    assert found.tensors == len(release)
    assert key in str(found)


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_a_lora_of_another_tool(save, alpha):
    module = "lora_unet_blocks_{}_self_attn_q"
    tensors = {}
    for i in range(2):
        stem = module.format(i)
        tensors |= {f"{stem}.lora_down.weight": torch.ones(4, 8), f"{stem}.lora_up.weight": torch.ones(8, 4)}
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    found = inspect_file(save(tensors | {"stranger": torch.ones(1)}))
    assert found.layout == "expert or LoRA"
    assert found.ranks == (4,)
    assert float(found.alpha) == alpha
    assert found.unplaced == ("stranger",)
    assert found.family == "Wan 2.1", "by its keys"
    assert found.known == "6 of 7; no such layer: stranger"
    assert "stranger" in str(found)


def test_an_expert_beside_the_model_it_is_to_go_on(family, converted):
    base, expert = converted
    shapes = {name.removeprefix("diffusion_model."): shape for name, shape in TensorFile(base).shapes.items()}
    count = inspect_file(expert).tensors
    assert (inspect_file(expert).known, inspect_file(expert).fits) == (f"{count} of {count}", None)
    assert f"fit model: {count} of {count}" in str(inspect_file(expert, Target("Model", family, shapes)))
    shallow = {name: shape for name, shape in shapes.items() if "blocks.1." not in name}
    assert "no such layer: diffusion_model." in inspect_file(expert, Target("Model", family, shallow)).fits
    other = next(f for f in FAMILIES.values() if f is not family)
    assert inspect_file(expert, Target("Model", other, {})).fits.startswith("none: the expert is for")
    assert inspect_file(base, Target("Model", family, shapes)).fits is None, "no expert inside"


def test_mixed_dtypes_are_counted(save):
    found = inspect_file(save({"a": torch.ones(1), "b": torch.ones(1), "c": torch.ones(1).half()}))
    assert found.dtypes == {"float32": 2, "float16": 1}
    assert found.layout == "something else"
    assert "unknown" in str(found)


def test_json_says_the_same(family, save, release):
    found = inspect_file(save(release))
    data = json.loads(json.dumps(asdict(found)))
    assert data["family"] == family.title
    assert data["experts"] == ["semantic", "detail"]
    assert data["ranks"] == [8]
    assert data["problem"] is None


def test_unreadable(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"GGUF and more")
    with pytest.raises(CheckpointError, match="GGUF"):
        inspect_file(tmp_path / "x.safetensors")


names = st.text(max_size=12) | st.sampled_from([key for family in FAMILIES.values() for key in release_shapes(family)])
endings = st.sampled_from(["", ".lora_A.weight", ".lora_down.weight", ".alpha", ".diff", ".set_weight", ".dora_scale"])
metadata = st.dictionaries(
    st.sampled_from(
        [
            "dcm.family",
            "dcm.expert",
            "dcm.boundary",
            "dcm.timesteps",
            "dcm.alpha",
            "dcm.rank",
            "dcm.tensors",
            "dcm.format",
        ]
    ),
    st.text(max_size=6) | st.sampled_from(["0", "8", "wan", "detail"]),
)


@given(
    keys=st.dictionaries(st.tuples(names, endings), st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=8),
    metadata=metadata,
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
def test_any_file_is_described(save, keys, metadata):
    tensors = {
        name + ending: torch.ones(shape) for (name, ending), shape in keys.items() if name + ending != "__metadata__"
    }
    found = inspect_file(save(tensors, metadata=metadata))
    assert found.tensors == len(tensors)
    assert str(found) and json.loads(json.dumps(asdict(found)))["tensors"] == len(tensors)
