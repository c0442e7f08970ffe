"""DCMTune in the host: a reference that is reached exactly at known settings, the budget, and a search that resumes."""

import json

import pytest
import torch
from safetensors.torch import save_file

COND, OTHER = ([[torch.randn(1, 5, 4096, generator=torch.Generator().manual_seed(seed)), {}]] for seed in (4, 5))
# even steps with shift 3: 1, 0.9, 0.75, 0.5
BOUNDARY = 0.8
DEFAULTS = {
    "positive": COND,
    "name": "search",
    "semantic_lora": "none",
    "semantic_strength": 1.0,
    "detail_lora": "none",
    "detail_strength": 1.0,
    "boundary": BOUNDARY,
    "experts": "independent, each on its side",
    "calls": 10_000,
    "distance": "error of the steps",
    "search_strengths": True,
    "search_boundary": True,
    "search_steps": False,
    "seed": 3,
    "seeds": 2,
    "schedule": "even",
    "steps": 4,
    "cfg": 1.0,
    "reference_steps": 4,
    "reference_cfg": 1.0,
    "shift": 3.0,
}


@pytest.fixture(scope="module")
def base(wan):
    return wan(seed=1, layers=1)


@pytest.fixture(scope="module")
def experts(base, random_expert):
    return {role: random_expert(base, role, seed) for seed, role in enumerate(("semantic", "detail"))}


@pytest.fixture(scope="module")
def goal(module, base, experts):
    """The experts at strength 1: a reference of the same steps is reached exactly."""
    attach = module("nodes.host.experts.attach").attach_experts
    return attach(base, experts["semantic"], experts["detail"], boundary=BOUNDARY, stacked=False)


@pytest.fixture
def run(node, base, experts, goal, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def tune(**inputs):
        given = {f"{side}_expert": expert for side, expert in experts.items()}
        latent = {"samples": torch.zeros(1, 16, 3, 6, 8)}
        return node(
            "DCMTune", **{"model": base, "latent_image": latent, "reference_model": goal, **given, **DEFAULTS, **inputs}
        )

    return tune


def text(output):
    return output.ui["text"][0]


@pytest.mark.parametrize(
    "fault",
    [
        {"detail_strength": 0.6},
        {"semantic_strength": 1.4},
        {"boundary": 0.6},
        {"boundary": 0.95, "detail_strength": 0.6},
    ],
    ids=["weak", "strong", "too low", "too high and weak"],
)
def test_planted_faults_are_undone(run, fault):
    output = run(**fault)
    semantic, detail, boundary, sigmas, plot = output.result
    assert semantic == pytest.approx(1, abs=0.03) and detail == pytest.approx(1, abs=0.03)
    assert 0.75 < boundary <= 0.9
    torch.testing.assert_close(sigmas, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert plot.shape == (1, 432, 768, 3)
    assert "step 1-2 semantic, 3-4 detail" in text(output)


def test_noise_levels_are_found_among_the_reference_s(run, tmp_path):
    """Two steps: the first starts from noise, the second is tried at each of the three others."""
    output = run(search_steps=True, search_strengths=False, search_boundary=False, steps=2)
    trials = json.loads((tmp_path / "dcm_tuning" / "search" / "trials.json").read_text())["trials"]
    best = min(trials, key=lambda trial: trial[1])[0]
    assert {settings["step 2"] for settings, _, _ in trials} == {1, 2, 3}
    assert output.result[3].tolist() == pytest.approx([1, [1, 0.9, 0.75, 0.5][int(best["step 2"])], 0])


@pytest.mark.parametrize("distance", ["error of the videos", "energy distance"])
def test_other_distances_have_the_same_goal(run, distance):
    output = run(distance=distance, detail_strength=0.8, search_boundary=False, seeds=3)
    assert output.result[:2] == pytest.approx((1, 1), abs=0.06)


def test_the_budget_counts_every_model_call(run, base):
    """8 of the reference, then 8 a trial; one that does not fit is not begun."""
    calls = []
    hook = base.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    try:
        output = run(calls=50, detail_strength=0.6)
    finally:
        hook.remove()
    assert len(calls) == 48 and "5 trials, 48 model calls of 50" in text(output)


def test_guidance_counts_twice(run):
    output = run(calls=100, cfg=2.0, negative=OTHER, reference_cfg=2.0, detail_strength=0.6)
    assert "5 trials, 96 model calls of 100" in text(output)


def test_an_interrupted_search_resumes(run, base):
    """At call 50: 8 of the reference, 5 trials of 8, and a sixth that is not finished."""
    import comfy.model_management as management

    wanted, seen = run(name="other", detail_strength=0.6), []

    def count(*_):
        seen.append(1)
        if len(seen) == 50:
            management.interrupt_current_processing()

    hook = base.model.diffusion_model.register_forward_pre_hook(count)
    try:
        with pytest.raises(management.InterruptProcessingException):
            run(detail_strength=0.6)
    finally:
        hook.remove()
        management.interrupt_current_processing(False)
    output = run(detail_strength=0.6)
    assert "Resumed after 5 trials" in text(output) and output.result[:3] == wanted.result[:3]
    assert text(output).splitlines()[:5] == text(wanted).splitlines()[:5]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"calls": 10}, "calls is 10, but the reference alone needs 8 and a trial 8. Set calls to 176 or more"),
        ({"search_strengths": False, "search_boundary": False}, "Nothing is searched"),
        ({"semantic_expert": None, "detail_expert": None}, "semantic_lora and detail_lora are both none"),
        ({"distance": "none"}, "distance is 'none'; choose one of"),
        ({"distance": "energy distance"}, "needs 3 videos or more"),
        ({"experts": "none"}, "experts is 'none'; choose one of"),
        ({"name": "../out"}, "The output name is '../out', which points outside the folder"),
        ({"detail_strength": float("nan")}, "detail_strength is nan"),
        ({"semantic_strength": float("inf"), "semantic_expert": None}, "semantic_strength is inf"),
        ({"reference_cfg": 2.0}, "no negative is connected"),
        ({"search_steps": True, "steps": 6}, "reference_steps is 4; expected at least the 6 steps"),
    ],
)
def test_bad_input_is_refused_before_any_call(run, base, inputs, message):
    hook = base.model.diffusion_model.register_forward_pre_hook(lambda *_: pytest.fail("a model call"))
    try:
        with pytest.raises(ValueError, match=message):
            run(**inputs)
    finally:
        hook.remove()


def test_trials_of_other_experts_are_not_used(run, base, random_expert):
    run(calls=50)
    with pytest.raises(ValueError, match="has the trials of another search: experts was"):
        run(calls=50, detail_expert=random_expert(base, "detail", 7))


def test_a_file_of_an_expert_is_taken_like_a_trained_one(run, module, base, experts, models):
    expert = module("dcm_core.experts.expert")
    tensors, metadata = expert.expert_to_state_dict(
        experts["detail"], module("nodes.host.experts.attach").module_shapes(base)
    )
    path = models / "loras" / "tuned.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    try:
        output = run(detail_expert=None, detail_lora="tuned.safetensors", calls=50)
    finally:
        path.unlink()
    assert "5 trials" in text(output)


def test_places_of_levels_in_a_grid(module):
    places = module("nodes.host.evaluation.tune").nearest_places
    grid = [1.0, 0.9, 0.8, 0.7, 0.6]
    assert places([1.0, 0.78, 0.61], grid) == [0, 2, 4]
    assert places([1.0, 0.99, 0.98], grid) == [0, 1, 2]
    assert places([1.0, 0.1, 0.05], grid) == [0, 3, 4]
