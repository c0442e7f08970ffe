"""Where files are looked for and written."""

import importlib
import inspect
import ntpath
import os
import posixpath
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, strategies


def test_new_files_go_to_the_user_and_never_into_the_pack(module, tmp_path, monkeypatch):
    """Also where extra_model_paths.yaml named the category before the pack was loaded."""
    import folder_paths

    folders = module("nodes.host.folders")
    for category in (folders.CONDITIONING, folders.DATASETS):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, category, ([str(tmp_path / "mine")], set()))
    importlib.reload(folders)
    for category in (folders.CONDITIONING, folders.DATASETS):
        path = folders.new_file(category, "prompt", overwrite=True)
        assert path.parent in (tmp_path / "mine", Path(folder_paths.models_dir) / category)
        assert folder_paths.folder_names_and_paths[category][1] == {".safetensors"}


def test_files_of_our_categories_have_the_same_names_on_every_system(module, monkeypatch):
    import folder_paths

    folders = module("nodes.host.folders")
    monkeypatch.setattr(folders, "os", SimpleNamespace(sep="\\"))
    monkeypatch.setattr(folder_paths, "get_filename_list", lambda category: ["world\\a.safetensors"])
    assert folders.files("dcm_conditioning") == folders.files("dcm_datasets") == ["world/a.safetensors"]
    assert folders.files("loras") == ["world\\a.safetensors"]


def test_the_pack_s_own_files_are_last_and_no_default(module, node, tmp_path, monkeypatch):
    """Whatever the user's files are called in our nodes; by the host's own order in all others."""
    import folder_paths

    folders = module("nodes.host.folders")
    for category in (folders.MODELS, folders.LORAS, folders.VAES, folders.CONDITIONING, folders.DATASETS):
        shipped = [path for path in (folders.SHIPPED / category).iterdir()]
        assert shipped and all(path.name.startswith(folders.SHIPPED_PREFIX) for path in shipped)
        mine = tmp_path / category
        mine.mkdir()
        for name in ("z_image_turbo.safetensors", "Zebra.safetensors", "zz.safetensors", "模型.safetensors"):
            (mine / name).touch()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths,
            category,
            ([str(folders.SHIPPED / category), str(mine)], {".safetensors"}),
        )
        monkeypatch.delitem(folder_paths.filename_list_cache, category, raising=False)
        own = [name for name in folders.files(category) if name.startswith(folders.SHIPPED_PREFIX)]
        assert own and folders.files(category)[-len(own) :] == own and len(folders.files(category)) == len(own) + 4
        ascii_names = [name for name in folder_paths.get_filename_list(category) if name.isascii()]
        assert [name.replace("\\", "/") for name in ascii_names[-len(own) :]] == own
        monkeypatch.delitem(folder_paths.filename_list_cache, category, raising=False)
    schema = node.classes["DCMLoadModel"].define_schema()
    assert schema.inputs[0].options[0] == "Zebra.safetensors"


def test_new_files_may_lie_behind_links_but_not_outside(module, tmp_path, monkeypatch):
    """A folder of models that is a link to another disk is common."""
    import folder_paths

    folders, errors = module("nodes.host.folders"), module("dcm_core.errors")
    mine, disk = tmp_path / "loras", tmp_path / "disk"
    for folder in (mine, disk):
        folder.mkdir()
    (mine / "linked").symlink_to(disk, target_is_directory=True)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(mine)], {".safetensors"}))
    path = folders.new_file("loras", "linked/sub/expert", overwrite=False)
    assert path == mine / "linked" / "sub" / "expert.safetensors" and (disk / "sub").is_dir()
    for name in ("../expert", "linked/../../expert", str(tmp_path / "expert"), "", " ", ".", "linked/.."):
        with pytest.raises(errors.DCMError, match="expected a file name inside"):
            folders.new_file("loras", name, overwrite=True)


NO_NAMES = {
    "is not a text": [None, True, 1, 0.5, float("nan"), [], ["a"], {}, {"a": 1}],
    "is empty": ["", " ", "\u3000"],
    "contains invisible characters": [
        "\ud800",
        "a\udcff",
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "\u202egnp.safetensors",
        "a\u2066",
        "a\u200bb",
        "\ufeffa",
        "a\x85",
        "a\u2028b",
    ],
    "contains one of < >": ["<img src=x onerror=alert(1)>.safetensors", "a>b"],
    "is a full path": ["/etc/passwd", "\\\\server\\share\\a", "C:\\a.safetensors", "c:a", "\\a"],
    "points outside the folder": ["..", "../a", "a/../../b", "a\\..\\b", ".", "a//b", "a/", "./a"],
    "is longer than 255 bytes": ["a" * 256, "b/" + "é" * 128 + "/a", "a/" * 3000 + "a", "a" * 10**6],
    "is not a valid file name on Windows": [
        "CON",
        "nul.safetensors",
        "a/com1/b",
        "LPT9.x.y",
        "aux ",
        "a.",
        "b./a",
        "a /b",
        "COM\u00b2",
        "conin$",
    ],
}
EACH = [(name, why) for why, names in NO_NAMES.items() for name in names]
SOUND = [
    "a.safetensors",
    "sub/a b.safetensors",
    "模型/é.safetensors",
    "a\\b",
    "console.safetensors",
    "~a",
    ".a",
    "..a",
    "a" * 255,
    "16:9 a?.pt",
]


@pytest.mark.parametrize(("name", "why"), EACH, ids=lambda value: ascii(value)[:40])
def test_a_name_that_can_be_none_is_refused_for_reading_and_writing(module, name, why):
    folders, errors = module("nodes.host.folders"), module("dcm_core.errors")
    assert folders.fault_of(name) == why
    reading = [
        lambda category=category: folders.path_of(category, name, "model_name")
        for category in (folders.MODELS, folders.LORAS)
    ]
    for read in reading:
        with pytest.raises(
            errors.CheckpointError, match=f"model_name is .*{why}; expected the name of a file in models/"
        ) as caught:
            read()
        assert str(caught.value).encode() and len(str(caught.value)) < 500
    if isinstance(name, str) and folders.fault_of(name.strip()) is None:
        return  # blanks around a name that was typed are no part of it
    for write in (lambda: folders.new_file(folders.LORAS, name, overwrite=True), lambda: folders.run_folder(name)):
        with pytest.raises(
            errors.CheckpointError, match=r"The output name is .*; expected a file name inside .*Choose another name"
        ):
            write()


@pytest.mark.parametrize("name", SOUND)
def test_sound_names_are_none_of_these(module, name):
    assert module("nodes.host.folders").fault_of(name) is None


@pytest.mark.parametrize("name", ["ab:c", "16:9 wan", "who?", "a|b", 'say "x"', "*"])
def test_files_are_not_written_under_names_that_windows_has_not(module, name):
    with pytest.raises(ValueError, match=r"which contains one of : \" \| \? \*; expected a file name inside"):
        module("nodes.host.folders").new_file("loras", name, overwrite=True)


def test_files_are_read_through_the_user_s_links_and_no_name_leaves_the_folder(module, tmp_path, monkeypatch):
    import folder_paths

    folders = module("nodes.host.folders")
    mine, disk = tmp_path / "loras", tmp_path / "disk"
    for folder in (mine, disk):
        folder.mkdir()
    (disk / "a.safetensors").touch()
    (tmp_path / "secret.safetensors").touch()
    (mine / "linked").symlink_to(disk, target_is_directory=True)
    (mine / "b.safetensors").symlink_to(disk / "a.safetensors")
    (mine / "<b>.safetensors").touch()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(mine)], {".safetensors"}))
    assert folders.files("loras") == ["b.safetensors", "linked/a.safetensors"]
    for name in folders.files("loras"):
        assert folders.path_of("loras", name).samefile(disk / "a.safetensors")
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "linked/../../secret.safetensors"):
        with pytest.raises(ValueError, match=r"points outside the folder|is a full path"):
            folders.path_of("loras", name)


def test_a_file_is_not_written_through_a_link_to_a_file(module, tmp_path, monkeypatch):
    import folder_paths
    import torch

    folders, writing = module("nodes.host.folders"), module("dcm_core.files.writing")
    mine, other = tmp_path / "loras", tmp_path / "other.safetensors"
    mine.mkdir()
    other.write_bytes(b"mine")
    (mine / "a.safetensors").symlink_to(other)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(mine)], {".safetensors"}))
    with pytest.raises(ValueError, match="already exists"):
        folders.new_file("loras", "a", overwrite=False)
    writing.write_tensors(folders.new_file("loras", "a", overwrite=True), {"x": torch.zeros(1)}, {})
    assert other.read_bytes() == b"mine" and not (mine / "a.safetensors").is_symlink()


@pytest.mark.parametrize("name", ["\0", "a" * 5000, "\ud800", "~\u202e", "x/" * 3000, None, 3])
def test_a_path_that_no_disk_has_is_refused(module, name):
    errors = module("dcm_core.errors")
    with pytest.raises(errors.DCMError, match=r"Enter the path of a folder of videos, or of a \.jsonl file"):
        module("nodes.host.folders").source_path(name)


def test_a_file_written_again_is_another_state(module, tmp_path, monkeypatch):
    import folder_paths

    folders = module("nodes.host.folders")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    file, states = tmp_path / "a.safetensors", []
    for seconds in (1, 2):
        file.touch()
        os.utime(file, (seconds, seconds))
        states.append(folders.state_of("loras", file.name))
    assert states == [10**9, 2 * 10**9]
    assert folders.state_of("loras", "none") == folders.state_of("loras", None) == 0


def test_no_fingerprint_raises(node):
    """Neither for what clients may send, nor for files that are gone."""
    names = [name for name, _ in EACH] + [
        "gone.safetensors",
        "loras/gone.safetensors",
        "none",
        "~nobody-of-this-name/x",
        "\0",
    ]
    asked = 0
    for cls in node.classes.values():
        if "fingerprint_inputs" not in vars(cls):
            continue
        parameters = inspect.signature(cls.fingerprint_inputs).parameters.values()
        wanted = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        for value in names:
            cls.fingerprint_inputs(**dict.fromkeys(wanted, value))
            asked += 1
    assert asked > 9 * len(names)


@given(
    name=strategies.text(strategies.characters(exclude_categories=()), max_size=40)
    | strategies.text("./\\\\ :~aCON\0", max_size=12)
)
def test_no_name_leaves_its_folder(module, name):
    folders, errors = module("nodes.host.folders"), module("dcm_core.errors")
    if folders.fault_of(name) is None:
        for paths in (posixpath, ntpath):
            root = "C:\\models" if paths is ntpath else "/models"
            assert paths.normpath(paths.join(root, name)).startswith(root + paths.sep)
    try:
        run = folders.run_folder(name)
    except errors.CheckpointError as error:
        assert str(error).encode()
    else:
        assert run.parent == Path(os.path.normpath(run)).parent and "dcm_training" in run.parts[:-1]


def test_files_that_cannot_be_offered_are_named_once(module, tmp_path, monkeypatch, caplog):
    import folder_paths

    folders = module("nodes.host.folders")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    for name in ("<b>", "a\u202eb", "good"):
        (tmp_path / f"{name}.safetensors").touch()
    with caplog.at_level("WARNING"):
        for _ in range(3):
            assert folders.files("loras") == ["good.safetensors"]
    (line,) = caplog.messages
    assert line.startswith(
        r"Some files in models/loras are not listed because their names cannot be used: <b>.safetensors, a\u202eb.safetensors. Rename"
    )
