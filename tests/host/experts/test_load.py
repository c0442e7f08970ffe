"""DCM Load Model: files that this ComfyUI cannot read, or would read wrongly, are named with what to do."""

import json
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ..compare import relative
from ..small_models import linears, native_wan

SIGMAS = [1.0, 0.9, 0.5, 0.0]


@pytest.fixture(scope="module")
def load(module, tmp_path_factory):
    """Load tensors from a file of some name: load(tensors, name)."""
    load = module("nodes.host.experts.load")
    folder = tmp_path_factory.mktemp("load")

    def run(tensors, name="model.safetensors", metadata=None):
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata)
        with torch.inference_mode():
            return load.load_file(folder / name, "default")

    return run


def quantised(form="float8_e4m3fn", note=None):
    """A small Wan base as newer hosts write it: every linear with its scale and a note of its format."""
    state = native_wan(layers=1)
    tensors = {key: value.bfloat16() for key, value in state.items()}
    note = json.dumps({"format": form}).encode() if note is None else note
    for name in linears(state):
        scale = state[f"{name}.weight"].abs().max() / 448
        tensors[f"{name}.weight"] = (state[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
    return tensors


def reads_notes():
    import comfy.utils

    return hasattr(comfy.utils, "detect_layer_quantization")


def test_a_quantised_base_is_read_right_or_refused(load, sample, wan):
    import comfyui_version

    if not reads_notes():
        version = comfyui_version.__version__.replace(".", r"\.")
        message = (
            rf"model\.safetensors has layers quantised as float8_e4m3fn .*ComfyUI {version} cannot read.*Update ComfyUI"
        )
        with pytest.raises(ValueError, match=message):
            load(quantised())
    else:
        model, _ = load(quantised())
        assert relative(sample(model, SIGMAS), sample(wan(layers=1), SIGMAS)) < 0.2


@pytest.mark.parametrize(
    ("note", "name"),
    [
        (b'{"format": "int2_magic"}', "int2_magic"),
        (b"{", "something unknown"),
        (b"[" * 5000, "something unknown"),
        (b"[1]", "something unknown"),
        (b"{}", "something unknown"),
        (b"\xff\xfe", "something unknown"),
    ],
)
def test_a_format_that_no_host_knows_is_refused(load, note, name):
    with pytest.raises(ValueError, match=rf"quantised as {name} \(comfy_quant\)"):
        load(quantised(note=note))


@given(
    note=st.binary(max_size=200) | st.recursive(st.integers(), st.lists).map(lambda value: json.dumps(value).encode())
)
@settings(deadline=2000, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mangled_notes_give_our_errors_alone(module, tmp_path_factory, note):
    path = tmp_path_factory.getbasetemp() / "note.safetensors"
    save_file({"a.comfy_quant": torch.tensor(list(note), dtype=torch.uint8)}, path)
    file = module("dcm_core.files.tensor_file").TensorFile(path)
    began = time.monotonic()
    formats = module("nodes.host.experts.load").layer_formats(file)
    assert all(isinstance(name, str) for name in formats) and time.monotonic() - began < 2


@pytest.mark.parametrize("part", ["blocks.0.", "head."])
def test_one_of_several_native_shards_is_named(load, part):
    state = native_wan(layers=1)
    some = {name: value for name, value in state.items() if name.startswith(part)}
    message = (
        r"diffusion_pytorch_model-00002-of-00006\.safetensors is only one of the 6 shards of a model\. Merge all shards"
    )
    with pytest.raises(ValueError, match=message):
        load(some, "diffusion_pytorch_model-00002-of-00006.safetensors")
    with pytest.raises(ValueError, match="only one of the 3 shards"):
        load(state, "model-00001-of-00003.safetensors")
    assert "plain Wan 2.1 model" in load(state, "model-00001-of-00001.safetensors")[1]


OTHERS = {
    "VAE": ({"encoder.conv1.weight": (8, 3, 3, 3, 3), "decoder.conv1.weight": (8, 4, 3, 3, 3)}, "Load VAE"),
    "text encoder": ({"shared.weight": (32, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}, "Load CLIP"),
    "text encoder ": ({"text_model.encoder.layers.0.self_attn.q_proj.weight": (8, 8)}, "Load CLIP"),
    "text encoder  ": (
        {"model.embed_tokens.weight": (8, 8), "model.layers.0.self_attn.q_proj.weight": (8, 8)},
        "Load CLIP",
    ),
    "CLIP vision model": ({"vision_model.encoder.layers.0.mlp.fc1.weight": (8, 8)}, "Load CLIP Vision"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_no_diffusion_model_is_named(load, kind):
    shapes, node = OTHERS[kind]
    message = rf"other\.safetensors is not a diffusion model that ComfyUI .* knows\. It looks like a {kind.strip()}: load it with {node}\."
    with pytest.raises(ValueError, match=message) as error:
        load({name: torch.zeros(shape) for name, shape in shapes.items()}, "other.safetensors")
    assert type(error.value).__name__ == "CheckpointError"


def test_a_file_of_nothing_known_is_no_bare_error_either(load):
    with pytest.raises(ValueError, match=r"not a diffusion model that ComfyUI \S+ knows\. Select a video model"):
        load({"weights": torch.zeros(3)}, "other.safetensors")


def test_another_error_of_the_host_s_loader_is_left_as_it_is(load, monkeypatch):
    import comfy.sd

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(comfy.sd, "load_diffusion_model", full)
    with pytest.raises(torch.OutOfMemoryError):
        load(native_wan(layers=1))
