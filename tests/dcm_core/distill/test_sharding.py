"""Tensors that are divided among processes, here without processes: what each of them would keep."""

import copy

import pytest
import torch
from torch import nn

from dcm_core.distill import parallel, sharding
from dcm_core.distill.backbone import shard_base
from dcm_core.distill.config import TrainingError
from dcm_core.distill.parallel import Processes
from dcm_core.distill.sharding import Shard, complete_shape, complete_size, divide, fill, whole
from dcm_core.families import WAN

CPU = torch.device("cpu")


def shards(tensor, count):
    return [Shard.of(tensor, Processes(rank, count, sharded=True), CPU) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_parts_are_of_one_size_and_make_the_tensor(count):
    tensor = torch.arange(1.0, 16.0).view(3, 5)
    parts = shards(tensor, count)
    assert len({part.numel() for part in parts}) == 1
    joined = torch.cat([part.data for part in parts])
    assert torch.equal(joined[:15].view(3, 5), tensor) and not joined[15:].any()
    assert all(complete_shape(part) == (3, 5) and complete_size([part]) == 60 for part in parts)


def test_a_part_is_filled_from_a_complete_tensor_and_copied_with_what_it_is():
    first, last = shards(torch.ones(3, 3), 2)
    fill(last, 2 * torch.arange(9.0).view(3, 3))
    assert last.tolist() == [10, 12, 14, 16, 0] and first.tolist() == [1] * 5
    copied = copy.deepcopy(nn.ParameterList([last.requires_grad_()]))[0]
    assert type(copied) is Shard and complete_shape(copied) == (3, 3) and copied.requires_grad
    assert torch.equal(copied, last) and copied.data_ptr() != last.data_ptr()
    assert first.part_of(torch.arange(9.0).view(3, 3)).tolist() == [0, 1, 2, 3, 4]


def test_the_gradient_of_a_part_is_its_mean_over_the_processes(monkeypatch):
    """The other process has the weights 10 and a gradient of 3 everywhere."""
    part = shards(torch.ones(2, 3), 2)[0].requires_grad_()
    monkeypatch.setattr(sharding, "_gathered", lambda part, count: torch.cat([part, part * 10]))
    monkeypatch.setattr(sharding, "_scattered_mean", lambda flat, count: (flat + 3)[: flat.numel() // 2] / count)
    complete = whole(part, torch.bfloat16)
    assert complete.dtype is torch.bfloat16 and complete.tolist() == [[1, 1, 1], [10, 10, 10]]
    (complete * torch.tensor([[5, 7, 9], [1, 1, 1]])).sum().backward()
    assert part.grad.dtype is torch.float32 and part.grad.tolist() == [4, 5, 6]


def test_only_matrices_of_layers_are_divided():
    layers = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(4, 4, 1))
    layers.modulation = nn.Parameter(torch.ones(1, 6, 4))
    divide(layers, Processes(1, 2, sharded=True), CPU)
    divided = {name for name, value in layers.named_parameters() if isinstance(value, Shard)}
    assert divided == {"0.weight", "2.weight"} and all(value.requires_grad for value in layers.parameters())


def test_a_base_that_cannot_be_divided_is_refused():
    base = nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2))
    base[1].weight = nn.Parameter(base[1].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        TrainingError, match=r'^1\.weight is stored as torch\.float8_e4m3fn.*bfloat16.*"shard" to false'
    ):
        shard_base(base, WAN, CPU)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_process_with_fewer_batches_repeats_its_last_one(sharded, monkeypatch):
    """The other process has three."""
    asked = []

    def summed(values):
        asked.append(values[0])
        return [values[0] + (len(asked) <= 3)]

    monkeypatch.setattr(parallel, "_summed", summed)
    found = list(Processes(0, 2, sharded).evenly(iter([("a", 0.5), ("b", 0.5)])))
    assert found == [("a", 0.5), ("b", 0.5), *[("b", 0.0)] * sharded]
