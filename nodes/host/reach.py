"""Which folders clients of the server may have read."""

import ipaddress
from collections.abc import Sequence
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ...dcm_core.distill.data.sources import is_within
from ...dcm_core.errors import DCMError
from .folders import source_path

REFUSED = (
    "`folder` is outside the folders that this server may read. As it accepts connections from other machines, these are ComfyUI's "
    "input, output and model folders, also those of extra_model_paths.yaml. Move the clips to the input folder."
)


def clip_source(name: str) -> tuple[Path, Sequence[Path] | None]:
    """The folder or list that `name` means, and the folders that all clips have to be in; None: anywhere.

    Raises:
        DCMError: no name, or one outside these folders, in the same words whether it exists or not.
    """
    roots = None if only_this_machine(args.listen) else allowed_folders()
    try:
        source = source_path(name)
    except RuntimeError as error:
        # `~` of a user that does not exist; that one exists is no business of other machines either
        raise DCMError(
            REFUSED if roots else f"`folder` is {name!r}, which names no user of this machine. Enter a full path."
        ) from error
    if not is_within(source, roots):
        raise DCMError(REFUSED)
    return source, roots


def only_this_machine(listen: str) -> bool:
    """Whether all addresses that the host listens on are of this machine alone."""
    return all(map(_is_loopback, listen.split(",")))


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.strip()).is_loopback
    except ValueError:
        # any other name is resolved by the network
        return address.strip() == "localhost"


def allowed_folders() -> list[Path]:
    """The host's input, output and configured model folders, links resolved; not the code and settings of node packs."""
    kinds = folder_paths.folder_names_and_paths.keys() - {"custom_nodes"}
    configured = [folder for kind in kinds for folder in folder_paths.get_folder_paths(kind)]
    named = [folder_paths.get_input_directory(), folder_paths.get_output_directory(), *configured]
    # without what is no full path, and without a whole disk: packs register all kinds of things
    return sorted({path.resolve() for path in map(Path, named) if path.is_absolute() and path != path.parent})
