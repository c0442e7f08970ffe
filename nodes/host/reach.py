"""Which folders the clients of this server may read."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ...dcm_core.distill.data.sources import is_within
from ...dcm_core.errors import DCMError
from .folders import source_path

REFUSED = (
    "`folder` is outside the folders that this server may read. Because it accepts connections from other machines, it reads only "
    "ComfyUI's input, output and model folders, and those in extra_model_paths.yaml. Move the clips to the input folder."
)


def clip_source(name: str) -> tuple[Path, Sequence[Path] | None]:
    """The folder or list called `name`, and the folders that all clips must be in (None: anywhere).

    Raises:
        DCMError: no name, or one outside these folders. The text is the same whether it exists or not.
    """
    roots = None if only_this_machine(args.listen) else allowed_folders()
    try:
        source = source_path(name)
    except RuntimeError as error:
        # `~` of a user that does not exist; other machines must not learn which users do
        raise DCMError(
            REFUSED if roots else f"`folder` is {name!r}, but this machine has no such user. Enter a full path."
        ) from error
    if not is_within(source, roots):
        raise DCMError(REFUSED)
    return source, roots


def only_this_machine(listen: str) -> bool:
    """Whether the host listens only on addresses of this machine."""
    return all(map(_is_loopback, listen.split(",")))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        # other names are resolved by the network
        return address.strip() == "localhost"


def allowed_folders() -> list[Path]:
    """The host's input, output and configured model folders, links resolved; not the folders of node packs."""
    kinds = folder_paths.folder_names_and_paths.keys() - {"custom_nodes"}
    configured = [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    named = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), *configured]
    # packs register all kinds of things: skip relative paths and the root of a disk
    return sorted({path.resolve() for path in map(Path, named) if path.is_absolute() and path != path.parent})
