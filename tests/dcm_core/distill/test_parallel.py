"""What a process does of what several do together. Real processes are in data/test_dataset.py and tests/host/training."""

import torch
from torch import nn

from dcm_core.distill import parallel
from dcm_core.distill.parallel import Processes


def test_a_global_batch_is_shared_out_in_order():
    items = [7, 5, 3, 1]
    assert Processes().share(items) == [(0, 7), (1, 5), (2, 3), (3, 1)]
    assert [Processes(rank, 2).share(items) for rank in range(2)] == [[(0, 7), (1, 5)], [(2, 3), (3, 1)]]


def test_a_tensor_without_a_gradient_gets_the_others_mean(monkeypatch):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    parameters[0].grad = torch.full((2,), 4.0)
    # the other process has 2 everywhere
    monkeypatch.setattr(parallel.dist, "all_reduce", lambda flat: flat.add_(2))
    Processes(0, 2).average_gradients(parameters)
    assert parameters[0].grad.tolist() == [3, 3] and parameters[1].grad.tolist() == [1, 1, 1]
