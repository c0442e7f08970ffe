"""The step bar's plan: foreseen from widgets and files, and as the sampler announces it."""

import json
import re
import urllib.error

import pytest
import torch

from dcm_core.families import WAN
from dcm_core.files.tensor_file import TensorFile
from dcm_core.files.writing import write_tensors
from dcm_core.inspection.plot import THEMES
from dcm_core.routing import plan_steps
from dcm_core.schedule import generic_sigmas

from ..server import ROOT

SETTINGS = {"schedule": "auto", "steps": 6, "shift": 17.0, "denoise": 1.0, "boundary": 0.0, "two_models": False}
RELEASE = "dcm_wan2.1_t2v_1.3B.safetensors"
SMALL = {
    "model": "zz_dcm_small_world_base.safetensors",
    "semantic": "zz_dcm_small_world_semantic.safetensors",
    "detail": "zz_dcm_small_world_detail.safetensors",
}


def ask(server, **changes):
    return server.request("/dcm/plan", {**SETTINGS, **changes})


def sides(plan):
    return [step["expert"] for step in plan["steps"]]


def levels(plan):
    return [step["sigma"] for step in plan["steps"]]


def test_a_release_has_its_preset(server):
    plan = ask(server, model=RELEASE)
    assert plan["boundary"] == WAN.preset.boundary
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([t / 1000 for t in WAN.preset.timesteps])
    assert sides(plan) == 3 * ["semantic"] + 3 * ["detail"]


def test_expert_files_bring_their_own_schedule_and_boundary(server):
    plan = ask(server, **SMALL)
    said = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["detail"]).metadata
    assert plan["boundary"] == float(said["dcm.boundary"])
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx(
        [t / 1000 for t in json.loads(said["dcm.timesteps"])]
    )


def test_widgets_go_before_files(server):
    assert ask(server, **SMALL, attached_boundary=0.6)["boundary"] == 0.6
    assert ask(server, **SMALL, attached_boundary=0.6, boundary=0.7)["boundary"] == 0.7
    plan = ask(server, **SMALL, schedule="generic", steps=10, shift=3.0, boundary=0.7)
    sigmas = generic_sigmas(10, 3.0)[:-1].tolist()
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx(sigmas)
    assert sides(plan) == ["semantic" if sigma >= 0.7 else "detail" for sigma in sigmas]
    assert len(ask(server, **SMALL, denoise=0.5)["steps"]) == 3


def test_two_full_models_change_over_where_wan_2_2_does(server):
    text_to_video = ask(server, model=SMALL["model"], two_models=True, shift=8.0, steps=4)
    assert text_to_video["boundary"] == 0.875
    assert len(text_to_video["steps"]) == 4
    models = server.base / "models" / "diffusion_models"
    file = TensorFile(ROOT / "small_world" / "models" / "diffusion_models" / SMALL["model"])
    with_image = {key: file.read(key) for key in file.shapes}
    with_image["patch_embedding.weight"] = with_image["patch_embedding.weight"].repeat(1, 3, 1, 1, 1)[:, :36]
    for name, prefix in (("takes_image", ""), ("whole", "model.diffusion_model.")):
        write_tensors(models / f"{name}.safetensors", {prefix + key: value for key, value in with_image.items()}, {})
        assert ask(server, model=f"{name}.safetensors", two_models=True)["boundary"] == 0.9
    # diffusers names: the last layer is called otherwise
    write_tensors(models / "diffusers.safetensors", in_diffusers_names(with_image), {})
    assert ask(server, model="diffusers.safetensors", two_models=True)["boundary"] == 0.9


def test_two_full_models_are_spaced_evenly(server):
    """At the levels their 4-step LoRAs are made for."""
    for schedule in ("auto", "generic", "even", "Wan 2.2 4 steps (lightx2v)"):
        plan = ask(server, model=SMALL["model"], two_models=True, schedule=schedule, shift=5.0, steps=4)
        assert levels(plan) == pytest.approx([1.0, 0.9375, 5 / 6, 0.625]), schedule
        assert sides(plan) == 2 * ["semantic"] + 2 * ["detail"]
    assert plan["notes"] == ["Wan 2.2 4 steps (lightx2v): steps and shift are not used"]


def test_no_expert_is_shown_that_is_absent_or_at_strength_0(server):
    """Where nothing changes there is no boundary."""

    def seen(**changes):
        plan = ask(server, model=SMALL["model"], **changes)
        assert (plan["boundary"] is None) == (len(set(sides(plan))) == 1)
        return sides(plan)

    both = {side: SMALL[side] for side in ("semantic", "detail")}
    plain, semantic, detail = 6 * ["base"], 6 * ["semantic"], 3 * ["semantic"] + 3 * ["detail"]
    assert seen(**both) == detail
    assert seen(**both, detail_strength=0) == seen(semantic=SMALL["semantic"], detail="none") == semantic
    assert seen(**both, semantic_strength=0) == 3 * ["base"] + 3 * ["detail"]
    assert seen(**both, semantic_strength=0, detail_strength=0) == plain
    assert seen(**both, detail_strength=0, stacked=False) == 3 * ["semantic"] + 3 * ["base"]
    assert seen(semantic="none", detail=SMALL["detail"]) == detail


def test_a_plain_base_is_warned_of(server):
    plan = ask(server, model=SMALL["model"])
    assert plan["boundary"] is None and sides(plan) == 6 * ["base"]
    assert plan["notes"][0].startswith("Warning: no expert is active, and a plain model needs more than 6 steps.")
    assert ask(server, **SMALL)["notes"] == ["auto: steps and shift are not used"]
    even = ask(server, model=SMALL["model"], schedule="even", steps=20, shift=5.0)
    assert (len(even["steps"]), even["notes"]) == (20, [])
    cfgs = ask(server, model=SMALL["model"], cfg=3.0, detail_cfg=1.0)
    assert (cfgs["boundary"], sides(cfgs)) == (0.979, 6 * ["base"])


def in_diffusers_names(native):
    """A base as diffusers keeps it."""
    templates = [pair for rule in WAN.DIFFUSERS_TO_NATIVE for pair in rule.key_pairs()]
    names = {
        target.replace("{n}", str(n)): source.replace("{n}", str(n)) for source, target in templates for n in range(40)
    }
    return {names[key]: value for key, value in native.items()}


def test_what_a_gguf_base_is_is_not_known_but_its_experts_are(server):
    gguf = {"model": "base.gguf"}
    assert ask(server, **{**SMALL, **gguf}) == ask(server, **SMALL)
    file = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["semantic"])
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    for name, facts in (("plain", {}), ("of_wan", {"dcm.family": "wan"})):
        write_tensors(loras / f"{name}.safetensors", file.read_all(), facts)
    # it may be an image model's half, or no Wan at all
    assert ask(server, **gguf, semantic="of_wan.safetensors", two_models=True) is None
    assert ask(server, **gguf, semantic="plain.safetensors", boundary=0.9) is None
    assert ask(server, **gguf, semantic="of_wan.safetensors", stacked=False)["boundary"] == 0.979
    plan = ask(server, **gguf, semantic="plain.safetensors", boundary=0.9, schedule="generic", stacked=False)
    assert plan["boundary"] == 0.9
    assert sides(ask(server, **gguf, semantic="of_wan.safetensors", stacked=False)) == 3 * ["semantic"] + 3 * ["base"]
    # which levels the host's schedulers give depends on the model
    assert ask(server, **gguf, semantic="plain.safetensors", boundary=0.9, schedule="simple") is None


def test_two_models_with_experts_or_a_lora(server):
    """A release keeps its own schedule and boundary; a LoRA that says nothing changes neither."""
    plan = ask(server, model=RELEASE, two_models=True)
    assert plan["boundary"] == WAN.preset.boundary
    assert [step["sigma"] for step in plan["steps"]] == pytest.approx([t / 1000 for t in WAN.preset.timesteps])
    file = TensorFile(ROOT / "small_world" / "models" / "loras" / SMALL["semantic"])
    loras = server.base / "models" / "loras"
    loras.mkdir(exist_ok=True)
    write_tensors(loras / "plain.safetensors", file.read_all(), {})
    half = ask(server, model=SMALL["model"], semantic="plain.safetensors", two_models=True, shift=8.0, steps=4)
    assert half == ask(server, model=SMALL["model"], two_models=True, shift=8.0, steps=4) and half["boundary"] == 0.875
    assert sides(ask(server, model=SMALL["model"], semantic="plain.safetensors")) == 6 * ["semantic"]


@pytest.fixture(scope="module")
def small_world(module):
    """Load the small world's base: load() -> MODEL."""
    return lambda: module("nodes.host.experts.load").load_model(SMALL["model"], "default")[0]


@pytest.mark.parametrize("schedule", ["auto", "generic", "HunyuanVideo 4 steps", "even", "beta"])
@pytest.mark.parametrize("second", [None, "same", "other"])
@pytest.mark.parametrize("strengths", [None, (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_what_is_foreseen_is_what_runs_and_what_is_drawn(strengths, second, schedule, module, node, small_world):
    """The plan before a run, the announced one, the text on the sampler and the plot come from one setup."""
    plan, sampling, schedules, setup = (
        module(f"nodes.host.sampling.{name}") for name in ("plan", "run", "schedules", "setup")
    )
    model = small_world()
    asked = {"model": SMALL["model"], "two_models": second == "other"}
    if strengths:
        read, attach = (
            module("nodes.host.experts.expert_files").load_expert,
            module("nodes.host.experts.attach").attach_experts,
        )
        experts = [read(SMALL[side], side, model) for side in ("semantic", "detail")]
        model = attach(model, *experts, semantic_strength=strengths[0], detail_strength=strengths[1])
        asked |= SMALL | dict(zip(("semantic_strength", "detail_strength"), strengths, strict=True))
    detail = {None: lambda: None, "same": model.clone, "other": small_world}[second]()
    prepared, boundary = sampling.prepare_model(model, 0.0, detail)
    sigmas, notes = schedules.choose_sigmas(schedule, 6, 9.0, 0.7, prepared)
    runs = setup.plan_run(prepared, sigmas, boundary)
    foreseen = plan.foresee({**SETTINGS, "schedule": schedule, "shift": 9.0, "denoise": 0.7, **asked})
    assert foreseen == plan.as_message(sigmas, runs, notes)
    drawn = node(
        "DCMSchedulePlot", sigmas=sigmas, boundary=0.0, width=320, height=200, model=model, detail_model=detail
    ).result[0]
    expected = module("dcm_core.inspection.plot").plot_schedule(sigmas, runs, 320, 200)
    assert torch.equal(drawn, sampling.as_image(expected))
    words = setup.describe_run(prepared, runs)
    for expert in ("semantic", "detail"):
        assert (expert in words.partition(" (the ")[0]) == (expert in sides(foreseen))


ROW = {"name": "a", "unit": "steps", "start": 1.0, "end": 2.0, "lora": "none", "strength": "1", "cfg": 0.0}


@pytest.mark.parametrize(
    ("rows", "second"),
    [
        (
            [{"lora": SMALL["semantic"]}, {"name": "b", "start": 3, "end": 6, "lora": SMALL["detail"], "cfg": 2.0}],
            False,
        ),
        ([{"end": 1}, {"name": "b", "unit": "sigma", "start": 0.95, "end": 0.0, "lora": SMALL["detail"]}], False),
        ([{"name": "b", "unit": "percent", "start": 0.0, "end": 0.4, "lora": SMALL["detail"], "strength": "0"}], False),
        ([{"lora": SMALL["semantic"]}, {"lora": SMALL["detail"], "strength": "1, 0.5"}], False),
        ([{"lora": SMALL["detail"], "end": 9}, {"name": "late", "start": 30, "end": 40}], False),
        ([{}, {"name": "low", "start": 3, "end": 6}], True),
    ],
)
@pytest.mark.parametrize("schedule", ["auto", "generic", "even", "beta"])
def test_rows_that_are_foreseen_are_what_runs(rows, second, schedule, module, node, small_world):
    plan, schedules, setup = (module(f"nodes.host.sampling.{name}") for name in ("plan", "schedules", "setup"))
    model, chain = small_world(), None
    other = small_world() if second else None
    asked = [{**ROW, **row, "own_model": second and number == len(rows) - 1} for number, row in enumerate(rows)]
    for row in asked:
        values = {name: value for name, value in row.items() if name != "own_model"}
        chain = node("DCMExpert", rows=chain, model=other if row["own_model"] else None, **values).result[0]
    attached = node("DCMAttachTable", model=model, rows=chain).result[0]
    sigmas, notes = schedules.choose_sigmas(schedule, 6, 9.0, 0.7, attached)
    prepared = schedules.with_shift(attached, schedule, 9.0)
    runs = setup.plan_run(prepared, sigmas, None)
    foreseen = plan.foresee(
        {**SETTINGS, "schedule": schedule, "shift": 9.0, "denoise": 0.7, "model": SMALL["model"], "rows": asked}
        | {"two_models": second}
    )
    if foreseen is None:  # the levels of percents depend on the model's own shift
        assert rows[0].get("unit") == "percent" and not schedules.sets_shift(
            setup.setup_of(attached).schedule(schedule)
        )
    else:
        assert foreseen == plan.as_message(sigmas, runs, notes)
    drawn = node("DCMSchedulePlot", sigmas=sigmas, boundary=0.0, width=320, height=200, model=prepared).result[0]
    expected = module("dcm_core.inspection.plot").plot_schedule(sigmas, runs, 320, 200)
    assert torch.equal(drawn, module("nodes.host.sampling.run").as_image(expected))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{}],
        [{**ROW}],
        [{**ROW, "own_model": 1}],
        [{**ROW, "own_model": False, "start": 0.0}],
        [{**ROW, "own_model": False, "strength": "x", "lora": SMALL["detail"]}],
        [{**ROW, "own_model": False, "lora": "../x.safetensors"}],
        [{**ROW, "own_model": False}, {**ROW, "own_model": False, "end": 3.0}],
        [{**ROW, "own_model": False}] * 33,
        "rows",
        [None],
    ],
)
def test_rows_that_cannot_be_foreseen_are_nothing(server, rows):
    try:
        assert ask(server, model=SMALL["model"], rows=rows) is None
    except urllib.error.HTTPError as error:
        assert error.code == 400


@pytest.mark.parametrize(
    "changes",
    [
        {"model": SMALL["model"], "semantic": "none", "detail": "none"},  # which DCM Attach Experts refuses
        {"model": "base.gguf"},
        {"model": "no such file.safetensors"},
        {**SMALL, "boundary": 2.0},
        {**SMALL, "schedule": "generic", "steps": 0},
        {**SMALL, "semantic": "\ud800.safetensors"},
        {**SMALL, "semantic": "../../etc/passwd.safetensors"},
        {"model": "\0.safetensors", "two_models": True},
        {**SMALL, "schedule": "fast"},
        {**SMALL, "schedule": "even", "shift": 0.0},
    ],
)
def test_what_cannot_be_foreseen_is_nothing(server, changes):
    assert ask(server, **changes) is None


def test_the_sampler_announces_its_plan(module, monkeypatch):
    sent = []
    plan = module("nodes.host.sampling.plan")

    class Running:
        client_id = "page"

        def send_sync(self, event, data, client):
            sent.append((event, data, client))

    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.0])
    both = plan_steps(sigmas, 0.8)
    plan.announce(sigmas, both, [], "7")  # nobody to tell
    monkeypatch.setattr(plan, "server", Running)
    plan.announce(sigmas, both, [], "7")
    plan.announce(sigmas, plan_steps(sigmas, None, ("base", "base")), ["a note"], "7")
    (_, routed, client), (event, plain, _) = sent
    assert (event, client, routed["node"]) == ("dcm.plan", "page", "7")
    assert sides(routed) == ["semantic", "semantic", "detail"] and routed["boundary"] == 0.8
    assert sides(plain) == ["base", "base", "base"] and plain["boundary"] is None and plain["notes"] == ["a note"]


def test_the_front_end_wears_the_plot_s_colours():
    text = (ROOT / "web" / "colours.js").read_text(encoding="utf-8")
    found = dict(re.findall(r'(\w+): "(#\w+)"', text.split("COLOURS = {")[1].split("}")[0]))
    assert found == THEMES["dark"].experts
    (others,) = re.findall(r"OTHERS = \[(.*)\]", text)
    assert tuple(re.findall(r"#\w+", others)) == THEMES["dark"].others
    assert f'NEUTRAL = "{THEMES["dark"].neutral}"' in text
