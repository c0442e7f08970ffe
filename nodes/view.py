"""Look at schedules."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.errors import DCMError
from ..dcm_core.inspection.plot import DARK, THEMES, plot_schedule
from ..dcm_core.routing import plan_steps
from .host.compat import newer
from .host.experts.expert_files import last_written
from .host.experts.inspect import file_names, inspect, path_of_choice
from .host.folders import NONE, fingerprint
from .host.report import report_picture
from .host.sampling.run import as_image, prepare_model
from .host.sampling.setup import plan_run


class DCMSchedulePlot(io.ComfyNode):
    """SIGMAS -> IMAGE: noise levels over steps and who runs them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSchedulePlot",
            display_name="DCM Schedule Plot",
            category="DCM/sampling",
            description="Draws the noise levels over the steps, which expert runs which step, and the boundary.",
            inputs=[
                io.Sigmas.Input("sigmas", tooltip="The schedule to draw."),
                io.Float.Input(
                    "boundary",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip="Sigma below which the detail side works. 0 uses the model's own, as in DCM Sampler.",
                ),
                io.Int.Input("width", default=768, min=256, max=4096, step=8, tooltip="Width of the image."),
                io.Int.Input("height", default=432, min=144, max=4096, step=8, tooltip="Height of the image."),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to sample. Only its active experts are drawn. Needed if boundary is 0.",
                ),
                io.Model.Input(
                    "detail_model", optional=True, tooltip="The second full model, if DCM Sampler has one (Wan 2.2)."
                ),
                io.Combo.Input(
                    "theme", options=list(THEMES), default=DARK, optional=True, tooltip="Colours of the plot."
                ),
            ],
            outputs=[io.Image.Output(display_name="plot", tooltip="For Preview Image or Save Image.")],
            **newer(search_aliases=["plot sigmas", "sigma graph", "show schedule"]),
        )

    @classmethod
    def execute(
        cls,
        sigmas: Any,
        boundary: float,
        width: int,
        height: int,
        model: Any = None,
        detail_model: Any = None,
        theme: str = DARK,
    ) -> io.NodeOutput:
        if model is None:
            if not boundary:
                raise DCMError(
                    "boundary is 0 and no model is connected. Set boundary, or connect the model with its experts."
                )
            plan = plan_steps(sigmas, boundary)
        else:
            prepared, boundary = prepare_model(model, boundary, detail_model)
            plan = plan_run(prepared, sigmas, boundary)
        return io.NodeOutput(as_image(plot_schedule(sigmas, plan, width, height, theme)))


class DCMInspectModel(io.ComfyNode):
    """A file or a MODEL -> what it contains, in words and as a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMInspectModel",
            display_name="DCM Inspect Model",
            category="DCM/loaders",
            description=(
                "Shows what a file or a model contains: family, experts, rank, boundary, strengths, matched keys, and how much each "
                "expert changes each block. With a file and a model, it says whether the file fits."
            ),
            inputs=[
                io.Combo.Input(
                    "file",
                    options=file_names(),
                    default=NONE,
                    tooltip="A model or expert file in models/diffusion_models or models/loras. none shows the connected model only.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model to inspect. If a file is selected too, the node checks its keys and measures its changes against this "
                    "model.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What was found, one item per line."),
                io.Image.Output(
                    display_name="plot",
                    tooltip="How much each expert changes each block, for Preview Image or Save Image.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(
                search_aliases=[
                    "what is this file",
                    "model info",
                    "lora info",
                    "check lora",
                    "matched keys",
                    "expert magnitude",
                ]
            ),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, file: str, **inputs: Any) -> tuple[int, ...]:
        return last_written(path_of_choice(file)) if file != NONE else ()

    @classmethod
    def execute(cls, file: str, model: Any = None) -> io.NodeOutput:
        text, plot = inspect(file, model, cls.hidden.unique_id)
        return io.NodeOutput(text, plot, ui=report_picture(text, plot, cls.hidden.unique_id))


NODES = [DCMSchedulePlot, DCMInspectModel]
