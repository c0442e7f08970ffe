"""`python -m dcm_core`: the same work with arguments, a bar, and errors without a traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cli import commands
from cli.commands import main, progress_line
from dcm_core.families import WAN
from dcm_core.files.tensor_file import TensorFile

from ..dcm_core.conftest import make_release, without_experts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def source(save):
    return save(make_release(WAN), "release.safetensors")


@pytest.fixture
def base(save):
    plain = without_experts(WAN, make_release(WAN))
    return save({key: tensor * 0.9 for key, tensor in plain.items()}, "base.safetensors")


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_convert(source, tmp_path, capsys):
    targets = tmp_path / "b.safetensors", tmp_path / "e.safetensors"
    assert run("convert", source, *targets, "--dtype", "float32") == 0
    captured = capsys.readouterr()
    assert str(targets[0]) in captured.out and "detail expert: LoRA rank 8" in captured.out
    assert "100%" in captured.err
    assert set(TensorFile(targets[0]).dtypes.values()) == {torch.float32}
    assert run("convert", source, *targets) == 2
    assert "already exist" in capsys.readouterr().err
    assert run("convert", source, *targets, "--overwrite") == 0


def test_extract(source, base, tmp_path, capsys):
    out = tmp_path / "l.safetensors"
    assert run("extract", source, base, out, "--rank", 3, "--dtype", "float16") == 0
    captured = capsys.readouterr()
    assert "layers at rank 3" in captured.out and "%" in captured.out
    assert "100%" in captured.err
    assert torch.float16 in TensorFile(out).dtypes.values()
    assert run("extract", source, base, out, "--overwrite", "--layers") == 0
    assert "blocks.0.self_attn.q\t8\t" in capsys.readouterr().out


def test_export_to_a_release(source, tmp_path, capsys):
    base, expert, back = (tmp_path / f"{name}.safetensors" for name in ("b", "e", "back"))
    assert run("convert", source, base, expert) == 0
    assert run("export", expert, back, "--to", "release", "--base", base) == 0
    captured = capsys.readouterr()
    assert "DCM release" in captured.out and "LoRA rank 8" in captured.out and "100%" in captured.err
    found, wanted = load_file(back), load_file(source)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert run("export", expert, back, "--to", "release", "--base", base, "--rank", 16, "--dtype", "float32") == 2
    assert "already exists" in capsys.readouterr().err
    assert run("export", expert, back, "--to", "release", "--base", base, "--rank", 16, "--overwrite") == 0
    assert "LoRA rank 16" in capsys.readouterr().out


def test_export_a_semantic_expert_into_a_release(source, base, tmp_path, capsys):
    native, expert, lora, back = (tmp_path / f"{name}.safetensors" for name in ("b", "e", "l", "back"))
    none = tmp_path / "none.safetensors"
    assert run("convert", source, none, expert) == run("convert", base, native, none) == 0
    assert run("extract", source, base, lora, "--rank", 64, "--dtype", "float32") == 0
    assert run("export", expert, back, "--to", "release", "--base", native, "--semantic", lora) == 0
    found, wanted = load_file(back), load_file(source)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key].float(), tensor.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("to", "name"), [("peft", "folder"), ("diffusers", "lora.safetensors")])
def test_export_for_other_tools(source, tmp_path, capsys, to, name):
    out = tmp_path / name
    assert run("export", source, out, "--to", to, "--dtype", "float16") == 0
    captured = capsys.readouterr()
    assert str(out) in captured.out and "Load it with" in captured.out and "100%" in captured.err
    assert out.is_dir() if to == "peft" else "Left out" in captured.out
    assert run("export", source, out, "--to", to, "--rank", 8) == 2
    assert "only used with --to release" in capsys.readouterr().err


def test_a_release_needs_a_base(source, tmp_path, capsys):
    assert run("export", source, tmp_path / "x", "--to", "release") == 2
    assert "Name its file with --base" in capsys.readouterr().err


def test_inspect(source, base, capsys):
    assert run("inspect", source, base) == 0
    out = capsys.readouterr().out
    assert "Wan 2.1" in out and "semantic, detail" in out and "no experts" in out


@pytest.mark.parametrize("count", [1, 2])
def test_inspect_for_programs(source, base, count, capsys):
    assert run("inspect", "--json", *[source, base][:count]) == 0
    data = json.loads(capsys.readouterr().out)
    reports = data if isinstance(data, list) else [data]
    assert [report["path"] for report in reports] == list(map(str, [source, base][:count]))


def test_one_bad_file_does_not_hide_the_others(source, tmp_path, capsys):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    assert run("inspect", bad, source) == 2
    captured = capsys.readouterr()
    assert str(bad) in captured.err
    assert str(source) in captured.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nowhere.safetensors"), "nowhere.safetensors does not exist"),
        (("convert", "nowhere.safetensors", "a", "b"), "nowhere.safetensors does not exist"),
        (("extract", "nowhere.safetensors", "b", "c"), "nowhere.safetensors does not exist"),
        (("extract", "a", "b", "c", "--rank", "0"), "rank is 0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_a_name_that_the_system_does_not_take_is_one_line(source, tmp_path, capsys):
    long = tmp_path / f"{'x' * 300}.safetensors"
    for arguments in (("inspect", long), ("convert", source, long, tmp_path / "e.safetensors")):
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and "too long" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "none.json cannot be read as settings"),
        ("list.json", b"[1]", "list.json contains a list; expected settings by name"),
        ("cut.json", b'{"model": ', "cut.json cannot be read as settings (Expecting value"),
        ("deep.json", b"[" * 100_000, "deep.json cannot be read as settings (maximum recursion depth"),
        ("long.json", b'{"steps": ' + b"1" * 5000 + b"}", "long.json cannot be read as settings (Exceeds the limit"),
        ("bytes.json", b"\xff\xfe", "bytes.json cannot be read as settings ('utf-8' codec can't decode"),
        ("cut.toml", b"steps = ", "cut.toml cannot be read as settings (Invalid value"),
        ("good.json", b"{}", "ComfyUI was not found in nowhere (no comfy/sd.py). Name its folder with --comfyui"),
    ],
)
def test_settings_that_cannot_be_read_are_one_line(name, content, message, tmp_path, capsys, monkeypatch):
    """A wrong --comfyui is not passed over for another ComfyUI."""
    (tmp_path / "comfy").mkdir()
    (tmp_path / "comfy" / "sd.py").touch()
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert run("train", "semantic", "--config", tmp_path / name, "--comfyui", "nowhere") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message in captured.err and captured.err.count("\n") == 1


def test_a_comfyui_that_this_python_cannot_import_is_one_line(tmp_path):
    (tmp_path / "comfy").mkdir()
    for name, text in (
        ("options", "def enable_args_parsing(): pass"),
        ("cli_args", ""),
        ("sd", "import no_such_package"),
    ):
        (tmp_path / "comfy" / f"{name}.py").write_text(text)
    (tmp_path / "run.json").write_text("{}")
    command = [sys.executable, "-m", "dcm_core", "train", "semantic", "--config", str(tmp_path / "run.json")]
    done = subprocess.run([*command, "--comfyui", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot be imported as ComfyUI (No module named 'no_such_package'). Run this with ComfyUI's" in done.stderr


def test_a_device_that_is_not_there(source, base, tmp_path, capsys):
    try:
        status = run("extract", source, base, tmp_path / "l.safetensors", "--device", "cuda:77")
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert "cuda:77" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nothing",),
        ("convert",),
        ("inspect",),
        ("evaluate", "--config", "a"),
        ("convert", "a", "b", "c", "--dtype", "int3"),
        ("extract", "a", "b", "c", "--device", "x y"),
        ("export", "a", "b"),
        ("export", "a", "b", "--to", "zip"),
        ("export", "a", "b", "--to", "peft", "--dtype", "float8_e4m3fn"),
    ],
)
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    assert "usage: python -m dcm_core" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("convert", "--overwrite"),
        ("extract", "--rank"),
        ("export", "--semantic"),
        ("inspect", "--json"),
        ("evaluate", "--output"),
    ],
)
def test_help(command, option, capsys):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    assert option in capsys.readouterr().out


def test_bar_of_nothing(capsys):
    progress_line("nothing")(0, 0)
    assert "nothing" in capsys.readouterr().err


def test_as_a_program(tmp_path):
    command = [sys.executable, "-m", "dcm_core", "inspect", str(tmp_path / "nowhere.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_what_ends_a_command_from_outside_can_be_caught_by_it(monkeypatch, capsys, tmp_path):
    """A training run saves itself then; launchers and batch systems send SIGTERM."""
    caught = []

    def work(_):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            caught.append("saved")
            raise

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(commands, "inspect", work)
    try:
        assert run("inspect", tmp_path) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught == ["saved"] and capsys.readouterr().err == "interrupted\n"


def test_nothing_that_acts_reaches_the_terminal(save, tmp_path, capsys):
    """Neither from a file's name nor from what is in it."""
    colour = "\x1b[31m"
    file = save({f"{colour}.lora_A.weight": torch.zeros(1)}, f"{colour}.safetensors", {"dcm.family": colour})
    assert run("inspect", file) == 0
    assert run("inspect", file, tmp_path / f"no {colour}") == 2
    shown = capsys.readouterr()
    assert r"\x1b[31m" in shown.out and r"\x1b[31m" in shown.err
    assert "\x1b" not in shown.out + shown.err
