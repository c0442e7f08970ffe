"""What hides the differences between hosts."""

import sys
import types

import pytest
import torch


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
