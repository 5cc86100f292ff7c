"""How much a request may ask for, and what is an image. All is checked before a pixel is decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from adaptkit.ops.forks import Lock
from adaptkit.pictures import CHANNELS, is_bands, read
from adaptkit.predict.pixels import pixels

__all__ = ["FORMATS", "Gate", "Limits", "Refused", "decoded", "sizes_of"]

#: Formats that are opened. Pillow knows more, and runs other programs for some of them (Ghostscript for EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class Refused(Exception):
    """A request that is not answered: an HTTP status, and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Limits:
    """What is asked for beyond these is refused: 413 for one request, 503 for all together."""

    body: int = 32 << 20  #: bytes of a request
    pixels: int = 40_000_000  #: of one image
    images: int = 16  #: of one request
    requests: int = 64  #: held at once: being read, waiting or answered
    held_pixels: int = 80_000_000  #: of all images that are held at once; a pixel takes 12 bytes

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"limit {name}={value}: give at least 1")
        if self.held_pixels < self.pixels:
            raise ValueError(
                f"limit held_pixels={self.held_pixels} is less than one image may have, pixels={self.pixels}"
            )


class Gate:
    """Counts what is held, so that a crowd is told to come again instead of filling the memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.requests, self.held = limits, 0, 0
        self._lock = Lock()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Hold a request; :class:`Refused` (503) where as many are held as may be."""
        with self._lock:
            if self.requests >= self.limits.requests:
                raise Refused(503, f"{self.requests} requests are being answered, which is the limit: try again")
            self.requests += 1
        try:
            yield
        finally:
            with self._lock:
                self.requests -= 1

    @contextmanager
    def pixels(self, count: int) -> Iterator[None]:
        """Hold so many pixels; :class:`Refused` (413) where no server of these limits could, 503 where this one is
        full."""
        most = self.limits.held_pixels
        if count > most:
            raise Refused(413, f"the images of this request have {count:,} pixels together; the limit is {most:,}")
        with self._lock:
            if self.held + count > most:
                raise Refused(503, f"images of {self.held:,} pixels are held, and the limit is {most:,}: try again")
            self.held += count
        try:
            yield
        finally:
            with self._lock:
                self.held -= count


def sizes_of(images: Sequence[bytes], limits: Limits, channels: int = CHANNELS) -> list[int]:
    """Files -> the number of pixels of each, read from their headers; of many channels, three count as one pixel.

    Raises :class:`Refused`: 400 for what is no image, 413 for one that has more pixels than ``limits`` allow.
    """
    Image.init()  # otherwise Pillow knows five formats until it met another
    found = []
    for number, data in enumerate(images, 1):
        which = f"image {number}" if len(images) > 1 else "the image"
        if is_bands(data, channels):
            height, width = _size_of_bands(data, which, channels)
            found.append(_within(height, width, which, limits, channels))
            continue
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                (width, height), kind = image.size, image.format
            with Image.open(io.BytesIO(data)) as image:  # as it will be opened, for the decoder
                same = image.format == kind
        except Image.DecompressionBombError as error:
            raise Refused(413, f"{which} is too large: {error}") from error
        except Exception as error:  # each format has errors of its own
            unknown = isinstance(error, UnidentifiedImageError)
            why = "no format among" if unknown else f"{str(error) or type(error).__name__}; known formats:"
            raise Refused(
                400, f"{which} ({len(data)} bytes) is not an image that can be read: {why} {', '.join(FORMATS)}"
            ) from error
        if not same:
            raise Refused(400, f"{which} is {kind} and something else at once")
        found.append(_within(height, width, which, limits))
    return found


def _size_of_bands(data: bytes, which: str, channels: int) -> tuple[int, int]:
    try:
        return read(data, which, pixels=False, channels=channels).upright
    except ValueError as error:
        raise Refused(400, str(error)) from error


def _within(height: int, width: int, which: str, limits: Limits, channels: int = CHANNELS) -> int:
    """The number of pixels of three channels; :class:`Refused` (413) where it is beyond the limit."""
    count = width * height * -(-channels // CHANNELS)
    if count > limits.pixels:
        many = "" if channels <= CHANNELS else f" of {channels} channels, which count as"
        raise Refused(
            413,
            f"{which} has {width} x {height} pixels (width x height){many or ','} {count:,}; the limit is "
            f"{limits.pixels:,}: make it smaller",
        )
    return count


def decoded(data: bytes, channels: int = CHANNELS) -> Tensor:
    """File -> (channels, H, W) float32, upright, as ``predict`` reads it; :class:`Refused` (400) where it is torn."""
    try:
        return pixels(data, channels)
    except ValueError as error:
        raise Refused(400, str(error).strip()) from error
