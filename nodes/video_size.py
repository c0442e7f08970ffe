"""How large and how long a video is to be."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.video_size import FORMATS, SHAPES, video_size
from .host.compat import newer
from .host.report import report
from .host.sampling.setup import video_format

AUTOMATIC = "automatic"


class DCMVideoSize(io.ComfyNode):
    """Seconds and a shape -> width, height, frames and frames per second that the model takes."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMVideoSize",
            display_name="DCM Video Size (seconds, aspect)",
            category="DCM/sampling",
            description=(
                "Turns seconds and a shape into a width, a height and a number of frames that the model takes. Connect them to "
                "the empty latent node, and fps to Create Video."
            ),
            inputs=[
                io.Combo.Input(
                    "model_type",
                    options=[AUTOMATIC, *FORMATS],
                    default=AUTOMATIC,
                    tooltip="The model the video is for. automatic: read it from the connected model.",
                ),
                io.Float.Input("seconds", default=5.0, min=0.1, max=120.0, step=0.1, tooltip="Length of the video."),
                io.Combo.Input("shape", options=list(SHAPES), default="16:9", tooltip="Width to height."),
                io.Float.Input(
                    "megapixels",
                    default=0.4,
                    min=0.01,
                    max=8.0,
                    step=0.01,
                    tooltip="Size of a frame in millions of pixels: 0.4 for 480p, 0.92 for 720p.",
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="The model to sample. Only used with model_type = automatic."
                ),
            ],
            outputs=[
                io.Int.Output(display_name="width", tooltip="Width in pixels."),
                io.Int.Output(display_name="height", tooltip="Height in pixels."),
                io.Int.Output(display_name="length", tooltip="Number of frames."),
                io.Float.Output(display_name="fps", tooltip="Frames per second, for Create Video."),
            ],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["video length", "seconds to frames", "aspect ratio", "resolution", "frame count"]),
        )

    @classmethod
    def execute(
        cls, model_type: str, seconds: float, shape: str, megapixels: float, model: Any = None
    ) -> io.NodeOutput:
        size = video_size(video_format(model) if model_type == AUTOMATIC else model_type, seconds, shape, megapixels)
        shown = report(str(size), cls.hidden.unique_id)
        return io.NodeOutput(size.width, size.height, size.length, float(size.fps), ui=shown)


NODES = [DCMVideoSize]
