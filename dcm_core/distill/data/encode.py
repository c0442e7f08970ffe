"""Encode clips and captions to latents and conditionings in a cache folder, each of them once."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from ...errors import CheckpointError, DCMError
from ...files.conditioning import Conditioning, load_conditioning, save_conditioning
from ...files.tensor_file import Progress, TensorFile
from ...files.values import is_finite
from ...files.writing import write_tensors
from ..parallel import ALONE, Processes
from .clips import CheckedClip, ClipSettings, Problem, check_clips, no_clip_left, read_clip
from .dataset import LATENT, CachedDataset, Entry
from .sources import Roots, find_clips
from .video_file import ClipError

FORMAT = "dcm-latent"
VERSION = "3"  # version of the cache; a change encodes everything again

# Where each part of the work starts on the progress bar, in thousandths.
CHECKING, VIDEOS, TEXTS, END = 0, 50, 900, 1000

T = TypeVar("T")


@dataclass(frozen=True)
class Encoders:
    """The VAE and the text encoder.

    Attributes:
        encode_video: pixels (frames, height, width, 3) from 0 to 1 -> latent (channels, latent frames, height, width).
        encode_text: a caption -> its conditioning.
        video_id, text_id: identify the encoders' weights. Cached results of other weights are not used.
        free: called once the encoders are not needed.
    """

    encode_video: Callable[[Tensor], Tensor]
    encode_text: Callable[[str], Conditioning]
    video_id: str
    text_id: str
    free: Callable[[], None]


def prepare(
    source: Path,
    settings: ClipSettings,
    encoders: Encoders,
    cache: Path,
    negative: str = "",
    progress: Progress | None = None,
    roots: Roots = None,
    processes: Processes = ALONE,
) -> CachedDataset:
    """Check the clips of `source`, encode what is not in the cache, and return the dataset.

    A latent in the cache depends on the clip's content, length, frame rate and size, and on the VAE. A conditioning depends on
    the text and its encoder. A change encodes only the affected entries again.

    If everything is cached, no encoder is called. Clips with unchanged size and modification time are not even opened. Clips
    that cannot be used are left out.

    Args:
        source: a folder or a list; see `find_clips`.
        cache: folder of the cache. It is created if it is missing.
        negative: the text of `CachedDataset.unconditional`.
        progress: called with (done, total) after every clip and text. It may raise to interrupt, which loses the current clip only.
        roots: folders that all clips have to be in; see `find_clips`.
        processes: the processes that divide the work. All of them call this function. Those whose `cache` is the same folder encode
            different entries; the result is the same in all.

    Raises:
        DCMError: no clip can be used, or an encoder is not for a video model. An error in one process ends all.
        CheckpointError: there is not enough room on the disk.
    """
    report = progress or (lambda done, total: None)
    with processes.agreed():
        clips, others = find_clips(source, roots)
        cache.mkdir(parents=True, exist_ok=True)
    place, sharing = processes.sharing(cache)
    for turn in (True, False):
        with processes.agreed():
            # the others then find in the cache what is known of each clip
            if turn == (place == 0):
                good, problems = check_clips(clips, settings, _part(report, CHECKING, VIDEOS), cache)

    def divided(new: Mapping[Path, T], encode: Callable[[Mapping[Path, T]], dict[Path, str]]) -> dict[Path, str]:
        """Encode this process's share, then what is still missing here. Returns what `encode` does: the paths that failed."""
        with processes.agreed():
            failed = encode({path: new[path] for path in list(new)[place::sharing]})
        with processes.agreed():
            # what failed elsewhere fails here too, and says why
            return failed | encode({path: new[path] for path in new if path not in failed and not path.exists()})

    videos = [(checked, cache / _video_name(checked, settings, encoders.video_id)) for checked in good]
    with processes.agreed():
        new_videos = {path: checked for checked, path in videos if _latent_shape(path) is None}
    failed = divided(new_videos, lambda new: _encode_videos(new, settings, encoders, _part(report, VIDEOS, TEXTS)))
    problems += (Problem(checked.clip.path, failed[path]) for checked, path in videos if path in failed)
    left = [(checked, path) for checked, path in videos if path not in failed]
    if not left:
        raise no_clip_left(problems)
    texts = {
        text: cache / _name("text", text, encoders.text_id)
        for text in [*(checked.clip.caption for checked, _ in left), negative]
    }
    with processes.agreed():
        new_texts = {path: text for text, path in texts.items() if not _holds_conditioning(path)}
    divided(new_texts, lambda new: _encode_texts(new, encoders, _part(report, TEXTS, END)))
    if new_videos or new_texts:
        encoders.free()
    report(END, END)
    entries = (_entry(checked, path, texts[checked.clip.caption]) for checked, path in left)
    notes = (Problem(checked.clip.path, note) for checked, _ in left for note in checked.notes)
    return CachedDataset(tuple(entries), texts[negative], tuple(problems), tuple(notes), others)


def _part(progress: Progress, begin: int, end: int) -> Progress:
    """Map the progress of one part of the work to the overall progress."""
    return lambda done, total: progress(begin + round((end - begin) * done / total), END)


def _name(kind: str, *parts: Any) -> str:
    """The file name of a cache entry: a hash of everything it depends on."""
    return hashlib.sha256(json.dumps([kind, VERSION, *parts]).encode()).hexdigest() + ".safetensors"


def _video_name(checked: CheckedClip, settings: ClipSettings, video_id: str) -> str:
    return _name(
        "video", checked.content, settings.frames, float(settings.fps), checked.bucket, video_id, *checked.changes
    )


def _encode_videos(
    new: Mapping[Path, CheckedClip], settings: ClipSettings, encoders: Encoders, progress: Progress
) -> dict[Path, str]:
    """Write the latents. Returns the paths that failed, and why."""
    failed = {}
    for done, (path, checked) in enumerate(new.items(), start=1):
        try:
            latent = _checked(encoders.encode_video(read_clip(checked, settings)), checked)
            write_tensors(path, {LATENT: latent}, {"format": FORMAT, "clip": checked.clip.path.name})
        except ClipError as error:
            failed[path] = error.reason
        progress(done, len(new))
    return failed


def _checked(latent: Tensor, checked: CheckedClip) -> Tensor:
    if latent.ndim != 4:
        raise DCMError(
            f"The VAE returned a latent of shape {tuple(latent.shape)}; expected channels, frames, height, width. "
            "Connect the VAE of Wan 2.1 or HunyuanVideo."
        )
    if not is_finite(latent):
        raise ClipError(
            checked.clip.path, "has a latent with NaN or infinite values. Run the VAE in bfloat16 or float32."
        )
    return latent


def _encode_texts(new: Mapping[Path, str], encoders: Encoders, progress: Progress) -> dict[Path, str]:
    """Write the texts' conditionings. A text that fails is an error, so no path is returned."""
    for done, (path, text) in enumerate(new.items(), start=1):
        save_conditioning(path, _checked_text(encoders.encode_text(text), text), text)
        progress(done, len(new))
    return {}


def _checked_text(conditioning: Conditioning, text: str) -> Conditioning:
    if not all(is_finite(context) for context, _ in conditioning):
        raise DCMError(
            f"The text encoder returned NaN or infinite values for {text!r}. Run it in bfloat16 or float32, or choose another file."
        )
    return conditioning


def _latent_shape(path: Path) -> tuple[int, ...] | None:
    """Shape of a cached latent; None if the file is missing or damaged."""
    try:
        file = TensorFile(path)
        file.verify()
    except CheckpointError:
        return None
    return file.shapes.get(LATENT) if file.metadata.get("format") == FORMAT else None


def _holds_conditioning(path: Path) -> bool:
    try:
        load_conditioning(path)
    except DCMError:
        return False
    return True


def _entry(checked: CheckedClip, latent: Path, conditioning: Path) -> Entry:
    return Entry(
        checked.clip.path, checked.clip.caption, latent, conditioning, checked.bucket, TensorFile(latent).shapes[LATENT]
    )
