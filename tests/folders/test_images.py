"""Images of every format, label masks and metadata, through the command normalize."""

import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image
from render_tiles import render_tile
from synthetic import rows, save
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from stainnorm_transform.estimate import has_tissue, small_copy
from stainnorm_transform.folders import images
from stainnorm_transform.folders.images import is_mask
from stainnorm_transform.folders.record import MAP_FIELDS

TILE = np.ascontiguousarray(render_tile().permute(1, 2, 0).numpy())
CODECS = {
    "a.bmp": (imagecodecs.bmp_encode, imagecodecs.bmp_decode),
    "a.BMP": (imagecodecs.bmp_encode, imagecodecs.bmp_decode),
    "a.webp": (lambda pixels: imagecodecs.webp_encode(pixels, lossless=True), imagecodecs.webp_decode),
    "a.jp2": (imagecodecs.jpeg2k_encode, imagecodecs.jpeg2k_decode),
    "a.j2k": (lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k"), imagecodecs.jpeg2k_decode),
}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", CODECS)
def test_a_result_has_the_format_of_its_input_and_no_loss(run, tmp_path, random_normalize, name):
    encode, decode = CODECS[name]
    path = write(tmp_path / "in" / name, encode(TILE))
    assert run(tmp_path / "in") == 0
    result = (tmp_path / "out" / name).read_bytes()
    assert result[:4] == path.read_bytes()[:4]
    expected = random_normalize(render_tile()).permute(1, 2, 0).numpy()
    assert np.array_equal(decode(result), expected)


@pytest.mark.parametrize("name", ["a.webp", "a.jp2", "a.tif"])
def test_every_format_that_has_transparency_keeps_it(run, tmp_path, random_normalize, name):
    image = to_pil_image(render_tile())
    alpha = Image.linear_gradient("L").resize(image.size)
    alpha.paste(0, (0, 0, 50, 50))
    image.putalpha(alpha)
    save(tmp_path / name, image, **({"lossless": True, "exact": True} if name == "a.webp" else {}))
    assert run(tmp_path / name) == 0
    with Image.open(tmp_path / "out" / name) as out:
        assert np.array_equal(out.getchannel("A"), alpha)
        white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        expected = random_normalize.for_slide([white])(render_tile())
        assert torch.equal(pil_to_tensor(out)[:3], expected)


def test_bmp_with_transparency_is_refused_rather_than_made_opaque(run, tmp_path, capsys):
    pixels = np.dstack([TILE, np.full(TILE.shape[:2], 128, np.uint8)])
    # Only the headers since Windows 95 say which bytes are alpha.
    masks = b"".join(value.to_bytes(4, "little") for value in (0xFF, 0xFF00, 0xFF0000, 0xFF000000))
    fields = [(108, 4), (pixels.shape[1], 4), (pixels.shape[0], 4), (1, 2), (32, 2), (3, 4), (pixels.nbytes, 4)]
    header = b"".join(value.to_bytes(size, "little") for value, size in fields) + bytes(16) + masks + bytes(52)
    file = b"BM" + (14 + 108 + pixels.nbytes).to_bytes(4, "little") + bytes(4) + (14 + 108).to_bytes(4, "little")
    write(tmp_path / "a.bmp", file + header + pixels[::-1].tobytes())
    with Image.open(tmp_path / "a.bmp") as image:
        assert np.array_equal(image, pixels)
    assert run(tmp_path / "a.bmp") == 1
    assert "a.bmp: not supported: BMP with transparency, convert it to PNG" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["jp2", "j2k"])
def test_jpeg_2000_of_16_bits_is_refused(run, tmp_path, capsys, form):
    path = write(tmp_path / f"a.{form}", imagecodecs.jpeg2k_encode(TILE.astype(np.uint16) * 257, codecformat=form))
    assert run(path) == 1
    assert "16 bits a channel" in capsys.readouterr().err


def label_mask(side=128):
    """Four classes, as blobs, with a palette."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 12), np.uint8)).resize((side, side), 3)
    mask = Image.fromarray(np.digitize(np.asarray(smooth), [90, 130, 170]).astype(np.uint8))
    mask.putpalette([220, 120, 180, 90, 40, 140, 250, 250, 250, 0, 200, 0])
    return mask


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_label_masks_beside_tiles_are_copied_to_the_byte(run, tmp_path, random_normalize, capsys, suffix):
    folder = tmp_path / "in"
    save(folder / "tile.png")
    mask = label_mask()
    classes = Image.fromarray(np.asarray(mask))
    kinds = {
        "palette": mask,
        "rgb": mask.convert("RGB"),
        "grey": classes,
        "binary": classes.point(lambda x: x > 1, "1"),
    }
    paths = [save(folder / f"{name}{suffix}", image) for name, image in kinds.items()]
    assert run(folder, options=["--overview"]) == 0
    for path in paths:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    with Image.open(tmp_path / "out/tile.png") as tile:
        assert torch.equal(pil_to_tensor(tile), random_normalize(render_tile()))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"{folder}/rgb{suffix}: few flat colors, as in a label mask: copied as it is\n" in printed.out
    taken = {row["output"]: [row["offset_a"], row["offset_b"]] for row in rows(tmp_path / "out")}
    assert [name for name, offset in taken.items() if offset != ["0.000", "0.000"]] == ["tile.png"]
    maps = {row["output"]: [float(row[name]) for name in MAP_FIELDS] for row in rows(tmp_path / "out")}
    assert [name for name, color_map in maps.items() if any(color_map)] == ["tile.png"]


def test_many_masks_are_told_in_one_line(run, tmp_path, capsys):
    for number in range(12):
        save(tmp_path / f"in/{number:02}.png", label_mask())
    assert run(tmp_path / "in") == 0
    assert f"  {tmp_path}/in/00.png and 11 others: few flat colors" in capsys.readouterr().out


def pale(share):
    return lambda pixels: (255 - (255 - pixels.astype(float)) * share).round().astype(np.uint8)


def on_white(pixels):
    """A little tissue on glass without noise."""
    out = np.full((64, 64, 3), 255, np.uint8)
    out[:10, :12] = pixels[:10, :12]
    return out


TISSUE = {
    "small": lambda pixels: pixels[:40, :40],
    "tiny": lambda pixels: pixels[:20, :20],
    "pale": pale(0.4),
    "pale and small": lambda pixels: pale(0.4)(pixels)[:40, :40],
    "on white": on_white,
    "64 colors": lambda pixels: np.asarray(Image.fromarray(pixels).quantize(64).convert("RGB")),
    "8 colors": lambda pixels: np.asarray(Image.fromarray(pixels).quantize(8).convert("RGB")),
    "8 colors, tiny": lambda pixels: np.asarray(Image.fromarray(pixels[:24, :24]).quantize(8).convert("RGB")),
}


@pytest.mark.parametrize("kind", TISSUE)
def test_tissue_is_no_mask(kind):
    for seed in range(5):
        # Its middle is no glass.
        pixels = render_tile(seed)[:, 64:192, 64:192].permute(1, 2, 0).numpy()
        image = Image.fromarray(TISSUE[kind](pixels))
        assert has_tissue(small_copy(pil_to_tensor(image)[None]))
        assert not is_mask(image)


@pytest.mark.parametrize("folder", ["edge_cases", "pcam", "monuseg/images"])
def test_real_tissue_is_no_mask(data, folder):
    for path in (data / folder).rglob("*.*"):
        with Image.open(path) as file:
            image = file.convert("RGB")
        if is_mask(image):
            assert not has_tissue(small_copy(pil_to_tensor(image)[None])), path


def stored_description(path):
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags["ImageDescription"]
        tiff.filehandle.seek(tag.valueoffset)
        return tiff.filehandle.read(tag.count)


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_the_description_of_a_tiff_is_kept_to_the_byte(run, tmp_path, encoding):
    text = "PhysicalSizeXUnit=µm".encode(encoding) + b"\0"
    tifffile.imwrite(tmp_path / "a.tif", TILE, photometric="rgb", metadata=None, extratags=[(270, 2, 0, text, True)])
    assert run(tmp_path / "a.tif") == 0
    assert stored_description(tmp_path / "out/a.tif") == stored_description(tmp_path / "a.tif") == text


def test_a_tiff_with_a_palette_keeps_its_scale(run, tmp_path):
    options = {"resolution": 4.0, "resolution_unit": 1, "description": "unit=micron"}
    save(tmp_path / "a.tif", to_pil_image(render_tile()).quantize(256), **options)
    assert run(tmp_path / "a.tif") == 0
    with tifffile.TiffFile(tmp_path / "out/a.tif") as tiff:
        assert tiff.pages[0].photometric == tifffile.PHOTOMETRIC.RGB
        tags = {name: tiff.pages[0].tags[name].value for name in ("XResolution", "ResolutionUnit", "ImageDescription")}
        assert tags == {"XResolution": (4, 1), "ResolutionUnit": 1, "ImageDescription": "unit=micron"}


def test_ome_xml_is_kept(run, tmp_path):
    size = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
    tifffile.imwrite(tmp_path / "a.ome.tif", TILE, photometric="rgb", metadata={"axes": "YXS", **size})
    assert run(tmp_path / "a.ome.tif") == 0
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as before, tifffile.TiffFile(tmp_path / "out/a.ome.tif") as after:
        assert after.ome_metadata == before.ome_metadata
        assert after.series[0].shape == TILE.shape


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_exif_is_kept_to_the_byte(run, tmp_path, name):
    exif = Image.Exif()
    exif[0x010E], exif[0x0110] = "0.25 µm a pixel".encode(), "Köhler".encode("latin-1")
    save(tmp_path / name, exif=exif)
    assert run(tmp_path / name) == 0
    with Image.open(tmp_path / "out" / name) as image:
        assert image.getexif()[0x010E].encode("latin-1") == "0.25 µm a pixel".encode()
        assert image.getexif()[0x0110] == "Köhler"


@pytest.mark.parametrize("resolution", [(0, 0), (0, 1), (5, 0), (2**32 - 1, 0)])
def test_a_resolution_that_is_none_is_dropped(run, tmp_path, random_normalize, resolution):
    options = {"photometric": "rgb", "metadata": None, "description": "a tile"}
    tifffile.imwrite(tmp_path / "a.tif", TILE, resolution=(1, 1), **options)
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        for name in ("XResolution", "YResolution"):
            tiff.pages[0].tags[name].overwrite(resolution)
    assert run(tmp_path / "a.tif") == 0
    with tifffile.TiffFile(tmp_path / "out/a.tif") as tiff:
        assert "XResolution" not in tiff.pages[0].tags
        assert tiff.pages[0].description == "a tile"
        assert np.array_equal(tiff.asarray(), random_normalize(render_tile()).permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("orientation", "expected"), [(1, (300, 150)), (3, (300, 150)), (6, (150, 300)), (8, (150, 300))]
)
def test_resolution_turns_with_the_image(tmp_path, orientation, expected):
    tags = ExifTags.Base
    how = {tags.Orientation: orientation, tags.XResolution: 300, tags.YResolution: 150, tags.ResolutionUnit: 2}
    to_pil_image(render_tile(0, 64)[:, :40]).save(tmp_path / "a.tif", tiffinfo=how)
    image = images.read(tmp_path / "a.tif")
    assert image.size == ((64, 40) if expected == (300, 150) else (40, 64))
    (tmp_path / "b.tif").write_bytes(images.encode(image, ".tif", like=image))
    with Image.open(tmp_path / "b.tif") as result:
        assert (result.tag_v2[tags.XResolution], result.tag_v2[tags.YResolution]) == expected
        assert result.tag_v2.get(tags.Orientation, 1) == 1


def test_five_or_six_bits_a_channel_are_eight(tmp_path):
    """BMP of 16 bits a pixel."""
    header = b"BM" + struct.pack("<IHHI", 14 + 40 + 12 + 2 * 4 * 4, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x7E0, 0x1F)
    (tmp_path / "a.bmp").write_bytes(header + struct.pack("<H", 0xFC1F) * 16)
    assert images.read(tmp_path / "a.bmp").getpixel((0, 0)) == (255, 129, 255)
