"""The pack inside a real ComfyUI, in this process."""

import importlib
import importlib.util
import sys

import pytest
import torch

from dcm_core.conditioning import save_conditioning

from .server import HOST, ROOT, make_tiny_models, start_server

NEEDS_HOST = "COMFYUI_PATH names no ComfyUI; `python scripts/test.py` brings one"

if HOST:
    sys.path.insert(0, HOST)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A running host with small random models: see `server.Server`."""
    if HOST is None:
        pytest.skip(NEEDS_HOST)
    base = tmp_path_factory.mktemp("server")
    make_tiny_models(base / "models")
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
    argv, sys.argv = sys.argv, ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args
    import folder_paths

    sys.argv = argv
    for kind in ("diffusion_models", "loras", "dcm_conditioning"):
        (models / kind).mkdir()
        folder_paths.folder_names_and_paths[kind] = ([str(models / kind)], {".safetensors", ".ckpt"})
    folder_paths.models_dir = str(models)
    spec = importlib.util.spec_from_file_location("dcm_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["dcm_pack"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def module(pack):
    """Import a module of the pack: module("nodes.host.attach")."""
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
    training = module("nodes.host.training")

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
    from safetensors.torch import save_file

    names = {}
    for model in ("wan_tiny", "hy_tiny"):
        names[model] = f"{model}.safetensors"
        save_file(recipe.release(model), models / "diffusion_models" / names[model])
    return names


def native_wan(seed=0, width=256, layers=2, channels=16):
    """The weights of a small Wan model in the host's layout, float32."""
    from dcm_core.families import WAN

    generator = torch.Generator().manual_seed(seed)
    shapes = {"patch_embedding.weight": (width, channels, 1, 2, 2), "head.modulation": (1, 2, width)}
    special = {
        "time_projection.1": (6 * width, width), "time_embedding.0": (width, 256), "text_embedding.0": (width, 4096),
        "ffn.0": (2 * width, width), "ffn.2": (width, 2 * width), "head.head": (64, width),
    }
    for rule in WAN.DIFFUSERS_TO_NATIVE:
        for index in [] if rule.optional else range(layers if "{n}" in rule.target else 1):
            name = rule.target.replace("{n}", str(index))
            shape = next((s for end, s in special.items() if name.endswith(end)), (width, width))
            if name.endswith("modulation"):
                shapes.setdefault(name, (1, 6, width))
            elif "norm" in name:
                shapes |= {f"{name}.{param}": (width,) for param in rule.params}
            else:
                shapes.setdefault(f"{name}.weight", shape)
                shapes.setdefault(f"{name}.bias", shape[:1])
    state_dict = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        scale = 0.05 if len(shape) == 1 else 0.7 / max(1, torch.Size(shape[1:]).numel()) ** 0.5
        state_dict[name] = 1 + 0.05 * value if "norm" in name and name.endswith("weight") else scale * value
    return state_dict


def make_wan(**sizes):
    """A small Wan model in float32: a MODEL without experts."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(native_wan(**sizes), model_options={"dtype": torch.float32})


@pytest.fixture(scope="session")
def wan(pack):
    """Make a small Wan model: wan(seed=..., width=..., layers=..., channels=...)."""
    return make_wan


@pytest.fixture(scope="session")
def random_expert(module):
    """Make an expert for a MODEL: random_expert(model, role, seed, rank, replaced=True) -> Expert."""
    attach = module("nodes.host.attach")
    experts = module("dcm_core.experts")

    def make(model, role="detail", seed=0, rank=4, replaced=True):
        generator = torch.Generator().manual_seed(seed)
        shapes = attach.module_shapes(model)
        sites = [n.removesuffix(".weight") for n in shapes if n.endswith(("attn.q.weight", "attn.v.weight", "attn.o.weight"))]

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
    """Sample a small video: sample(model, sigmas, sampler="euler", ...) -> latent as the host returns it."""
    import comfy.sample
    import comfy.samplers

    def run(model, sigmas, sampler="euler", seed=3, cfg=1.0, batch=1, callback=None, mask=None, latent=None, size=(2, 6, 8)):
        generator = torch.Generator().manual_seed(11)
        positive = [[torch.randn(1, 6, 4096, generator=generator), {}]]
        negative = [[torch.randn(1, 6, 4096, generator=generator), {}]]
        latent = torch.zeros(batch, 16, *size) if latent is None else latent
        noise = comfy.sample.prepare_noise(latent, seed)
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, cfg, comfy.samplers.sampler_object(sampler), torch.as_tensor(sigmas), positive, negative, latent,
                noise_mask=mask, callback=callback, disable_pbar=True, seed=seed,
            )

    return run
