"""Wan 2.1 (and every model built on its transformer)."""

from ..schedule import TIMESTEPS, Preset, shift_sigma
from .family import Family
from .keymap import Rule

WEIGHT = ("weight",)
WHOLE = ("",)

# Layers that only some models have.
IMAGE = "image layers"
VACE = "VACE layers"

EMBEDDERS = (
    Rule("patch_embedding", "patch_embedding"),
    Rule("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    Rule("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    Rule("condition_embedder.time_proj", "time_projection.1"),
    Rule("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    Rule("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    Rule("condition_embedder.image_embedder.norm1", "img_emb.proj.0", optional=IMAGE),
    Rule("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", optional=IMAGE),
    Rule("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", optional=IMAGE),
    Rule("condition_embedder.image_embedder.norm2", "img_emb.proj.4", optional=IMAGE),
    Rule("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", WHOLE, optional=IMAGE),
)


def _block(block: str, optional: str = "") -> tuple[Rule, ...]:
    """The layers of a numbered block, which has the same name in both layouts."""
    attention = (("attn1", "self_attn"), ("attn2", "cross_attn"))
    linears = (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"))
    return (
        *(
            Rule(f"{block}.{source}.{layer}", f"{block}.{target}.{native}", optional=optional)
            for source, target in attention
            for layer, native in linears
        ),
        *(
            Rule(f"{block}.{source}.{norm}", f"{block}.{target}.{norm}", WEIGHT, optional=optional)
            for source, target in attention
            for norm in ("norm_q", "norm_k")
        ),
        Rule(f"{block}.norm2", f"{block}.norm3", optional=optional),
        Rule(f"{block}.ffn.net.0.proj", f"{block}.ffn.0", optional=optional),
        Rule(f"{block}.ffn.net.2", f"{block}.ffn.2", optional=optional),
        Rule(f"{block}.scale_shift_table", f"{block}.modulation", WHOLE, optional=optional),
    )


BLOCKS = (
    *_block("blocks.{n}"),
    Rule("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img", optional=IMAGE),
    Rule("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img", optional=IMAGE),
    Rule("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img", WEIGHT, optional=IMAGE),
)

# They read the control video, and the output of each is added to a main block.
VACE_BLOCKS = (
    Rule("vace_patch_embedding", "vace_patch_embedding", optional=VACE),
    *_block("vace_blocks.{n}", VACE),
    Rule("vace_blocks.{n}.proj_in", "vace_blocks.{n}.before_proj", optional=VACE),
    Rule("vace_blocks.{n}.proj_out", "vace_blocks.{n}.after_proj", optional=VACE),
)

HEAD = (
    Rule("proj_out", "head.head"),
    Rule("scale_shift_table", "head.modulation", WHOLE),
)

# The levels that lightx2v's two LoRAs for Wan 2.2 A14B are distilled for (4 steps), and their authors' levels for 8 steps.
PAIR_SHIFT = 5.0
PAIR_TIMESTEPS = {
    name: tuple(TIMESTEPS * shift_sigma(1 - step / steps, PAIR_SHIFT) for step in range(steps))
    for name, steps in (("Wan 2.2 4 steps (lightx2v)", 4), ("Wan 2.2 8 steps (lightx2v)", 8))
}

WAN = Family(
    name="wan",
    title="Wan 2.1",
    preset=Preset("wan", "Wan 2.1 6 steps", (1000.0, 992.0, 982.0, 949.0, 905.0, 810.0), boundary=0.979),
    DIFFUSERS_TO_NATIVE=(*EMBEDDERS, *BLOCKS, *VACE_BLOCKS, *HEAD),
    lora_targets=r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    detail_modules=("condition_embedder", "proj_out"),
    native_marks=("patch_embedding.weight", "head.modulation", "time_projection.1.weight"),
    text_module="text_embedding.0",
    convolutions=("patch_embedding", "vace_patch_embedding"),
    clip_type="wan",
    block_lists=("blocks",),
    feature_blocks="blocks",
    head="head",
    fps=16,
    feature_weight=10.0,
    pair_boundary={False: 0.875, True: 0.9},
    pair_timesteps=PAIR_TIMESTEPS,
)
