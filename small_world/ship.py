"""Write what the pack ships of the small world: base, VAE, the two experts, the captions' embeddings, some of
the base's own videos to train on.

    COMFYUI_PATH=... python small_world/ship.py <folder with models and runs>
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import host

# isort: split
import torch
from distill import load_base, load_data, load_expert, training
from world import CAPTIONS, embed

MODELS = Path(__file__).parent / "models"
TRAINING_CLIPS = 96
# The semantic expert is trained whole. Its large matrices are kept as pairs of RANK; the captions have a dozen words, so that the
# first layer that reads them has learned no more than that.
RANK, TEXT_LAYER, TEXT_RANK = 88, "text_embedding.0", 16

storage, conditioning = host.pack("dcm_core.storage"), host.pack("dcm_core.conditioning")
experts, extract = host.pack("dcm_core.experts"), host.pack("dcm_core.extract")


def copy_in_half(source: Path, target: Path) -> None:
    """The same tensors and metadata in bfloat16."""
    file = storage.TensorFile(source)
    tensors = {key: value.bfloat16() if value.ndim else value for key, value in file.read_all().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    storage.write_tensors(target, tensors, file.metadata)


def compact(expert: Any, base: Any) -> Any:
    """A full fine-tune as what it adds to the base, each matrix as a pair where this is smaller."""
    weights = dict(base.model.diffusion_model.named_parameters())
    low_rank, diff = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, value in expert.replaced.items():
        module, _, param = name.rpartition(".")
        difference = value.float() - weights[name].detach().float()
        rank = TEXT_RANK if module == TEXT_LAYER else RANK
        if param == "weight" and value.ndim == 2 and rank * sum(value.shape) < value.numel():
            down, up, _ = extract.truncate(difference, rank, generator)
            low_rank[module] = (experts.LowRank(down, up, scale=1.0),)
        else:
            diff[name] = difference
    return dataclasses.replace(expert, low_rank=low_rank, replaced={}, diff=diff)


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
    base = load_base(args.folder)
    copy_in_half(args.folder / "detail.safetensors", MODELS / "loras" / "dcm_small_world_detail.safetensors")
    semantic, path = compact(load_expert(args.folder, "semantic", base), base), MODELS / "loras" / "dcm_small_world_semantic.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    training.save_expert(path, semantic, base)
    write_captions(MODELS / "dcm_conditioning" / "dcm_small_world")
    data = load_data(args.folder, base, TRAINING_CLIPS)
    path = MODELS / "dcm_datasets" / "dcm_small_world.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    host.pack("dcm_core.distill.data_file").write_data(path, data, torch.bfloat16)
    sizes = {file.relative_to(MODELS).parts[0]: 0 for file in MODELS.rglob("*.safetensors")}
    for file in MODELS.rglob("*.safetensors"):
        sizes[file.relative_to(MODELS).parts[0]] += file.stat().st_size
    print({name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()})


if __name__ == "__main__":
    main()
