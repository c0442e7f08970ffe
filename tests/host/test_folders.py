"""Where files are looked for and written."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest


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
