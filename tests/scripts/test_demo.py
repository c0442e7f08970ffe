"""The demo in a real ComfyUI: a video comes out, and what goes wrong is told in the server's words."""

import av
import numpy as np
import pytest
from demo import PROMPTS, WORKFLOW, prompt_file, render
from environment import Environment, SetupError
from instance import LOG, RunError, start

LATENT_NODE = "EmptyHunyuanLatentVideo"


@pytest.fixture
def prompt(server):
    return server.prompt_of(WORKFLOW)


def inputs_of(prompt, node_type):
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == node_type)


def test_demo_renders_a_shape_of_the_colour_that_was_asked_for(server, capsys):
    path = render(server, "a yellow triangle moving right", seed=4)
    with av.open(path) as video:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]).astype(float)
    assert frames.shape == (17, 256, 256, 3)
    red, green, blue = np.moveaxis(frames, -1, 0)
    yellow = (np.minimum(red, green) - blue) > 80
    assert yellow.any((1, 2)).mean() > 0.7, "no yellow shape in most frames"
    assert 0.005 < yellow.mean() < 0.3
    said = capsys.readouterr().out
    assert "rendered 'a yellow triangle moving right'" in said
    assert "step 1-3 semantic, 4-6 detail, boundary 0.76" in said


def test_an_unknown_prompt_names_the_known_ones():
    assert (PROMPTS / prompt_file("a red circle moving up")).is_file()
    with pytest.raises(SetupError, match=r"'a cat'; the small world knows a blue circle moving down"):
        prompt_file("a cat")


def test_refused_prompt_says_why(server, prompt):
    inputs_of(prompt, LATENT_NODE)["width"] = 0
    with pytest.raises(RunError, match=rf"{LATENT_NODE}: Value 0 smaller than min of 16: width"):
        server.run(prompt)


def test_failing_node_says_why(server, prompt):
    inputs_of(prompt, LATENT_NODE).update(width=64, height=48, length=5)
    inputs_of(prompt, "DCMSampler")["denoise"] = 0.0
    entry = server.run(prompt)
    with pytest.raises(RunError, match=r"DCMSampler: denoise is 0"):
        server.saved(entry)


def test_workflow_that_is_none_says_why(server, tmp_path):
    path = tmp_path / "empty.json"
    path.write_text("{}")
    with pytest.raises(RunError, match=r"empty\.json cannot be converted"):
        server.prompt_of(path)


def test_host_that_does_not_start_shows_its_log(server, tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('no such thing')")
    environment = Environment(server.environment.python, tmp_path)
    with pytest.raises(SetupError, match="no such thing"), start(environment, tmp_path):
        pass
    assert (tmp_path / LOG).is_file()
