"""Write what the pack ships of the small world: base, VAE, the two experts, the captions' embeddings, some of
the base's own videos to train on.

    COMFYUI_PATH=... python small_world/ship.py <folder with models and runs>
"""

import argparse
from pathlib import Path

import host

# isort: split
import torch
from distill import load_base, load_data
from world import CAPTIONS, embed

MODELS = Path(__file__).parent / "models"
TRAINING_CLIPS = 96
# shipped under the names of their runs in distill.py
EXPERTS = ("semantic", "detail")

storage, conditioning = host.pack("dcm_core.storage"), host.pack("dcm_core.conditioning")


def copy_in_half(source: Path, target: Path) -> None:
    """The same tensors and metadata in bfloat16."""
    file = storage.TensorFile(source)
    tensors = {key: value.bfloat16() if value.ndim else value for key, value in file.read_all().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write_tensors(target, tensors, file.metadata)


def write_captions(folder: Path) -> None:
    """An embedding file for every caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for caption in CAPTIONS:
        conditioning.save_conditioning(folder / f"{caption}.safetensors", [[embed(caption)[None], {}]], caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    copy_in_half(args.folder / "base.safetensors", MODELS / "diffusion_models" / "dcm_small_world_base.safetensors")
    copy_in_half(args.folder / "vae.safetensors", MODELS / "vae" / "dcm_small_world_vae.safetensors")
    for name in EXPERTS:
        copy_in_half(args.folder / f"{name}.safetensors", MODELS / "loras" / f"dcm_small_world_{name}.safetensors")
    write_captions(MODELS / "dcm_conditioning" / "dcm_small_world")
    data = load_data(args.folder, load_base(args.folder), TRAINING_CLIPS)
    path = MODELS / "dcm_datasets" / "dcm_small_world.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    host.pack("dcm_core.distill.data_file").write_data(path, data, torch.bfloat16)
    sizes = {file.relative_to(MODELS).parts[0]: 0 for file in MODELS.rglob("*.safetensors")}
    for file in MODELS.rglob("*.safetensors"):
        sizes[file.relative_to(MODELS).parts[0]] += file.stat().st_size
    print({name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()})


if __name__ == "__main__":
    main()
