"""The pictures that a command line means: files, folders, patterns, and the frames of videos."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Found", "found", "frames"]

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


class Found(NamedTuple):
    """A picture or a video, and what its answer is called."""

    path: Path
    name: str  #: without suffix; with the folders below the one that was given

    @property
    def is_video(self) -> bool:
        """Whether it has frames."""
        return self.path.suffix.lower() in VIDEOS


def found(given: Sequence[str]) -> list[Found]:
    """Return the pictures and videos of files, folders (and what is below them) and patterns such as ``"*.jpg"``.

    Raises ``ValueError`` where one names nothing, is no picture or video, or two would be answered under one name.
    """
    listed: list[Found] = []
    for text in given:
        path = Path(text).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in PICTURES | VIDEOS and p.is_file())
            if not inside:
                raise ValueError(f"{text} holds no picture ({', '.join(sorted(PICTURES))}) and no video")
            listed += [Found(p, p.relative_to(path).with_suffix("").as_posix()) for p in inside]
        elif path.is_file():
            if path.suffix.lower() not in PICTURES | VIDEOS:
                raise ValueError(f"{text}: expected a picture ({', '.join(sorted(PICTURES))}) or a video")
            listed.append(Found(path, path.stem))
        else:
            matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
            if not matched:
                raise ValueError(f"there is no file, folder or pattern {text}")
            listed += [Found(p, p.stem) for p in matched if p.suffix.lower() in PICTURES | VIDEOS]
    names: dict[str, Path] = {}
    for one in listed:
        if one.name in names and names[one.name] != one.path:
            remedy = "give the folder above them, so that names keep their folders"
            if names[one.name].parent == one.path.parent:
                remedy = "rename one"
            raise ValueError(
                f"{names[one.name]} and {one.path} would both be answered in {one.name}.png: {remedy}, or run twice, "
                "each time with another --out"
            )
        names[one.name] = one.path
    return list({one.path: one for one in listed}.values())


def frames(path: Path, every: int = 1) -> Iterator[tuple[int, Any]]:
    """Yield (number, PIL image) of every so many frames of a video.

    Raises ``ImportError`` where neither PyAV nor torchcodec is installed, ``ValueError`` for a file that is no video.
    """
    try:
        import av
    except ImportError:
        yield from _by_torchcodec(path, every)
        return
    try:
        with av.open(str(path)) as video:
            for number, frame in enumerate(video.decode(video=0)):
                if number % every == 0:
                    yield number, frame.to_image()
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


def _by_torchcodec(path: Path, every: int) -> Iterator[tuple[int, Any]]:
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError) as error:  # the second where FFmpeg is missing
        raise ImportError(f"{path} is a video, which PyAV reads: pip install av") from error
    from torchvision.transforms.v2.functional import to_pil_image

    video = VideoDecoder(str(path))
    for number in range(0, len(video), every):
        yield number, to_pil_image(video[number])
