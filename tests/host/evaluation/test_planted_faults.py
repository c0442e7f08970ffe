"""Faults planted in the small world's experts are what the report names."""

import pytest
import torch

from .small_world import BOUNDARY, PROMPTS, SHIFT, STEPS, SmallWorld, latent, slowed

ROWS = 4


@pytest.fixture(scope="module")
def world(module):
    return SmallWorld(module)


@pytest.fixture(scope="module")
def report(module, world):
    """Compare a model with the base. Its runs are the same for all of them."""
    compare = module("nodes.host.evaluation.compare")
    task = compare.Task(world.prompts, None, latent(ROWS), seed=9000, seeds=1)
    reference, ways = compare.reference_of(world.model(), None, 1.0, 50, SHIFT), []

    @torch.inference_mode()
    def run(model):
        candidate, _ = compare.with_schedule(model, "DCM grid", STEPS, SHIFT, 1.0)
        if not ways:
            ways.append(compare.run_reference(reference, task, candidate.levels, int))
        return compare.compare(candidate, reference, task, ways=ways[0])

    return run


def says(found, *parts):
    return any(all(part in line for part in parts) for line in found.findings)


@pytest.fixture(scope="module")
def good(report, world):
    return report(world.model())


def test_the_shipped_experts_have_no_fault(good):
    assert good.videos == ROWS * len(PROMPTS)
    assert not says(good, "too weak") and not says(good, "too strong") and not says(good, "boundary")
    assert says(good, "semantic reduces the error of the plain model in steps 1 to 3")
    assert says(good, "detail reduces the error of the plain model in steps 4 to 6")
    assert good.measure("motion").value.value == pytest.approx(1, abs=0.1)


def test_a_weak_detail_expert_is_named(report, world):
    found = report(world.model(detail=0.6))
    assert says(found, "detail is too weak", "step 6") and not says(found, "semantic is too weak")


def test_a_weak_semantic_expert_is_named_with_its_strength(report, world):
    """At the first step both start from the same noise: the factor is the inverse of the strength."""
    found = report(world.model(semantic=0.6))
    assert says(found, "semantic is too weak", "steps 1 to") and not says(found, "detail is too weak")
    assert found.steps[0].factor.value == pytest.approx(1 / 0.6, rel=0.05)


def test_a_strong_semantic_expert_is_named(report, world):
    assert says(report(world.model(semantic=1.6)), "semantic is too strong")


@pytest.mark.parametrize(
    ("boundary", "says_what"),
    [
        (BOUNDARY - 0.1, "semantic runs step 4, where detail would lose"),
        (BOUNDARY + 0.11, "detail runs step 3, where semantic would lose"),
    ],
)
def test_a_boundary_that_is_off_is_named(report, world, boundary, says_what):
    found = report(world.model(boundary=boundary))
    assert says(found, says_what, "the boundary") and not says(found, "too strong")


def test_slow_motion_is_named_by_its_share(report, world, good):
    """The last estimate is the video: its motion is scaled by exactly as much."""
    found = report(slowed(world.model(), 0.6))
    share = found.measure("motion").value
    assert share.value / good.measure("motion").value.value == pytest.approx(0.6, rel=1e-4)
    assert found.findings[0] == f"{share.percent()} of the reference's motion"
    assert next(entry for entry in found.sets if entry.name == "motion").value.exceeds(0.01)


def test_the_report_agrees_with_the_small_world_s_own_script(module, world, good):
    """small_world/measure.py samples by itself: the set distance is the same but for rounding."""
    sampling, schedule = module("nodes.host.sampling.run"), module("dcm_core.schedule")
    import comfy.samplers

    def sample(model, steps):
        found = []
        for number, prompt in enumerate(world.prompts):
            noise = torch.randn((ROWS, *latent(1)["samples"].shape[1:]), generator=torch.manual_seed(9000 + number))
            guider = sampling.make_guider(model, prompt, None, 1.0)
            sigmas, euler = schedule.generic_sigmas(steps, SHIFT), comfy.samplers.sampler_object("euler")
            with torch.inference_mode():
                out = guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True)
            found.append(model.model.process_latent_in(out.float()))
        return torch.cat(found)

    value, error = module("dcm_core.evaluation.measures").energy_distance(
        sample(world.model(), STEPS), sample(world.base, 50)
    )
    assert good.sets[0].value.value == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert good.sets[0].value.error == pytest.approx(error, rel=1e-3, abs=1e-6)
