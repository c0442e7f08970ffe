"""The pack inside a real ComfyUI, in this process."""

import importlib
import importlib.util
import sys

import pytest
import torch
from safetensors.torch import save_file

from dcm_core.files.conditioning import save_conditioning

from .server import DEVICE, HOST, ROOT, here, make_models, start_server
from .small_models import make_wan
from .training.small_runs import SMALL, random_data

NEEDS_HOST = "COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one"

if HOST:
    sys.path.insert(0, HOST)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running host with small random models: see `instance.Instance`."""
    if HOST is None:
        pytest.skip(NEEDS_HOST)
    base = tmp_path_factory.mktemp("server")
    make_models(here(), base)
    save_conditioning(base / "models" / "dcm_conditioning" / "narrow.safetensors", [[torch.zeros(1, 8, 768), {}]])
    with start_server(base) as running:
        yield running


@pytest.fixture(scope="session")
def info(server):
    """Node id -> what the host says of it."""
    return server.request("/object_info")


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A models folder of its own, with the golden releases in it."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def pack(models):
    """The pack, loaded as ComfyUI loads a custom node folder."""
    if HOST is None:
        pytest.skip(NEEDS_HOST)
    # the golden numbers are of whole float32
    torch.backends.cudnn.allow_tf32 = False
    argv, sys.argv = sys.argv, ["main.py", *DEVICE]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import folder_paths

    sys.argv = argv
    for kind in ("diffusion_models", "loras", "dcm_conditioning"):
        (models / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(models / kind)], {".safetensors", ".ckpt"})
    folder_paths.models_dir = str(models)
    spec = importlib.util.spec_from_file_location(
        "dcm_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["dcm_pack"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module(pack):
    """Import a module of the pack: module("nodes.host.experts.attach")."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture
def every_update(pack, monkeypatch):
    """Progress is told as often as it is made: newer hosts leave out what follows too fast."""
    import comfy.utils

    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        monkeypatch.setattr(comfy.utils, name, 0, raising=False)


@pytest.fixture
def gradients(module):
    """What a test needs that trains without `train_expert`."""
    with module("nodes.host.compat").gradients():
        yield


@pytest.fixture(scope="session")
def train(module):
    """Train as a node does: in the host's inference mode."""
    training = module("nodes.host.training.run")

    def run(*args, **keywords):
        with torch.inference_mode():
            return training.train_expert(*args, **keywords)

    return run


@pytest.fixture(scope="session")
def node(module):
    """Run a node as the host does: node("DCMScheduler", model=...) -> its NodeOutput."""
    nodes = {cls.__name__: cls for cls in module("nodes").NODES}

    def run(name, /, **inputs):
        cls = nodes[name]
        cls.GET_SCHEMA()
        prepared = cls.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
        with torch.inference_mode():
            return prepared.execute(**inputs)

    run.classes = nodes
    return run


@pytest.fixture(scope="session")
def releases(pack, models, recipe):
    """Files of the golden releases among the host's diffusion models: model name -> file name."""
    names = {}
    for model in recipe.RELEASES:
        names[model] = f"{model}.safetensors"
        save_file(recipe.release(model), models / "diffusion_models" / names[model])
    return names


@pytest.fixture(scope="session")
def wan(pack):
    """Make a small Wan model: wan(seed=..., width=..., layers=..., channels=...)."""
    return make_wan


@pytest.fixture(scope="session")
def data(module):
    """Four random videos with captions to train a small Wan model on."""
    return random_data(module("dcm_core.distill.data.dataset"))


@pytest.fixture(scope="module")
def model(wan):
    """A small MODEL to train on, of the test file's own."""
    return wan(layers=2)


@pytest.fixture(scope="session")
def config(module):
    """Small settings: config("semantic", rank=0, ...) -> TrainingConfig."""
    return lambda side, **values: module("dcm_core.distill.config").TrainingConfig(side, **{**SMALL, **values})


@pytest.fixture(scope="session")
def random_expert(module):
    """Make an expert for a MODEL: random_expert(model, role, seed, rank, replaced=True) -> Expert."""
    attach = module("nodes.host.experts.attach")
    experts = module("dcm_core.experts.expert")

    def make(model, role="detail", seed=0, rank=4, replaced=True):
        generator = torch.Generator().manual_seed(seed)
        shapes = attach.module_shapes(model)
        sites = [
            n.removesuffix(".weight") for n in shapes if n.endswith(("attn.q.weight", "attn.v.weight", "attn.o.weight"))
        ]

        def random(*shape):
            return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

        low_rank = {}
        for site in sites:
            rows, width = shapes[f"{site}.weight"]
            low_rank[site] = (experts.LowRank(random(rank, width), random(rows, rank), 0.7),)
        names = [n for n in shapes if n.startswith(("time_projection.1.", "head.head."))] if replaced else []
        return experts.Expert("wan", role, low_rank, {n: random(*shapes[n]) for n in names}, boundary=0.979)

    return make


@pytest.fixture(scope="session")
def sample():
    """Sample a small video: sample(model, sigmas, sampler="euler", ...) -> latent as the host returns it.

    `prompt` goes onto the positive conditioning."""
    import comfy.sample
    import comfy.samplers

    def run(
        model,
        sigmas,
        sampler="euler",
        seed=3,
        cfg=1.0,
        batch=1,
        callback=None,
        mask=None,
        latent=None,
        size=(2, 6, 8),
        **prompt,
    ):
        generator = torch.Generator().manual_seed(11)
        positive = [[torch.randn(1, 6, 4096, generator=generator), prompt]]
        negative = [[torch.randn(1, 6, 4096, generator=generator), {}]]
        latent = torch.zeros(batch, 16, *size) if latent is None else latent
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model,
                noise,
                cfg,
                comfy.samplers.sampler_object(sampler),
                torch.as_tensor(sigmas),
                positive,
                negative,
                latent,
                noise_mask=mask,
                callback=callback,
                disable_pbar=True,
                seed=seed,
            )

    return run
