"""Image to video: what the host's nodes and models make of a clip's frames is what every part of a run is given."""

import dataclasses
import json

import pytest
import torch

from ..small_models import VISION, make_wan
from .small_runs import by_its_schedule, interrupted_after, make_trainer, random_data, same, weights

FIRST, BOTH = "first frame", "first and last frame"


@pytest.fixture(scope="module")
def vision(pack, tmp_path_factory):
    """The host's CLIP vision model, small: 5 tokens per image."""
    import comfy.clip_vision

    config = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 2,
        "hidden_size": VISION,
        "num_attention_heads": 4,
        "intermediate_size": 16,
        "hidden_act": "gelu",
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 28,
        "projection_dim": 8,
    }
    path = tmp_path_factory.mktemp("vision") / "config.json"
    path.write_text(json.dumps(config))
    model = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(2)
    values = {name: torch.randn(value.shape, generator=generator) / 30 for name, value in model.get_sd().items()}
    # its positions are counted, not weights
    model.load_sd({name: value for name, value in values.items() if not name.endswith("position_ids")})
    return model


@pytest.fixture(scope="module")
def bases(pack):
    """Small image-to-video models: that of Wan 2.2 A14B, and those of Wan 2.1 that also see their images."""
    return {
        "wan 2.2": make_wan(channels=36, width=128, layers=1),
        "wan 2.1": make_wan(channels=36, width=128, layers=1, vision=True),
        "wan 2.1 first and last": make_wan(channels=36, width=128, layers=1, vision=True, positions=10),
    }


@pytest.fixture(scope="module")
def clips(module, vae, vision):
    """clips(kind, seen=True, count=4) -> random clips with the image conditioning that the encoders make."""
    dataset, encoders = module("dcm_core.distill.data.dataset"), module("nodes.host.training.encoders")

    class Text:
        patcher, tokenizer, layer_idx, tokenizer_options = vae.patcher, None, None, {}

    def make(kind, seen=True, count=4):
        data = random_data(dataset, count, size=(2, 6, 8))
        if kind == "none":
            return data
        made = encoders.host_encoders(vae, Text(), kind, vision if seen else None)
        images = [made.encode_image(pixels_of(index)) for index in range(count)]
        return dataset.TensorDataset(data._latents, data._conditionings, data._texts, data.unconditional(), images)

    return make


def pixels_of(index):
    return torch.rand(5, 48, 64, 3, generator=torch.Generator().manual_seed(index))


@pytest.fixture
def seen_by(monkeypatch):
    """seen_by(MODEL) -> a list that receives (input, clip_fea, output) of each call of its transformer."""

    def watch(model):
        transformer, calls = model.model.diffusion_model, []
        forward = type(transformer).forward

        def watched(self, x, timestep, context, clip_fea=None, *args, **kwargs):
            out = forward(self, x, timestep, context, clip_fea, *args, **kwargs)
            calls.append((x.detach().clone(), clip_fea, out.detach().clone()))
            return out

        monkeypatch.setattr(type(transformer), "forward", watched)
        return calls

    return watch


CASES = [("wan 2.2", FIRST), ("wan 2.2", BOTH), ("wan 2.1", FIRST), ("wan 2.1 first and last", BOTH)]


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize(("base", "kind"), CASES)
def test_training_gives_the_model_what_the_hosts_nodes_give_it(
    base, kind, module, bases, clips, config, vae, vision, sample, seen_by, tmp_path
):
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo, WanImageToVideo

    from nodes import CLIPVisionEncode

    model, data, pixels = bases[base], clips(kind, base != "wan 2.2"), pixels_of(0)

    def look(image):
        return None if base == "wan 2.2" else CLIPVisionEncode().encode(vision, image, "none")[0]

    with torch.inference_mode():
        if kind == FIRST:
            made = WanImageToVideo.execute(
                data.conditioning(0), data.unconditional(), vae, 64, 48, 5, 1, pixels[:1], look(pixels[:1])
            )
        else:
            ends = pixels[:1], pixels[-1:]
            made = WanFirstLastFrameToVideo.execute(
                data.conditioning(0), data.unconditional(), vae, 64, 48, 5, 1, *ends, *map(look, ends)
            )
        prompt = made.result[0][0][1]
        calls = seen_by(model)
        sample(model, [1.0, 0.0], size=(2, 6, 8), **prompt)
        from_host, its_vision, its_output = calls.pop()

        trainer = make_trainer(module, model, data, config("semantic"), tmp_path)
        batch = trainer.batches.held_out(0, 0)
        # the prompt that `sample` makes
        generator = torch.Generator().manual_seed(11)
        text = dataclasses.replace(batch.text, context=torch.randn(1, 6, 4096, generator=generator))
        trainer.backbone.velocity(from_host[:, :16], torch.ones(1), text)
    ours, our_vision, our_output = calls.pop()
    assert ours.shape[1] == 36 and torch.equal(ours, from_host)
    # its attention is another for sampling
    torch.testing.assert_close(our_output, its_output, rtol=1e-5, atol=1e-5)
    assert (our_vision is None) == (its_vision is None) == (base == "wan 2.2")
    assert our_vision is None or torch.equal(our_vision, its_vision)
    assert torch.equal(batch.no_text.concat, batch.text.concat), "guidance is about the text"
    # the mask says which latent frames are given: the first, or the first and a part of the last
    given = batch.text.concat[0, :4].mean(dim=(2, 3))
    assert given[:, 0].tolist() == [1] * 4
    assert given[:, 1].tolist() == ([0] * 4 if kind == FIRST else [0, 0, 0, 1])


@pytest.mark.parametrize(("side", "base"), [("semantic", "wan 2.2"), ("detail", "wan 2.1")])
def test_a_run_trains_and_resumes(side, base, bases, clips, config, train, module, tmp_path, monkeypatch):
    model, data = bases[base], clips(FIRST, base == "wan 2.1")
    before = weights(model)
    settings = config(
        side, steps=2, batch_size=1, warmup_steps=0, held_out=1, held_out_every=1, gradient_checkpointing=True
    )
    whole = train(model, data, settings, tmp_path / "whole")
    with interrupted_after(module, monkeypatch, 1):
        train(model, data, settings, tmp_path / "parts")
    assert same(whole.expert, train(model, data, settings, tmp_path / "parts").expert)
    after = weights(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(update.up.abs().sum() > 0 for updates in whole.expert.low_rank.values() for update in updates)
    trained = {name.split(".")[0] for name in whole.expert.replaced}
    assert ("img_emb" in trained) == (side == "detail" and base == "wan 2.1")


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_gradients_reach_every_tensor(side, module, bases, clips, config, tmp_path):
    trainer = make_trainer(module, bases["wan 2.1"], clips(FIRST), config(side), tmp_path)
    for name, value in trainer.learner.parameters.items():
        if ".ups." in name:
            value.data.normal_(std=0.02)
    trainer._gradients(0)
    parameters = trainer.learner.parameters
    assert [name for name, value in parameters.items() if value.grad is None or not value.grad.any()] == []


@pytest.mark.usefixtures("gradients")
@pytest.mark.parametrize("side", ["semantic", "detail"])
def test_every_call_of_a_step_has_the_image(side, module, bases, clips, config, seen_by, tmp_path):
    """Student, teacher with and without text, target network, and features; also for the held-out loss."""
    model, data = bases["wan 2.2"], clips(FIRST, seen=False)
    trainer = make_trainer(module, model, data, config(side, batch_size=1, held_out=1), tmp_path)
    ((batch, _),) = trainer.batches.of_step(0)
    calls = seen_by(model)
    trainer.losses(batch)
    assert len(calls) == {"semantic": 4, "detail": 6}[side]
    assert all(torch.equal(x[:, 16:], batch.text.concat) for x, _, _ in calls)
    calls.clear()
    trainer.held_out_loss()
    held_out = trainer.batches.held_out(0, trainer.held_out[0]).text.concat
    assert len(calls) == 4 and all(torch.equal(x[:, 16:], held_out) for x, _, _ in calls)
    assert not torch.equal(held_out, batch.text.concat)


def test_samples_are_what_the_sampler_node_makes_of_the_hosts_prompt(
    module, node, bases, clips, config, train, vae, vision, tmp_path, monkeypatch
):
    from comfy_extras.nodes_wan import WanImageToVideo

    show, seen = module("nodes.host.training.show"), []
    strip = show.preview_strip
    monkeypatch.setattr(show, "preview_strip", lambda *args: seen.append(args) or strip(*args))
    model, data = bases["wan 2.1"], clips(FIRST)
    expert = train(model, data, config("semantic", steps=1, sample_every=1, seed=3), tmp_path).expert
    ((_, latent),) = seen
    with torch.inference_mode():
        first = pixels_of(0)[:1]
        prompt, *_ = WanImageToVideo.execute(
            data.conditioning(0), [], vae, 64, 48, 5, 1, first, vision.encode_image(first, crop=False)
        ).result
    sampled = node(
        "DCMSampler",
        model=show.with_experts(model, expert, None),
        seed=3,
        **by_its_schedule(prompt, data.shape(0)),
    ).result[0]["samples"]
    assert torch.equal(latent, model.model.process_latent_in(sampled))


@pytest.mark.usefixtures("gradients")
def test_memory_is_measured_with_images_of_every_size(module, bases, config, clips, tmp_path):
    """The steps that are measured have other sizes than the clips."""
    trainer = make_trainer(module, bases["wan 2.1"], clips(FIRST), config("semantic"), tmp_path)
    ((batch, share),) = trainer.batches.empty(0, (2, 16, 3, 4, 8))
    assert batch.text.concat.shape == batch.no_text.concat.shape == (2, 20, 3, 4, 8)
    assert batch.text.extras["clip_fea"].shape == (2, 5, VISION)
    trainer._learn(batch, share)
    trainer._zero_grad()
    assert trainer.memory().step > 0


REFUSED = [
    (
        "wan 2.2",
        "none",
        True,
        r"takes 20 channels more\), but the clips were encoded for text to video\. Set image_conditi",
    ),
    ("text", FIRST, True, "encoded for image to video, but the model takes only text. Set image_conditioning to none"),
    (
        "wan 2.1",
        FIRST,
        False,
        "sees its images through CLIP vision, but the clips were encoded without it. Connect clip",
    ),
    ("control", FIRST, True, "takes 32 channels besides the video's, but images give 16. Load an image-to-video model"),
]


@pytest.mark.parametrize(("base", "kind", "seen", "message"), REFUSED)
def test_clips_of_another_kind_are_refused_before_anything(
    base, kind, seen, message, bases, clips, config, train, module, tmp_path, monkeypatch
):
    others = {"text": {}, "control": {"channels": 48}}
    model = bases.get(base) or make_wan(width=128, layers=1, **others[base])
    monkeypatch.setattr(module("nodes.host.training.run"), "clear_device", lambda base: pytest.fail("began"))
    with pytest.raises(module("dcm_core.errors").DCMError, match=message):
        train(model, clips(kind, seen), config("semantic"), tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_conditioning": FIRST}, "the model takes only text. Set image_conditioning to none"),
        ({"image_conditioning": "last frame"}, r"is 'last frame'; choose one of none, first frame, first and last"),
        ({"sample_prompts": "a cat"}, r"`sample_prompts` of the dataset is 'a cat'; expected a list of texts"),
    ],
)
def test_the_settings_file_is_refused_before_clips_are_encoded(values, message, module, tmp_path):
    settings = {"dataset": {"folder": "clips", **values}}
    with pytest.raises(module("dcm_core.errors").DCMError, match=message):
        module("nodes.host.training.command").load_data(
            settings, tmp_path, make_wan(width=128, layers=1), module("dcm_core.distill.parallel").ALONE
        )


def test_captions_cannot_be_dropped_without_an_empty_text(bases, clips, config, train, module, tmp_path):
    with pytest.raises(
        module("dcm_core.errors").DCMError, match=r"caption_dropout is 0\.1, but the dataset file has no empty"
    ):
        train(bases["wan 2.2"], clips(FIRST, seen=False), config("semantic", caption_dropout=0.1), tmp_path)


def test_another_vision_model_is_refused(bases, clips, config, train, module, tmp_path):
    data = clips(FIRST)
    for image in data._images:
        image["clip_vision_output"] = image["clip_vision_output"][..., :1024]
    with pytest.raises(
        module("dcm_core.errors").DCMError, match="gives tokens of width 1024, but the model takes 1280"
    ):
        train(bases["wan 2.1"], data, config("semantic"), tmp_path)


def test_saved_clips_train_alike(bases, clips, config, train, module, tmp_path):
    files, data = module("dcm_core.distill.data.dataset_file"), clips(FIRST)
    files.write_dataset(tmp_path / "data.safetensors", data, torch.float32)
    back = files.read_dataset(tmp_path / "data.safetensors")
    assert back.fingerprint == data.fingerprint
    runs = [
        train(bases["wan 2.1"], given, config("semantic"), tmp_path / name)
        for name, given in (("a", data), ("b", back))
    ]
    assert runs[0].history == runs[1].history
