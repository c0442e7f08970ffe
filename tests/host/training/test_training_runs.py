"""Runs that end early, go on from experts, hold clips out, or get data that does not fit."""

import csv
import dataclasses
import gc
import math
import os
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ..small_models import native_wan
from .small_runs import make_trainer, random_data, same


@pytest.fixture(scope="module")
def config(config):
    return lambda side, **values: config(side, **{"steps": 4, "learning_rate": 1e-3, **values})


@pytest.fixture
def trainer(module, model, data, config, tmp_path):
    """trainer(side, data=..., ...) -> a Trainer that has not begun."""
    return lambda side, data=data, **values: make_trainer(module, model, data, config(side, **values), tmp_path)


# Ending early


def test_states_without_room_are_refused_before_the_first_step(
    train, module, model, data, config, tmp_path, monkeypatch
):
    errors, trainer_class = module("dcm_core.errors"), module("dcm_core.distill.trainer").Trainer
    whole = train(model, data, config("detail", save_every=1), tmp_path / "whole")
    assert len(whole.history) == 4
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("step_*"))

    def room(states):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(states * size)))

    def never(self):
        raise AssertionError("a step was made")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "_training_step", never)
        room(2.5)
        with pytest.raises(errors.DCMError, match=r"step_\*\.safetensors needs .* MB, but .*parts has .* MB free"):
            train(model, data, config("detail", save_every=1), tmp_path / "parts")
        (tmp_path / "file").touch()
        with pytest.raises(errors.DCMError, match=r"file cannot be written to .* Choose another place"):
            train(model, data, config("detail"), tmp_path / "file")
    room(3.2)
    train(model, data, config("detail", save_every=1), tmp_path / "parts")
    room(1.2)
    train(model, data, config("detail", save_every=1, steps=5), tmp_path / "parts")


@pytest.mark.parametrize("done", [0, 2])
def test_a_step_that_fails_leaves_no_state_that_is_there_already(
    done, train, module, model, data, config, tmp_path, monkeypatch
):
    """Nothing at all of a first step, so that its settings can be changed."""
    if done:
        train(model, data, config("semantic", steps=done, save_every=done), tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def fail(*_):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(module("dcm_core.distill.trainer").Trainer, "_training_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train(model, data, config("semantic", save_every=2), tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    if not done:
        train(model, data, config("semantic", steps=1, batch_size=1), tmp_path)


def test_another_process_that_is_lost_costs_the_step_alone(train, module, model, data, config, tmp_path, monkeypatch):
    """Gradients are gathered from all before anything changes."""
    learner, gathered = module("dcm_core.distill.learner").Learner, []
    gather = learner.gather

    def lost(self, *args):
        gathered.append(self.name)
        if gathered.count("discriminator") == 3:
            raise RuntimeError("Connection closed by peer")
        return gather(self, *args)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="closed by peer"):
        patch.setattr(learner, "gather", lost)
        train(model, data, config("detail"), tmp_path)
    assert module("dcm_core.distill.checkpoints").newest_checkpoint(tmp_path)[1].steps == 2


def test_a_diverging_run_is_ended_and_the_states_before_are_kept(
    train, module, model, data, config, tmp_path, monkeypatch
):
    divergence, trainer_module = module("dcm_core.distill.divergence"), module("dcm_core.distill.trainer")
    monkeypatch.setattr(divergence, "WINDOW", 2)
    update = trainer_module.Trainer._training_step

    def growing(self):
        update(self)
        self.history[-1]["loss"] *= 100.0 ** (self.done > 2)

    monkeypatch.setattr(trainer_module.Trainer, "_training_step", growing)
    with pytest.raises(divergence.Diverged, match=r"-fold since step 2, .*stopped at step 4 without saving"):
        train(model, data, config("semantic", steps=9, save_every=2, keep=9), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["losses.csv", "step_00000002.safetensors"]
    monkeypatch.undo()
    slower = train(model, data, config("semantic", steps=3, learning_rate=1e-4), tmp_path)
    assert len(slower.history) == 3, "goes on with another learning rate"


def test_nothing_of_a_run_stays_in_memory(train, module, model, data, config, tmp_path, monkeypatch):
    trainer_module, made = module("dcm_core.distill.trainer"), []
    begin = trainer_module.Trainer.__post_init__

    def remembered(self, *args):
        begin(self, *args)
        made.extend(weakref.ref(value) for value in (self, self.discriminator, *self.learner.parameters.values()))

    monkeypatch.setattr(trainer_module.Trainer, "__post_init__", remembered)
    gc.disable()
    try:
        train(model, data, config("detail", steps=2, sample_every=1), tmp_path)
        assert len(made) > 10 and not [reference for reference in made if reference() is not None]
    finally:
        gc.enable()


def test_the_expert_it_starts_from_does_not_stay_in_memory(train, module, model, data, config, tmp_path, monkeypatch):
    """A full fine-tune's is as large as the model."""
    training, trainer_module = module("nodes.host.training.run"), module("dcm_core.distill.trainer")
    made, alive = [], []
    first = training.first_expert

    def remembered(*args):
        expert = first(*args)
        made.extend(map(weakref.ref, expert.replaced.values()))
        return expert

    update = trainer_module.Trainer._training_step
    monkeypatch.setattr(training, "first_expert", remembered)
    monkeypatch.setattr(
        trainer_module.Trainer,
        "_training_step",
        lambda self: (alive.append(sum(ref() is not None for ref in made)), update(self)),
    )
    train(model, data, config("semantic", rank=0, steps=1), tmp_path)
    assert len(made) > 50 and alive == [0]


@pytest.fixture
def semantic_expert(module, model):
    """semantic_expert(boundary) -> one as DCM Extract LoRA makes it of a full fine-tune: pairs, and differences of the rest."""
    experts = module("dcm_core.experts.expert")

    def make(boundary=None):
        torch.manual_seed(1)
        weights = dict(model.model.diffusion_model.named_parameters())
        pairs, diff = {}, {}
        for name, value in weights.items():
            if value.ndim == 2:
                rows, columns = value.shape
                down, up = torch.randn(2, columns) / columns**0.5, 0.1 * torch.randn(rows, 2)
                pairs[name.removesuffix(".weight")] = (experts.LowRank(down, up, 1.0),)
            else:
                diff[name] = 0.05 * torch.randn(value.shape)
        return experts.Expert("wan", "semantic", pairs, diff=diff, boundary=boundary)

    return make


def test_a_detail_expert_goes_on_top_of_an_extracted_one(
    module, model, data, config, semantic_expert, sample, tmp_path
):
    """A fresh detail expert changes nothing: the pair samples as the semantic expert alone."""
    training, attach = module("nodes.host.training.run"), module("nodes.host.experts.attach")
    semantic, family = semantic_expert(), module("dcm_core.families").WAN
    settings = config("detail", steps=1, learning_rate=1e-12, ema_decay=0.0)
    result = training.train_expert(model, data, settings, tmp_path, semantic=semantic)
    fresh = training.first_expert(model, family, settings.for_family(family), None, semantic)
    sigmas = [1.0, 0.95, 0.5, 0.0]
    alone = sample(attach.attach_experts(model, semantic), sigmas)
    assert (sample(model, sigmas) - alone).norm() / alone.norm() > 0.01
    for detail in (fresh, result.expert):
        both = sample(attach.attach_experts(model, semantic, detail, boundary=0.9), sigmas)
        assert (both - alone).norm() / alone.norm() < 1e-5


@pytest.mark.parametrize("given", ["semantic", "start"])
def test_the_boundary_is_that_of_the_expert_it_goes_with(given, module, model, data, config, semantic_expert, tmp_path):
    training, students = module("nodes.host.training.run"), module("dcm_core.distill.student")
    if given == "semantic":
        side, expert = "detail", semantic_expert(boundary=0.76)
    else:
        modules = dict(model.model.diffusion_model.named_modules())
        family = module("dcm_core.families").WAN
        side, expert = "semantic", students.new_semantic(family, modules, 4, 8.0, torch.Generator().manual_seed(0))
        expert = dataclasses.replace(expert, boundary=0.76)
    result = training.train_expert(model, data, config(side, steps=1, boundary=0.0), tmp_path, **{given: expert})
    assert result.expert.boundary == 0.76
    if given == "semantic":
        with pytest.raises(ValueError, match=r"boundary is 0\.9, but the semantic expert was made for 0\.76"):
            training.train_expert(model, data, config(side, steps=1, boundary=0.9), tmp_path / "other", semantic=expert)


def test_experts_of_two_pairs_are_not_trained_together(module, model, data, config, semantic_expert, tmp_path):
    training, family = module("nodes.host.training.run"), module("dcm_core.families").WAN
    settings = config("detail", boundary=0.0)
    start = training.first_expert(model, family, dataclasses.replace(settings, boundary=0.9), None, None)
    with pytest.raises(ValueError, match=r"different boundaries \(0\.76 and 0\.9\)"):
        training.train_expert(model, data, settings, tmp_path, semantic=semantic_expert(boundary=0.76), start=start)


def test_a_semantic_expert_that_is_only_on_the_model_is_refused(
    train, module, model, data, config, semantic_expert, tmp_path
):
    """A run takes it off: the detail expert would stand on the base alone."""
    expert = semantic_expert(boundary=0.9)
    attached = module("nodes.host.experts.attach").attach_experts(model, expert)
    with pytest.raises(
        ValueError,
        match=r"has a semantic expert attached. Training removes it.*[Cc]onnect that expert to semantic_expert",
    ):
        train(attached, data, config("detail"), tmp_path)
    assert train(attached, data, config("detail", steps=1), tmp_path, semantic=expert).history


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        (
            {"rank": 2, "alpha": 4.0},
            {},
            r"rank is 4 and alpha is 8, but .* has rank 2 and alpha 4\. Set rank to 2 and alpha to 4\.",
        ),
        ({"alpha": 4.0}, {}, r"has rank 4 and alpha 4\."),
        ({"rank": 0}, {}, r"is not a LoRA: all its weights were trained\. Set rank to 0\."),
        ({}, {"rank": 0}, r"rank is 0 .* has rank 4 and alpha 8\."),
    ],
)
def test_a_form_that_the_expert_to_continue_from_has_not_is_refused(
    form, settings, message, train, module, model, data, config, tmp_path
):
    family = module("dcm_core.families").WAN
    start = module("nodes.host.training.run").first_expert(model, family, config("semantic", **form), None, None)
    with pytest.raises(ValueError, match=message):
        train(model, data, config("semantic", **settings), tmp_path, start=start)


@pytest.mark.parametrize("form", [{"rank": 0}, {"rank": 4, "alpha": 8.0}])
def test_a_form_that_the_expert_to_continue_from_has_is_taken(form, module, model, config):
    training, family = module("nodes.host.training.run"), module("dcm_core.families").WAN
    settings = config("semantic", **form)
    start = training.first_expert(model, family, settings, None, None)
    training.check_form(model, settings.for_family(family), family, start, None)


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_an_expert_to_continue_from_is_taken_whole(side, module, model, config):
    training, family, settings = module("nodes.host.training.run"), module("dcm_core.families").WAN, config(side)
    fresh = training.first_expert(model, family, settings, None, None)
    trained = dataclasses.replace(fresh, replaced={name: value + 1 for name, value in fresh.replaced.items()})
    assert same(training.first_expert(model, family, settings, trained, None), trained)
    assert bool(trained.replaced) == (side == "detail")


def test_a_plain_lora_to_continue_from_gets_embedders_and_head_of_its_own(module, model, config):
    training, family = module("nodes.host.training.run"), module("dcm_core.families").WAN
    settings = config("detail")
    fresh = training.first_expert(model, family, settings, None, None)
    again = training.first_expert(
        model, family, settings, dataclasses.replace(fresh, role="semantic", replaced={}), None
    )
    assert again.role == "detail" and same(fresh, again) and set(again.replaced) == set(fresh.replaced) != set()


@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_a_schedule_without_a_step_for_an_expert_is_refused(side, train, model, data, config, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"detail \(low-noise\) side has no steps.*the boundary is 0\.3.*shift, sample_steps and boundary",
    ):
        train(model, data, config(side, boundary=0.3, shift=17.0), tmp_path)


def test_a_run_does_not_write_over_what_it_continues_from(module, model, data, config, models):
    path = module("nodes.host.folders").new_file("loras", "dcm/again", overwrite=True)
    path.write_bytes(b"mine")
    with pytest.raises(
        ValueError, match=r"continue_from is dcm/again\.safetensors, which is the file that this run writes"
    ):
        module("nodes.host.training.run").train_and_save(
            model, data, config("semantic"), "again", "dcm/again.safetensors"
        )
    assert path.read_bytes() == b"mine"
    path.unlink()


def test_data_of_another_family_is_refused(train, module, model, data, config, tmp_path):
    """Wan and HunyuanVideo agree in channels and text width; the second has pooled embeddings."""
    text = [[torch.zeros(1, 3, 4096), {"pooled_output": torch.zeros(1, 768)}]]
    pooled = module("dcm_core.distill.data.dataset").TensorDataset([data.latent(0)], [text], [0], text)
    with pytest.raises(ValueError, match=r"pooled embeddings, which Wan 2\.1 does not use"):
        train(model, pooled, config("semantic"), tmp_path)


@pytest.mark.parametrize(
    ("dtype", "rank", "stored"),
    [
        ("float32", 0, "float32"),
        ("float16", 0, "float16"),
        ("bfloat16", 0, "bfloat16"),
        ("float32", 2, "bfloat16"),
    ],
)
def test_a_full_fine_tune_is_kept_in_the_base_s_precision(dtype, rank, stored, module, pack, tmp_path):
    import comfy.sd

    training, students = module("nodes.host.training.run"), module("dcm_core.distill.student")
    base = comfy.sd.load_diffusion_model_state_dict(
        native_wan(layers=1), model_options={"dtype": getattr(torch, dtype)}
    )
    modules = dict(base.model.diffusion_model.named_modules())
    expert = students.new_semantic(
        module("dcm_core.families").WAN, modules, rank, 4.0, torch.Generator().manual_seed(0)
    )
    training.save_expert(tmp_path / "expert.safetensors", expert, base)
    kinds = {
        value.dtype for key, value in load_file(tmp_path / "expert.safetensors").items() if not key.endswith("alpha")
    }
    assert kinds == {getattr(torch, stored)}


# Held out


@pytest.mark.usefixtures("gradients")
def test_clips_that_are_held_out_are_measured_and_never_trained_on(trainer, monkeypatch):
    made, seen = trainer("detail", steps=5, held_out=2, held_out_every=2), []
    batch = made.batches.order.batch
    monkeypatch.setattr(made.batches.order, "batch", lambda step: seen.append(batch(step)) or seen[-1])
    result = made.run()
    assert len(made.held_out) == 2 and not set(made.held_out) & {index for indices in seen for index in indices}
    assert [entry["step"] for entry in result.history if "held_out" in entry] == [2, 4, 5]
    assert made.held_out_loss() == result.history[-1]["held_out"], "the same noise each time"
    values = [value for value in made.learner.parameters.values() if value.ndim == 2]
    for value in values:
        value.data += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    assert made.held_out_loss() > 1.1 * result.history[-1]["held_out"]


# What the user is told


def with_nan(module, *broken):
    """Four clips, of which some have latents that are no numbers."""
    dataset = module("dcm_core.distill.data.dataset")
    data = random_data(dataset)
    latents = [torch.full_like(data.latent(i), math.nan) if i in broken else data.latent(i) for i in range(4)]
    return dataset.TensorDataset(latents, [data.conditioning(i) for i in range(4)], range(4), data.unconditional())


@pytest.fixture
def said(module, monkeypatch):
    """What a run says on its node."""
    show, texts = module("nodes.host.training.show"), []
    monkeypatch.setattr(show, "tell", lambda text, node: texts.append(text))
    return texts


def test_skipped_steps_are_counted_and_their_clips_named(said, train, module, model, config, tmp_path, caplog):
    result = train(model, with_nan(module, 2), config("semantic", batch_size=1), tmp_path)
    step = next(int(entry["step"]) for entry in result.history if math.isnan(entry["loss"]))
    named = f"Step {step} was skipped: its loss or gradient is NaN or infinite. Clips in it: clip 3."
    assert [record.message for record in caplog.records if "skipped" in record.message] == [named]
    counted = f"1 of 4 steps skipped, as the loss was NaN or infinite: {step}."
    assert result.skipped == counted
    assert said[-1].splitlines()[1:] == [counted, named]
    with (tmp_path / "losses.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file) if row["skipped"] == "1"] == [str(step)]


def test_only_the_clips_of_broken_batches_are_named_and_a_run_of_skipped_steps_is_no_success(
    train, module, model, config, tmp_path, caplog
):
    settings = config("semantic", steps=2, batch_size=1, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="Nothing was trained: in all 2 steps the loss was NaN or infinite"):
        train(model, with_nan(module, 0, 3), settings, tmp_path)
    assert caplog.text.count("Clips in it: clip 1, clip 4.") == 2


def test_a_detail_expert_without_a_semantic_one_is_told(said, train, module, model, data, config, tmp_path, caplog):
    train(model, data, config("detail", steps=1), tmp_path)
    note = "There is no semantic expert, so the detail expert is trained on the base model alone."
    assert note in caplog.text and said[-1].splitlines()[1].startswith(note)


def test_a_second_run_in_a_folder_is_refused(train, module, model, data, config, tmp_path):
    checkpoints = module("dcm_core.distill.checkpoints")
    with (
        checkpoints.locked(tmp_path),
        pytest.raises(ValueError, match=rf"in use by another run: process {os.getpid()} on .*, since"),
    ):
        train(model, data, config("semantic"), tmp_path)
    assert train(model, data, config("semantic", steps=1), tmp_path).history
    assert not (tmp_path / checkpoints.LOCK).exists()


def test_a_rate_that_rises_is_told_before_the_first_step(said, train, model, data, config, tmp_path):
    settings = config("semantic", steps=2, scheduler="cosine", warmup_steps=0)
    train(model, data, settings, tmp_path)
    said.clear()
    train(model, data, dataclasses.replace(settings, steps=4), tmp_path)
    assert "The learning rate goes back up from 0.0005 to 0.0005" not in said[0]
    # 1e-3 (1 + cos(pi / 2)) / 2 was the last; of four steps, the third has the same
    said.clear()
    train(model, data, dataclasses.replace(settings, steps=20), tmp_path)
    assert (
        "The learning rate goes back up from 0.000146 to 0.000905, as the cosine schedule now has 20 steps instead of 4"
        in said[0]
    )


def test_a_run_goes_on_with_more_clips(said, train, module, model, data, config, tmp_path):
    dataset = module("dcm_core.distill.data.dataset")
    settings = config("semantic", steps=2, batch_size=1)
    train(model, data, settings, tmp_path)
    clips = [0, 1, 2, 3, 0]
    latents = [data.latent(i) for i in clips[:4]] + [data.latent(0) + 1]
    more = dataset.TensorDataset(latents, [data.conditioning(i) for i in clips], range(5), data.unconditional())
    said.clear()
    result = train(model, more, dataclasses.replace(settings, steps=4), tmp_path)
    assert "Resumed with other data (1 clip added): weights and optimizer are kept" in said[0]
    assert result.resumed == said[0] and len(result.history) == 4


def test_progress_has_pace_and_rate(said, train, model, data, config, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(model, data, config("semantic", steps=3, warmup_steps=0), tmp_path)
    assert re.search(
        r"Step 3 of 3: loss .*, learning rate 0\.001, steps/s [\d.e-]+, time left 00:00$", caplog.text, re.MULTILINE
    )
    assert re.match(r"Step 2 of 3: loss .*, steps/s [\d.e-]+, time left [\d:]+$", said[-2])
    assert re.match(r"Step 1 of 3: loss .*, learning rate 0\.001$", said[-3])


# Mixed data


@pytest.mark.usefixtures("gradients")
def test_a_batch_of_mixed_captions_is_the_mean_of_its_videos(trainer, module):
    """Texts of different lengths cannot share a tensor; sizes have batches of their own."""
    dataset = module("dcm_core.distill.data.dataset")
    generator = torch.Generator().manual_seed(7)
    sizes = [(2, 4, 6), (2, 4, 6), (2, 6, 4)]
    latents = [torch.randn(16, *size, generator=generator) for size in sizes]
    texts = [[[torch.randn(1, words, 4096, generator=generator), {}]] for words in (3, 5, 4)]
    data = dataset.TensorDataset(latents, texts, [0, 1, 2], [[torch.zeros(1, 3, 4096), {}]])
    made = trainer("semantic", data=data, batch_size=2, ema_decay=0.0)
    assert [len(bucket) for bucket in data.buckets] == [2, 1]
    step = next(step for step in range(9) if set(made.batches.order.batch(step)) == {0, 1})
    terms = made._gradients(step)
    together = {name: value.grad.clone() for name, value in made.learner.parameters.items()}
    made._zero_grad()
    batches = list(made.batches.of_step(step))
    assert [share for _, share in batches] == [0.5, 0.5]
    losses = []
    for batch, _ in batches:
        loss = made.losses(batch)[0]
        (loss / 2).backward()
        losses.append(float(loss.detach()))
    assert terms["loss"] == pytest.approx(sum(losses) / 2) and losses[0] != losses[1]
    for name, value in made.learner.parameters.items():
        assert torch.allclose(value.grad, together[name], rtol=1e-4, atol=1e-9), name


def test_texts_of_another_encoder_are_refused(train, module, model, config, tmp_path):
    dataset, errors = module("dcm_core.distill.data.dataset"), module("dcm_core.errors")
    data = dataset.TensorDataset(
        [torch.zeros(16, 2, 4, 6)], [[[torch.zeros(1, 3, 768), {}]]], [0], [[torch.zeros(1, 3, 4096), {}]]
    )
    with pytest.raises(
        errors.DCMError, match=r"dataset has text embeddings of width 768 .* takes 4096. Load .* type `wan`"
    ):
        train(model, data, config("semantic"), tmp_path)
