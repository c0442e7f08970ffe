"""Encode clips and captions to latents and conditionings in a cache folder, each of them once."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from ...errors import CheckpointError, DCMError
from ...files.conditioning import Conditioning, load_conditioning, save_conditioning
from ...files.tensor_file import Progress, TensorFile
from ...files.values import is_finite
from ...files.writing import write_tensors
from ..parallel import ALONE, Processes
from .clips import CheckedClip, ClipSettings, Problem, check_clips, no_clip_left, read_clip
from .dataset import LATENT, CachedDataset, Entry, ImageConditioning
from .sources import Roots, find_clips
from .video_file import ClipError

FORMAT, IMAGE_FORMAT = "dcm-latent", "dcm-image-conditioning"
VERSION = "3"  # version of the cache; a change encodes everything again

# Where each part of the work starts on the progress bar, in thousandths.
CHECKING, VIDEOS, TEXTS, END = 0, 50, 900, 1000

K, T = TypeVar("K"), TypeVar("T")


@dataclass(frozen=True)
class Encoders:
    """The VAE, the text encoder, and for image to video what makes the image conditioning.

    Attributes:
        encode_video: pixels (frames, height, width, 3) from 0 to 1 -> latent (channels, latent frames, height, width).
        encode_text: a caption -> its conditioning.
        video_id, text_id: identify the encoders' weights. Cached results of other weights are not used.
        free: called once the encoders are not needed.
        encode_image: the same pixels -> their image conditioning; None for text to video.
        image_id: identifies how it does that, and with which weights.
    """

    encode_video: Callable[[Tensor], Tensor]
    encode_text: Callable[[str], Conditioning]
    video_id: str
    text_id: str
    free: Callable[[], None]
    encode_image: Callable[[Tensor], ImageConditioning] | None = None
    image_id: str = ""


def prepare(
    source: Path,
    settings: ClipSettings,
    encoders: Encoders,
    cache: Path,
    negative: str = "",
    progress: Progress | None = None,
    roots: Roots = None,
    processes: Processes = ALONE,
    sample_prompts: Sequence[str] = (),
) -> CachedDataset:
    """Check the clips of `source`, encode what is not in the cache, and return the dataset.

    A latent or image conditioning in the cache depends on the clip's content, length, frame rate and size, and on its encoders.
    A conditioning depends on the text and its encoder. A change encodes only the affected entries again.

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
        sample_prompts: the texts of `CachedDataset.sample_prompts`.

    Raises:
        DCMError: no clip can be used, an encoder is not for a video model, or images are to be trained as image to video. An error in
            one process ends all.
        CheckpointError: there is not enough room on the disk.
    """
    report = progress or (lambda done, total: None)
    if settings.images and encoders.encode_image is not None:
        raise DCMError(
            "images is on, but the clips are for image to video, and an image has no further frames. Turn images off."
        )
    with processes.agreed():
        clips, others = find_clips(source, roots, settings.images)
        cache.mkdir(parents=True, exist_ok=True)
    place, sharing = processes.sharing(cache)
    for turn in (True, False):
        with processes.agreed():
            # the others then find in the cache what is known of each clip
            if turn == (place == 0):
                good, problems = check_clips(clips, settings, _part(report, CHECKING, VIDEOS), cache)

    def divided(
        new: Mapping[K, T], encode: Callable[[Mapping[K, T]], dict[K, str]], exists: Callable[[K], bool]
    ) -> dict[K, str]:
        """Encode this process's share, then what is still missing here. Returns what `encode` does: the entries that failed."""
        with processes.agreed():
            failed = encode({entry: new[entry] for entry in list(new)[place::sharing]})
        with processes.agreed():
            # what failed elsewhere fails here too, and says why
            return failed | encode({entry: new[entry] for entry in new if entry not in failed and not exists(entry)})

    videos = [(checked, _files_of(checked, settings, encoders, cache)) for checked in good]
    with processes.agreed():
        new_videos = {files: checked for checked, files in videos if not files.complete}
    failed = divided(
        new_videos, lambda new: _encode_videos(new, settings, encoders, _part(report, VIDEOS, TEXTS)), _Files.exist
    )
    problems += (Problem(checked.clip.path, failed[files]) for checked, files in videos if files in failed)
    left = [(checked, files) for checked, files in videos if files not in failed]
    if not left:
        raise no_clip_left(problems)
    texts = {
        text: cache / _name("text", text, encoders.text_id)
        for text in [*(text for checked, _ in left for text in checked.clip.captions), negative, "", *sample_prompts]
    }
    with processes.agreed():
        new_texts = {path: text for text, path in texts.items() if not _holds_conditioning(path)}
    divided(new_texts, lambda new: _encode_texts(new, encoders, _part(report, TEXTS, END)), Path.exists)
    if new_videos or new_texts:
        encoders.free()
    report(END, END)
    entries = (_entry(checked, files, [texts[text] for text in checked.clip.captions]) for checked, files in left)
    # a clip may have several windows
    notes = dict.fromkeys(Problem(checked.clip.path, note) for checked, _ in left for note in checked.notes)
    prompts = tuple(texts[text] for text in sample_prompts)
    return CachedDataset(tuple(entries), texts[negative], texts[""], prompts, tuple(problems), tuple(notes), others)


def _part(progress: Progress, begin: int, end: int) -> Progress:
    """Map the progress of one part of the work to the overall progress."""
    return lambda done, total: progress(begin + round((end - begin) * done / total), END)


def _name(kind: str, *parts: Any) -> str:
    """The file name of a cache entry: a hash of everything it depends on."""
    return hashlib.sha256(json.dumps([kind, VERSION, *parts]).encode()).hexdigest() + ".safetensors"


class _Files(NamedTuple):
    """The files of a clip in the cache; `image` only for image to video."""

    latent: Path
    image: Path | None

    def exist(self) -> bool:
        return self.latent.exists() and (self.image is None or self.image.exists())

    @property
    def complete(self) -> bool:
        return _whole(self.latent, FORMAT) and (self.image is None or _whole(self.image, IMAGE_FORMAT))


def _files_of(checked: CheckedClip, settings: ClipSettings, encoders: Encoders, cache: Path) -> _Files:
    def path(kind: str, *encoders: str) -> Path:
        read = checked.content, checked.frames, float(settings.fps), checked.bucket
        window = [f"from frame {checked.begin}"] if checked.begin else []
        return cache / _name(kind, *read, *encoders, *checked.changes, *window)

    image = path("image", encoders.video_id, encoders.image_id) if encoders.encode_image else None
    return _Files(path("video", encoders.video_id), image)


def _encode_videos(
    new: Mapping[_Files, CheckedClip], settings: ClipSettings, encoders: Encoders, progress: Progress
) -> dict[_Files, str]:
    """Write the missing latents and image conditionings. Returns the files that failed, and why."""
    failed = {}
    for done, (files, checked) in enumerate(new.items(), start=1):
        about = {"clip": checked.clip.path.name}
        try:
            pixels = read_clip(checked, settings)
            if not _whole(files.latent, FORMAT):
                latent = _checked(encoders.encode_video(pixels), checked)
                write_tensors(files.latent, {LATENT: latent}, {"format": FORMAT, **about})
            if files.image is not None and not _whole(files.image, IMAGE_FORMAT):
                image = dict(encoders.encode_image(pixels))
                _check_finite(image.values(), "an image conditioning", checked)
                write_tensors(files.image, image, {"format": IMAGE_FORMAT, **about})
        except ClipError as error:
            failed[files] = error.reason
        progress(done, len(new))
    return failed


def _checked(latent: Tensor, checked: CheckedClip) -> Tensor:
    if latent.ndim != 4:
        raise DCMError(
            f"The VAE returned a latent of shape {tuple(latent.shape)}; expected channels, frames, height, width. "
            "Connect the VAE of Wan 2.1 or HunyuanVideo."
        )
    _check_finite([latent], "a latent", checked)
    return latent


def _check_finite(values: Iterable[Tensor], what: str, checked: CheckedClip) -> None:
    if not all(map(is_finite, values)):
        reason = f"has {what} with NaN or infinite values. Run the VAE in bfloat16 or float32."
        raise ClipError(checked.clip.path, reason)


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


def _whole(path: Path, kind: str) -> bool:
    """Whether a file of the cache is there, undamaged and of this kind."""
    try:
        file = TensorFile(path)
        file.verify()
    except CheckpointError:
        return False
    return file.metadata.get("format") == kind


def _holds_conditioning(path: Path) -> bool:
    try:
        load_conditioning(path)
    except DCMError:
        return False
    return True


def _entry(checked: CheckedClip, files: _Files, conditionings: Sequence[Path]) -> Entry:
    shape = TensorFile(files.latent).shapes[LATENT]
    clip = checked.clip
    return Entry(clip.path, clip.captions, files.latent, tuple(conditionings), checked.bucket, shape, files.image)
