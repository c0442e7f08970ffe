"""Save and load text embeddings."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.files.conditioning import describe_conditioning, load_conditioning, save_conditioning
from .host.compat import newer
from .host.folders import CONDITIONING, files, fingerprint, new_file, path_of, state_of
from .host.report import report


class DCMSaveConditioning(io.ComfyNode):
    """CONDITIONING -> a file in models/dcm_conditioning."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSaveConditioning",
            display_name="DCM Save Conditioning",
            category="DCM/conditioning",
            description=(
                "Saves text embeddings to a file. You can then use this prompt without loading the text encoder (up to 11 GB for Wan)."
            ),
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The output of a text encode node."),
                io.String.Input("name", default="prompt", tooltip="File name in models/dcm_conditioning."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace an existing file with this name."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="The input, unchanged.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["cache prompt", "save text embeddings"]),
        )

    @classmethod
    def execute(cls, conditioning: Any, name: str, overwrite: bool) -> io.NodeOutput:
        path = new_file(CONDITIONING, name, overwrite)
        save_conditioning(path, conditioning)
        text = f"{path.name}: {describe_conditioning(conditioning)}"
        return io.NodeOutput(conditioning, ui=report(text, cls.hidden.unique_id))


class DCMLoadConditioning(io.ComfyNode):
    """A saved file -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMLoadConditioning",
            display_name="DCM Load Conditioning",
            category="DCM/conditioning",
            description="Loads text embeddings saved by DCM Save Conditioning. No text encoder is needed.",
            inputs=[io.Combo.Input("name", options=files(CONDITIONING), tooltip="A file in models/dcm_conditioning.")],
            outputs=[io.Conditioning.Output(display_name="conditioning", tooltip="For a sampler.")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["cached prompt", "load text embeddings"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, name: str | None) -> int:
        return state_of(CONDITIONING, name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        conditioning = load_conditioning(path_of(CONDITIONING, name, "name"))
        return io.NodeOutput(
            conditioning, ui=report(f"{name}: {describe_conditioning(conditioning)}", cls.hidden.unique_id)
        )


NODES = [DCMSaveConditioning, DCMLoadConditioning]
