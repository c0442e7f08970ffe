"""What loading a release takes, beside the host's own loader on a native file of the same base.

    COMFYUI_PATH=<ComfyUI> python benchmarks/loading.py [--layers 6] [--dtype float32] [--repeats 3] [--cpu-time | --thread-time]

A release of Wan 2.1 1.3B's layer sizes (`--layers 30` is the whole model, 6.2 GB in float32) with random weights, and its base as
DCM Convert Checkpoint writes it. Each load runs in a process of its own, in turn, so that each peak of memory is that load's alone; the
files are in the system's cache. Loading a release also reads and attaches its detail expert, which the host's file does not have.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import torch
from routing import DIM, FFN, RANK, start_host
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

HOST, RELEASE = "host", "release"
CLOCKS = {"clock": "perf_counter", "processor": "process_time", "thread": "thread_time"}


def write_files(folder: Path, layers: int, dtype: torch.dtype) -> dict[str, Path]:
    """The release and its base."""
    from tiny_models import wan_shapes

    from dcm_core.convert import convert_release
    from dcm_core.families import WAN
    from dcm_core.files.writing import write_stream

    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in wan_shapes(DIM, layers, FFN).items():
        module, _, param = name.rpartition(".")
        if not WAN.lora_target_pattern.fullmatch(module):
            shapes[name] = shape
        else:
            shapes[f"{module}.base_layer.{param}"] = shape
            if param == "weight":
                shapes |= {
                    f"{module}.lora_A.lora1.weight": (RANK, shape[1]),
                    f"{module}.lora_B.lora1.weight": (shape[0], RANK),
                }
        for copied in WAN.detail_modules:
            if name.startswith(f"{copied}."):
                shapes[name.replace(copied, f"{copied}_lora", 1)] = shape
    random = torch.randn(
        max(torch.Size(shape).numel() for shape in shapes.values()), generator=torch.Generator().manual_seed(0)
    ).to(dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            yield name, random[: torch.Size(shape).numel()].reshape(shape)

    paths = {name: folder / f"{name}.safetensors" for name in (RELEASE, HOST, "expert")}
    write_stream(paths[RELEASE], {name: (dtype, shape) for name, shape in shapes.items()}, tensors(), {})
    convert_release(paths[RELEASE], paths[HOST], paths["expert"])
    return paths


def load(kind: str, path: Path, clock: Callable[[], float]) -> tuple[float, float]:
    """(seconds, GB of memory at the peak) of one load in this process."""
    pack = start_host()
    import comfy.sd

    loader = pack("nodes.host.experts.load")
    with suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    began = clock()
    model = loader.load_file(path, "default")[0] if kind == RELEASE else comfy.sd.load_diffusion_model(str(path))
    seconds = clock() - began
    assert model is not None
    with open("/proc/self/status") as file:
        peak = int(next(line for line in file if line.startswith("VmHWM")).split()[1]) * 1024
    return seconds, peak / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="of the model's 30 (default: %(default)s)")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", default="float32", choices=dtypes, help="of the files (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="loads of each kind (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="where the files are made and removed again (default: a temporary folder)"
    )
    clock = parser.add_mutually_exclusive_group()
    clock.add_argument(
        "--cpu-time", action="store_true", help="count the processor's seconds, where others use the machine too"
    )
    clock.add_argument(
        "--thread-time",
        action="store_true",
        help="the same of the loading thread alone: what runs beside it is left out",
    )
    parser.add_argument("--load", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    kind_of_time = "processor" if args.cpu_time else "thread" if args.thread_time else "clock"
    if args.load:
        print(*load(args.load[0], Path(args.load[1]), getattr(time, CLOCKS[kind_of_time])))
        return
    found: dict[str, list[tuple[float, float]]] = {HOST: [], RELEASE: []}
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        # the pack's library alone: the host is started by each load
        sys.path[:] = [*sys.path, str(Path(__file__).parents[1])]
        paths = write_files(Path(folder), args.layers, getattr(torch, args.dtype))
        sizes = {kind: paths[kind].stat().st_size / 1e9 for kind in found}
        for _ in range(args.repeats):
            for kind, loads in found.items():
                command = [
                    sys.executable,
                    __file__,
                    "--load",
                    kind,
                    str(paths[kind]),
                    *(["--cpu-time"] if args.cpu_time else []),
                    *(["--thread-time"] if args.thread_time else []),
                ]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds, peak = map(float, output.splitlines()[-1].split())
                loads.append((seconds, peak))
    print(f"{args.layers} layers, {args.dtype}, {os.cpu_count()} cores, {kind_of_time} seconds")
    for kind, loads in found.items():
        times, peaks = zip(*loads, strict=True)
        spread = f"{median(times):.2f} s [{min(times):.2f}, {max(times):.2f}]"
        print(f"{kind:>8}: {sizes[kind]:.2f} GB, {spread}, peak {max(peaks):.2f} GB")
    ratio, peak = (median(a[i] for a in found[RELEASE]) / median(b[i] for b in found[HOST]) for i in (0, 1))
    print(f"   ratio: {ratio:.2f} in time, {peak:.2f} at the peak")


if __name__ == "__main__":
    main()
