"""Load a base model or a released checkpoint."""

from typing import Any

from comfy_api.latest import io

from .host.compat import newer
from .host.experts.load import WEIGHT_DTYPES, load_model
from .host.folders import MODELS, files, fingerprint, state_of
from .host.report import report


class DCMLoadModel(io.ComfyNode):
    """A model file of any layout -> MODEL, with the detail expert on it if the file has one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMLoadModel",
            display_name="DCM Load Model (Wan, Hunyuan)",
            category="DCM/loaders",
            description=(
                "Loads a video model. A released DCM checkpoint (Wan 2.1, HunyuanVideo) comes with both experts and is ready "
                "to sample. Any other model loads as in Load Diffusion Model. The node recognises the file by its content."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=files(MODELS),
                    tooltip="A file in models/diffusion_models: a DCM release, or a base model in native or diffusers layout.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="How the base weights are kept in memory. fp8 halves their size; the expert stays in full precision.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The base model, with the experts from its file.")],
            hidden=[io.Hidden.unique_id],
            **newer(
                search_aliases=[
                    "load wan",
                    "load hunyuanvideo",
                    "dual expert",
                    "consistency model",
                    "load dcm",
                    "wan dcm",
                    "hunyuan dcm",
                ]
            ),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, model_name: str | None, **inputs: Any) -> int:
        return state_of(MODELS, model_name)

    @classmethod
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        model, line = load_model(model_name, weight_dtype, cls.hidden.unique_id)
        return io.NodeOutput(model, ui=report(line, cls.hidden.unique_id))


NODES = [DCMLoadModel]
