"""Every recipe opens its pictures here: images, masks, depth maps and panoptic maps, from files and from Parquet rows.

What a file holds is what comes out:

* 16-bit greys are divided by 65535, floating-point ones must lie in 0..1, and both are kept as float32. 16-bit colours
  of a PNG are kept too; those of a TIFF come with the eight bits that Pillow reads.
* NumPy's ``.npy`` and TIFFs of many channels are read by :mod:`adaptkit.bands`. How many channels come out is said to
  :func:`read`; a picture is three of them, and nothing is made up for more.
* Palettes are looked up, CMYK is converted, and what is transparent shows white.
* EXIF's orientation turns an image upright, and a mask with it (:func:`pair`).
* A file that is empty, torn or no picture at all is a ``ValueError`` that names it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from adaptkit import bands

if TYPE_CHECKING:
    from torchvision import tv_tensors

CHANNELS = 3  #: a picture is read as red, green and blue, unless another number is asked for
ORIENTATION = 0x0112  # EXIF's tag
AGAIN = "copy or download it again, or take it out of the set"
GREYS = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes with more than eight bits a pixel


class Picture(NamedTuple):
    """A picture read whole, as it is stored."""

    image: Image.Image
    name: str  #: what to call it in an error: its file, or its row
    turn: int = 1  #: EXIF's orientation, 1 to 8; 1 is upright
    wide: bytes | None = None  #: the file, where it is a PNG of 16-bit colours: Pillow reads only eight of them
    bands: np.ndarray | None = None  #: (H, W, C) as stored, in place of the image, where Pillow has no mode for it
    channels: int = CHANNELS  #: that :func:`colours` gives

    @property
    def stored(self) -> tuple[int, int]:
        """Height and width before it is turned."""
        if self.bands is not None:
            return self.bands.shape[0], self.bands.shape[1]
        return self.image.height, self.image.width

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width of the picture as it is to be seen."""
        return self.stored[::-1] if self.turn > 4 else self.stored


# --------------------------------------------------------------------------------------------------------- read


def read(stored: Any, name: str = "", pixels: bool = True, channels: int = CHANNELS) -> Picture:
    """Read a file, its bytes or a row's ``{"bytes", "path"}`` whole; a PIL image stays as it is.

    Args:
        stored: what to read.
        name: of what has no path of its own, for the error.
        pixels: False reads the sizes alone.
        channels: as which it will be asked for, where it is an image; a map of one channel is read as ever.

    Raises ``ValueError`` where it cannot be read.
    """
    if isinstance(stored, Image.Image):
        stored.load()  # a TIFF is upright when it is loaded, and says so
        return Picture(stored, name, _orientation(stored), channels=channels)
    stored = {"bytes": None, "path": str(stored)} if isinstance(stored, str | Path) else stored
    stored = {"bytes": stored, "path": None} if isinstance(stored, bytes) else stored
    path, data = stored["path"], stored["bytes"]
    if data is None and not path:
        raise ValueError(f"{name} holds no picture; fill it, or take the row out")
    name = (f"{name} ({path})" if path else name) if data is not None else str(path)
    try:
        data = stored_bytes(stored)
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error}); {AGAIN}") from error
    if not data:
        raise ValueError(f"{name} is empty (0 bytes); {AGAIN}")
    if bands.is_npy(data):
        return _of_array(bands.array_of_npy(data, name), name=name, channels=channels)
    if bands.is_tiff(data) and not _is_pillows(data, channels):
        return _of_array(*bands.array_of_tiff(data, name, pixels), name=name, channels=channels)
    try:
        image: Any = Image.open(io.BytesIO(data))
        wide, turn = _is_wide(image), _orientation(image)  # in this order: to ask for EXIF may load the pixels
        if pixels:
            image.load()
        if pixels and turn != _orientation(image):  # Pillow turns a TIFF by itself: as all formats, it is turned back
            image = image.transpose(_BACK[turn])
    except Exception as error:  # each decoder has errors of its own, and a torn file meets them all
        unknown = isinstance(error, UnidentifiedImageError)
        why = "no format that Pillow knows" if unknown else str(error) or type(error).__name__
        raise ValueError(
            f"{name} is not an image that can be read whole: {why} ({len(data)} bytes); {AGAIN}"
        ) from error
    return Picture(image, name, turn, data if wide else None, channels=channels)


def read_row(row: dict[str, Any], where: str, pixels: bool = True, channels: int = CHANNELS) -> dict[str, Any]:
    """Read the pictures of a row; ``where`` names the row. A ``ValueError`` names the column too."""
    return {
        k: read(v, f"{where}, column {k!r}", pixels, channels) if _is_picture(v, k, where) else v
        for k, v in row.items()
    }


def _of_array(array: np.ndarray, last: bool = True, *, name: str, channels: int) -> Picture:
    """Rows and columns are a picture of Pillow's, a map as well as a grey; with channels they are bands."""
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array.squeeze(2 if array.shape[2] == 1 else 0)
    if array.ndim == 2 and array.size:
        return Picture(_grey(array, name), name, channels=channels)
    if array.ndim != 3:
        raise ValueError(f"{name} holds an array of shape {array.shape}: a map is (H, W), an image has channels too")
    return Picture(Image.new("L", (1, 1)), name, bands=bands.arranged(array, channels, name, last), channels=channels)


def _grey(array: np.ndarray, name: str) -> Image.Image:
    """(H, W) of numbers -> a picture with the same values in Pillow's mode for them."""
    if array.dtype.kind == "f":
        return Image.fromarray(array.astype(np.float32))
    if array.dtype in (np.uint8, np.uint16):
        return Image.fromarray(array)
    if array.dtype == np.bool_:
        return Image.fromarray(array.astype(np.uint8))
    if int(array.min()) < -(2**31) or int(array.max()) >= 2**31:
        raise ValueError(f"{name} holds whole numbers {array.min()}..{array.max()} beyond 32 bits")
    return Image.fromarray(array.astype(np.int32))


def is_bands(data: bytes, channels: int) -> bool:
    """Whether :mod:`adaptkit.bands` reads this file, and not Pillow."""
    return bands.is_npy(data) or (bands.is_tiff(data) and not _is_pillows(data, channels))


def _is_pillows(data: bytes, channels: int) -> bool:
    """Whether Pillow opens this TIFF, and has all of it that is asked for."""
    try:
        samples, more = bands.pages_of_tiff(data)
        if channels != CHANNELS or samples > 4:
            return samples == 1 and not more
        Image.open(io.BytesIO(data)).close()
        return True
    except UnidentifiedImageError:
        return False
    except Exception:  # torn: what reads it says so
        return True


def _is_picture(value: Any, column: str, where: str) -> bool:
    if value is None:
        raise ValueError(f"{where}, column {column!r} holds nothing; fill it, or take the row out")
    return isinstance(value, Image.Image) or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def stored_bytes(stored: dict[str, Any]) -> bytes:
    """Return the bytes of a row's ``{"bytes", "path"}``: those that it holds, else those of the file that it names."""
    data, path = stored["bytes"], stored["path"]
    if data is not None:
        return bytes(data)
    if "://" not in path:
        return Path(path).read_bytes()
    import fsspec  # inside an archive, or on the Hub, when a set is streamed

    with fsspec.open(path, "rb") as file:
        return file.read()


def _orientation(image: Image.Image) -> int:
    turn = image.getexif().get(ORIENTATION, 1)
    return turn if turn in _BACK else 1


def _is_wide(image: Any) -> bool:
    """Is it a PNG of colours, or of greys with alpha, in 16 bits?"""
    return image.format == "PNG" and image.mode in ("RGB", "RGBA", "LA") and "16" in str(image.tile[0][3])


_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,  # 6 and 8 undo each other, the others themselves
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def turned(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Pixels (H, W, ...) as they are stored -> upright, by EXIF's orientation."""
    pixels = pixels.swapaxes(0, 1) if turn > 4 else pixels
    rows = slice(None, None, -1 if turn in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if turn in (2, 3, 6, 7) else 1)
    return pixels[rows, columns]


# ------------------------------------------------------------------------------------------------------- colours


def colours(picture: Picture, upright: bool = True) -> tv_tensors.Image:
    """Picture -> (channels, H, W), turned upright: uint8, or float32 where the file has more than eight bits.

    Floats are in 0..1; of bands that are no picture, in their own unit (:func:`adaptkit.bands.values`). Raises
    ``ValueError`` where the file has another number of channels than was asked for.
    """
    from torchvision import tv_tensors  # here, as in all of the package: it takes a second to import

    if picture.bands is not None:
        pixels = bands.values(picture.bands, picture.name)
    elif picture.channels != CHANNELS:
        pixels = _as_many(picture)
    elif picture.wide is not None:
        pixels = _wide(picture.wide)
    elif picture.image.mode in GREYS:
        pixels = np.repeat(_deep(picture)[..., None], CHANNELS, -1)
    else:
        pixels = _eight_bits(picture)
    if upright:
        pixels = turned(pixels, picture.turn)
    return tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1))


def _as_many(picture: Picture) -> np.ndarray:
    """What Pillow reads -> (H, W, channels) of another number than three: greys for one, red to alpha for four."""
    if picture.channels == 1:
        if picture.image.mode in GREYS:
            return _deep(picture)[..., None]
        pixels = _eight_bits(picture) if picture.wide is None else _wide(picture.wide)
        if (pixels == pixels[..., :1]).all():
            return pixels[..., :1]
        raise ValueError(f"{picture.name} has colours, and the backbone takes one channel: save it in grey")
    found = np.asarray(picture.image) if picture.wide is None else _unchanged(picture.wide)
    count = 1 if found.ndim == 2 else found.shape[-1]
    if picture.channels == 4 == count and picture.image.mode == "RGBA":
        return found
    raise ValueError(
        f"{picture.name} has {count} channels (mode {picture.image.mode}), and the backbone takes {picture.channels}: "
        "give a TIFF or .npy of as many"
    )


def _eight_bits(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8; what is transparent is laid on white."""
    image = picture.image
    try:
        if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
            seen = image.convert("LA") if image.mode == "La" else image
            seen = seen.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
        return np.asarray(image.convert("RGB"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{picture.name} has the mode {picture.image.mode}, which cannot be read as colours ({error}); save it "
            "as RGB"
        ) from error


def _unchanged(data: bytes) -> np.ndarray:
    """A PNG of 16-bit colours -> (H, W, C) float32 in 0..1."""
    from torchvision.io import decode_image

    pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode="UNCHANGED")
    values: np.ndarray = pixels.permute(1, 2, 0).numpy().astype(np.float32) / 65535
    return values


def _wide(data: bytes) -> np.ndarray:
    """A PNG of 16-bit colours -> (H, W, 3) float32, alpha laid on white."""
    values = _unchanged(data)
    if values.shape[-1] in (2, 4):
        values, alpha = values[..., :-1], values[..., -1:]
        values = values * alpha + (1 - alpha)
    return np.broadcast_to(values, (*values.shape[:2], CHANNELS))


def _deep(picture: Picture) -> np.ndarray:
    """Greys of more than eight bits -> (H, W) float32 in 0..1."""
    values, mode = np.asarray(picture.image), picture.image.mode
    if mode.startswith("I;16"):
        return values.astype(np.float32) / 65535
    low, high = (float(values.min()), float(values.max())) if np.isfinite(values).all() else (np.nan, np.nan)
    if mode == "F":
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"{picture.name} holds floating-point values {low:g}..{high:g}, and an image is read as 0..1: divide "
                "by what is white, or save it in 8 or 16 bits"
            )
        return values.astype(np.float32)
    # Pillow's 32-bit integers: a 16-bit PNG in older versions, or a 32-bit TIFF, which does not say what is white.
    sixteen = picture.image.format in ("PNG", "PPM") or high > 255 or high == 0
    if low < 0 or high > 65535 or not sixteen:
        raise ValueError(
            f"{picture.name} holds 32-bit integers {low:g}..{high:g}, and nothing says which of them is white: save it "
            "in 8 or 16 bits"
        )
    return values.astype(np.float32) / 65535


# ----------------------------------------------------------------------------------------------------------- maps


def numbers(picture: Picture, what: str, advice: str, palette: bool) -> np.ndarray:
    """Picture -> its numbers (H, W) as they are stored: class ids, or depths.

    Args:
        picture: of one channel.
        what: it is, for the error.
        advice: how to store it.
        palette: whether a number may be an index into colours.
    """
    values = np.asarray(picture.image) if picture.bands is None else picture.bands
    if values.ndim != 2 or (picture.image.mode == "P" and not palette):
        channels = "a palette" if values.ndim == 2 else f"{values.shape[-1]} channels"
        raise ValueError(f"{picture.name}: {what} has {channels} (mode {picture.image.mode}); {advice}")
    return values


def class_ids(picture: Picture) -> np.ndarray:
    """Mask -> class ids (H, W) int64. Colours and fractions are no class ids: ``ValueError``."""
    values = numbers(picture, "a mask", "store one class id per pixel (mode L or P)", palette=True)
    ids: np.ndarray = values.astype(np.int64)
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (ids == values).all()):
        raise ValueError(f"{picture.name}: a mask holds fractions; store one class id per pixel (mode L or P)")
    return ids


def pair(image: Picture, other: Picture, values: np.ndarray, what: str) -> tuple[tv_tensors.Image, Tensor]:
    """Image and map -> (3, H, W) and (H, W), both upright.

    A map that says no orientation of its own, which is the rule, and has the size of the image as it is stored, was
    made for the stored pixels and is turned with them. One that has the size of the upright image is upright already.

    Raises ``ValueError`` where the map has another size than its image.
    """
    check_pair(image, other, what)
    with_image = other.turn == 1 and other.stored == image.stored
    return colours(image), torch.from_numpy(turned(values, image.turn if with_image else other.turn).copy())


def check_pair(image: Picture, other: Picture, what: str) -> None:
    """``ValueError`` where a map has another size than its image."""
    if other.upright != image.upright and not (other.turn == 1 and other.stored == image.stored):
        (h, w), (height, width) = other.upright, image.upright
        raise ValueError(
            f"{other.name}: {what} is {h} x {w} pixels (height x width), its image {image.name} is {height} x {width}; "
            "pair it with its own image, or save both at one size"
        )


def framed(picture: Picture, size: tuple[int, int]) -> tv_tensors.Image:
    """Picture -> (3, H, W) in the frame of annotations that were made for ``size``, height and width.

    COCO's files give each image's size. Where it is that of the upright picture, boxes were drawn on it (as detectron2
    has it, and browsers show it); where it is that of the pixels as they are stored, and only then, the picture is not
    turned. pycocotools itself opens no picture. Raises ``ValueError`` for another size.
    """
    check_frame(picture, size)
    return colours(picture, upright=size == picture.upright)


def check_frame(picture: Picture, size: tuple[int, int]) -> None:
    """``ValueError`` where a picture is not of the size that its annotations were made for."""
    if size not in (picture.upright, picture.stored):
        (h, w), (height, width) = picture.upright, size
        raise ValueError(
            f"{picture.name} is {h} x {w} pixels (height x width), its entry says {height} x {width}: the annotations "
            "belong to another size"
        )
