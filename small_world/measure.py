"""Measure the small world's experts against their base: the tables and pictures of docs/small-world.md.

    COMFYUI_PATH=... python small_world/measure.py <folder with models and runs> [--videos 6] [--seeds 9000 10000 11000 12000]

Seeds whose table is in the folder are passed over: two processes can share them, and a third then makes the mean.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import host  # noqa: F401

# isort: split
import torch
from chart import NOTHING, charts
from comfy.latent_formats import Wan21
from distill import BOUNDARY, GUIDANCE, expert_path, load_base, load_expert, pack, sample
from judge import flicker, look, path_distance, unevenness
from PIL import Image
from ship import MODELS
from torch import Tensor
from train_base import load_vae
from world import LATENT, NAMES, caption

from dcm_core.evaluation.measures import edge_strength, energy_distance, motion_difference, spectrum

attach, read_expert_file = pack("nodes.host.experts.attach"), pack("nodes.host.experts.expert_files").read_expert_file

# A number, or one with its standard error.
Measures = dict[str, float | tuple[float, float]]


def sample_all(model: Any, steps: int, cfg: float, videos: int, seed: int) -> Tensor:
    """So many videos of each caption, (captions x videos, 16, frames, height, width), from the same noise for every model."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(NAMES))]
    noises = [torch.randn((videos, *LATENT), generator=generator) for generator in generators]
    return torch.cat(
        [sample(model, caption(*name), noise, steps, cfg) for name, noise in zip(NAMES, noises, strict=True)]
    )


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Tensor:
    return torch.cat([vae.decode(Wan21().process_out(part)) for part in latents.split(8)]).clamp(-1, 1)


def models(folder: Path) -> dict[str, tuple[Any, int, float]]:
    """Name -> (MODEL, steps, cfg) of everything that is compared."""
    base = load_base(folder)

    def pair(*experts: Any) -> tuple[Any, int, float]:
        return attach.attach_experts(base, *experts, boundary=BOUNDARY), 6, 1.0

    found = {f"base, {steps} steps": (base, steps, GUIDANCE) for steps in (50, 25, 10, 6)}
    runs = {
        "one expert": ("one_expert", None),
        "two experts": ("semantic_by_consistency", "detail_by_consistency"),
        "+ temporal coherence": ("semantic", "detail_without_gan"),
        "+ GAN and feature matching": ("semantic", "detail"),
    }
    for name, run in runs.items():
        if all(expert_path(folder, part).exists() for part in run if part):
            found[name] = pair(*(load_expert(folder, part, base) if part else None for part in run))
    shipped = {side: MODELS / "loras" / f"zz_dcm_small_world_{side}.safetensors" for side in ("semantic", "detail")}
    found["as shipped"] = pair(*(read_expert_file(path, side, base) for side, path in shipped.items()))
    return found


def judge(
    latents: Tensor, videos: Tensor, reference: dict[str, Tensor], names: Sequence[tuple[str, str, str]]
) -> Measures:
    """All measures of one method: of the set of its videos, of what each shows, and against the reference's video of the same noise."""
    seen, wanted = [look(video) for video in videos], [look(video) for video in reference["videos"]]
    matches = torch.tensor([one.matches(name) for one, name in zip(seen, names, strict=True)]).float()
    strays = torch.tensor([unevenness(one.path) for one in seen])
    ways = torch.tensor([path_distance(a.path, b.path) for a, b in zip(seen, wanted, strict=True)])
    return {
        "latent distance": energy_distance(latents, reference["latents"]),
        "pixel distance": energy_distance(videos, reference["videos"]),
        "motion distance": energy_distance(videos.diff(dim=2), reference["videos"].diff(dim=2)),
        "spectrum error": float((spectrum(videos) - spectrum(reference["videos"])).abs().mean()),
        "edges": edge_strength(videos) / edge_strength(reference["videos"]),
        "flicker": sum(map(flicker, videos)) / sum(map(flicker, reference["videos"])),
        "unevenness (px)": float(strays.nanmean()),
        **dict(zip(("colour", "shape", "motion"), matches.mean(0).tolist(), strict=True)),
        "latent error": float((latents - reference["latents"]).square().mean().sqrt()),
        "motion error": motion_difference(videos, reference["videos"]),
        "path error (px)": float(ways.nanmean()),
    }


def contact_sheet(rows: dict[str, Tensor], path: Path, videos: int = 3) -> None:
    """A row for each method: five frames each of a few videos."""
    strips = []
    for found in rows.values():
        apart = len(found) // videos - 1
        frames = [found[index, :, time] for index in range(0, apart * videos, apart) for time in (0, 4, 8, 12, 16)]
        strips.append(torch.cat(frames, -1))
    pixels = ((torch.cat(strips, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    Image.fromarray(pixels.numpy()).save(path)


def shown(value: float | tuple[float, float]) -> str:
    value, error = value if isinstance(value, tuple) else (value, 0)
    if abs(value) < NOTHING:
        value = 0
    return f"{value:.3g}" + (f" ± {error:.1g}" if error > NOTHING else "")


def markdown(table: dict[str, Measures]) -> str:
    """The measures as a table, a row for each method."""
    columns = list(next(iter(table.values())))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(shown(row[name]) for name in columns)} |" for title, row in table.items()]
    return "\n".join(lines) + "\n"


def mean_of(values: Sequence[float | tuple[float, float]]) -> tuple[float, float]:
    """Mean over the seeds, with its standard error: from the values' own errors, or else from how they differ."""
    count = len(values)
    pairs = [value for value in values if isinstance(value, tuple)]
    if pairs:
        return sum(value for value, _ in pairs) / count, math.hypot(*(error for _, error in pairs)) / count
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(count)


def measure(folder: Path, seed: int, videos: int) -> dict[str, Measures]:
    """A row for each method from one seed of noise; the table and a picture are written into the folder, and kept there."""
    path = folder / f"measured_{seed}"
    if path.with_suffix(".json").exists():
        return read(path)
    names = [name for name in NAMES for _ in range(videos)]
    vae = load_vae(folder)
    reference: dict[str, Tensor] = {}
    shown_videos: dict[str, Tensor] = {}
    table: dict[str, Measures] = {}
    for title, (model, steps, cfg) in models(folder).items():
        started = time.monotonic()
        latents = sample_all(model, steps, cfg, videos, seed)
        found = decode(vae, latents)
        reference = reference or {"latents": latents, "videos": found}
        shown_videos[title] = found
        # guidance asks the model twice a step
        table[title] = {"calls": steps * (1 + (cfg > 1)), **judge(latents, found, reference, names)}
        print(
            f"{seed}, {title} ({time.monotonic() - started:.0f} s): "
            + ", ".join(f"{name} {shown(value)}" for name, value in table[title].items()),
            flush=True,
        )
    contact_sheet(shown_videos, folder / f"frames_{seed}.png")
    write(table, path)
    return table


def write(table: dict[str, Measures], path: Path) -> None:
    path.with_suffix(".md").write_text(markdown(table))
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(table, indent=1))
    unfinished.replace(path.with_suffix(".json"))


def read(path: Path) -> dict[str, Measures]:
    table = json.loads(path.with_suffix(".json").read_text())
    return {
        title: {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        for title, row in table.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--videos", type=int, default=6, help="of each caption and seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[9000, 10000, 11000, 12000])
    args = parser.parse_args()
    tables = [measure(args.folder, seed, args.videos) for seed in args.seeds]
    if len(tables) > 1:
        means = {
            title: {name: mean_of([table[title][name] for table in tables]) for name in row}
            for title, row in tables[0].items()
        }
        write(means, args.folder / "measured")
        charts(means).save(args.folder / "measured.png")


if __name__ == "__main__":
    main()
