"""Weights as the host leaves them, made usable for gradients. Whole backbones are in tests/host."""

import pytest
import torch
from torch import nn

from dcm_core.distill.backbone import usable_weights
from dcm_core.experts.placing import placed


@pytest.fixture
def moved():
    """A layer as a graph's loader makes it and the host then moves it, outside inference mode, to the GPU."""
    with torch.inference_mode():
        layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for weight in layers.parameters():
        weight.data = weight.data.clone()
    layers.requires_grad_(False)
    return layers


def test_weights_that_were_moved_since_inference_mode(moved):
    weight = moved[1].weight
    x = torch.ones(2, 4, requires_grad=True)
    assert not weight.is_inference()
    with pytest.raises(RuntimeError, match="Inference tensors"):
        moved(x)
    with usable_weights(moved):
        moved(x).sum().backward()
        assert moved[1].weight.data_ptr() == weight.data_ptr()
    expected = torch.ones(2, 4) @ moved[1].weight.clone() @ moved[0].weight.clone()
    torch.testing.assert_close(x.grad, expected)
    assert moved[1].weight is weight


def test_other_weights_are_left_alone():
    layer = nn.Linear(4, 4)
    weight, bias = layer.weight, layer.bias
    with usable_weights(layer):
        assert layer.weight is weight and layer.bias is bias
        assert not {"weight", "bias"} & set(vars(layer))


def test_what_is_placed_meanwhile_is_seen(moved):
    """As an expert's bare parameter is."""
    weight, mine = moved[0].weight, torch.zeros(4, 4)
    with usable_weights(moved):
        with placed([(moved[0]._parameters, "weight", mine)]):
            assert moved[0].weight is mine
        assert moved[0].weight is not weight
    assert moved[0].weight is weight
