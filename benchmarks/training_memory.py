"""What a training run is said to need before its first step, for the real model sizes: arithmetic on tensors without values.

    COMFYUI_PATH=<ComfyUI> python benchmarks/training_memory.py [--first <rows>] [--measure]

Base and steps are made on PyTorch's meta device by the code that a run asks (`Trainer.memory`), at the full length of the video.
Attention is the flash kernel's, which keeps no matrix of scores. A detail expert stands on a semantic LoRA of its own rank.

`--measure` makes real steps of the Wan rows on the GPU, with random weights, and prints the most that PyTorch had allocated beside it.
"""

import argparse
import gc
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from routing import DIM, FFN, HEADS, TEXT_DIM, TEXT_TOKENS, random_base, start_host
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

META = torch.device("meta")
WAN, WAN_14B, HUNYUAN_VIDEO = "Wan 2.1 1.3B, 832x480", "Wan 14B, 832x480", "HunyuanVideo 13B, 832x480"
LATENT = (60, 104)
CARDS = (1, 2, 8)
# name, frames of the video, dtype of the base, settings, numbers of GPUs
ROWS: list[tuple[str, int, torch.dtype, dict[str, Any], Sequence[int]]] = [
    (WAN, 81, torch.bfloat16, {"side": "semantic"}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "semantic", "offload_activations": True}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "semantic", "gradient_checkpointing": False}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "semantic", "rank": 32}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "semantic", "rank": 0}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "detail"}, (1,)),
    (WAN, 81, torch.bfloat16, {"side": "detail", "adversarial_weight": 0.0}, (1,)),
    (WAN, 49, torch.bfloat16, {"side": "semantic"}, (1,)),
    (WAN, 49, torch.bfloat16, {"side": "detail"}, (1,)),
    (WAN, 33, torch.float8_e4m3fn, {"side": "semantic", "rank": 32}, (1,)),
    (WAN, 33, torch.float8_e4m3fn, {"side": "detail", "rank": 32}, (1,)),
    (HUNYUAN_VIDEO, 29, torch.bfloat16, {"side": "semantic"}, (1,)),
    (HUNYUAN_VIDEO, 29, torch.float8_e4m3fn, {"side": "semantic", "rank": 32}, (1,)),
    (HUNYUAN_VIDEO, 29, torch.float8_e4m3fn, {"side": "detail", "rank": 32}, (1,)),
    *(
        (name, frames, torch.bfloat16, settings, CARDS)
        for name, frames in ((WAN_14B, 81), (HUNYUAN_VIDEO, 29))
        for settings in ({"side": "semantic"}, {"side": "semantic", "rank": 0}, {"side": "detail"})
    ),
]


def transformer(name: str, dtype: torch.dtype) -> nn.Module:
    """The host's model class in the real size, without values."""
    import comfy.ops
    from comfy.ldm.hunyuan_video.model import HunyuanVideo
    from comfy.ldm.wan.model import WanModel

    place = {"operations": comfy.ops.manual_cast, "device": META, "dtype": dtype}
    if name == WAN:
        return WanModel(dim=DIM, ffn_dim=FFN, num_heads=HEADS, num_layers=30, text_dim=TEXT_DIM, **place)
    if name == WAN_14B:
        return WanModel(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=TEXT_DIM, **place)
    return HunyuanVideo(
        in_channels=16,
        out_channels=16,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=20,
        depth_single_blocks=40,
        axes_dim=[16, 56, 56],
        theta=256,
        patch_size=[1, 2, 2],
        qkv_bias=True,
        guidance_embed=True,
        byt5=False,
        meanflow=False,
        use_cond_type_embedding=False,
        vision_in_dim=None,
        image_model="hunyuan_video",
        **place,
    )


def flash_attention(
    _: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, skip_reshape: bool = False, **__: Any
) -> Tensor:
    """Attention with what a flash kernel keeps: the output, and one number for each row of each head."""
    if not skip_reshape:
        q, k, v = (value.unflatten(-1, (heads, -1)).transpose(1, 2) for value in (q, k, v))
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out.transpose(1, 2).flatten(2)


def out_of_sight(*, pin_memory: bool) -> saved_tensors_hooks:
    """As `save_on_cpu`, for tensors without values: only their shapes wait for the backward pass."""
    return saved_tensors_hooks(
        lambda tensor: (tensor.shape, tensor.dtype, tensor.device),
        lambda kept: torch.empty(kept[0], dtype=kept[1], device=kept[2]),
    )


def random_clip(pack: Callable[[str], Any], frames: int, extras: dict[str, Any]) -> Any:
    """One clip of so many frames with its text, as training data."""
    text = [[torch.randn(1, TEXT_TOKENS, TEXT_DIM), extras]]
    return pack("dcm_core.distill.data.dataset").TensorDataset(
        [torch.randn(16, 1 + (frames - 1) // 4, *LATENT)], [text], [0], text
    )


def without_values(expert: Any) -> Any:
    """The expert with tensors on the meta device."""
    low_rank = {
        name: tuple(replace(update, down=update.down.to(META), up=update.up.to(META)) for update in updates)
        for name, updates in expert.low_rank.items()
    }
    return replace(
        expert, low_rank=low_rank, replaced={name: value.to(META) for name, value in expert.replaced.items()}
    )


def memory(
    pack: Callable[[str], Any], name: str, frames: int, dtype: torch.dtype, settings: dict[str, Any], cards: int
) -> Any:
    """What the run is said to need on each of so many GPUs, which divide everything among them."""
    families, students = pack("dcm_core.families"), pack("dcm_core.distill.student")
    family = families.HUNYUAN_VIDEO if name == HUNYUAN_VIDEO else families.WAN
    config = pack("dcm_core.distill.config").TrainingConfig(**settings).for_family(family)
    module = transformer(name, dtype).requires_grad_(False)
    modules, generator = dict(module.named_modules()), torch.Generator()
    shapes = {key: value.shape for key, value in module.state_dict().items()}

    def new(make: Callable[..., Any], **more: Any) -> Any:
        with patch.object(students, "_free", Tensor.detach):
            made = make(
                family,
                modules,
                config.rank,
                config.alpha,
                generator,
                weight_of=lambda key: torch.empty(shapes[key], device=META),
                **more,
            )
        return without_values(made)

    semantic = new(students.new_semantic) if config.side == "detail" else None
    expert = new(students.new_semantic) if semantic is None else new(students.new_detail, semantic=semantic)
    data = random_clip(pack, frames, {"pooled_output": torch.zeros(1, 768)} if name == HUNYUAN_VIDEO else {})
    backbone = pack("dcm_core.distill.backbone").Backbone(
        module,
        family,
        torch.bfloat16,
        lambda: {"optimized_attention_override": flash_attention},
        config.gradient_checkpointing,
        config.offload_activations,
    )
    sharding, processes = pack("dcm_core.distill.sharding"), pack("dcm_core.distill.parallel").Processes
    with (
        tempfile.TemporaryDirectory() as folder,
        pack("nodes.host.compat").gradients(),
        # nothing is made, so that the whole video can be
        patch.object(pack("dcm_core.distill.memory"), "PROBE", 10**9),
        patch.object(pack("dcm_core.distill.backbone"), "save_on_cpu", out_of_sight),
        patch.object(sharding, "_gathered", lambda part, count: part.new_empty(count * part.numel())),
        patch.object(sharding, "_scattered_mean", lambda flat, count: flat.new_empty(flat.numel() // count)),
    ):
        trainer = pack("dcm_core.distill.trainer").Trainer(
            backbone,
            data,
            config,
            replace(expert, boundary=config.boundary),
            Path(folder),
            META,
            semantic,
            processes=processes(0, cards, sharded=cards > 1),
        )
        estimate = trainer.memory()
    # FSDP2 itself needs tensors with values
    return replace(estimate, base=estimate.base // cards)


def measure(
    pack: Callable[[str], Any], frames: int, dtype: torch.dtype, settings: dict[str, Any], steps: int = 3
) -> tuple[float, float]:
    """(GiB at the peak, seconds a step) of a run on a Wan base of random weights."""
    gc.collect()
    torch.cuda.empty_cache()
    model = random_base(30, dtype)
    attach, students = pack("nodes.host.experts.attach"), pack("dcm_core.distill.student")
    config = pack("dcm_core.distill.config").TrainingConfig(**settings, steps=steps)
    family, modules = attach.require_family(model), dict(attach.diffusion_model(model).named_modules())
    semantic = (
        students.new_semantic(family, modules, config.rank, config.alpha, torch.Generator())
        if config.side == "detail"
        else None
    )
    data = random_clip(pack, frames, {})
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        result = pack("nodes.host.training.run").train_expert(model, data, config, Path(folder), semantic=semantic)
    return torch.cuda.max_memory_allocated() / 2**30, result.seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="make real steps of the Wan rows on the GPU")
    parser.add_argument("--first", type=int, default=1000, help="so many rows of the table (default: all)")
    args = parser.parse_args()
    pack = start_host()
    measured = " measured | seconds a step |" if args.measure else ""
    head = (
        f"| model | frames | base | settings | GPUs | base, GiB | experts and optimiser | a step | in all |{measured}"
    )
    print(head, "|---" * (head.count("|") - 1) + "|", sep="\n")
    rows = [(*row, count) for *row, cards in ROWS for count in cards]
    for name, frames, dtype, settings, cards in rows[: args.first]:
        parts = memory(pack, name, frames, dtype, settings, cards).parts.values()
        told = ", ".join(f"{key} {value}" for key, value in settings.items())
        sizes = [f"{size:.1f}" for size in (*parts, sum(parts))]
        if args.measure:
            sizes += [f"{value:.1f}" for value in measure(pack, frames, dtype, settings)] if name == WAN else ["", ""]
        print(
            f"| {name} | {frames} | {str(dtype).removeprefix('torch.')} | {told} | {cards} | {' | '.join(sizes)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
