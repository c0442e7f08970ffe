import pytest
import torch


@pytest.fixture(scope="module")
def bases(module, releases):
    """name -> (plain MODEL in float32, noise, conditioning)."""
    load, attach = module("nodes.host.experts.load"), module("nodes.host.experts.attach")
    load.WEIGHT_DTYPES["float32"] = {"dtype": torch.float32}
    generator = torch.Generator().manual_seed(5)
    noise, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 6, 4096, generator=generator)
    extras = {"pooled_output": torch.randn(1, 768, generator=generator), "guidance": 6.0}
    made = {
        name: (attach.detach_experts(load.load_model(file, "float32")[0]), noise, [[text, extras]])
        for name, file in releases.items()
    }
    del load.WEIGHT_DTYPES["float32"]
    return made
