"""ComfyUI-DCM: run, convert and train Dual-Expert Consistency Models in ComfyUI."""

import importlib.util

WEB_DIRECTORY = "./web"

# A test runner collects this folder without the host.
if __package__ and importlib.util.find_spec("comfy_api"):

    async def comfy_entrypoint():
        """What ComfyUI calls for the nodes of the pack."""
        from .nodes import DCMExtension

        return DCMExtension()


__all__ = ["WEB_DIRECTORY"]
