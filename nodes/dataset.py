"""Training data."""

from typing import Any

from comfy_api.latest import io

from ..dcm_core.distill.data.clips import WINDOWS, ClipSettings
from ..dcm_core.distill.data.dataset_file import read_dataset, write_dataset
from ..dcm_core.distill.data.encode import prepare
from ..dcm_core.distill.data.sources import check_source, source_state
from ..dcm_core.errors import DCMError, counted
from .host.compat import newer
from .host.folders import DATASETS, data_cache, files, fingerprint, new_file, path_of, state_of
from .host.progress import byte_progress
from .host.reach import clip_source
from .host.report import report
from .host.training.encoders import host_encoders
from .host.training.image import IMAGE_CONDITIONINGS, NO_IMAGE

Dataset = io.Custom("DCM_DATASET")


class DCMVideoDataset(io.ComfyNode):
    """A folder of clips -> DCM_DATASET, encoded in output/dcm_cache."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMVideoDataset",
            display_name="DCM Video Dataset (training)",
            category="DCM/training",
            description=(
                "Checks clips with captions and encodes each one once for training. Unchanged clips come from the cache in "
                "output/dcm_cache. Clips that cannot be used are left out and listed."
            ),
            inputs=[
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="A folder of videos, including its subfolders. The caption of each video is in a .txt file of the same name. "
                    "Or a list of videos and captions: a .jsonl, .json or .csv file. Enter a full path, or a path in the input directory.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model to train."),
                io.Clip.Input("clip", tooltip="The text encoder of the model to train."),
                io.Int.Input(
                    "width", default=832, min=16, max=4096, step=16, tooltip="Width of the training clips in pixels."
                ),
                io.Int.Input(
                    "height", default=480, min=16, max=4096, step=16, tooltip="Height of the training clips in pixels."
                ),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=1,
                    max=1001,
                    step=4,
                    tooltip="Length of the training clips in frames: 1 more than a multiple of 4.",
                ),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Frames per second that the model is made for: 16 for Wan 2.1, 24 for HunyuanVideo.",
                ),
                io.Boolean.Input(
                    "buckets",
                    default=True,
                    tooltip="On: each clip nearly keeps its own aspect ratio, at about the same area. "
                    "Off: all clips are cropped to width x height.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Negative prompt, which guidance moves away from.",
                ),
                io.Combo.Input(
                    "image_conditioning",
                    options=list(IMAGE_CONDITIONINGS),
                    default=NO_IMAGE,
                    optional=True,
                    tooltip="For image-to-video models of Wan: the frames of each clip that the model takes as images. none is text to "
                    "video.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Only for image-to-video models of Wan 2.1, which also see their images through CLIP vision.",
                ),
                io.Combo.Input(
                    "window",
                    options=list(WINDOWS),
                    default=ClipSettings.window,
                    optional=True,
                    tooltip="The part of a longer clip that is used. random chooses once for each clip. all cuts a clip into several "
                    "training clips.",
                ),
                io.Int.Input(
                    "window_seed",
                    default=ClipSettings.window_seed,
                    min=0,
                    max=2**31,
                    control_after_generate=False,
                    optional=True,
                    tooltip="Seed of the random windows. Only used with window = random.",
                ),
                io.Boolean.Input(
                    "images",
                    default=ClipSettings.images,
                    optional=True,
                    tooltip="Also uses images with captions, each as a video of one frame. Only for text to video.",
                ),
                io.String.Input(
                    "sample_prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts of the sample videos, one per line. If it is empty, the caption of the first clip is used.",
                ),
            ],
            outputs=[Dataset.Output(display_name="dataset", tooltip="Encoded clips for a training node.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["video training", "training data", "video folder", "cache latents"]),
        )

    @classmethod
    def validate_inputs(cls, folder: str | None, images: bool | None = ClipSettings.images) -> bool | str:
        # None: it comes from another node, whose text is not known yet
        try:
            if folder is not None:
                check_source(*clip_source(folder), bool(images))
        except DCMError as error:
            return str(error)
        return True

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, folder: str | None, images: bool | None = ClipSettings.images, **settings: Any) -> str:
        return source_state(*clip_source(folder), bool(images)) if folder is not None else ""

    @classmethod
    def execute(
        cls,
        folder: str,
        vae: Any,
        clip: Any,
        width: int,
        height: int,
        frames: int,
        fps: float,
        buckets: bool,
        negative: str = "",
        image_conditioning: str = NO_IMAGE,
        clip_vision: Any = None,
        window: str = ClipSettings.window,
        window_seed: int = ClipSettings.window_seed,
        images: bool = ClipSettings.images,
        sample_prompts: str = "",
    ) -> io.NodeOutput:
        source, roots = clip_source(folder)
        dataset = prepare(
            source,
            ClipSettings(frames, fps, width, height, buckets, window, window_seed, images),
            host_encoders(vae, clip, image_conditioning, clip_vision),
            data_cache(),
            negative,
            byte_progress(cls.hidden.unique_id),
            roots,
            sample_prompts=[line.strip() for line in sample_prompts.splitlines() if line.strip()],
        )
        return io.NodeOutput(dataset, ui=report(dataset.report(), cls.hidden.unique_id))


class DCMSaveDataset(io.ComfyNode):
    """DCM_DATASET -> one file in models/dcm_datasets."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMSaveDataset",
            display_name="DCM Save Dataset",
            category="DCM/training",
            description="Saves encoded training data to one file, so that you can train without VAE and text encoder.",
            inputs=[
                Dataset.Input("dataset", tooltip="Encoded clips from DCM Video Dataset."),
                io.String.Input("file_name", default="dataset", tooltip="File name in models/dcm_datasets."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace an existing file with this name."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
            **newer(search_aliases=["cache dataset", "export latents"]),
        )

    @classmethod
    def execute(cls, dataset: Any, file_name: str, overwrite: bool) -> io.NodeOutput:
        path = new_file(DATASETS, file_name, overwrite)
        write_dataset(path, dataset, progress=byte_progress(cls.hidden.unique_id))
        return io.NodeOutput(ui=report(f"Saved {counted(len(dataset), 'clip')} to {path}", cls.hidden.unique_id))


class DCMLoadDataset(io.ComfyNode):
    """A file of models/dcm_datasets -> DCM_DATASET."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DCMLoadDataset",
            display_name="DCM Load Dataset",
            category="DCM/training",
            description="Loads encoded training data from a file. No VAE or text encoder is needed.",
            inputs=[io.Combo.Input("file_name", options=files(DATASETS), tooltip="A file in models/dcm_datasets.")],
            outputs=[Dataset.Output(display_name="dataset", tooltip="Encoded clips for a training node.")],
            hidden=[io.Hidden.unique_id],
            **newer(search_aliases=["training data", "cached latents"]),
        )

    @classmethod
    @fingerprint
    def fingerprint_inputs(cls, file_name: str | None) -> int:
        return state_of(DATASETS, file_name)

    @classmethod
    def execute(cls, file_name: str) -> io.NodeOutput:
        data = read_dataset(path_of(DATASETS, file_name, "file_name"), byte_progress(cls.hidden.unique_id))
        line = f"{counted(len(data), 'clip')}, {counted(len(data.buckets), 'size')}"
        return io.NodeOutput(data, ui=report(line, cls.hidden.unique_id))


NODES = [DCMVideoDataset, DCMSaveDataset, DCMLoadDataset]
