"""Convert releases, extract LoRAs, export experts."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.convert import DTYPES, KEEP, convert_release
from ..dcm_core.errors import CheckpointError, check_choice
from ..dcm_core.export import DIFFUSERS, PEFT, TITLES, export_expert
from ..dcm_core.extract import extract_lora
from ..dcm_core.release import write_release
from .host.compat import newer
from .host.devices import compute_device
from .host.experts.expert_files import state_of_expert
from .host.folders import LORAS, MODELS, NONE, files, fingerprint, new_file, path_of, state_of
from .host.progress import byte_progress
from .host.report import report

OVERWRITE_TIP = "Replace existing files with these names."
RELEASE = "DCM release"
FORMATS = [RELEASE, TITLES[PEFT], TITLES[DIFFUSERS]]


class DCMConvertCheckpoint(io.ComfyNode):
    """A released checkpoint -> a native base file and an expert file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMConvertCheckpoint",
            display_name="DCM Convert Checkpoint",
            category="DCM/convert",
            description=(
                "Splits a released DCM checkpoint into a base model in ComfyUI's own layout (models/diffusion_models) and a "
                "detail expert (models/loras). Works tensor by tensor in under 2 GB of memory."
            ),
            inputs=[
                io.Combo.Input(
                    "model_name", options=files(MODELS), tooltip="A released checkpoint, or any diffusers-layout file."
                ),
                io.String.Input(
                    "base_name",
                    default="dcm_semantic_base",
                    tooltip="Name of the base file in models/diffusion_models.",
                ),
                io.String.Input(
                    "expert_name", default="dcm_detail_expert", tooltip="Name of the expert file in models/loras."
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default=KEEP,
                    tooltip="Number format of the base. keep leaves it unchanged. float8_e4m3fn converts only the matrices of the blocks.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip=OVERWRITE_TIP),
            ],
            outputs=[
                io.String.Output(display_name="base_file", tooltip="Path of the new base file."),
                io.String.Output(
                    display_name="expert_file", tooltip="Path of the new expert file; empty if there was no expert."
                ),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["split checkpoint", "diffusers to comfyui", "convert dcm"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, model_name: str | None = NONE, **inputs: Any) -> int:
        return state_of(MODELS, model_name)

    @classmethod
    def execute(cls, model_name: str, base_name: str, expert_name: str, dtype: str, overwrite: bool) -> io.NodeOutput:
        check_choice("dtype", dtype, DTYPES, CheckpointError)
        result = convert_release(
            path_of(MODELS, model_name, "model_name"),
            # which files it writes is known, and checked, once the checkpoint has been read
            new_file(MODELS, base_name, overwrite=True),
            new_file(LORAS, expert_name, overwrite=True),
            DTYPES[dtype],
            byte_progress(cls.hidden.unique_id),
            overwrite,
        )
        shown = report(str(result), cls.hidden.unique_id)
        return io.NodeOutput(str(result.base), str(result.expert or ""), ui=shown)


class DCMExtractLoRA(io.ComfyNode):
    """A full fine-tune and its base -> a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMExtractLoRA",
            display_name="DCM Extract LoRA",
            category="DCM/convert",
            description="Turns a full fine-tune into a small semantic expert: the low-rank part of its difference from the base model.",
            inputs=[
                io.Combo.Input("tuned_model", options=files(MODELS), tooltip="The full fine-tune, e.g. a DCM release."),
                io.Combo.Input("base_model", options=files(MODELS), tooltip="The model it was fine-tuned from."),
                io.Int.Input(
                    "rank",
                    default=128,
                    min=1,
                    max=4096,
                    tooltip="Rank of every layer. A higher rank keeps more detail and makes a larger file.",
                ),
                io.String.Input(
                    "name", default="dcm_semantic_expert", tooltip="Name of the LoRA file in models/loras."
                ),
                io.Boolean.Input("overwrite", default=False, tooltip=OVERWRITE_TIP),
            ],
            outputs=[
                io.String.Output(display_name="lora_file", tooltip="Path of the new LoRA file."),
                io.String.Output(display_name="layers", tooltip="Rank, energy kept and relative error of every layer."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["extract difference", "svd lora", "model to lora"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(
        cls, tuned_model: str | None = NONE, base_model: str | None = NONE, **inputs: Any
    ) -> list[int]:
        return [state_of(MODELS, tuned_model), state_of(MODELS, base_model)]

    @classmethod
    def execute(cls, tuned_model: str, base_model: str, rank: int, name: str, overwrite: bool) -> io.NodeOutput:
        result = extract_lora(
            path_of(MODELS, tuned_model, "tuned_model"),
            path_of(MODELS, base_model, "base_model"),
            new_file(LORAS, name, overwrite),
            rank,
            device=compute_device(),
            progress=byte_progress(cls.hidden.unique_id),
            overwrite=overwrite,
        )
        return io.NodeOutput(str(result.path), result.table(), ui=report(str(result), cls.hidden.unique_id))


class DCMExportExpert(io.ComfyNode):
    """An expert file -> a release, a PEFT adapter, or a LoRA for diffusers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        floats = [name for name, dtype in DTYPES.items() if dtype is None or dtype.itemsize > 1]
        return io.Schema(
            node_id="DCMExportExpert",
            display_name="DCM Export Expert",
            category="DCM/convert",
            description=(
                "Writes an expert for use outside ComfyUI: a file in the layout of the official release, a PEFT adapter, or a LoRA "
                "for diffusers. The text on the node lists everything that the format cannot store."
            ),
            inputs=[
                io.Combo.Input(
                    "expert", options=files(LORAS), tooltip="The expert file. For a DCM release: the detail expert."
                ),
                io.Combo.Input(
                    "format",
                    options=FORMATS,
                    tooltip=(
                        "DCM release: base and both experts in one file for the official code. PEFT adapter: a folder with LoRA and "
                        "replaced layers. diffusers LoRA: a file for load_lora_weights, LoRA only."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="dcm_export",
                    tooltip="Name of the file or folder: in models/diffusion_models for a DCM release, else in models/loras.",
                ),
                io.Combo.Input(
                    "base_model",
                    options=[NONE, *files(MODELS)],
                    default=NONE,
                    tooltip="The base model of the experts. Only used with format = DCM release.",
                ),
                io.Combo.Input(
                    "semantic_lora",
                    options=[NONE, *files(LORAS)],
                    default=NONE,
                    tooltip=(
                        "Semantic expert to merge into the base; none if the base is the semantic expert. Only used with format = DCM "
                        "release."
                    ),
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=4096,
                    tooltip=(
                        "Pads the LoRA with zeros to this rank; the official scripts expect 128. 0 keeps the expert's rank. Only used "
                        "with format = DCM release."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=floats,
                    default=KEEP,
                    tooltip="Number format of all tensors. keep leaves it unchanged.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip=OVERWRITE_TIP),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Path of the new file or folder.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["peft", "diffusers lora", "release", "merge experts"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(
        cls,
        expert: str | None = NONE,
        base_model: str | None = NONE,
        semantic_lora: str | None = NONE,
        **inputs: Any,
    ) -> list[Any]:
        return [state_of_expert(expert), state_of(MODELS, base_model), state_of_expert(semantic_lora)]

    @classmethod
    def execute(
        cls,
        expert: str,
        format: str,
        name: str,
        base_model: str,
        semantic_lora: str,
        rank: int,
        dtype: str,
        overwrite: bool,
    ) -> io.NodeOutput:
        check_choice("format", format, FORMATS, CheckpointError)
        check_choice("dtype", dtype, DTYPES, CheckpointError)
        source = path_of(LORAS, expert, "expert")
        # checked for every format: not every host checks what its clients send
        base = None if base_model == NONE else path_of(MODELS, base_model, "base_model")
        semantic = None if semantic_lora == NONE else path_of(LORAS, semantic_lora, "semantic_lora")
        settings = {
            "dtype": DTYPES[dtype],
            "progress": byte_progress(cls.hidden.unique_id),
            "overwrite": overwrite,
        }
        if format == RELEASE:
            if base is None:
                raise CheckpointError(
                    "base_model is none, but a DCM release contains the base model too. Select the base model of these experts."
                )
            result = write_release(
                base,
                source,
                new_file(MODELS, name, overwrite),
                semantic,
                rank=rank,
                **settings,
            )
        else:
            to = next(to for to, title in TITLES.items() if title == format)
            out = new_file(LORAS, name, overwrite or to == PEFT)
            result = export_expert(source, out.with_suffix("") if to == PEFT else out, to, **settings)
        return io.NodeOutput(str(result.path), ui=report(str(result), cls.hidden.unique_id))


NODES = [DCMConvertCheckpoint, DCMExtractLoRA, DCMExportExpert]
