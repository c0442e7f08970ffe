"""Wan 2.1 (and every model built on its transformer)."""

from ..keymap import Rule
from ..schedule import TIMESTEPS, Preset, shift_sigma
from .family import Family

WEIGHT = ("weight",)
WHOLE = ("",)

EMBEDDERS = (
    Rule("patch_embedding", "patch_embedding"),
    Rule("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    Rule("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    Rule("condition_embedder.time_proj", "time_projection.1"),
    Rule("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    Rule("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    Rule("condition_embedder.image_embedder.norm1", "img_emb.proj.0", optional=True),
    Rule("condition_embedder.image_embedder.ff.net.0.proj", "img_emb.proj.1", optional=True),
    Rule("condition_embedder.image_embedder.ff.net.2", "img_emb.proj.3", optional=True),
    Rule("condition_embedder.image_embedder.norm2", "img_emb.proj.4", optional=True),
    Rule("condition_embedder.image_embedder.pos_embed", "img_emb.emb_pos", WHOLE, optional=True),
)

ATTENTION = tuple(
    rule
    for source, target in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for rule in (
        Rule(f"blocks.{{n}}.{source}.to_q", f"blocks.{{n}}.{target}.q"),
        Rule(f"blocks.{{n}}.{source}.to_k", f"blocks.{{n}}.{target}.k"),
        Rule(f"blocks.{{n}}.{source}.to_v", f"blocks.{{n}}.{target}.v"),
        Rule(f"blocks.{{n}}.{source}.to_out.0", f"blocks.{{n}}.{target}.o"),
        Rule(f"blocks.{{n}}.{source}.norm_q", f"blocks.{{n}}.{target}.norm_q", WEIGHT),
        Rule(f"blocks.{{n}}.{source}.norm_k", f"blocks.{{n}}.{target}.norm_k", WEIGHT),
    )
)

BLOCKS = (
    *ATTENTION,
    Rule("blocks.{n}.attn2.add_k_proj", "blocks.{n}.cross_attn.k_img", optional=True),
    Rule("blocks.{n}.attn2.add_v_proj", "blocks.{n}.cross_attn.v_img", optional=True),
    Rule("blocks.{n}.attn2.norm_added_k", "blocks.{n}.cross_attn.norm_k_img", WEIGHT, optional=True),
    Rule("blocks.{n}.norm2", "blocks.{n}.norm3"),
    Rule("blocks.{n}.ffn.net.0.proj", "blocks.{n}.ffn.0"),
    Rule("blocks.{n}.ffn.net.2", "blocks.{n}.ffn.2"),
    Rule("blocks.{n}.scale_shift_table", "blocks.{n}.modulation", WHOLE),
)

HEAD = (
    Rule("proj_out", "head.head"),
    Rule("scale_shift_table", "head.modulation", WHOLE),
)

# The levels that the lightx2v LoRA pairs for Wan 2.2 A14B are distilled for (4 steps), and those their authors name for 8.
PAIR_SHIFT = 5.0
PAIR_TIMESTEPS = {
    f"Wan 2.2 {steps} steps (lightx2v)": tuple(TIMESTEPS * shift_sigma(1 - step / steps, PAIR_SHIFT) for step in range(steps))
    for steps in (4, 8)
}

WAN = Family(
    name="wan",
    title="Wan 2.1",
    preset=Preset("wan", "Wan 2.1 6 steps", (1000.0, 992.0, 982.0, 949.0, 905.0, 810.0), boundary=0.979),
    DIFFUSERS_TO_NATIVE=(*EMBEDDERS, *BLOCKS, *HEAD),
    lora_targets=r"blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)",
    detail_modules=("condition_embedder", "proj_out"),
    native_marks=("patch_embedding.weight", "head.modulation", "time_projection.1.weight"),
    text_module="text_embedding.0",
    clip_type="wan",
    block_lists=("blocks",),
    feature_blocks="blocks",
    head="head",
    fps=16,
    feature_weight=10.0,
    pair_boundary={False: 0.875, True: 0.9},
    pair_timesteps=PAIR_TIMESTEPS,
)
