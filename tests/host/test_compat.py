"""What hides the differences between hosts."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from .small_models import KINDS, native_wan, stored


@pytest.fixture
def compat(module):
    return module("nodes.host.compat")


def test_rotation_is_the_host_s(compat, pack):
    from comfy.ldm.flux.math import apply_rope, rope

    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 6, 16, generator=generator)
    rotations = rope(torch.arange(6)[None], 16, 10000)[:, None]
    for ours, theirs in zip(compat.rotate_both(q, k, rotations), apply_rope(q, k, rotations), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert compat.rotate(q.bfloat16(), rotations).dtype == torch.bfloat16


def test_kernels_without_a_gradient_stand_aside_while_training(compat, pack, monkeypatch):
    """As on a host that binds the kernels at import and has no word for training."""
    import comfy.model_management

    def kernel(*_):
        raise NotImplementedError("no autograd formula")

    layer = types.ModuleType("comfy.ldm.made_up.model")
    layer.apply_rope1 = layer.apply_rope = kernel
    operations = types.ModuleType("comfy.quant_ops")
    operations.ck = types.SimpleNamespace(apply_rope=kernel, apply_rope1=kernel)
    monkeypatch.setitem(sys.modules, "comfy.quant_ops", operations)
    monkeypatch.setitem(sys.modules, layer.__name__, layer)
    monkeypatch.delattr(comfy.model_management, "in_training", raising=False)
    with pytest.raises(ZeroDivisionError), compat.gradients():
        assert layer.apply_rope1 is compat.rotate and layer.apply_rope is compat.rotate_both
        raise ZeroDivisionError
    assert layer.apply_rope1 is kernel and layer.apply_rope is kernel


def test_a_host_that_knows_training_is_told(compat, pack, monkeypatch):
    import comfy.model_management

    monkeypatch.setattr(comfy.model_management, "in_training", False, raising=False)
    with compat.gradients():
        assert comfy.model_management.in_training
    assert not comfy.model_management.in_training


@pytest.fixture(scope="module")
def load(pack, tmp_path_factory):
    """load(kind, seed, prefix="") -> a MODEL, of weights that are stored in a kind of few bits."""
    import comfy.sd

    def make(kind, seed=0):
        path = tmp_path_factory.mktemp(kind) / "model.safetensors"
        tensors, metadata = stored(kind, native_wan(seed, layers=1))
        save_file(tensors, path, metadata)
        options = {"dtype": torch.float8_e4m3fn} if kind == "fp8" else {}
        with torch.inference_mode():
            return comfy.sd.load_diffusion_model(str(path), model_options=options)

    return make


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_weights_of_a_model_are_found_however_they_are_stored(compat, load, kind):
    model = load(kind)
    found = compat.key_patches(model)
    for name, value in native_wan(layers=1).items():
        (weight, convert), *patches = found[f"diffusion_model.{name}"]
        plain = convert(weight).to(torch.float32)
        assert plain.shape == value.shape and (plain - value).norm() < 0.1 * value.norm(), name
        assert patches == []


@torch.inference_mode()
def test_a_patched_weight_is_found_unpatched_with_its_patches(compat, load):
    name, patch = "diffusion_model.blocks.0.ffn.0.weight", ("diff", (torch.ones(512, 256),))
    model = load("bfloat16")
    before = compat.key_patches(model)[name][0][0].clone()
    model.add_patches({name: patch})
    model.patch_model()
    (weight, _), (_, value, *_) = compat.key_patches(model)[name]
    model.unpatch_model()
    assert torch.equal(weight, before) and value == patch


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_s_name_is_that_of_its_weights_however_they_are_stored(module, load, kind):
    name = module("nodes.host.training.encoders").weights_id
    assert name(load(kind)) == name(load(kind)) != name(load(kind, seed=1))


def test_errors_that_say_that_the_device_is_full(compat):
    assert compat.is_oom(torch.OutOfMemoryError("CUDA out of memory")) and compat.is_oom(
        RuntimeError("MPS backend out of memory")
    )
    assert not compat.is_oom(RuntimeError("element 0 of tensors does not require grad"))


@pytest.mark.parametrize(
    ("version", "lines"), [("0.3.75", 0), ("0.33.0", 0), ("0.33.1", 1), ("0.46.0", 1), ("1.0", 1), ("dev", 0), ("", 0)]
)
def test_a_host_newer_than_any_tried_gives_one_line(compat, monkeypatch, caplog, version, lines):
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", version)
    with caplog.at_level("INFO"):
        compat.tell_newer_host()
    assert len(caplog.messages) == lines
    assert all(
        f"This is ComfyUI {version}; ComfyUI-DCM was tested up to {compat.NEWEST_TRIED}." in line
        for line in caplog.messages
    )


def test_the_line_is_told_once_when_the_pack_is_loaded(module, monkeypatch, caplog):
    import asyncio

    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", "99.0.0")
    with caplog.at_level("INFO"):
        assert asyncio.run(module("nodes").DCMExtension().get_node_list())
    assert len([line for line in caplog.messages if "99.0.0" in line]) == 1


def test_the_newest_host_tried_is_the_docs_newest(compat):
    from .server import ROOT

    assert f"ComfyUI {compat.NEWEST_TRIED}" in (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
