"""What the tests of training share: small settings, random videos, a Trainer, comparisons."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from dcm_core.experts.expert import expert_id

SMALL = {
    "steps": 3,
    "batch_size": 2,
    "rank": 4,
    "alpha": 8.0,
    "discriminator_width": 64,
    "gradient_checkpointing": False,
    "warmup_steps": 2,
    "boundary": 0.9,
    "shift": 5.0,
}


def random_data(dataset, count=4, channels=16, size=(2, 4, 6), words=3, longest=3):
    """Training data for a small Wan model; `dataset` is the pack's module."""
    generator = torch.Generator().manual_seed(5)
    latents = [torch.randn(channels, *size, generator=generator) for _ in range(count)]
    lengths = [words] * (count - 1) + [max(words, longest)]
    texts = [[[torch.randn(1, length, 4096, generator=generator), {}]] for length in lengths]
    nothing = [[torch.zeros(1, words, 4096), {}]]
    return dataset.TensorDataset(latents, texts, list(range(count)), nothing, empty=nothing)


def uneven_data(dataset):
    """The same with one longer caption, which cannot be in a batch with the others."""
    return random_data(dataset, longest=5)


@contextmanager
def group_of_one():
    """A group of processes with this one in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def interrupted_after(module, monkeypatch, done):
    """A block whose run is interrupted after so many steps."""
    show = module("nodes.host.training.run").Show
    step = show.step

    def interrupted(self, history, steps):
        step(self, history, steps)
        if len(history) == done:
            raise KeyboardInterrupt

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(show, "step", interrupted)
        yield


def by_its_schedule(positive, shape):
    """Inputs of DCM Sampler for a video of a latent's shape on the expert's own schedule."""
    return {
        "positive": positive,
        "latent_image": {"samples": torch.zeros(1, *shape)},
        "schedule": "auto",
        "steps": 9,
        "cfg": 1.0,
        "denoise": 1.0,
    }


def make_trainer(module, model, data, config, folder, sharded=False):
    """A Trainer for a MODEL that has not begun.

    Args:
        sharded: divide everything among the processes of the current group.
    """
    training, places = module("nodes.host.training.run"), module("nodes.host.training.base")
    family = module("nodes.host.experts.attach").require_family(model)
    config = config.for_family(family)
    places.hold(model, 0)
    backbone, expert = (
        places.make_backbone(model, family, config),
        training.first_expert(model, family, config, None, None),
    )
    if sharded:
        module("dcm_core.distill.backbone").shard_base(backbone.module, family, model.load_device)
    return module("dcm_core.distill.trainer").Trainer(
        backbone,
        data,
        config,
        expert,
        folder,
        model.load_device,
        image_in=module("nodes.host.training.image").image_inputs(model),
        processes=module("dcm_core.distill.parallel").Processes(sharded=sharded),
    )


def same(a, b):
    """Whether two experts are equal to the last bit."""
    return expert_id(a) == expert_id(b)


def weights(model):
    """A copy of a MODEL's weights."""
    return {name: value.cpu().clone() for name, value in model.model.diffusion_model.state_dict().items()}
