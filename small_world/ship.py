"""Write what the pack ships of the small world: base, VAE, the two experts, the captions' embeddings, some of
the base's own videos to train on.

    COMFYUI_PATH=... python small_world/ship.py <folder with models and runs>
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import host

# isort: split
import torch
from distill import load_base, load_data, load_expert
from torch import Tensor
from world import CAPTIONS, embed

MODELS = Path(__file__).parent / "models"
TRAINING_CLIPS = 96
# Numbers that each expert may have. All that is shipped, but for the videos, stays below 15 MB.
SEMANTIC_VALUES, DETAIL_VALUES = 1_740_000, 1_480_000
# The captions have a dozen words: the first layer that reads them is large, and has learned no more than these.
TEXT_LAYER, TEXT_RANK = "text_embedding.0", 16

tensor_file, writing = host.pack("dcm_core.files.tensor_file"), host.pack("dcm_core.files.writing")
conditioning = host.pack("dcm_core.files.conditioning")
experts, extract = host.pack("dcm_core.experts.expert"), host.pack("dcm_core.extract")
attach = host.pack("nodes.host.experts.attach")


def copy_in_half(source: Path, target: Path) -> None:
    """The same tensors and metadata in bfloat16."""
    file = tensor_file.TensorFile(source)
    tensors = {key: value.bfloat16() if value.ndim else value for key, value in file.read_all().items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    writing.write_tensors(target, tensors, file.metadata)


def compact(expert: Any, values: int) -> Any:
    """The expert in at most `values` numbers: each matrix that it adds as a low-rank pair, or whole where this is smaller.

    Ranks go where they keep most of the energy (squared norm) for their size; the text layer's is TEXT_RANK.
    """
    added = {name: value for name, value in expert.diff.items() if value.ndim == 2}
    others = {name: value for name, value in expert.diff.items() if name not in added}
    generator = torch.Generator().manual_seed(0)
    pairs = {name: extract.truncate(value, min(value.shape), generator)[:2] for name, value in added.items()}
    text = f"{TEXT_LAYER}.weight"
    gains = [(math.inf, text)] * TEXT_RANK + sorted(
        (
            (float(energy) / sum(added[name].shape), name)
            for name, (down, up) in pairs.items()
            if name != text
            for energy in down.square().sum(1) * up.square().sum(0)
        ),
        reverse=True,
    )
    left = values - sum(value.numel() for value in (*others.values(), *expert.replaced.values()))
    ranks, sizes = dict.fromkeys(added, 0), dict.fromkeys(added, 0)
    for _, name in gains:
        size = min((ranks[name] + 1) * sum(added[name].shape), added[name].numel())
        if left < size - sizes[name]:
            break
        left -= size - sizes[name]
        ranks[name], sizes[name] = ranks[name] + 1, size
    whole = {name: value for name, value in added.items() if sizes[name] == value.numel()}
    low_rank = {
        name.removesuffix(".weight"): (experts.LowRank(down[: ranks[name]], up[:, : ranks[name]], scale=1.0),)
        for name, (down, up) in pairs.items()
        if ranks[name] and name not in whole
    }
    return dataclasses.replace(expert, low_rank=low_rank, diff=others | whole)


def write_experts(folder: Path, base: Any, target: Path) -> None:
    """The two experts, the semantic one as what it adds to the base, the detail one as what it adds to that."""
    weights = {name: value.detach().float() for name, value in base.model.diffusion_model.named_parameters()}
    semantic, detail = load_expert(folder, "semantic", base), load_expert(folder, "detail", base)

    def of_semantic(name: str) -> Tensor:
        return experts.merged(semantic, name, weights.__getitem__)

    diff = {name: of_semantic(name) - weights[name] for name in semantic.replaced}
    small = compact(dataclasses.replace(semantic, replaced={}, diff=diff), SEMANTIC_VALUES)
    # to the semantic expert as it is shipped: what that one lost is in it too
    names = [f"{TEXT_LAYER}.weight", f"{TEXT_LAYER}.bias", *(f"{module}.weight" for module in detail.low_rank)]
    diff = {
        name: experts.merged(detail, name, of_semantic) - experts.merged(small, name, weights.__getitem__)
        for name in names
    }
    own = {name: value for name, value in detail.replaced.items() if name not in names}
    found = {
        "semantic": small,
        "detail": compact(dataclasses.replace(detail, low_rank={}, replaced=own, diff=diff), DETAIL_VALUES),
    }
    target.mkdir(parents=True, exist_ok=True)
    for side, expert in found.items():
        experts.write_expert(
            target / f"zz_dcm_small_world_{side}.safetensors", expert, attach.module_shapes(base), torch.bfloat16
        )


def write_captions(folder: Path) -> None:
    """An embedding file for every caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for caption in CAPTIONS:
        conditioning.save_conditioning(folder / f"{caption}.safetensors", [[embed(caption)[None], {}]], caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    copy_in_half(args.folder / "base.safetensors", MODELS / "diffusion_models" / "zz_dcm_small_world_base.safetensors")
    copy_in_half(args.folder / "vae.safetensors", MODELS / "vae" / "zz_dcm_small_world_vae.safetensors")
    base = load_base(args.folder)
    write_experts(args.folder, base, MODELS / "loras")
    write_captions(MODELS / "dcm_conditioning" / "zz_dcm_small_world")
    data = load_data(args.folder, base, TRAINING_CLIPS)
    path = MODELS / "dcm_datasets" / "zz_dcm_small_world.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    host.pack("dcm_core.distill.data.dataset_file").write_dataset(path, data, torch.bfloat16)
    sizes = {file.relative_to(MODELS).parts[0]: 0 for file in MODELS.rglob("*.safetensors")}
    for file in MODELS.rglob("*.safetensors"):
        sizes[file.relative_to(MODELS).parts[0]] += file.stat().st_size
    print({name: f"{size / 1e6:.2f} MB" for name, size in sizes.items()})


if __name__ == "__main__":
    main()
