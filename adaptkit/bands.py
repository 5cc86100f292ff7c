"""Images of any number of channels: NumPy's ``.npy`` and TIFF, GeoTIFF among them, of 8 or 16 bits or floats.

    value = v / 255 of uint8, v / 65535 of uint16, and v itself of every other kind          (H, W, C)

What is white in a float or in a signed integer no file says: with one or three channels, which are a picture, they
must be in 0..1; with others they are taken in the unit they are stored in (reflectance, decibel, kelvin), and
normalised by a mean and a standard deviation in that unit. NaN and infinity are refused.

A TIFF is read by tifffile, or by rasterio where that is installed alone. Nothing of an ``.npy`` is ever unpickled.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any

import numpy as np

from adaptkit.version import DISTRIBUTION

__all__ = ["PICTURES", "arranged", "array_of_npy", "array_of_tiff", "is_npy", "is_tiff", "pages_of_tiff", "values"]

PICTURES = (1, 3)  #: numbers of channels whose floats are in 0..1
INSTALL = f"pip install tifffile (or '{DISTRIBUTION}[tiff]')"
SAMPLES, MOST_TAGS = 277, 4096  # TIFF's tag of the channels of a pixel; entries that are looked through
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two have 64-bit offsets


def is_npy(data: bytes) -> bool:
    """Whether a file is NumPy's."""
    return data[:6] == b"\x93NUMPY"


def is_tiff(data: bytes) -> bool:
    """Whether a file is a TIFF."""
    return data[:4] in TIFF


def array_of_npy(data: bytes, name: str) -> np.ndarray:
    """File -> its array, without a copy. Raises ``ValueError`` where it is torn or holds objects."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header: Any = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, columns_first, dtype = header[version](file)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name} is no array that can be read ({error}): write it with numpy.save") from error
    there = len(data) - file.tell()
    if dtype.hasobject or dtype.kind not in "buif":
        raise ValueError(f"{name} holds {dtype}: an image or a mask is of numbers")
    if math.prod(shape) * dtype.itemsize != there:  # before anything is allocated
        raise ValueError(f"{name} is torn: shape {shape} of {dtype}, and {there} bytes; copy or download it again")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return _native(array.reshape(shape, order="F" if columns_first else "C"))


def _native(array: np.ndarray) -> np.ndarray:
    """The same numbers in this machine's byte order."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def array_of_tiff(data: bytes, name: str, pixels: bool = True) -> tuple[np.ndarray, bool]:
    """File -> its first image with all channels, as stored, and whether channels are its last axis.

    Args:
        data: the file.
        name: for errors.
        pixels: False decodes nothing: the values are zeros, that take no memory.

    Raises ``ValueError`` where it cannot be read, or nothing that reads it is installed.
    """
    failed: Exception | None = None
    for read in (_by_tifffile, _by_rasterio):  # the second knows LZW by itself
        try:
            return read(data, pixels)
        except ModuleNotFoundError as error:
            if error.name not in ("tifffile", "rasterio"):
                raise
        except Exception as error:  # each decoder has errors of its own, and a torn file meets them all
            failed = failed or error
    if failed is None:
        raise ValueError(f"{name} is a TIFF of many channels, which tifffile or rasterio reads: {INSTALL}")
    more = ": pip install imagecodecs" if "imagecodecs" in str(failed) else ""
    raise ValueError(f"{name} is not a TIFF that can be read whole: {failed}{more} ({len(data)} bytes)") from failed


def pages_of_tiff(data: bytes) -> tuple[int, bool]:
    """File -> channels of its first image, and whether another one follows, by the tags alone.

    Pillow opens no image of more than four channels, and logs an error for each. Raises ``struct.error`` for a torn
    one.
    """
    order, big = "<" if data[:2] == b"II" else ">", 43 in data[2:4]
    word, at, entry = ("Q", 8, 20) if big else ("I", 4, 12)
    (place,) = struct.unpack_from(order + word, data, at)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, place)
    place, samples = place + (8 if big else 2), 1
    for i in range(min(count, MOST_TAGS)):
        (tag,) = struct.unpack_from(order + "H", data, place + i * entry)
        if tag == SAMPLES:
            (samples,) = struct.unpack_from(order + "H", data, place + (i + 1) * entry - (8 if big else 4))
    (following,) = struct.unpack_from(order + word, data, place + count * entry)
    return samples, following != 0


def _by_tifffile(data: bytes, pixels: bool) -> tuple[np.ndarray, bool]:
    import tifffile

    with tifffile.TiffFile(io.BytesIO(data)) as file:
        image = file.series[0]
        shape, axes = image.shape, image.axes
        found = image.asarray() if pixels else np.broadcast_to(np.zeros((), image.dtype), shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"it holds {shape} with the axes {axes}, and an image has rows, columns and channels")
    return _native(found), axes[-1] in "SC"


def _by_rasterio(data: bytes, pixels: bool) -> tuple[np.ndarray, bool]:
    from rasterio.io import MemoryFile

    with MemoryFile(data) as memory, memory.open() as file:
        if pixels:
            return file.read(), False
        return np.broadcast_to(np.zeros((), file.dtypes[0]), (file.count, file.height, file.width)), False


def arranged(array: np.ndarray, channels: int, name: str, last: bool = True) -> np.ndarray:
    """(H, W, C) or (C, H, W) -> (H, W, C): channels are the side of that many; where both are, the one that is said.

    Raises ``ValueError`` where neither side is the number of channels.
    """
    fits = [axis for axis in ((2, 0) if last else (0, 2)) if array.shape[axis] == channels]
    if not fits:
        raise ValueError(
            f"{name} has the shape {array.shape}, and the backbone takes {channels} channels: give (H, W, {channels}) "
            f"or ({channels}, H, W). A backbone of three channels is expanded with --channels N "
            "(adaptkit.expand_channels)"
        )
    if 0 in array.shape:
        raise ValueError(f"{name} has the shape {array.shape}: no pixel")
    return np.moveaxis(array, fits[0], 2)


def values(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W, C) as stored -> uint8, or float32 by the equation above; ``ValueError`` for what is no value."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.uint16:
        return array.astype(np.float32) / 65535
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    low, high = float(array.min()), float(array.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite: fill them")
    if array.shape[-1] in PICTURES and not (array.dtype.kind == "f" and low >= 0 and high <= 1):
        raise ValueError(
            f"{name} holds {array.dtype} {low:g}..{high:g}, and an image of {array.shape[-1]} channels is of 8 or 16 "
            "bits without a sign, or of floats in 0..1: divide by what is white"
        )
    return array.astype(np.float32)
