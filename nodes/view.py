"""Look at schedules."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import DCMError
from ..dcm_core.plot import plot_schedule
from .host.compat import newer
from .host.sampling import as_image, choose_boundary


class DCMSchedulePlot(io.ComfyNode):
    """SIGMAS -> IMAGE: noise levels over steps and who owns them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSchedulePlot",
            display_name="DCM Schedule Plot",
            category="DCM/sampling",
            description="Draws the noise levels over the steps, which expert owns which step, and the boundary.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to draw."),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Sigma below which the detail expert works. 0 takes the model's own.",
                ),
                io.Int.Input("width", default=768, min=256, max=4096, step=8, tooltip="Width of the image."),
                io.Int.Input("height", default=432, min=144, max=4096, step=8, tooltip="Height of the image."),
                io.Model.Input("model", optional=True, tooltip="Where boundary 0 reads it."),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="For Preview Image or Save Image.")],
            **newer(search_aliases=["plot sigmas", "sigma graph", "show schedule"]),
        )

    @classmethod
    def execute(cls, sigmas: Any, boundary: float, width: int, height: int, model: Any = None) -> io.NodeOutput:
        sigma = choose_boundary(model, boundary, two_models=False) if model is not None else boundary
        if not sigma:
            raise DCMError("boundary is 0 and no model with a boundary is connected. Set boundary, or connect the model with its experts.")
        return io.NodeOutput(as_image(plot_schedule(sigmas, sigma, width, height)))


NODES = [DCMSchedulePlot]
