"""An expert table on a MODEL: as exact as whole models that are exchanged by hand, in any sampler, and nothing of a base changes."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from ..compare import relative
from ..sampling.test_switch_sides import on_a_small_card
from .test_attach import copy_of, merged, untouched
from .test_lora_parity import merge

SIGMAS = [1.0, 0.95, 0.85, 0.7, 0.5, 0.25, 0.0]
SAMPLERS = [
    "euler",
    "heun",
    "dpm_2",
    "dpmpp_2m",
    "uni_pc",
    "res_multistep",
    "euler_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "lcm",
]


@pytest.fixture(scope="module")
def attach(module):
    return module("nodes.host.experts.attach")


@pytest.fixture(scope="module")
def table(module):
    return module("nodes.host.experts.table")


@pytest.fixture(scope="module")
def base(wan):
    return wan()


@pytest.fixture(scope="module")
def span(module):
    return module("dcm_core.table").Span


@pytest.fixture(scope="module")
def rows_of(table, span):
    """rows_of(("high", ("steps", 1, 2), [(expert, strengths)]), ..., models={name: MODEL}, cfgs={name: cfg})."""

    def make(*rows, models=None, cfgs=None):
        made = ()
        for name, where, experts in rows:
            chosen = tuple(
                table.ChosenExpert(strengths if isinstance(strengths, tuple) else (strengths,), trained=expert)
                for expert, strengths in experts
            )
            row = table.ChosenRow(name, span(*where), chosen, (models or {}).get(name), (cfgs or {}).get(name))
            made = table.with_row(made, row)
        return made

    return make


def by_level(model, pieces):
    """The slow reference: each call goes to the whole model of its noise level; pieces: [(lowest sigma, model)]."""
    from comfy.patcher_extension import WrappersMP

    def choose(executor, x, t, *args, **kwargs):
        owner = next(owner for low, owner in pieces if float(t.max()) >= low)
        return owner.model._apply_model(x, t, *args, **kwargs)

    clone = model.clone()
    others = {id(owner.model): owner for _, owner in pieces if not owner.is_clone(model)}
    clone.set_additional_models("reference", list(others.values()))
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "reference", choose)
    return clone


@pytest.fixture(scope="module")
def experts(base, random_expert):
    return [random_expert(base, seed=seed, rank=2 + seed, replaced=seed == 2) for seed in range(5)]


@pytest.mark.parametrize(
    ("count", "sampler"), [(3, sampler) for sampler in SAMPLERS] + [(n, "euler") for n in (1, 2, 4, 5)]
)
def test_rows_equal_merged_models_exchanged_by_hand(wan, attach, table, base, experts, rows_of, sample, count, sampler):
    edges = [*[1.0, 0.9, 0.75, 0.6, 0.3][:count], 0.0]
    rows = rows_of(*((f"row {n}", ("sigma", *edges[n : n + 2]), [(experts[n], 0.9)]) for n in range(count)))
    before = copy_of(base)
    reference = by_level(
        base, [(low, merged(wan, attach, [expert], [0.9])) for expert, low in zip(experts, edges[1:], strict=False)]
    )
    routed = table.attach_table(base, rows)
    assert relative(sample(routed, SIGMAS, sampler), sample(reference, SIGMAS, sampler)) < 1e-6
    untouched(base, before)


def test_gaps_are_the_base_and_overlaps_stack(wan, attach, table, base, experts, rows_of, sample):
    first, second, _, style, _ = experts
    rows = rows_of(
        ("high", ("steps", 1, 2), [(first, 1.0)]),
        ("low", ("steps", 4, 6), [(second, 1.0)]),
        ("style", ("steps", 2, 4), [(style, 0.5)]),
    )
    reference = by_level(
        base,
        [
            (0.96, merged(wan, attach, [first])),
            (0.86, merged(wan, attach, [first, style], [1.0, 0.5])),
            (0.71, merged(wan, attach, [style], [0.5])),
            (0.51, merged(wan, attach, [second, style], [1.0, 0.5])),
            (0.0, merged(wan, attach, [second])),
        ],
    )
    # steps begin at 1, 0.95, 0.85, 0.7, 0.5 and 0.25, so the third is the style's alone
    levels = [1.0, 0.95, 0.85, 0.7, 0.5, 0.25, 0.0]
    pieces = dict(zip(levels, [0, 1, 2, 3, 4, 4], strict=False))
    assert list(pieces.values()) == [0, 1, 2, 3, 4, 4]
    out, wanted = sample(table.attach_table(base, rows), SIGMAS), sample(reference, SIGMAS)
    assert relative(out, wanted) < 1e-6


def test_batches_with_a_mask_and_an_image(wan, attach, table, base, experts, rows_of, sample):
    mask = torch.zeros(1, 1, 2, 6, 8)
    mask[..., 4:] = 1
    latent = torch.randn(2, 16, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    kwargs = {"mask": mask, "latent": latent, "cfg": 2.0, "batch": 2}
    rows = rows_of(
        ("high", ("sigma", 1, 0.8), [(experts[0], 1.0)]),
        ("mid", ("sigma", 0.8, 0.4), [(experts[2], 1.0)]),
        ("low", ("sigma", 0.4, 0), [(experts[1], 0.5)]),
    )
    pieces = [
        (low, merged(wan, attach, [expert], [strength]))
        for low, expert, strength in ((0.8, experts[0], 1.0), (0.4, experts[2], 1.0), (0.0, experts[1], 0.5))
    ]
    out = sample(table.attach_table(base, rows), SIGMAS[1:], **kwargs)
    assert relative(out, sample(by_level(base, pieces), SIGMAS[1:], **kwargs)) < 1e-6
    torch.testing.assert_close(out[..., :4], latent[..., :4], rtol=1e-4, atol=1e-4)


def test_rows_over_fp8_weights(module, attach, table, releases, random_expert, rows_of, sample):
    """The same as a pair over them, which is routed everywhere on its semantic side."""
    model, _ = module("nodes.host.experts.load").load_model(releases["wan_tiny"], "fp8_e4m3fn")
    base = attach.detach_experts(model)
    assert base.model.get_dtype() is torch.float8_e4m3fn
    first, second = (random_expert(base, "semantic", seed, replaced=bool(seed)) for seed in range(2))
    rows = rows_of(("high", ("steps", 1, 3), [(first, 1.0)]), ("low", ("steps", 4, 6), [(second, 1.0)]))
    alone = [attach.attach_experts(base, expert, boundary=0.001, stacked=False) for expert in (first, second)]
    seen = [[], [], []]

    def sampled(model, found):
        return sample(model, SIGMAS, callback=lambda step, denoised, x, total: found.append(denoised.clone()))

    for model, found in zip((table.attach_table(base, rows), *alone), seen, strict=True):
        sampled(model, found)
    mixed, high, low = seen
    assert all(torch.equal(a, b) for a, b in zip(mixed[:3], high, strict=False))
    assert relative(mixed[3], low[3]) > 1e-6  # its input is another
    # the low row alone, from what the high row left
    again = rows_of(("low", ("sigma", 0.75, 0), [(second, 1.0)]), ("high", ("sigma", 1, 0.75), [(first, 1.0)]))
    assert torch.equal(sample(table.attach_table(base, again), SIGMAS), sample(table.attach_table(base, rows), SIGMAS))


def test_an_expert_that_replaces_layers_works_under_another(wan, attach, table, base, experts, rows_of, sample):
    """The later row adds to what the earlier one has replaced."""
    plain, replacing = experts[0], experts[2]
    rows = rows_of(("below", ("sigma", 1, 0), [(replacing, 1.0)]), ("above", ("sigma", 0.9, 0), [(plain, -0.5)]))
    reference = by_level(
        base,
        [(0.9, merged(wan, attach, [replacing])), (0.0, merged(wan, attach, [replacing, plain], [1.0, -0.5]))],
    )
    assert relative(sample(table.attach_table(base, rows), SIGMAS), sample(reference, SIGMAS)) < 1e-6


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_strength_for_each_step(wan, attach, table, base, experts, rows_of, sample, sampler):
    rows = rows_of(("style", ("steps", 2, 6), [(experts[1], (1.0, 0.5, 0.0, -0.25))]))
    reference = by_level(
        base,
        [
            (0.951, base),
            (0.851, merged(wan, attach, experts[1:2], [1.0])),
            (0.701, merged(wan, attach, experts[1:2], [0.5])),
            (0.501, base),
            (0.0, merged(wan, attach, experts[1:2], [-0.25])),
        ],
    )
    assert relative(sample(table.attach_table(base, rows), SIGMAS, sampler), sample(reference, SIGMAS, sampler)) < 1e-6


def test_percents_are_the_hosts(table, base, experts, rows_of, sample):
    """As a conditioning's start and end percent, they follow the model's shift."""
    sampling = base.get_model_object("model_sampling")
    bound = sampling.percent_to_sigma(0.4)
    assert 0.4 < bound < 1
    rows = [
        rows_of(("high", (unit, *where), [(experts[0], 1.0)]))
        for unit, *where in (("percent", 0, 0.4), ("sigma", 1, bound + 2e-6))
    ]
    first, second = (sample(table.attach_table(base, row), SIGMAS) for row in rows)
    assert torch.equal(first, second) and not torch.equal(first, sample(base, SIGMAS))


def test_one_file_in_two_rows_is_in_memory_once(table, base, experts, rows_of, module):
    rows = rows_of(
        ("high", ("steps", 1, 2), [(experts[0], 1.0)]),
        ("low", ("steps", 3, 4), [(experts[0], 0.25), (experts[1], 1.0)]),
    )
    routed = table.attach_table(base, rows)
    key = module("nodes.host.experts.route").KEY
    assert [patcher.model.name for patcher in routed.get_additional_models_with_key(key)] == ["trained", "trained #2"]


def test_a_batch_with_rows_of_the_table_in_several_intervals(wan, attach, table, base, experts, rows_of):
    import comfy.model_management as management

    edges = [1.0, 0.8, 0.5, 0.2]
    rows = rows_of(*((f"row {n}", ("sigma", *edges[n : n + 2]), [(experts[n], 1.0)]) for n in range(3)))
    wholes = [*(merged(wan, attach, [expert]) for expert in experts[:3]), base]
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(5, *shape, generator=generator) for shape in ((16, 2, 6, 8), (6, 4096)))
    t = torch.tensor([0.9, 0.1, 0.5, 0.79, 0.2])
    owners = [0, 3, 1, 1, 2]

    def call(model, rows=slice(None)):
        management.load_models_gpu([model, *model.get_nested_additional_models()])
        model.pre_run()
        options = {"wrappers": model.wrappers}
        with torch.inference_mode():
            return model.model.apply_model(x[rows], t[rows], c_crossattn=context[rows], transformer_options=options)

    out = call(table.attach_table(base, rows))
    for place, owner in enumerate(owners):
        assert relative(out[place], call(wholes[owner], slice(place, place + 1))[0]) < 1e-6


@pytest.fixture(scope="module")
def halves(wan):
    return [wan(seed=seed) for seed in (11, 12)]


def test_rows_with_full_models_cfgs_and_experts(wan, attach, table, base, halves, experts, rows_of, sample):
    """Three models in one trajectory; a style without a model works on the models that it overlaps."""
    middle, last = halves
    rows = rows_of(
        ("high", ("steps", 1, 2), [(experts[0], 1.0)]),
        ("mid", ("steps", 3, 4), []),
        ("low", ("steps", 5, 6), [(experts[1], 0.5)]),
        ("style", ("steps", 4, 5), [(experts[3], 1.0)]),
        models={"mid": middle, "low": last},
    )
    seeds = {"seed": 11}, {"seed": 12}
    reference = by_level(
        base,
        [
            (0.851, merged(wan, attach, experts[:1])),
            (0.701, middle),
            (0.501, merged(wan, attach, [experts[3]], **seeds[0])),
            (0.251, merged(wan, attach, [experts[1], experts[3]], [0.5, 1.0], **seeds[1])),
            (0.0, merged(wan, attach, [experts[1]], [0.5], **seeds[1])),
        ],
    )
    wholes = [copy_of(model) for model in (base, *halves)]
    routed = table.attach_table(base, rows)
    assert relative(sample(routed, SIGMAS), sample(reference, SIGMAS)) < 1e-6
    for model, before in zip((base, *halves), wholes, strict=True):
        untouched(model, before)
    assert not routed.is_clone(middle)


def test_a_cfg_for_each_row(table, base, experts, rows_of, sample):
    rows = rows_of(
        ("high", ("steps", 1, 2), []),
        ("low", ("steps", 4, 6), []),
        cfgs={"high": 3.0, "low": 1.0},
    )
    import comfy.samplers

    seen = []

    class Watched(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            seen.append((round(float(timestep[0]), 3), self.cfg))
            return super().predict_noise(x, timestep, model_options or {}, seed)

    guider = Watched(table.attach_table(base, rows))
    generator = torch.Generator().manual_seed(1)
    context = [[torch.randn(1, 6, 4096, generator=generator), {}]]
    guider.set_conds(context, context)
    guider.set_cfg(2.0)
    noise = torch.randn(1, 16, 2, 6, 8, generator=generator)
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), torch.tensor(SIGMAS))
    assert seen == list(zip(SIGMAS[:-1], [3.0, 3.0, 2.0, 1.0, 1.0, 1.0], strict=True)) and guider.cfg == 2.0


def test_only_one_full_model_is_loaded_when_memory_is_short(table, base, halves, rows_of, sample, monkeypatch):
    import comfy.model_management as management

    load = management.load_models_gpu

    def load_without_room(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(
                management, "get_free_memory", lambda dev=None, torch_free_too=False: (0, 0) if torch_free_too else 0
            )
            return load(*args, **kwargs)

    names = {base.model: "base", halves[0].model: "mid", halves[1].model: "low"}
    rows = rows_of(
        ("mid", ("steps", 3, 4), []),
        ("low", ("steps", 5, 6), []),
        models=dict(zip(("mid", "low"), map(on_a_small_card, halves), strict=True)),
    )
    management.unload_all_models()
    monkeypatch.setattr(management, "load_models_gpu", load_without_room)
    loaded = []
    out = sample(
        table.attach_table(on_a_small_card(base), rows),
        SIGMAS,
        callback=lambda *_: loaded.append(
            [names[entry.model.model] for entry in management.current_loaded_models if entry.model.model in names]
        ),
    )
    assert loaded == [["base"]] * 2 + [["mid"]] * 2 + [["low"]] * 2
    assert relative(out, sample(by_level(base, [(0.851, base), (0.501, halves[0]), (0, halves[1])]), SIGMAS)) < 1e-6


def test_a_run_that_fails_leaves_nothing(table, base, halves, experts, rows_of, sample):
    rows = rows_of(
        ("high", ("steps", 1, 2), [(experts[0], 1.0)]),
        ("low", ("steps", 4, 6), [(experts[1], (1.0, 0.5))]),
        models={"low": halves[0]},
        cfgs={"low": 1.0},
    )
    before = [copy_of(model) for model in (base, halves[0])]
    routed = table.attach_table(base, rows)
    plain = sample(routed, SIGMAS)
    for step in range(6):

        def stop(at, *_, step=step):
            if at == step:
                raise KeyError("stopped")

        with pytest.raises(KeyError, match="stopped"):
            sample(routed, SIGMAS, callback=stop)
        for model, copy in zip((base, halves[0]), before, strict=True):
            untouched(model, copy)
    assert torch.equal(sample(routed, SIGMAS), plain)


def test_a_users_lora_works_in_every_row(wan, attach, table, base, experts, rows_of, sample):
    """Before or after the table, also where an expert replaces the layer."""
    generator = torch.Generator().manual_seed(5)
    names = ["blocks.0.self_attn.q.weight", "head.head.weight"]
    shapes = attach.module_shapes(base)
    patches = {
        f"diffusion_model.{name}": ("diff", (torch.randn(*shapes[name], generator=generator) / 50,)) for name in names
    }

    def with_lora(model):
        clone = model.clone()
        clone.add_patches(patches, 0.8)
        return clone

    rows = rows_of(
        ("high", ("sigma", 1, 0.8), [(experts[0], 1.0)]),
        ("low", ("sigma", 0.8, 0.3), [(experts[2], 1.0)]),
    )
    outs = [
        sample(table.attach_table(with_lora(base), rows), SIGMAS),
        sample(with_lora(table.attach_table(base, rows)), SIGMAS),
    ]
    pieces = [
        (low, with_lora(merged(wan, attach, part)))
        for low, part in ((0.8, experts[:1]), (0.3, experts[2:3]), (0.0, []))
    ]
    wholes = [(low, whole) for low, whole in pieces]
    import comfy.model_management

    comfy.model_management.load_models_gpu([whole for _, whole in wholes])
    assert relative(outs[0], outs[1]) < 1e-6
    assert relative(outs[0], sample(by_level(wholes[0][1], wholes), SIGMAS)) < 1e-5


def test_the_last_table_wins_and_the_pair_nodes_undo_it(attach, table, module, base, halves, experts, rows_of, sample):
    first = table.attach_table(base, rows_of(("a", ("sigma", 1, 0), [(experts[0], 1.0)]), models={"a": halves[0]}))
    second = table.attach_table(first, rows_of(("b", ("sigma", 1, 0), [(experts[1], 1.0)])))
    alone = table.attach_table(base, rows_of(("b", ("sigma", 1, 0), [(experts[1], 1.0)])))
    assert torch.equal(sample(second, SIGMAS), sample(alone, SIGMAS))
    pair = attach.attach_experts(first, detail=experts[2])
    assert torch.equal(sample(pair, SIGMAS), sample(attach.attach_experts(base, detail=experts[2]), SIGMAS))
    assert torch.equal(sample(attach.detach_experts(first), SIGMAS), sample(base, SIGMAS))
    assert not module("nodes.host.sampling.setup").is_table(pair)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "has no rows"),
        (
            [("a", ("steps", 1, 3), []), ("b", ("steps", 3, 4), [])],
            {"models": "both"},
            "Rows 'a' and 'b' both have a full model, and their intervals overlap",
        ),
    ],
)
def test_tables_that_contradict_themselves_are_refused(table, base, halves, rows_of, rows, options, message):
    models = dict(zip("ab", halves, strict=True)) if options else None
    with pytest.raises(ValueError, match=message):
        table.attach_table(base, rows_of(*rows, models=models))


def test_contradictions_that_only_the_run_shows_stop_it_at_its_start(table, base, halves, rows_of, sample):
    models, cfgs = dict(zip("ab", halves, strict=True)), {"a": 2.0, "b": 3.0}
    where = ("a", ("steps", 1, 3), []), ("b", ("sigma", 0.9, 0.1), [])
    steps = []
    for options, what in (({"models": models}, "a full model"), ({"cfgs": cfgs}, "a cfg")):
        with pytest.raises(ValueError, match=rf"Rows 'a' and 'b' both have {what} for the same step"):
            sample(
                table.attach_table(base, rows_of(*where, **options)),
                SIGMAS,
                callback=lambda step, *_: steps.append(step),
            )
    assert steps == []
    apart = table.attach_table(base, rows_of(where[0], ("b", ("sigma", 0.8, 0.1), []), cfgs=cfgs))
    assert sample(apart, SIGMAS).isfinite().all()


def test_the_same_name_is_one_row_or_an_error(rows_of, experts, halves):
    here = ("steps", 1, 2)
    (row,) = rows_of(("a", here, [(experts[0], 1.0)]), ("a", here, [(experts[1], 0.5)]), cfgs={"a": 2.0})
    assert [expert.trained for expert in row.experts] == experts[:2] and row.cfg == 2.0
    assert str(row) == "a: step 1 to 2; trained, strength 1; trained, strength 0.5; cfg 2"
    with pytest.raises(ValueError, match=r"Two rows are named 'a': step 1 to 2 and step 3\. Give each"):
        rows_of(("a", here, []), ("a", ("steps", 3, 3), []))


def test_every_site_of_a_row_has_to_answer(table, base, experts, rows_of, sample):
    rows = rows_of(("high", ("steps", 1, 2), [(experts[0], 1.0)]), ("low", ("steps", 5, 6), [(experts[1], 1.0)]))
    routed = table.attach_table(base, rows)
    block = base.model.diffusion_model.blocks[1].cross_attn
    own, steps = type(block).forward, []

    def past(self, x, context, **kwargs):
        return x

    block.forward = past.__get__(block)
    try:
        with pytest.raises(
            ValueError, match=r"did not use 3 of the layers that the trained expert changes: blocks\.1\.cross"
        ):
            sample(routed, SIGMAS, callback=lambda step, *_: steps.append(step))
    finally:
        del block.forward
    assert steps == [] and type(block).forward is own


# nodes


@pytest.fixture(scope="module")
def files(pack, models, base, experts, module, attach):
    """The experts as files, and one as a plain LoRA of a community."""
    write = module("dcm_core.experts.expert").write_expert
    names = []
    for number, expert in enumerate(experts[:3]):
        names.append(f"row_{number}.safetensors")
        write(models / "loras" / names[-1], expert, attach.module_shapes(base))
    lora = {
        "diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(4, 256) / 16,
        "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(256, 4),
    }
    save_file(lora, models / "loras" / "style.safetensors")
    return [*names, "style.safetensors"]


def expert_row(node, **values):
    defaults = {"name": "high", "unit": "steps", "start": 1.0, "end": 2.0, "lora": "none", "strength": "1", "cfg": 0.0}
    return node("DCMExpert", **defaults | values).result[0]


def test_the_nodes_make_what_the_library_makes(node, table, base, files, experts, rows_of, sample):
    rows = expert_row(node, lora=files[0])
    rows = expert_row(node, name="low", start=3.0, end=6.0, lora=files[1], strength="1, 0.5", rows=rows)
    rows = expert_row(node, name="style", unit="sigma", start=1.0, end=0.0, lora=files[3], strength="0.25", rows=rows)
    out = node("DCMAttachTable", model=base, rows=rows)
    made = rows_of(("high", ("steps", 1, 2), [(experts[0], 1.0)]), ("low", ("steps", 3, 6), [(experts[1], (1.0, 0.5))]))
    style = rows[2:]
    assert torch.equal(sample(out.result[0], SIGMAS), sample(table.attach_table(base, made + style), SIGMAS))
    text = out.ui.as_dict()["text"][0]
    assert text.splitlines() == [
        "high: step 1 to 2; row_0, strength 1",
        "low: step 3 to 6; row_1, strength 1, 0.5",
        "style: all steps; style, strength 0.25",
    ]
    again = node("DCMAttachTable", model=out.result[0], rows=rows)
    assert "Replaces the experts" in again.ui.as_dict()["text"][0]


def test_a_file_that_turns_weights_is_read_at_each_of_its_strengths(node, wan, base, models, sample):
    """What OFT changes is not proportional to its strength. The host's own loader computes the reference."""
    torch.manual_seed(0)
    tensors = {"diffusion_model.blocks.0.self_attn.q.oft_blocks": 0.3 * torch.randn(64, 4, 4)}
    save_file(tensors, models / "loras" / "turning.safetensors")
    rows = expert_row(node, start=2.0, end=5.0, lora="turning.safetensors", strength="1, 0.4, 0, 0.4")

    def whole(strength):
        model = wan()
        changed = merge(model, tensors, strength)
        model.model.state_dict()["diffusion_model.blocks.0.self_attn.q.weight"].copy_(*changed.values())
        return model

    strong, weak = whole(1.0), whole(0.4)
    levels = [(0.951, base), (0.851, strong), (0.701, weak), (0.501, base), (0.251, weak), (0.0, base)]
    out = sample(node("DCMAttachTable", model=base, rows=rows).result[0], SIGMAS)
    assert relative(out, sample(by_level(base, levels), SIGMAS)) < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": ""}, "name is ''; expected 1 to 40 visible characters"),
        ({"name": "a" * 41}, "name is "),
        ({"name": "a\u202eb"}, "name is "),
        ({"start": 3.0}, "start and end are 3 and 2; expected the first and last step"),
        ({"unit": "sigma", "start": 0.5, "end": 0.9}, "expected noise levels that fall"),
        ({"strength": "strong"}, "strength is 'strong'; expected a number"),
        ({"cfg": float("nan")}, "cfg is nan; expected"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(node, values, message):
    with pytest.raises(ValueError, match=message):
        expert_row(node, **values)


def test_errors_name_the_row_and_the_file(node, base, files, models, random_expert, wan):
    save_file({"nonsense": torch.zeros(2)}, models / "loras" / "nonsense.safetensors")
    rows = expert_row(node, lora="nonsense.safetensors")
    with pytest.raises(ValueError, match=r"lora of row 'high' is 'nonsense\.safetensors'"):
        node("DCMAttachTable", model=base, rows=rows)
    rows = expert_row(node, expert=random_expert(wan(width=128)))
    with pytest.raises(ValueError, match="expert of row 'high' does not fit"):
        node("DCMAttachTable", model=base, rows=rows)
    with pytest.raises(ValueError, match="missing"):
        node("DCMAttachTable", model=base, rows=expert_row(node, lora="missing.safetensors"))


def test_the_sampler_shows_the_rows(node, module, base, files, halves):
    rows = expert_row(node, lora=files[0], cfg=1.0)
    rows = expert_row(node, name="low", start=4.0, end=6.0, lora=files[1], rows=rows, model=halves[0])
    rows = expert_row(node, name="late", start=9.0, end=9.0, lora=files[3], rows=rows)
    model = node("DCMAttachTable", model=base, rows=rows).result[0]
    context = [[torch.randn(1, 6, 4096, generator=torch.Generator().manual_seed(0)), {}]]
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    values = {"positive": context, "latent_image": latent, "seed": 1, "schedule": "even", "steps": 6, "denoise": 1.0}
    out = node("DCMSampler", model=model, cfg=1.0, **values)
    line = out.ui.as_dict()["text"][0].splitlines()[0]
    assert line == "step 1-2 high, 3 base, 4-6 low, high cfg 1 (the late row has no step)"
    for wrong in ({"boundary": 0.9}, {"detail_cfg": 2.0}, {"detail_model": halves[1]}):
        with pytest.raises(ValueError, match="has an expert table"):
            node("DCMSampler", model=model, cfg=1.0, **values, **wrong)
    rows = expert_row(node, name="guided", start=3.0, end=3.0, cfg=4.0, rows=rows)
    guided = node("DCMAttachTable", model=base, rows=rows).result[0]
    with pytest.raises(ValueError, match=r"cfg of row 'guided' is 4, but no negative is connected"):
        node("DCMSampler", model=guided, cfg=1.0, **values)
    message = module("nodes.host.sampling.plan").as_message
    sigmas = module("nodes.host.sampling.schedules").choose_sigmas("even", 6, 17.0, 1.0, model)[0]
    steps = message(sigmas, module("nodes.host.sampling.setup").plan_run(model, sigmas, None))["steps"]
    assert [(step["expert"], step["letter"]) for step in steps] == list(
        itertools.chain([("high", "H")] * 2, [("base", "B")], [("low", "L")] * 3)
    )


def test_inspect_shows_every_row(node, base, files):
    rows = expert_row(node, lora=files[0])
    rows = expert_row(node, name="low", start=3.0, end=6.0, lora=files[2], strength="0.5, 0.25", rows=rows)
    model = node("DCMAttachTable", model=base, rows=rows).result[0]
    text, picture = node("DCMInspectModel", file="none", model=model).result
    assert "experts: table of 2 rows" in text
    assert "row 1: high: step 1 to 2; row_0, strength 1" in text
    assert "row 2: low: step 3 to 6; row_2, strength 0.5, 0.25" in text
    assert picture.ndim == 4
