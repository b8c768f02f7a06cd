"""Opening pictures as a person would expect to see them, whatever is in the file.

`open_image` gives an RGB 8-bit picture or one `ImageError` that names the file and what is wrong with it.
Every picture that miaformer reads, from a user's file, a data set or a request, comes through here.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Most pixels a picture may have: Pillow's own limit, 256 MiB as RGB."""

# Formats that hold no pixels of their own, or that Pillow hands to another program (EPS runs Ghostscript).
_NOT_PICTURES = {"EPS", "WMF", "FPX", "MPEG", "GRIB", "HDF5", "BUFR"}
_USUAL = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
_strict_decoding = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be used. The message names it and says why."""


class TooManyPixelsError(ImageError):
    """A picture that may be a good one, and is larger than is allowed."""


def open_image(
    source: str | Path | bytes | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decode one picture into an upright RGB image with 8 bits a channel.

    The EXIF orientation is applied. Transparency (alpha, palette or colour key) is composited on white.
    16-bit grey is scaled to 8 bits, not clipped; 32-bit and floating-point grey are described at
    `_grey_to_8_bits`. CMYK is converted as Pillow does, without colour profiles. Of several frames the first
    is taken.

    Args:
        source: a path, the encoded bytes, or a binary file open for reading.
        name: what to call the picture in errors; by default the path.
        max_pixels: a picture of more is refused before it is decoded; at most `MAX_PIXELS`.

    Raises:
        ImageError: the file is missing, empty, a directory, not a picture, truncated or damaged, or
            (`TooManyPixelsError`) has more than `max_pixels` pixels.
        TypeError: `source` is none of the above.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = name or str(path)
        encoded = _read(path, name)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        encoded = bytes(source)
        name = name or f"<picture of {len(encoded)} bytes>"
    elif hasattr(source, "read"):
        name = name or str(getattr(source, "name", "<stream>"))
        encoded = source.read()
        if not isinstance(encoded, bytes):
            raise TypeError(f"{name}: opened as text; open it in binary mode, 'rb'")
    else:
        raise TypeError(f"a picture is a path, bytes or a binary file, not {type(source).__name__}")
    if not encoded:
        raise ImageError(f"{name}: the file is empty")
    return _decode(encoded, name, min(max_pixels, MAX_PIXELS))


def find_images(path: str | Path) -> list[Path]:
    """The pictures at `path`: itself if it is a file, else all below it, sorted, by the suffixes that Pillow
    reads.

    Hidden files and folders are skipped; links are followed, each folder once.

    Raises:
        ImageError: nothing is there, or the folder holds no picture.
    """
    root = Path(path)
    if root.is_file():
        return [root]
    suffixes = picture_suffixes()
    found = files_below(root, lambda name: os.path.splitext(name)[1].lower() in suffixes)
    if not found:
        raise ImageError(f"{root}: no pictures in this folder (known suffixes: {', '.join(sorted(suffixes)[:8])}, ...)")
    return found


def files_below(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    """All files in a folder and below it whose name is wanted, sorted.

    Hidden files and folders are skipped; links are followed, each folder once, but not to folders above.

    Raises ImageError where there is no such folder.
    """
    if not root.is_dir():
        raise ImageError(f"{root}: no such file or folder")
    found: list[Path] = []
    seen = {os.path.realpath(above) for above in Path(os.path.realpath(root)).parents}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [Path(folder, name) for name in files if not name.startswith(".") and wanted(name)]
    return sorted(found)


def picture_suffixes() -> set[str]:
    """Lower-case file suffixes, with the dot, of the formats `open_image` reads."""
    formats = set(readable_formats())
    return {suffix.lower() for suffix, name in Image.registered_extensions().items() if name in formats}


@cache
def readable_formats() -> list[str]:
    """Formats in the order to try: the usual ones first, which halves the time to open a small JPEG."""
    Image.init()
    readable = [name for name in Image.OPEN if name not in _NOT_PICTURES]
    return sorted(readable, key=lambda name: _USUAL.index(name) if name in _USUAL else len(_USUAL))


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: this is a folder, not a picture") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise ImageError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decode(encoded: bytes, name: str, max_pixels: int) -> Image.Image:
    try:
        with Image.open(io.BytesIO(encoded), formats=readable_formats()) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise TooManyPixelsError(f"{name}: {width} x {height} pixels are more than the limit of {max_pixels:,}")
            _load(image)
            if not _is_complete(encoded, image.format):
                raise ImageError(f"{name}: truncated: its {image.format} end marker is missing")
            return _to_rgb(_upright(image))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: not a picture in a format that Pillow knows ({len(encoded)} bytes)") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixelsError(f"{name}: more than the limit of {max_pixels:,} pixels: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        raise ImageError(f"{name}: cannot be decoded, truncated or damaged: {error}") from error


def _load(image: Image.Image) -> None:
    """Decode all pixels; fail on a truncated file even if other code told Pillow to fill it up with grey."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        image.load()
        return
    with _strict_decoding:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True


def _is_complete(encoded: bytes, format: str | None) -> bool:
    """Whether the end marker is there, in the two formats whose decoders take zeros for pixels.

    A broken download may have its full length with zeros at the end: Pillow then shows the rest grey or
    black.
    """
    if format == "PNG":
        return b"IEND" in encoded
    if format not in ("JPEG", "MPO"):
        return True
    position = 2  # after the start marker; then segments: FF, kind, length (2 bytes, big-endian, counts itself)
    while position + 4 <= len(encoded) and encoded[position] == 0xFF and encoded[position + 1] != 0xDA:
        if encoded[position + 1] == 0xFF:  # a fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
    return encoded.find(b"\xff\xd9", position) >= 0


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF says nothing about the pixels: show them as they are stored
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_grey_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(grey: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey levels of any type to 0..255.

    Integers within 0..65535 are taken as 16-bit (65535 is white), floats within 0..1 as fractions of white.
    Other ranges have no agreed white: they are stretched from their least to their greatest value.
    """
    levels = grey.astype(np.float64)
    if not np.isfinite(levels).all():
        raise ValueError("its grey levels contain NaN or infinity")
    low, high = 0.0, 65535.0 if np.issubdtype(grey.dtype, np.integer) else 1.0
    if levels.min() < low or levels.max() > high:
        low, high = levels.min(), max(levels.max(), levels.min() + 1)
    return np.rint((levels - low) * (255 / (high - low))).astype(np.uint8)
