"""Several processes, here as threads: who does what when."""

import threading

import torch
from torch import nn

from dcm_core.distill import parallel
from dcm_core.distill.parallel import Processes


def together(monkeypatch, work):
    """Run work(Processes) as two processes that wait for each other."""
    barrier = threading.Barrier(2, timeout=30)
    monkeypatch.setattr(parallel.dist, "barrier", barrier.wait)
    threads = [threading.Thread(target=work, args=(Processes(rank, 2),)) for rank in (1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_the_first_works_alone_before_the_others(monkeypatch):
    order = []

    def work(processes):
        with processes.first_alone():
            order.append(("in", processes.rank))
            order.append(("out", processes.rank))

    together(monkeypatch, work)
    assert order == [("in", 0), ("out", 0), ("in", 1), ("out", 1)]


def test_one_process_waits_for_nobody():
    with Processes().first_alone():
        Processes().wait()


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
