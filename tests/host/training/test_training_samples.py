"""Samples during training: they show the expert and leave the run alone."""

import pytest
import torch

from .small_runs import by_its_schedule, same, weights


@pytest.fixture
def train(train, model, data, config):
    """train(side, folder, ...) -> the result of three steps."""

    def run(side, folder, vae=None, **values):
        return train(model, data, config(side, **{"learning_rate": 1e-2, **values}), folder, vae=vae)

    return run


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_they_do_not_change_the_training(side, train, model, tmp_path):
    """A stacked semantic expert is patched into the weights that teacher and student share."""
    before = weights(model)
    plain = train(side, tmp_path / "without")
    sampled = train(side, tmp_path / "with", sample_every=1)
    assert plain.history == sampled.history and same(plain.expert, sampled.expert)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_they_are_what_the_sampler_node_makes(train, module, node, model, data, tmp_path, monkeypatch):
    show, seen = module("nodes.host.training.show"), []
    strip = show.preview_strip
    monkeypatch.setattr(show, "preview_strip", lambda *args: seen.append(args) or strip(*args))
    expert = train("semantic", tmp_path, steps=1, sample_every=1, seed=3).expert
    ((_, latent),) = seen
    sampled = node(
        "DCMSampler",
        model=show.with_experts(model, expert, None),
        seed=3,
        **by_its_schedule(data.conditioning(0), data.shape(0)),
    ).result[0]["samples"]
    assert torch.equal(latent, model.model.process_latent_in(sampled))


def test_each_sample_prompt_gives_a_sample(module, model, data, config, wan, tmp_path, monkeypatch):
    show, dataset = module("nodes.host.training.show"), module("dcm_core.distill.data.dataset")
    prompts, made, saved = [data.conditioning(1), data.conditioning(2)], [], []
    # a first clip that is an image has no video to show
    latents = [data.latent(0)[:, :1], *(data.latent(index) for index in range(1, 4))]
    texts = [data.conditioning(index) for index in range(4)]
    given = dataset.TensorDataset(latents, texts, range(4), data.unconditional(), sample_prompts=prompts)

    def sample(model, conditioning, clip, expert, seed, handover):
        made.append((conditioning[0][0], tuple(clip.shape), seed))
        return torch.zeros(1, *clip.shape)

    monkeypatch.setattr(show, "with_experts", lambda *args: model)
    monkeypatch.setattr(show, "sample_latent", sample)
    monkeypatch.setattr(show, "save_video", lambda vae, latent, fps, path: saved.append(path.name))
    expert = module("dcm_core.experts.expert").Expert("wan", "semantic")
    for clips in (given, data):
        shown = show.Show(model, None, config("semantic", seed=3), clips, tmp_path, None, lambda: None, Vae())
        shown.sample(7, expert)
    assert [shape for _, shape, _ in made] == [data.shape(1)] * 3 and {seed for *_, seed in made} == {3}
    wanted = [*prompts, data.conditioning(0)]
    assert all(torch.equal(context, text[0][0]) for (context, *_), text in zip(made, wanted, strict=True))
    assert saved == ["sample_00000007_1.mp4", "sample_00000007_2.mp4", "sample_00000007.mp4"]
    assert shown.picture.height * 2 == show.stacked([shown.picture, shown.picture]).height


class Vae:
    """Decodes a latent to grey frames."""

    def decode(self, latent):
        return torch.full((1, latent.shape[2], 16, 16, 3), 0.5)


def test_losses_and_samples_are_shown_while_it_works(train, module, every_update, tmp_path, monkeypatch):
    import comfy.utils

    shown = []
    monkeypatch.setattr(module("nodes.host.training.show"), "SHOW_SECONDS", 0.0)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, **_: shown.append((value, total, preview)))
    train("semantic", tmp_path, vae=Vae(), steps=4, sample_every=2)
    # a sample has a bar of its own
    steps = [entry for entry in shown if entry[1] == 4 and entry[2] is not None]
    assert [value for value, _, _ in steps] == [1, 2, 3, 4]
    pictures = [preview[1] for _, _, preview in steps]
    assert pictures[0].size == (pictures[1].width, 432), "the losses alone"
    assert pictures[1].height > 432 and pictures[3].height > 432, "with a sample below"
    assert pictures[3].tobytes() != pictures[1].tobytes()
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["sample_00000002.mp4", "sample_00000004.mp4"]


def test_a_sample_that_fails_does_not_end_the_run(train, tmp_path, caplog):
    class Small(Vae):
        def decode(self, latent):
            raise torch.OutOfMemoryError("too little memory")

    plain = train("semantic", tmp_path / "without")
    assert train("semantic", tmp_path / "with", vae=Small(), sample_every=2).history == plain.history
    assert "Could not make the sample video at step 2: too little memory" in caplog.text


def test_an_interrupt_during_a_sample_ends_the_run(train, tmp_path):
    import comfy.model_management as management

    class Pressed(Vae):
        def decode(self, latent):
            raise management.InterruptProcessingException

    with pytest.raises(management.InterruptProcessingException):
        train("semantic", tmp_path, vae=Pressed(), sample_every=2)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002.safetensors"]


def test_a_resumed_run_shows_the_losses_from_its_start(train, module, tmp_path, monkeypatch):
    show, seen = module("nodes.host.training.show"), []
    train("semantic", tmp_path, steps=2)
    plot = show.plot_losses
    monkeypatch.setattr(show, "plot_losses", lambda history, term: seen.append(len(history)) or plot(history, term))
    train("semantic", tmp_path, steps=3)
    assert seen == [3]
