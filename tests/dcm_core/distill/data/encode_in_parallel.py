"""One of two processes of test_dataset: encodes clips three times, and writes down what it did and got.

Its arguments are the folder of the clips and the file to write. RANK, WORLD_SIZE and so on come from the test, as from a launcher.
"""

import json
import sys
from pathlib import Path

import torch

from dcm_core.distill.data.clips import ClipSettings
from dcm_core.distill.data.encode import Encoders, prepare
from dcm_core.distill.parallel import join
from dcm_core.errors import DCMError

SMALL = ClipSettings(frames=5, fps=16, width=64, height=48)


def encode(clips, cache, processes, broken=False):
    """[how many videos this process encoded, how many texts, the dataset's fingerprint or the error]"""
    videos, texts = [], []

    def video(pixels):
        if broken and processes.rank == 1:
            raise DCMError("the disk is full")
        videos.append(pixels)
        return pixels.permute(3, 0, 1, 2)[:, ::4, ::8, ::8].contiguous()

    def text(caption):
        texts.append(caption)
        return [[torch.full((1, 3, 4), float(len(caption))), {}]]

    encoders = Encoders(video, text, "vae", "t5", lambda: None)
    try:
        data = prepare(clips, SMALL, encoders, cache, processes=processes)
    except DCMError as error:
        return [len(videos), len(texts), str(error)]
    return [len(videos), len(texts), data.fingerprint, data.report()]


if __name__ == "__main__":
    clips, out = Path(sys.argv[1]), Path(sys.argv[2])
    processes = join(torch.device("cpu"))
    own = f"own_{processes.rank}"
    runs = {
        "shared": encode(clips, clips / ".cache", processes),
        "again": encode(clips, clips / ".cache", processes),
        "own disks": encode(clips, clips / f".{own}", processes),
        "one fails": encode(clips, clips / ".other", processes, broken=True),
    }
    runs["marks left"] = [path.name for path in (clips / ".cache").glob("process_*")]
    out.with_name(f"{out.name}_{processes.rank}.json").write_text(json.dumps(runs))
