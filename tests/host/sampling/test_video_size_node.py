"""DCM Video Size in the host: what the model tells, and that the host's empty latent has that size."""

import pytest


def test_the_model_tells_what_it_takes(node, wan, releases):
    model = node("DCMLoadModel", model_name=releases["hy_tiny"], weight_dtype="default").result[0]
    asked = {"model_type": "automatic", "seconds": 5.0, "shape": "16:9", "megapixels": 0.4}
    assert node("DCMVideoSize", model=model, **asked).result == (832, 480, 121, 24.0)
    out = node("DCMVideoSize", model=wan(), **asked)
    assert out.result == (832, 480, 81, 16.0)
    assert out.ui.as_dict()["text"] == ("832 x 480, 81 frames, 5.06 s at 16 a second",)
    # what is chosen goes before the model
    assert node("DCMVideoSize", model=model, **{**asked, "model_type": "Wan 2.2 5B"}).result[2:] == (121, 24.0)


def test_without_a_model_one_has_to_be_chosen(node, module):
    asked = {"seconds": 5.0, "shape": "16:9", "megapixels": 0.4}
    assert node("DCMVideoSize", model_type="HunyuanVideo", **asked).result == (832, 480, 121, 24.0)
    error = module("dcm_core.errors").DCMError
    with pytest.raises(error, match="model_type is automatic, but no model is connected"):
        node("DCMVideoSize", model_type="automatic", **asked)


def test_the_host_s_empty_latent_takes_it(node):
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo

    width, height, length, _ = node(
        "DCMVideoSize", model_type="HunyuanVideo", seconds=2.0, shape="3:4", megapixels=0.2
    ).result
    (latent,) = EmptyHunyuanLatentVideo.execute(width, height, length).result
    _, _, frames, rows, columns = latent["samples"].shape
    assert (8 * columns, 8 * rows, 4 * (frames - 1) + 1) == (width, height, length)
