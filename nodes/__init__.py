"""The nodes of the pack."""

from comfy_api.latest import ComfyExtension, io

from . import conditioning, convert, experts, load, sample, schedule, view

NODES: list[type[io.ComfyNode]] = [
    node for module in (load, experts, sample, schedule, view, convert, conditioning) for node in module.NODES
]


class DCMExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
