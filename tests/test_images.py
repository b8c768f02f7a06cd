"""Any picture file gives the picture a person would see, or one error that names the file."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from miaformer.data.images import MAX_PIXELS, ImageError, find_images, open_image


@pytest.fixture
def photo() -> Image.Image:
    """Smooth colour, so that lossy formats stay close: red grows to the right, green downwards. 48 x 32 px."""
    x, y = np.meshgrid(np.linspace(0, 255, 48), np.linspace(0, 255, 32))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=-1).astype(np.uint8))


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def assert_close(image: Image.Image, expected: Image.Image, levels: float) -> None:
    assert (image.mode, image.size) == ("RGB", expected.size)
    difference = np.asarray(image, dtype=int) - np.asarray(expected.convert("RGB"), dtype=int)
    assert np.abs(difference).max() <= levels


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_the_same_picture_from_path_string_bytes_and_stream(photo: Image.Image, tmp_path: Path, format: str) -> None:
    path = tmp_path / "picture"
    path.write_bytes(encode(photo, format))
    for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())):
        assert_close(open_image(source), photo, 0)


def test_cmyk_jpeg_keeps_its_colours(photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    photo.convert("CMYK").save(path, quality=98, subsampling=0)
    with Image.open(path) as raw:
        assert raw.mode == "CMYK"
    assert_close(open_image(path), photo, 12)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo: Image.Image, tmp_path: Path, orientation: int) -> None:
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation](np.asarray(photo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone.jpg"
    photo.save(path, exif=exif, quality=98, subsampling=0)
    assert_close(open_image(path), Image.fromarray(np.ascontiguousarray(turned)), 10)


def test_damaged_exif_does_not_lose_the_picture(photo: Image.Image) -> None:
    assert_close(open_image(encode(photo, "JPEG", exif=b"Exif\0\0not tiff at all", quality=98)), photo, 40)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, format: str) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    path = tmp_path / "scan"
    Image.fromarray(levels).save(path, format)
    seen = np.asarray(open_image(path))[..., 0]
    assert np.array_equal(seen, np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(
    ("levels", "white"),
    [
        (np.linspace(0, 1, 64, dtype=np.float32), 255),
        (np.linspace(0, 0.5, 64, dtype=np.float32), 128),
        (np.linspace(-3, 70, 64, dtype=np.float32), 255),
        (np.linspace(0, 2**31 - 1, 64).astype(np.int32), 255),
        (np.full(64, 7.5, dtype=np.float32), 0),
    ],
)
def test_grey_of_other_types_uses_its_range(tmp_path: Path, levels: np.ndarray, white: int) -> None:
    path = tmp_path / "measured.tiff"
    Image.fromarray(levels.reshape(8, 8)).save(path)
    seen = np.asarray(open_image(path))
    assert seen.min() == 0
    assert seen.max() == white


def test_grey_that_is_not_a_number_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "measured.tiff"
    Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)).save(path)
    with pytest.raises(ImageError, match=r"measured\.tiff.*NaN"):
        open_image(path)


def transparent_palette(format: str) -> bytes:
    image = Image.new("P", (4, 2), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (2, 0, 4, 2))
    return encode(image, format, transparency=0)


def transparent_rgba() -> bytes:
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (2, 0, 4, 2))
    return encode(image, "PNG")


def transparent_colour_key() -> bytes:
    image = Image.new("RGB", (4, 2), (0, 0, 0))
    image.paste((255, 0, 0), (2, 0, 4, 2))
    return encode(image, "PNG", transparency=(0, 0, 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: transparent_palette("PNG"),
        lambda: transparent_palette("GIF"),
        transparent_rgba,
        transparent_colour_key,
    ],
)
def test_transparency_shows_white(make: Callable[[], bytes]) -> None:
    expected = Image.new("RGB", (4, 2), "white")
    expected.paste((255, 0, 0), (2, 0, 4, 2))
    assert_close(open_image(make()), expected, 0)


def test_half_transparent_grey_is_mixed_with_white() -> None:
    assert open_image(encode(Image.new("LA", (1, 1), (0, 128)), "PNG")).getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("size", [(1, 1), (10_000, 3), (3, 10_000)])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_tiny_and_very_long_pictures_open(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    path = tmp_path / "odd.png"
    Image.new(mode, size, 1 if mode == "1" else "white").save(path)
    assert_close(open_image(path), Image.new("RGB", size, "white"), 0)


def test_of_several_frames_the_first_is_shown(photo: Image.Image) -> None:
    other = Image.new("RGB", photo.size, "blue")
    for format in ("GIF", "TIFF", "WEBP"):
        frames = encode(Image.new("RGB", photo.size, "red"), format, save_all=True, append_images=[other])
        red, _, blue = open_image(frames).getpixel((0, 0))
        assert red > 250
        assert blue < 5


@pytest.mark.parametrize("other_code_allows_truncation", [False, True])
@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {}),
    ],
)
def test_a_truncated_file_is_an_error_wherever_it_ends(
    photo: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    options: dict[str, object],
    other_code_allows_truncation: bool,
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", other_code_allows_truncation)
    whole = encode(photo, format, **options)
    path = tmp_path / "cut.jpg"
    for kept in (0.05, 0.3, 0.6, 0.9, 0.97):
        path.write_bytes(whole[: int(kept * len(whole))])
        with pytest.raises(ImageError, match=r"cut\.jpg"):
            open_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is other_code_allows_truncation


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_download_filled_up_with_zeros_is_an_error(photo: Image.Image, format: str) -> None:
    thumbnail = encode(photo.resize((12, 8)), "JPEG")  # has an end marker of its own
    options = {"exif": b"Exif\0\0" + thumbnail} if format == "JPEG" else {}
    whole = encode(photo, format, **options)
    kept = len(whole) * 3 // 4
    with pytest.raises(ImageError, match="half"):
        open_image(whole[:kept] + bytes(len(whole) - kept), name="half")


def test_bytes_after_the_end_do_no_harm(photo: Image.Image) -> None:
    for format in ("JPEG", "PNG"):
        assert_close(open_image(encode(photo, format) + b"\xff\xda a film, say" + bytes(99)), photo, 60)


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9460, 20_000])  # just over our limit; over Pillow's own error
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_undecoded(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert side * side > MAX_PIXELS
    with pytest.raises(ImageError, match=r"bomb\.png.*89,478,485"):
        open_image(png_header(side, side), name="bomb.png")


def test_every_unusable_file_gives_one_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("These are not the pixels you are looking for.\n" * 20)
    (tmp_path / "folder.jpg").mkdir()
    # A PostScript picture would make Pillow run another program
    (tmp_path / "program.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    reasons = {
        "empty.png": "empty",
        "text.jpg": "not a picture",
        "folder.jpg": "folder",
        "missing.jpg": "no such file",
        "program.eps": "not a picture",
        "nul\0l.png": "null",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert name in str(caught.value)
        assert reason in str(caught.value)


def test_wrong_types_are_type_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="ndarray"):
        open_image(np.zeros((2, 2, 3)))  # type: ignore[arg-type]
    (tmp_path / "a.png").write_text("text")
    with (tmp_path / "a.png").open() as text, pytest.raises(TypeError, match=r"a\.png.*binary"):
        open_image(text)  # type: ignore[arg-type]


def test_pictures_are_found_sorted_and_hidden_ones_skipped(tmp_path: Path) -> None:
    wanted = ["B.PNG", "a.jpg", "deep/er/c.JpEg", "deep/z.webp"]
    for name in [*wanted, "notes.txt", ".hidden.png", ".cache/x.png", "deep/page.eps"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in find_images(tmp_path)] == wanted
    assert find_images(tmp_path / "notes.txt") == [tmp_path / "notes.txt"]


def test_nothing_to_find_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ImageError, match="no pictures"):
        find_images(tmp_path)
