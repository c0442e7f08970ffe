"""`python -m dcm_core evaluate`, as its users run it."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from .small_world import MODELS, PROMPTS, ROOT

SETTINGS = {
    "model": str(MODELS / "diffusion_models" / "zz_dcm_small_world_base.safetensors"),
    "semantic": str(MODELS / "loras" / "zz_dcm_small_world_semantic.safetensors"),
    "detail": str(MODELS / "loras" / "zz_dcm_small_world_detail.safetensors"),
    "conditionings": [str(MODELS / "dcm_conditioning" / "zz_dcm_small_world" / f"{PROMPTS[0]}.safetensors")],
    "width": 64,
    "height": 64,
    "frames": 17,
    "seeds": 2,
    "shift": 3.0,
    "reference_steps": 8,
}


@pytest.fixture
def command(pack, tmp_path):
    """Run with changed settings; None removes one."""

    def run(*arguments, **changed):
        settings = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
        (tmp_path / "run.json").write_text(json.dumps(settings))
        line = [sys.executable, "-m", "dcm_core", "evaluate", "--config", str(tmp_path / "run.json")]
        return subprocess.run(
            [*line, "--output", str(tmp_path / "out"), *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ,
        )

    return run


def test_a_report_is_written(command, tmp_path):
    vae = str(MODELS / "vae" / "zz_dcm_small_world_vae.safetensors")
    done = command(vae=vae, detail_strength=0.6)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1-3 semantic, 4-6 detail, boundary 0.76" in done.stdout and "of the reference's motion" in done.stdout
    assert "Comparing: 100 %" in done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["videos"] == 2 and found["decoded"] and len(found["steps"]) == 6
    assert all(finding in done.stdout for finding in found["findings"])
    with Image.open(tmp_path / "out" / "report.png") as picture:
        assert picture.size[0] == 1280
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.png"]
    again = command()
    assert again.returncode == 2 and "already exist" in again.stderr


@pytest.fixture(scope="module")
def read(module):
    return module("nodes.host.evaluation.command").Evaluation.read


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nothing": 1}, r"Unknown setting 'nothing'\. Valid settings: model, width"),
        ({"model": None}, "The setting model is missing"),
        ({"steps": "6"}, "steps is '6'; expected"),
        ({"cfg": True}, "cfg is True; expected"),
        ({"stacked": 1}, "stacked is 1; expected"),
        ({"conditionings": "a"}, "conditionings is 'a'; expected a list of texts"),
        ({"conditionings": None}, "There is no prompt"),
        ({"prompts": ["a"]}, "text_encoders is missing"),
        ({"negative": "bad"}, "text_encoders is missing"),
        ({"reference_cfg": 5.0}, "reference_cfg is 5, which needs a negative prompt"),
        ({"cfg": float("nan")}, "cfg is nan"),
        ({"frames": 16}, "frames is 16; expected 1 more than a multiple of 4"),
        ({"seeds": 0}, "seeds is 0; expected 1 or more"),
        ({"schedule": "none"}, "schedule is 'none'; choose one of"),
        ({"weight_dtype": "int3"}, "weight_dtype is 'int3'; choose one of"),
        ({"detail": "gone.safetensors"}, r"detail is 'gone\.safetensors', but .* is not a file"),
        ({"vae": "gone.safetensors"}, r"vae is 'gone\.safetensors', but .* is not a file"),
        ({"conditionings": ["gone"]}, "conditionings is 'gone', but .* is not a file"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(read, tmp_path, changed, message):
    settings = {name: value for name, value in {**SETTINGS, **changed}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read(settings, tmp_path)


def test_a_size_that_the_model_does_not_take_is_refused(command):
    done = command(width=72)
    assert done.returncode == 2 and "The size is 72 x 64; expected multiples of 16 pixels" in done.stderr


def test_an_interrupted_write_leaves_no_file(module, tmp_path, monkeypatch):
    command = module("nodes.host.evaluation.command")
    from ...dcm_core.evaluation.test_report import report

    def fail(self):
        raise OSError("no disk")

    monkeypatch.setattr(module("dcm_core.files.unfinished").Unfinished, "finish", fail)
    with pytest.raises(OSError, match="no disk"):
        command.write_report(report(), [tmp_path / "report.json", tmp_path / "report.png"])
    assert list(tmp_path.iterdir()) == []
