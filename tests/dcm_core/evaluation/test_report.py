"""What a report says of values that are known, in words and in JSON."""

import json
import math

import pytest
import torch

from dcm_core.errors import DCMError
from dcm_core.evaluation.collect import StepErrors, VideoMeasures, make_report, make_steps
from dcm_core.evaluation.measures import euler_state
from dcm_core.evaluation.report import Measure, Report, Step, Value, check_finite, compare_sets, mean, numbers, ratio

OWNERS = ("semantic", "semantic", "detail", "detail")


def sure(value):
    return Value(value, 0.001)


def step(number, own=0.1, *, distance=None, owner=None, **values):
    return Step(
        number,
        1 - 0.2 * number,
        owner or OWNERS[number - 1],
        sure(0.1 * number if distance is None else distance),
        sure(own),
        **values,
    )


def report(*steps, measures=(), sets=(), videos=8, **values):
    steps = steps or tuple(step(number) for number in range(1, 5))
    return Report("step 1-2 semantic, 3-4 detail", "50 steps", videos, True, steps, measures, sets, **values)


def says(found, *parts):
    return any(all(part in line for part in parts) for line in found.findings)


def test_a_ratio_has_the_jackknife_s_error():
    """Of means, the jackknife gives the textbook's standard error."""
    values = torch.tensor([1.0, 2.0, 4.0, 7.0])
    found = mean(values)
    assert found.value == pytest.approx(3.5)
    assert found.error == pytest.approx(float(values.std() / 2))
    assert ratio(0.6 * values, values).value == pytest.approx(0.6)
    assert ratio(0.6 * values, values).error == pytest.approx(0, abs=1e-7)
    assert mean(values[:1]).error == math.inf


def test_values_in_words():
    assert str(Value(0.12345, 0.012)) == "0.123 ± 0.01" and str(Value(0.5, math.inf)) == "0.5"
    assert Value(0.6, 0.02).percent() == "60 ± 2 %" and Value(0.6, 0.001).percent() == "60 %"


def test_a_difference_counts_only_beyond_its_error():
    assert Value(0.6, 0.05).differs(1, 0.05) and not Value(0.6, 0.3).differs(1, 0.05)
    assert not Value(0.96, 0.001).differs(1, 0.05) and Value(0.6, math.inf).differs(1, 0.05)
    assert Value(1.5, 0.1).exceeds(1.1) and not Value(1.5, 0.3).exceeds(1.1)


def test_slow_motion_is_named():
    found = report(measures=[Measure("motion", Value(0.6, 0.02), 0.06, 0.1)])
    assert found.findings[0] == "60 ± 2 % of the reference's motion"


def test_where_the_distance_grows_is_named_with_its_expert():
    found = report(step(1, distance=0.05), step(2, distance=0.1), step(3, distance=0.3), step(4, distance=0.5))
    assert says(found, "Most is lost in steps 3 to 4, run by detail (80 % of the distance)")
    found = report(step(1, distance=0.3), step(2, distance=0.2), step(3, distance=0.3), step(4, distance=0.31))
    assert says(found, "Most is lost in steps 1 to 2, run by semantic (97 % of the distance)")
    assert not says(report(*(step(number, owner="base") for number in range(1, 5))), "Most is lost")


def test_what_an_expert_does_to_the_plain_model_s_error_is_named():
    found = report(
        *(step(number, own, plain=sure(0.2)) for number, own in enumerate((0.1, 0.1, 0.24, 0.24), 1)),
    )
    assert says(found, "semantic reduces the error of the plain model in steps 1 to 2 by 50 %")
    assert says(found, "detail increases the error of the plain model in steps 3 to 4 by 20 %")


def test_a_weak_expert_is_named():
    found = report(
        step(1, factor=sure(1.0)), step(2, factor=sure(1.05)), step(3, factor=sure(1.67)), step(4, factor=sure(0.9))
    )
    assert says(found, "detail is too weak: in step 3, its effect times 1.67 comes closest", "Raise its strength")
    assert not says(found, "semantic is too weak") and not says(found, "too strong")
    unsure = step(3, factor=Value(1.67, 0.5))
    assert not says(report(step(1), step(2), unsure, step(4)), "too weak")


def test_a_strong_expert_is_named_where_it_matters():
    """A factor under 1 alone is what detail that no one can foresee looks like."""
    mild, strong = (step(1, factor=sure(0.6), factor_gain=gain) for gain in (0.1, 0.5))
    assert not says(report(mild, step(2), step(3), step(4)), "too strong")
    assert says(
        report(strong, step(2), step(3), step(4)),
        "semantic is too strong: in step 1, its effect times 0.60",
        "Lower its strength",
    )


def test_a_boundary_on_the_wrong_side_of_a_step_is_named():
    """And the strength of the expert there is not, which works where it was not trained."""
    raised = report(
        step(1), step(2, 0.2, other=("detail", sure(0.1)), factor=sure(0.3), factor_gain=0.5), step(3), step(4)
    )
    assert says(raised, "semantic runs step 2, where detail would lose 50 % less. Raise the boundary above 0.6")
    assert not says(raised, "too strong")
    lowered = report(step(1), step(2), step(3, 0.2, other=("semantic", sure(0.1))), step(4))
    assert says(lowered, "detail runs step 3, where semantic would lose 50 % less. Lower the boundary to 0.4")
    assert not says(report(step(1), step(2, 0.1, other=("detail", sure(0.098))), step(3), step(4)), "boundary")


def test_measures_far_from_the_reference_s_are_named():
    found = report(
        measures=[
            Measure("sharpness", Value(0.8, 0.02), 0.8, 1),
            Measure("contrast", Value(0.99, 0.001), 0.8, 1),
            Measure("saturation drift", Value(-0.2, 0.02), -0.2, 0, "difference"),
            Measure("first-frame fidelity", Value(-3.0, 0.2), 22, 25, "difference", "dB"),
        ]
    )
    assert says(found, "80 ± 2 % of the reference's sharpness") and not says(found, "contrast")
    assert says(found, "20 % less saturation drift") and says(found, "3.0 dB less first-frame fidelity")


def test_one_video_says_that_nothing_is_sure():
    assert says(report(videos=1), "One video") and not says(report(videos=2), "One video")


def test_steps_in_words():
    steps = {number: step(number) for number in range(1, 5)}
    assert numbers([steps[2]]) == "step 2" and numbers([steps[2], steps[3]]) == "steps 2 to 3"
    assert numbers([steps[1], steps[3], steps[4]]) == "steps 1, 3 and 4"


def test_json_has_every_value_and_no_number_that_json_lacks():
    found = report(
        measures=[Measure("motion", Value(0.6, math.inf), 0.06, 0.1)], settings={"seed": 3, "rate": math.nan}
    )
    data = json.loads(found.to_json())
    assert data["format"] == "dcm-report" and data["version"] == 1 and data["findings"] == found.findings
    assert data["measures"][0]["value"] == {"value": 0.6, "error": None} and data["settings"] == {
        "seed": 3,
        "rate": None,
    }
    assert [entry["owner"] for entry in data["steps"]] == list(OWNERS)


def test_names_in_a_report_are_safe_to_show():
    """An owner may be the name of a row or a file."""
    bad = "\x1b[31m\u202erow"
    found = report(*(step(number, owner=bad, plain=sure(0.2)) for number in range(1, 5)), settings={bad: bad})
    for text in (str(found), found.to_json()):
        assert "\x1b" not in text and "\u202e" not in text and r"\x1b[31m" in text.replace("\\\\", "\\")


def test_a_latent_that_is_not_finite_is_refused():
    with pytest.raises(DCMError, match="The video of the reference has NaN or infinite values"):
        check_finite(torch.tensor([math.nan]), "reference")


def test_sets_as_far_apart_as_can_be():
    found = compare_sets("videos", torch.zeros(4, 1), torch.ones(4, 1))
    assert found.value.value == pytest.approx(2) and found.share == pytest.approx(1)
    assert compare_sets("videos", torch.zeros(1, 1), torch.ones(1, 1)) is None


SIGMAS = [1.0, 0.8, 0.5, 0.0]


def collected(strength, videos=3):
    """Steps of a model whose effect is `strength` times what is needed, over a plain model that is off by 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(videos, 4, 2, 4, 4, generator=generator)
    targets = [torch.randn(x.shape, generator=generator) for _ in SIGMAS[1:]]
    way = [x]
    for start, end, target in zip(SIGMAS[:-1], SIGMAS[1:], targets, strict=True):
        way.append(euler_state(way[-1], target, start, end))
    plain = [target + 1 for target in targets]
    own = [without + strength * (target - without) for without, target in zip(plain, targets, strict=True)]
    errors = StepErrors.of(3)
    errors.add(way, SIGMAS, own, [target + 0.5 for target in targets], plain)
    errors.add_other(1, "detail", way, SIGMAS, targets[1] + 2)
    return make_steps(SIGMAS, ["semantic", "semantic", "detail"], errors), way[-1]


def test_errors_are_shares_of_the_spread_of_the_reference():
    steps, final = collected(0.6)
    unit = float(mean(1 / final.flatten(1).std(1, correction=0)).value)
    for found in steps:
        assert found.plain.value == pytest.approx(unit, rel=1e-4)
        assert found.own.value == pytest.approx(0.4 * unit, rel=1e-4)
        assert found.distance.value == pytest.approx(0.5 * unit, rel=1e-4)
        assert found.factor.value == pytest.approx(1 / 0.6, rel=1e-4) and found.factor_gain == pytest.approx(
            1, abs=1e-2
        )
    assert steps[1].other[0] == "detail" and steps[1].other[1].value == pytest.approx(2 * unit, rel=1e-4)
    assert steps[0].other is None


def test_a_perfect_model_has_no_error():
    steps, _ = collected(1.0)
    assert all(found.own.value == pytest.approx(0, abs=1e-5) for found in steps)


def test_videos_beside_their_references():
    generator = torch.Generator().manual_seed(0)
    videos, slow = VideoMeasures(decoded=True), []
    for _ in range(4):
        reference = torch.rand(3, 5, 16, 16, generator=generator) - 0.5
        middle = reference.mean(1, keepdim=True)
        slow.append(middle + 0.6 * (reference - middle))
        videos.add(slow[-1], reference, image=reference[:, 0])
    latents = torch.stack(slow)
    found = make_report("run", "reference", [step(1)], videos, latents, latents, {})
    motion = found.measure("motion")
    assert motion.value.value == pytest.approx(0.6, abs=1e-4) and motion.value.error < 1e-3
    assert motion.model == pytest.approx(0.6 * motion.reference, rel=1e-4)
    assert found.measure("sharpness").value.value < 1 and len(found.spectrum) == 7 and max(found.spectrum) < 1
    assert found.measure("first-frame fidelity").value.value < 0
    assert found.measure("first-frame fidelity").reference == 100
    assert {entry.name: entry.value.value for entry in found.sets} == pytest.approx(
        {"videos": 0, "motion": 0}, abs=1e-9
    )


def test_latents_have_no_colours_and_one_frame_no_motion():
    videos = VideoMeasures(decoded=False)
    videos.add(torch.randn(16, 1, 4, 4), torch.randn(16, 1, 4, 4))
    assert [entry.name for entry in videos.measures()] == ["contrast"]
    assert videos.spectrum() == []
