"""`python -m dcm_core convert | extract | export | inspect | train | evaluate`: the library on the command line."""

import argparse
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from cli.launch import find_comfyui, load_pack
from dcm_core.convert import DTYPES, KEEP, convert_release
from dcm_core.errors import DCMError
from dcm_core.export import DIFFUSERS, PEFT, export_expert
from dcm_core.extract import extract_lora
from dcm_core.files.tensor_file import Progress
from dcm_core.inspection.inspect import inspect_file
from dcm_core.release import OFFICIAL_RANK, write_release
from dcm_core.text import plain

PAGES = "https://github.com/comfyui-dcm/ComfyUI-DCM/blob/main/docs"
TRAINING_PAGE, REPORT_PAGE = f"{PAGES}/training.md", f"{PAGES}/report.md"
RELEASE = "release"
# Characters that are printed at most. A table has one line for each layer.
LONGEST = 10**7


def progress_line(label: str) -> Progress:
    """A progress bar in percent on stderr. It appears at the first update."""
    bar = None

    def update(done: int, total: int) -> None:
        nonlocal bar
        percent = 100 * done // total if total else 100
        bar = bar or tqdm(total=100, desc=label, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}")
        bar.update(percent - bar.n)
        if done >= total:
            bar.close()

    return update


def convert(args: argparse.Namespace) -> str:
    report = convert_release(
        args.source, args.base, args.expert, DTYPES[args.dtype], progress_line("convert"), overwrite=args.overwrite
    )
    return str(report)


def extract(args: argparse.Namespace) -> str:
    report = extract_lora(
        args.tuned,
        args.base,
        args.out,
        args.rank,
        dtype=DTYPES[args.dtype],
        device=args.device,
        seed=args.seed,
        progress=progress_line("extract"),
        overwrite=args.overwrite,
    )
    return f"{report.table()}\n{report}" if args.layers else str(report)


def export(args: argparse.Namespace) -> str:
    settings = {"dtype": DTYPES[args.dtype], "progress": progress_line("export"), "overwrite": args.overwrite}
    if args.to == RELEASE:
        if args.base is None:
            raise DCMError("A release also contains the base model. Name its file with --base.")
        return str(write_release(args.base, args.expert, args.out, args.semantic, rank=args.rank, **settings))
    if args.base or args.semantic or args.rank:
        raise DCMError(f"--base, --semantic and --rank are only used with --to {RELEASE}. Leave them out.")
    return str(export_expert(args.expert, args.out, args.to, **settings))


def inspect(args: argparse.Namespace) -> str:
    """Describe every readable file, then report the others as errors."""
    reports, errors = [], []
    for path in args.files:
        try:
            reports.append(inspect_file(path))
        except DCMError as error:
            errors.append(str(error))
    if args.json and reports:
        data = [asdict(report) for report in reports]
        text = json.dumps(data if len(args.files) > 1 else data[0], indent=2)
    else:
        text = "\n\n".join(map(str, reports))
    if errors:
        print(plain(text, LONGEST), end="\n" if text else "")
        raise DCMError("\n".join(errors))
    return text


def train(args: argparse.Namespace) -> str:
    """Train inside ComfyUI, which has the model classes."""
    settings = read_settings(args.config, TRAINING_PAGE)
    return in_comfyui(
        args,
        lambda pack: pack("nodes.host.training.command").train(args.expert, settings, args.config.resolve().parent),
    )


def evaluate(args: argparse.Namespace) -> str:
    """Compare a model with its reference inside ComfyUI."""
    settings = read_settings(args.config, REPORT_PAGE)
    folder = args.config.resolve().parent
    return in_comfyui(
        args,
        lambda pack: pack("nodes.host.evaluation.command").evaluate(settings, folder, args.output, args.overwrite),
    )


def in_comfyui(args: argparse.Namespace, work: Callable[[Callable[[str], ModuleType]], str]) -> str:
    """What `work` returns, called with a function that imports the pack's modules inside ComfyUI."""
    pack = load_pack(find_comfyui(args.comfyui))
    try:
        return work(pack)
    except pack("dcm_core.errors").DCMError as error:
        raise DCMError(str(error)) from error


def read_settings(path: Path, page: str) -> dict[str, Any]:
    """Read settings from a JSON or TOML file.

    Args:
        page: where they are explained.

    Raises:
        DCMError: a file that cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            import tomllib

            return tomllib.loads(text)
        settings = json.loads(text)
    except ImportError as error:
        raise DCMError(f"{path} is TOML, which needs Python 3.11. Write the settings as JSON.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise DCMError(f"{path} cannot be read as settings ({error}). Write JSON or TOML as in {page}.") from error
    if not isinstance(settings, dict):
        raise DCMError(f"{path} contains a {type(settings).__name__}; expected settings by name, as in {page}.")
    return settings


def device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{name!r} is not a device; expected cpu, cuda, cuda:1, mps ...") from error


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dcm_core", description="Convert, export, inspect, train and evaluate Dual-Expert Consistency Models."
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser(
        "convert", help="convert a released checkpoint to a base model and an expert file (export does the reverse)"
    )
    command.add_argument("source", type=Path, help="transformer/diffusion_pytorch_model.safetensors of the release")
    command.add_argument(
        "base", type=Path, help="where to write the base model in ComfyUI's layout (models/diffusion_models/...)"
    )
    command.add_argument("expert", type=Path, help="where to write the detail expert (models/loras/...)")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default=KEEP,
        help="dtype of the base; fp8 is only used for the blocks (default: %(default)s)",
    )
    command.add_argument("--overwrite", action="store_true", help="overwrite existing files")
    command.set_defaults(run=convert)

    command = commands.add_parser("extract", help="extract a LoRA from a full fine-tune and its base")
    command.add_argument("tuned", type=Path, help="the fine-tuned model (native, diffusers or release file)")
    command.add_argument("base", type=Path, help="the base model it was fine-tuned from")
    command.add_argument("out", type=Path, help="where to write the LoRA")
    command.add_argument("--rank", type=int, default=128, help="LoRA rank of every layer (default: %(default)s)")
    floats = [name for name, dtype in DTYPES.items() if dtype is not None and dtype.itemsize > 1]
    command.add_argument("--dtype", choices=floats, default="bfloat16", help="dtype of the LoRA (default: %(default)s)")
    command.add_argument(
        "--device",
        type=device,
        default="cpu",
        help="device that runs the decomposition, e.g. cuda (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the decomposition (default: %(default)s)")
    command.add_argument("--layers", action="store_true", help="print a line for each layer")
    command.add_argument("--overwrite", action="store_true", help="overwrite an existing file")
    command.set_defaults(run=extract)

    command = commands.add_parser(
        "export",
        help="export an expert as a PEFT adapter or a diffusers LoRA, or a base and its experts as one release file",
    )
    command.add_argument("expert", type=Path, help="the expert file; with --to release, the detail expert")
    command.add_argument("out", type=Path, help="where to write it: a file, or a folder for a PEFT adapter")
    command.add_argument("--to", choices=[RELEASE, PEFT, DIFFUSERS], required=True, help="output format")
    command.add_argument("--base", type=Path, help="release: the base model")
    command.add_argument("--semantic", type=Path, help="release: a semantic expert to merge into the base")
    command.add_argument(
        "--rank",
        type=int,
        default=0,
        help=f"release: pad the LoRA to this rank; the official scripts expect {OFFICIAL_RANK} (default: as trained)",
    )
    floats = [name for name, dtype in DTYPES.items() if dtype is None or dtype.itemsize > 1]
    command.add_argument("--dtype", choices=floats, default=KEEP, help="dtype of all tensors (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="overwrite existing files")
    command.set_defaults(run=export)

    command = commands.add_parser("inspect", help="show what a file contains")
    command.add_argument("files", nargs="+", type=Path, help="safetensors files")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=inspect)

    command = commands.add_parser("train", help="train experts, or resume an interrupted run")
    command.add_argument(
        "expert", choices=["semantic", "detail", "both"], help="which expert to train; both trains one after the other"
    )
    command.add_argument(
        "--config", type=Path, required=True, help=f"settings in a .json or .toml file ({TRAINING_PAGE})"
    )
    command.add_argument(
        "--comfyui", type=Path, help="ComfyUI's folder (default: COMFYUI_PATH, or where the pack is installed)"
    )
    command.set_defaults(run=train)

    command = commands.add_parser("evaluate", help="compare a model with experts with its reference, and report")
    command.add_argument(
        "--config", type=Path, required=True, help=f"settings in a .json or .toml file ({REPORT_PAGE})"
    )
    command.add_argument("--output", type=Path, required=True, help="folder for report.json and report.png")
    command.add_argument("--overwrite", action="store_true", help="overwrite an existing report")
    command.add_argument(
        "--comfyui", type=Path, help="ComfyUI's folder (default: COMFYUI_PATH, or where the pack is installed)"
    )
    command.set_defaults(run=evaluate)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    # launchers, batch systems and containers send SIGTERM before they kill; a training run then saves a checkpoint
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        print(plain(args.run(args), LONGEST))
    except DCMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # a name that the system does not take, a disk that is gone
        print(f"error: {plain(error)}. Check the names and the permissions of the files.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0
