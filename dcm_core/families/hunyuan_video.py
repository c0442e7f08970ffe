"""HunyuanVideo."""

from ..schedule import Preset
from .family import Family
from .keymap import Rule

WHOLE = ("",)
WEIGHT = ("weight",)
SCALE = ("scale",)


def _mlp_embedder(source: str, target: str, optional: str = "") -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.linear_1", f"{target}.in_layer", optional=optional),
        Rule(f"{source}.linear_2", f"{target}.out_layer", optional=optional),
    )


def _fused(names: tuple[str, ...], target: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, target, part=part) for part, name in enumerate(names))


EMBEDDERS = (
    Rule("x_embedder.proj", "img_in.proj"),
    *_mlp_embedder("time_text_embed.timestep_embedder", "time_in"),
    *_mlp_embedder("time_text_embed.guidance_embedder", "guidance_in", optional="guidance layers"),
    *_mlp_embedder("time_text_embed.text_embedder", "vector_in"),
    *_mlp_embedder("context_embedder.time_text_embed.timestep_embedder", "txt_in.t_embedder"),
    *_mlp_embedder("context_embedder.time_text_embed.text_embedder", "txt_in.c_embedder"),
    Rule("context_embedder.proj_in", "txt_in.input_embedder"),
)

REFINER = "context_embedder.token_refiner.refiner_blocks.{n}"
NATIVE_REFINER = "txt_in.individual_token_refiner.blocks.{n}"
REFINER_BLOCKS = (
    Rule(f"{REFINER}.norm1", f"{NATIVE_REFINER}.norm1"),
    Rule(f"{REFINER}.norm2", f"{NATIVE_REFINER}.norm2"),
    *_fused(tuple(f"{REFINER}.attn.to_{name}" for name in "qkv"), f"{NATIVE_REFINER}.self_attn.qkv"),
    Rule(f"{REFINER}.attn.to_out.0", f"{NATIVE_REFINER}.self_attn.proj"),
    Rule(f"{REFINER}.ff.net.0.proj", f"{NATIVE_REFINER}.mlp.0"),
    Rule(f"{REFINER}.ff.net.2", f"{NATIVE_REFINER}.mlp.2"),
    Rule(f"{REFINER}.norm_out.linear", f"{NATIVE_REFINER}.adaLN_modulation.1"),
)

DOUBLE = "transformer_blocks.{n}"
NATIVE_DOUBLE = "double_blocks.{n}"
DOUBLE_BLOCKS = (
    Rule(f"{DOUBLE}.norm1.linear", f"{NATIVE_DOUBLE}.img_mod.lin"),
    Rule(f"{DOUBLE}.norm1_context.linear", f"{NATIVE_DOUBLE}.txt_mod.lin"),
    *_fused(tuple(f"{DOUBLE}.attn.to_{name}" for name in "qkv"), f"{NATIVE_DOUBLE}.img_attn.qkv"),
    *_fused(tuple(f"{DOUBLE}.attn.add_{name}_proj" for name in "qkv"), f"{NATIVE_DOUBLE}.txt_attn.qkv"),
    Rule(f"{DOUBLE}.attn.to_out.0", f"{NATIVE_DOUBLE}.img_attn.proj"),
    Rule(f"{DOUBLE}.attn.to_add_out", f"{NATIVE_DOUBLE}.txt_attn.proj"),
    Rule(f"{DOUBLE}.attn.norm_q", f"{NATIVE_DOUBLE}.img_attn.norm.query_norm", WEIGHT, SCALE),
    Rule(f"{DOUBLE}.attn.norm_k", f"{NATIVE_DOUBLE}.img_attn.norm.key_norm", WEIGHT, SCALE),
    Rule(f"{DOUBLE}.attn.norm_added_q", f"{NATIVE_DOUBLE}.txt_attn.norm.query_norm", WEIGHT, SCALE),
    Rule(f"{DOUBLE}.attn.norm_added_k", f"{NATIVE_DOUBLE}.txt_attn.norm.key_norm", WEIGHT, SCALE),
    Rule(f"{DOUBLE}.ff.net.0.proj", f"{NATIVE_DOUBLE}.img_mlp.0"),
    Rule(f"{DOUBLE}.ff.net.2", f"{NATIVE_DOUBLE}.img_mlp.2"),
    Rule(f"{DOUBLE}.ff_context.net.0.proj", f"{NATIVE_DOUBLE}.txt_mlp.0"),
    Rule(f"{DOUBLE}.ff_context.net.2", f"{NATIVE_DOUBLE}.txt_mlp.2"),
)

SINGLE = "single_transformer_blocks.{n}"
NATIVE_SINGLE = "single_blocks.{n}"
SINGLE_BLOCKS = (
    Rule(f"{SINGLE}.norm.linear", f"{NATIVE_SINGLE}.modulation.lin"),
    *_fused((*(f"{SINGLE}.attn.to_{name}" for name in "qkv"), f"{SINGLE}.proj_mlp"), f"{NATIVE_SINGLE}.linear1"),
    Rule(f"{SINGLE}.proj_out", f"{NATIVE_SINGLE}.linear2"),
    Rule(f"{SINGLE}.attn.norm_q", f"{NATIVE_SINGLE}.norm.query_norm", WEIGHT, SCALE),
    Rule(f"{SINGLE}.attn.norm_k", f"{NATIVE_SINGLE}.norm.key_norm", WEIGHT, SCALE),
)

HEAD = (
    # diffusers keeps (scale, shift), the native layer (shift, scale)
    Rule("norm_out.linear", "final_layer.adaLN_modulation.1", swap_halves=True),
    Rule("proj_out", "final_layer.linear"),
)

# Newer versions of ComfyUI call `.weight` what older ones and released files call `.scale`.
NORMS = (
    *(f"{NATIVE_DOUBLE}.{stream}_attn.norm.{name}_norm" for stream in ("img", "txt") for name in ("query", "key")),
    *(f"{NATIVE_SINGLE}.norm.{name}_norm" for name in ("query", "key")),
)

ORIGINAL = (
    *(Rule(norm, norm, WEIGHT, SCALE) for norm in NORMS),
    *(Rule(f"{norm}.scale", norm, WHOLE, SCALE) for norm in NORMS),
    *(
        Rule(
            f"{NATIVE_DOUBLE}.{stream}_attn_{letter}_norm",
            f"{NATIVE_DOUBLE}.{stream}_attn.norm.{name}_norm",
            WEIGHT,
            SCALE,
        )
        for stream in ("img", "txt")
        for letter, name in (("q", "query"), ("k", "key"))
    ),
    *(
        Rule(f"{NATIVE_SINGLE}.{letter}_norm", f"{NATIVE_SINGLE}.norm.{name}_norm", WEIGHT, SCALE)
        for letter, name in (("q", "query"), ("k", "key"))
    ),
    *(
        Rule(f"{name}.mlp.{layer}", f"{name}.{target}")
        for name in ("time_in", "guidance_in", "txt_in.t_embedder")
        for layer, target in (("0", "in_layer"), ("2", "out_layer"))
    ),
    Rule("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    Rule("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    Rule(f"{NATIVE_REFINER}.self_attn_qkv", f"{NATIVE_REFINER}.self_attn.qkv"),
    Rule(f"{NATIVE_REFINER}.self_attn_proj", f"{NATIVE_REFINER}.self_attn.proj"),
    Rule(f"{NATIVE_REFINER}.mlp.fc1", f"{NATIVE_REFINER}.mlp.0"),
    Rule(f"{NATIVE_REFINER}.mlp.fc2", f"{NATIVE_REFINER}.mlp.2"),
    *(
        Rule(f"{NATIVE_DOUBLE}.{stream}_{source}", f"{NATIVE_DOUBLE}.{stream}_{target}")
        for stream in ("img", "txt")
        for source, target in (
            ("mod.linear", "mod.lin"),
            ("attn_qkv", "attn.qkv"),
            ("attn_proj", "attn.proj"),
            ("mlp.fc1", "mlp.0"),
            ("mlp.fc2", "mlp.2"),
        )
    ),
    Rule(f"{NATIVE_SINGLE}.modulation.linear", f"{NATIVE_SINGLE}.modulation.lin"),
)

HUNYUAN_VIDEO = Family(
    name="hunyuan_video",
    title="HunyuanVideo",
    preset=Preset("hunyuan_video", "HunyuanVideo 4 steps", (1000.0, 992.0, 981.8, 912.4), boundary=0.982),
    DIFFUSERS_TO_NATIVE=(*EMBEDDERS, *REFINER_BLOCKS, *DOUBLE_BLOCKS, *SINGLE_BLOCKS, *HEAD),
    lora_targets=(
        r"(context_embedder\.token_refiner\.refiner_blocks|transformer_blocks)\.\d+\.attn\.to_(q|k|v|out\.0)"
        r"|single_transformer_blocks\.\d+\.attn\.to_(q|k|v)"
    ),
    detail_modules=("time_text_embed", "norm_out", "proj_out"),
    native_marks=("txt_in.input_embedder.weight", "single_blocks.0.linear1.weight", "final_layer.linear.weight"),
    text_module="txt_in.input_embedder",
    convolutions=("img_in.proj",),
    clip_type="hunyuan_video",
    block_lists=("double_blocks", "single_blocks"),
    feature_blocks="single_blocks",
    head="final_layer",
    fps=24,
    writes_in_place=True,
    feature_weight=1.0,
    text_extras=(("pooled_output", "y"), ("guidance", "guidance")),
    ALIAS_TO_NATIVE=ORIGINAL,
)
