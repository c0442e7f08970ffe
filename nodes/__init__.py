"""The nodes of the pack."""

from comfy_api.latest import ComfyExtension, io

from . import conditioning, convert, dataset, evaluate, experts, load, sample, schedule, table, train, video_size, view
from .host.compat import tell_newer_host
from .host.sampling.plan_route import add_route

NODES: list[type[io.ComfyNode]] = [
    node
    for module in (
        load,
        experts,
        table,
        sample,
        schedule,
        video_size,
        view,
        evaluate,
        convert,
        conditioning,
        dataset,
        train,
    )
    for node in module.NODES
]


class DCMExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # the host of 0.3.75 never calls on_load
        add_route()
        tell_newer_host()
        return NODES
