"""A run of DCMSampler in the host: what is called, shown, kept and stopped."""

import base64
import io

import pytest
import torch
from PIL import Image, ImageChops, ImageOps, ImageStat

from ..compare import calls_of

COND = [[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(4)), {}]]
OTHER = [[torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(5)), {}]]
DEFAULTS = {"seed": 3, "schedule": "auto", "steps": 6, "cfg": 1.0, "denoise": 1.0, "positive": COND}


@pytest.fixture(scope="module")
def base(wan):
    return wan(seed=1, layers=1)


@pytest.fixture(scope="module")
def low(wan):
    return wan(seed=2, layers=1)


@pytest.fixture(scope="module")
def routed(module, base, random_expert):
    return module("nodes.host.experts.attach").attach_experts(base, detail=random_expert(base))


@pytest.fixture(scope="module")
def run(node):
    return lambda model, **settings: node(
        "DCMSampler", **{"model": model, "latent_image": latent(), **DEFAULTS, **settings}
    )


def latent(batch=1, **extra):
    return {"samples": torch.zeros(batch, 16, 2, 4, 6), **extra}


def samples(output):
    return output.result[0]["samples"]


@pytest.fixture
def calls(base, low):
    """(which model, rows in the batch) of every call of a transformer."""
    with calls_of(high=base, low=low) as seen:
        yield seen


@pytest.mark.parametrize("negative", [None, OTHER])
def test_cfg_one_is_one_call_of_one_row_a_step(run, routed, calls, negative):
    run(routed, negative=negative)
    assert calls == [("high", 1)] * 6


def test_the_negative_runs_only_on_the_side_whose_cfg_needs_it(run, base, low, calls):
    """Prompts of two lengths do not share a batch: a step with cfg is two calls."""
    settings = {"detail_model": low, "schedule": "generic", "shift": 3.0, "steps": 4, "negative": OTHER, "cfg": 3.0}
    run(base, detail_cfg=1.0, **settings)
    assert calls == [("high", 1)] * 4 + [("low", 1)] * 2
    calls.clear()
    run(base, **{**settings, "cfg": 1.0}, detail_cfg=3.0)
    assert calls == [("high", 1)] * 2 + [("low", 1)] * 4


def test_detail_cfg_works_on_the_experts_of_one_model(run, routed, calls):
    run(routed, negative=OTHER, detail_cfg=2.0)
    assert calls == [("high", 1)] * 3 + [("high", 1)] * 2 * 3


def test_batch_rows_are_the_videos_of_their_index(run, routed):
    """A row's noise depends on its batch_index alone."""
    both = samples(run(routed, latent_image=latent(2, batch_index=[4, 1])))
    for row, index in enumerate([4, 1]):
        alone = samples(run(routed, latent_image=latent(1, batch_index=[index])))
        torch.testing.assert_close(alone[0], both[row], rtol=1e-4, atol=1e-4)


def test_image_to_image_is_the_hosts(run, base):
    """denoise takes the schedule's last part, then everything is as in SamplerCustom."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    generator = torch.Generator().manual_seed(8)
    given = {
        "samples": torch.randn(2, 16, 2, 4, 6, generator=generator),
        "noise_mask": torch.rand(1, 1, 4, 6, generator=generator),
        "batch_index": [3, 7],
        "note": "kept",
    }
    sigmas = torch.tensor([0.949, 0.905, 0.81, 0.0])
    with torch.inference_mode():
        theirs = SamplerCustom.execute(
            base, True, 3, 2.5, COND, OTHER, comfy.samplers.sampler_object("heun"), sigmas, given
        ).result
    ours = run(
        base, latent_image=given, denoise=0.5, negative=OTHER, cfg=2.5, sampler=comfy.samplers.sampler_object("heun")
    ).result
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["samples"], b["samples"])
        assert a["noise_mask"] is given["noise_mask"]


def test_previews_come_from_both_sides_on_the_nodes_one_bar(module, base, low, monkeypatch):
    import comfy.utils
    import latent_preview
    from latent_preview import LatentPreviewMethod

    seen = []
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **kwargs: seen.append((args, kwargs)))
    host = module("nodes.host.sampling.run")
    model, _ = host.prepare_model(base, detail_model=low)
    guider = host.make_guider(model, COND, None, 1.0)
    with torch.inference_mode():
        host.run(guider, latent(), None, torch.tensor([1.0, 0.9, 0.5, 0.0]), 3, "17")
    assert [args[:2] for args, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    assert {kwargs["node_id"] for _, kwargs in seen} == {"17"}
    for args, _ in seen:
        kind, image, _ = args[2]
        assert kind == "JPEG"
        assert image.size == (6, 4)


def test_the_frames_of_a_preview_are_the_host_s_preview_of_each(module, base):
    """As many as are shown at most, from the first to the last."""
    import latent_preview

    host = module("nodes.host.sampling.run")
    latent_format = base.model.latent_format
    previewer = latent_preview.Latent2RGBPreviewer(
        latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias
    )
    video = torch.randn(2, 16, 31, 4, 6, generator=torch.Generator().manual_seed(0))
    frames = host.preview_frames(previewer, video)
    assert len(frames) == host.PREVIEW_FRAMES == 16
    for number, data in enumerate(frames):
        with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
            _, one, size = previewer.decode_latent_to_preview_image("JPEG", video[:, :, 2 * number : 2 * number + 1])
            assert shown.format == "JPEG" and max(shown.size) == size
            expected = ImageOps.contain(one, (size, size), Image.Resampling.BILINEAR)
            difference = ImageChops.difference(shown, expected)
            assert sum(ImageStat.Stat(difference).mean) / 3 < 6, "but for what JPEG loses"
    assert len(host.preview_frames(previewer, video[:, :, :3])) == 3


def test_too_little_memory_is_told_before_the_run(module, run, routed, monkeypatch, caplog):
    """By the host's own number for one row: what it plans with."""
    import comfy.model_management

    free = comfy.model_management.get_free_memory
    host = module("nodes.host.sampling.run")
    guider = host.make_guider(host.prepare_model(routed)[0], COND, None, 1.0)
    large = {"samples": torch.zeros(1, 1, 1, 1, 1).expand(1, 4, 21, 60, 104)}
    needed = routed.model.memory_required([1, 16, 21, 60, 104], cond_shapes={"c_crossattn": [list(COND[0][0].shape)]})
    assert needed > 1e8
    for room, warns in ((needed, False), (needed - 1e6, True)):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device, room=room: room)
        said = host.memory_warning(guider, large)
        assert bool(said) == warns
    assert said == (
        f"Warning: a step needs about {needed / 1e9:.1f} GB in addition to the model's weights, but cpu has {(needed - 1e6) / 1e9:.1f} GB "
        "(ComfyUI's estimate). Use fewer frames or a smaller size."
    )
    monkeypatch.setattr(
        comfy.model_management, "get_free_memory", lambda device, both=False: free(device, both) if both else 0.0
    )
    with caplog.at_level("INFO"):
        out = run(routed)
    assert "Warning: a step needs about 0.0 GB" in caplog.messages[0], "told before it begins"
    assert "Warning: a step needs about" in out.ui.as_dict()["text"][0]


@pytest.mark.parametrize("step", [0, 2, 3])
def test_interrupt_stops_within_the_step_and_the_next_run_is_whole(run, routed, base, monkeypatch, every_update, step):
    import comfy.model_management as management
    import comfy.utils

    whole = samples(run(routed))
    weights = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    seen = []

    def interrupt(value, total, *_, **__):
        seen.append(value)
        if value == step + 1:
            management.interrupt_current_processing(True)

    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", interrupt)
        with pytest.raises(management.InterruptProcessingException):
            run(routed)
    assert seen == list(range(1, step + 2))
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.model.state_dict().items())
    assert not any("forward" in vars(module) for module in base.model.modules())
    assert torch.equal(samples(run(routed)), whole)


def test_empty_latents_are_widened_as_each_host_wants_it(module, run, routed, monkeypatch):
    """Newer hosts ask for the downscale ratios that their empty latents carry."""
    import comfy.sample

    expected, asked = samples(run(routed)), []
    fix = comfy.sample.fix_empty_latent_channels

    def newer(model, latent_image, downscale_ratio_spacial=None, downscale_ratio_temporal=None):
        asked.append((downscale_ratio_spacial, downscale_ratio_temporal))
        return fix(model, latent_image)

    monkeypatch.setattr(comfy.sample, "fix_empty_latent_channels", newer)
    given = {"samples": torch.zeros(1, 4, 2, 4, 6), "downscale_ratio_spacial": 8, "note": "kept"}
    out = run(routed, latent_image=given)
    assert asked == [(8, None)]
    assert torch.equal(samples(out), expected)
    assert out.result[0].keys() == {"samples", "note"}
    assert "downscale_ratio_spacial" in given, "the given latent is the user's"


def test_models_given_are_never_changed(run, base, low, routed):
    def facts(model):
        return {
            "wrappers": {
                kind: {key: list(found) for key, found in keyed.items()} for kind, keyed in model.wrappers.items()
            },
            "attachments": dict(model.attachments),
            "additional": dict(model.additional_models),
            "patches": dict(model.patches),
            "options": repr(model.model_options),
        }

    before = [facts(model) for model in (base, low, routed)]
    run(routed, boundary=0.9, detail_cfg=2.0, negative=OTHER)
    run(base, detail_model=low)
    assert [facts(model) for model in (base, low, routed)] == before


def test_plan_is_logged(run, routed, caplog):
    with caplog.at_level("INFO"):
        run(routed)
    assert "step 1-3 semantic, 4-6 detail, boundary 0.979\nauto: steps and shift are not used" in caplog.messages


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_latent_is_sampled_in_float32(run, routed, dtype):
    """Some empty latent nodes make it; hosts before 0.30 would draw other noise and take coarse steps."""
    expected = samples(run(routed))
    out = samples(run(routed, latent_image={"samples": torch.zeros(1, 16, 2, 4, 6, dtype=dtype)}))
    assert out.dtype == torch.float32 and torch.equal(out, expected)
