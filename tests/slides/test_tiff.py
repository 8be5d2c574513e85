"""TIFFs of every writer: compressions, layouts, missing and damaged tiles, orientation."""

import struct
import threading
from unittest.mock import Mock

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from synthetic import by_openslide, damage, make_slide, tissue, write_ome

from stainnorm_transform.slides import Slide, is_slide
from stainnorm_transform.slides.jpeg import decode_jpeg, frame_of

PIXELS = tissue(500, 700)
HALF = np.ascontiguousarray(PIXELS[::2, ::2])


def write(path, *levels, flag=True, subifds=False, **options):
    """A TIFF of some levels, in pages or SubIFDs, flagged as reduced or not."""
    options = {"tile": (128, 128), "photometric": "rgb", "metadata": None, **options}
    byteorder = options.pop("byteorder", None)
    with tifffile.TiffWriter(path, byteorder=byteorder) as file:
        for number, level in enumerate(levels or (PIXELS, HALF)):
            below = len(levels or (PIXELS, HALF)) - 1 if subifds and not number else None
            file.write(level, subfiletype=int(flag and number > 0), subifds=below, **options)
    return path


def whole(path, level=0, **options):
    with Slide(path, **options) as slide:
        return slide.read(0, 0, *slide.level_dimensions[level], level).permute(1, 2, 0).numpy()


LAYOUTS = {
    "plain": {},
    "LZW": {"compression": "lzw", "predictor": True},
    "Deflate": {"compression": "zlib", "predictor": True},
    "Zstandard": {"compression": "zstd"},
    "PackBits": {"compression": "packbits"},
    "WebP": {"compression": "webp", "compressionargs": {"lossless": True}},
    "JPEG 2000": {"compression": "jpeg2000"},
    "Aperio's JPEG 2000": {"compression": "aperio_jp2000_rgb"},
    "big-endian": {"compression": "zlib", "byteorder": ">"},
    "SubIFDs": {"compression": "zlib", "subifds": True},
    "pages without flag": {"compression": "zlib", "flag": False},
    "strips": {"compression": "lzw", "tile": None, "rowsperstrip": 33},
    "one strip": {"tile": None, "rowsperstrip": 500},
    "JPEG of RGB": {
        "compression": "jpeg",
        "compressionargs": {"level": 100, "outcolorspace": "rgb"},
        "photometric": "rgb",
        "subsampling": (1, 1),
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_pixels_of_every_layout(tmp_path, name):
    path = write(tmp_path / "a.tif", **LAYOUTS[name])
    assert is_slide(path)
    most = 6 if name == "JPEG of RGB" else 0
    with Slide(path) as slide:
        assert slide.level_dimensions == [(700, 500), (350, 250)]
        assert np.abs(slide.read(0, 0, 700, 500).permute(1, 2, 0).numpy().astype(int) - PIXELS).max() <= most
        part = slide.read(200, 100, 130, 140, level=1).permute(1, 2, 0).numpy()
        assert np.abs(part.astype(int) - HALF[50:190, 100:230]).max() <= most
        # Beyond all edges.
        part = slide.read(-10, 480, 900, 40).permute(1, 2, 0).numpy()
    assert np.abs(part[:20, 10:710].astype(int) - PIXELS[480:]).max() <= most
    assert (part[20:] == 255).all()
    assert (part[:, 710:] == 255).all()
    assert (part[:, :10] == 255).all()


@pytest.mark.parametrize("subsampling", [(1, 1), (2, 1), (2, 2)])
def test_jpeg_is_as_openslide_has_it(tmp_path, subsampling):
    path = write(tmp_path / "a.tif", compression="jpeg", subsampling=subsampling)
    assert np.abs(whole(path).astype(int) - by_openslide(path)).max() <= 1
    assert np.abs(whole(path).astype(int) - PIXELS).mean() < 8


def test_planes_of_a_page(tmp_path):
    planes = [np.moveaxis(level, -1, 0).copy() for level in (PIXELS, HALF)]
    path = write(tmp_path / "a.tif", *planes, planarconfig="separate", compression="zlib")
    assert np.array_equal(whole(path), PIXELS)
    assert np.array_equal(whole(path, level=1), HALF)


@pytest.mark.parametrize("options", [{}, {"tile": None, "rowsperstrip": 100}])
@pytest.mark.parametrize("photometric", ["minisblack", "rgb"])
def test_planes_of_ome_tiff(tmp_path, photometric, options):
    options = {"tile": (128, 128), "photometric": photometric, "compression": "lzw", **options}
    if photometric == "rgb":
        options["planarconfig"] = "separate"
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(np.moveaxis(PIXELS, -1, 0).copy(), metadata={"axes": "CYX"}, subifds=1, **options)
        file.write(np.moveaxis(HALF, -1, 0).copy(), metadata=None, subfiletype=1, **options)
    assert is_slide(path)
    assert np.array_equal(whole(path), PIXELS)
    assert np.array_equal(whole(path, level=1), HALF)


RED, GREEN, BLUE = -16776961, 16711935, 65535


@pytest.mark.parametrize(
    "channels",
    [
        {"Name": ["Blue", "Red", "Green"]},
        {"Name": ["B", "R", "G"], "Color": [RED, GREEN, BLUE]},
        {"Name": ["Channel 0", "Channel 1", "Channel 2"], "Color": [BLUE, RED, GREEN]},
        {"Color": [BLUE, RED, GREEN]},
    ],
)
def test_channels_are_those_that_names_or_colors_say(tmp_path, channels):
    path = tmp_path / "a.ome.tif"
    options = {"tile": (128, 128), "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True) as file:
        for number, level in enumerate((PIXELS, HALF)):
            planes = np.moveaxis(level[..., [2, 0, 1]], -1, 0).copy()
            if number == 0:
                file.write(planes, metadata={"axes": "CYX", "Channel": channels}, subifds=1, **options)
            else:
                file.write(planes, metadata=None, subfiletype=1, **options)
    assert np.array_equal(whole(path), PIXELS)
    assert np.array_equal(whole(path, level=1), HALF)


@pytest.mark.parametrize("names", [["DAPI", "FITC", "Cy3"], ["Red", "Green", "Cy5"], ["Red", "Red", "Blue"]])
def test_channels_of_other_names_are_refused(tmp_path, names):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "CYX", "Channel": {"Name": names}}
        file.write(np.moveaxis(PIXELS, -1, 0).copy(), tile=(128, 128), photometric="minisblack", metadata=metadata)
    with pytest.raises(ValueError, match=f"expected the channels red, green and blue, got {', '.join(names)}"):
        Slide(path)


def other(height, width):
    """No smaller copy of ``PIXELS``, of its kind."""
    out = np.full((height, width, 3), 245, np.uint8)
    out[height // 3 :, : width // 2] = tissue(height, width)[height // 3 :, : width // 2]
    return out


@pytest.mark.parametrize("size", [(250, 350), (125, 175), (200, 280), (200, 200), (240, 100)])
def test_another_scan_is_not_lost(tmp_path, size):
    path = write(tmp_path / "a.tif", PIXELS, other(*size), flag=False)
    with pytest.raises(ValueError, match="expected one scan, got other images beside it, which would be lost"):
        Slide(path)


def test_several_smaller_scans_are_not_lost(tmp_path):
    path = write(tmp_path / "a.tif", PIXELS, *[np.ascontiguousarray(PIXELS[:200, :280])] * 2, flag=False)
    with pytest.raises(ValueError, match="expected one scan, got other images beside it"):
        Slide(path)


@pytest.mark.parametrize("steps", [(2, 4, 8), (4, 16), (2, 16), (5,), (40,)])
def test_smaller_copies_without_a_flag_are_no_other_scans(tmp_path, steps):
    image = Image.fromarray(PIXELS)
    levels = [np.asarray(image.resize((700 // step, 500 // step), Image.Resampling.BOX)) for step in steps]
    path = write(tmp_path / "a.tif", PIXELS, *levels, flag=False, compression="jpeg")
    with Slide(path) as slide:
        assert slide.dimensions == (700, 500)


def test_copies_are_told_where_tiles_are_damaged_or_missing(tmp_path):
    path = without_tiles(write(tmp_path / "a.tif", compression="zlib", flag=False), 0, 1, 2)
    with Slide(damage(path, level=0, tile=7)) as slide:
        assert len(slide.level_dimensions) == 2


def test_three_channels_of_fluorescence_are_not_rgb(tmp_path):
    path = tmp_path / "a.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as file:
        metadata = {"axes": "CYX", "Channel": {"EmissionWavelength": [461, 520, 617]}}
        file.write(np.moveaxis(PIXELS, -1, 0).copy(), tile=(128, 128), photometric="minisblack", metadata=metadata)
    with pytest.raises(ValueError, match="expected RGB, got three channels of fluorescence"):
        Slide(path)


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
def test_the_fourth_channel(tmp_path, kind):
    alpha = np.full((500, 700, 1), 255, np.uint8)
    alpha[:100], alpha[100:200] = 0, 128
    share = alpha / 255
    colors = np.round(PIXELS * share) if kind == "assocalpha" else PIXELS
    image = np.concatenate([colors.astype(np.uint8), alpha], axis=-1)
    # On white glass.
    expected = PIXELS if kind == "unspecified" else PIXELS * share + 255 * (1 - share)
    path = write(tmp_path / "a.tif", image, compression="zlib", extrasamples=[kind])
    assert np.abs(whole(path) - expected).max() <= 2


def test_ycbcr_without_jpeg(tmp_path):
    ycbcr = np.asarray(Image.fromarray(PIXELS).convert("YCbCr"))
    for options in ({"photometric": "ycbcr", "compression": "zlib"}, {"compression": "aperio_jp2000_ycbc"}):
        path = write(tmp_path / "a.tif", ycbcr, **options)
        assert np.abs(whole(path).astype(int) - PIXELS).max() <= 3  # of rounding twice


def without_tiles(path, *tiles):
    """Takes away the first page's tiles of these numbers."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = tiff.pages[0].tags[name]
            tag.overwrite([0 if number in tiles else value for number, value in enumerate(tag.value)])
    return path


@pytest.mark.parametrize("compression", ["jpeg", "zlib"])
@pytest.mark.parametrize("ome", [False, True])
def test_missing_tiles_are_white(tmp_path, compression, ome):
    if ome:
        path = write_ome(tmp_path / "a.ome.tif", PIXELS, compression=compression)
    else:
        path = write(tmp_path / "a.tif", PIXELS, compression=compression)
    before = whole(path)
    after = whole(without_tiles(path, 0, 8))
    expected = before.copy()
    expected[:128, :128] = expected[128:256, 256:384] = 255
    assert np.array_equal(after, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    path = write(tmp_path / "a.tif", compression="zlib", extratags=[(274, 3, 1, orientation, True)])
    exif = Image.Exif()
    exif[274] = orientation

    def turned(pixels):
        image = Image.fromarray(pixels)
        image.getexif()[274] = orientation
        return np.asarray(ImageOps.exif_transpose(image))

    shown = turned(PIXELS)
    with Slide(path) as slide:
        assert slide.dimensions == shown.shape[1::-1]
        region = slide.read(150, 60, 200, 150).permute(1, 2, 0).numpy()
    assert np.array_equal(region, shown[60:210, 150:350])
    assert np.array_equal(whole(path), shown)
    assert np.array_equal(whole(path, level=1), turned(HALF))
    damage(path, tile=1)  # at x = 128, y = 0 as it is stored
    broken = PIXELS.copy()
    broken[:128, 128:256] = 255
    with Slide(path, skip_damaged=True) as slide:
        found = slide.read(0, 0, *slide.dimensions).permute(1, 2, 0).numpy()
        ((x, y, width, height),) = slide.damaged
    assert np.array_equal(found, turned(broken))
    assert (found[y : y + height, x : x + width] == 255).all()
    assert (width, height) == (128, 128)


def test_scanners_formats_with_another_orientation_are_refused(tmp_path):
    path = make_slide(tmp_path / "a.svs", PIXELS, extratags=[(274, 3, 1, 6, True)])
    with pytest.raises(ValueError, match="not supported: Orientation 6 in a scanner's format; convert it"):
        Slide(path)


def test_aperios_layout_with_a_compression_that_openslide_lacks(tmp_path):
    path = make_slide(tmp_path / "a.svs", PIXELS, compression="jpeg2000", mpp=0.25, objective=40)
    with Slide(path) as slide:
        assert (slide.mpp, slide.objective) == ((0.25, 0.25), 40)
        assert slide.level_dimensions == [(700, 500), (175, 125)]
        assert slide.associated_images().keys() == {"thumbnail", "label", "macro"}
    assert np.array_equal(whole(path), PIXELS)


def test_a_compression_that_nobody_reads_is_not_supported(tmp_path):
    path = write(tmp_path / "a.tif", PIXELS)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(34661)
    with pytest.raises(ValueError, match=r"not supported: TIFF compression JBIG; convert it .*vips tiffsave"):
        Slide(path)


def jpeg_tile(path, change):
    """Changes the bytes of the second tile."""
    with tifffile.TiffFile(path) as tiff:
        place, size = tiff.pages[0].dataoffsets[1], tiff.pages[0].databytecounts[1]
    content = path.read_bytes()
    changed = change(content[place : place + size])
    assert len(changed) == size
    path.write_bytes(content[:place] + changed + content[place + size :])


# What is changed, and what is said of it.
DAMAGES = {
    "ends too early": lambda data: data[:2000] + b"\xff\xd9" + bytes(len(data) - 2002),
    "has no end": lambda data: data[:-2] + b"\0\0",
    "has a marker that is none, 0x2": lambda data: data[:2000] + b"\xff\x02" + data[2002:],
    "": lambda data: data[:500] + np.random.default_rng(0).bytes(1500) + data[2000:],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_jpeg_is_found(tmp_path, name):
    """libjpeg only warns of it, and a patch of gray would pass for the slide."""
    path = write(tmp_path / "a.tif", PIXELS, compression="jpeg")
    good = whole(path)
    jpeg_tile(path, DAMAGES[name])
    with Slide(path) as slide:
        with pytest.raises(ValueError, match=rf"damaged at x = 100, y = 50 of 50 x 50 pixels: JPEG data {name}"):
            slide.read(100, 50, 50, 50)
        assert np.array_equal(slide.read(256, 0, 300, 300).permute(1, 2, 0).numpy(), good[:300, 256:556])
    good[:128, 128:256] = 255
    assert np.array_equal(whole(path, skip_damaged=True), good)


def test_jpeg_of_absurd_size_is_refused_before_memory_is_asked_for(tmp_path):
    path = write(tmp_path / "a.tif", PIXELS, compression="jpeg")

    def absurd(data):
        place = data.index(b"\xff\xc0") + 5
        return data[:place] + struct.pack(">2H", 65500, 65500) + data[place + 4 :]

    jpeg_tile(path, absurd)
    with Slide(path) as slide, pytest.raises(ValueError, match="tiles of 65500 x 65500 pixels"):
        slide.read(100, 50, 50, 50)


@pytest.mark.parametrize("kind", ["Aperio", "TIFF", "strips", "OME"])
def test_skipped_parts_are_white_and_listed(tmp_path, kind):
    path = tmp_path / ("a.ome.tif" if kind == "OME" else "a.tif")
    if kind == "Aperio":
        make_slide(path, PIXELS, levels=())
    elif kind == "OME":
        write_ome(path, PIXELS, compression="zlib")
    else:
        write(path, PIXELS, compression="zlib", **({"tile": None, "rowsperstrip": 50} if kind == "strips" else {}))
    with tifffile.TiffFile(path) as tiff:
        place = tiff.pages[0].dataoffsets[1]
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 50)
    expected = {"Aperio": [(240, 0, 240, 240)], "strips": [(0, 50, 700, 50)]}
    expected = expected.get(kind, [(128, 0, 128, 128)])
    with Slide(path) as slide, pytest.raises(ValueError, match="damaged at x = 0, y = 0"):
        slide.read(0, 0, 700, 500)
    with Slide(path, skip_damaged=True) as slide:
        assert slide.damaged == []
        slide.read(512, 256, 100, 100)
        assert slide.damaged == []
        threads = [threading.Thread(target=slide.read, args=(0, 0, 700, 500)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = slide.read(0, 0, 700, 500).permute(1, 2, 0).numpy()
        assert slide.damaged == expected
    right = PIXELS.copy()
    for x, y, width, height in expected:
        right[y : y + height, x : x + width] = 255
    assert np.array_equal(found, right)


def test_damage_of_smaller_levels_is_not_listed_as_it_is_not_in_the_result(tmp_path):
    path = damage(write(tmp_path / "a.tif", compression="zlib"), level=1, tile=0)
    with Slide(path, skip_damaged=True) as slide:
        assert (slide.read(0, 0, 128, 128, level=1) == 255).all()
        assert slide.damaged == []


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    with Slide(write(tmp_path / "a.tif"), skip_damaged=True) as slide:
        monkeypatch.setattr(slide._reader._levels[0], "_read", Mock(side_effect=OSError(5, "Input/output error")))
        with pytest.raises(ValueError, match="Input/output error"):
            slide.read(0, 0, 10, 10)
        assert slide.damaged == []


def test_memory_that_is_missing_is_no_damage(tmp_path, monkeypatch):
    with Slide(write(tmp_path / "a.tif"), skip_damaged=True) as slide:
        monkeypatch.setattr(slide._reader._levels[0], "_decode", Mock(side_effect=MemoryError("Unable to allocate")))
        with pytest.raises(MemoryError, match="Unable to allocate"):
            slide.read(0, 0, 10, 10)
        assert slide.damaged == []


def test_a_tile_is_decoded_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", PIXELS, compression="zlib", tile=None, rowsperstrip=100)
    decoded = []
    with Slide(path) as slide:
        level = slide._reader._levels[0]
        decode = level._decode
        monkeypatch.setattr(level, "_decode", lambda *tile: decoded.append(tile) or decode(*tile))
        threads = [threading.Thread(target=slide.read, args=(x, 0, 100, 500)) for x in range(0, 700, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(decoded) == [(0, row) for row in range(5)]


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20_000, 40_000), "resolutionunit": "centimeter"}, (0.5, 0.25)),
        ({"resolution": (50_800, 50_800), "resolutionunit": "inch"}, (0.5, 0.5)),
        ({"resolution": (300, 300), "resolutionunit": "inch"}, None),  # for print
        ({"resolution": (2400, 2400), "resolutionunit": "inch"}, None),
        ({"resolution": (500, 500), "resolutionunit": "centimeter"}, (20, 20)),
        ({"resolution": (2, 2), "resolutionunit": "none"}, None),
        ({}, None),
    ],
)
def test_resolution_by_tags(tmp_path, options, mpp):
    with Slide(write(tmp_path / "a.tif", PIXELS, **options)) as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


def retag(path, name, code=None, kind=None, count=None, value=None, pages=(0,)):
    """Changes a tag of a little-endian TIFF: its code, type, count, or value of up to 4 bytes."""
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages[page].tags[name] for page in pages]
    with path.open("r+b") as file:
        for tag in tags:
            file.seek(tag.offset)
            old = struct.unpack("<HHI4s", file.read(12))
            new = [old[i] if given is None else given for i, given in enumerate((code, kind, count))]
            file.seek(tag.offset)
            file.write(struct.pack("<HHI", *new) + (old[3] if value is None else struct.pack("<I", value)))
    return path


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("XResolution", {"kind": 11, "count": 1, "value": 0x3F800000}),  # a float
        ("XResolution", {"kind": 4, "count": 1, "value": 4}),
        ("YResolution", {"kind": 2, "count": 4, "value": 0x00616161}),  # text
        ("XResolution", {"count": 2}),
        ("ResolutionUnit", {"kind": 2, "count": 4, "value": 0x00616161}),
    ],
)
def test_a_resolution_of_another_type_is_none(tmp_path, name, change):
    path = write(tmp_path / "a.tif", PIXELS, resolution=(20_000, 20_000), resolutionunit="centimeter", byteorder="<")
    with Slide(retag(path, name, **change)) as slide:
        assert slide.mpp is None


@pytest.mark.parametrize("compression", [None, "packbits"])
def test_a_predictor_counts_only_where_libtiff_follows_it(tmp_path, compression):
    path = write(tmp_path / "a.tif", compression=compression, software="x", byteorder="<")
    retag(path, "Software", code=317, kind=3, count=1, value=2, pages=(0, 1))
    assert np.array_equal(by_openslide(path), PIXELS)
    assert np.array_equal(whole(path), PIXELS)
    assert np.array_equal(whole(path, level=1), HALF)


def test_bits_in_reverse(tmp_path):
    reverse = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)], np.uint8)
    for options in ({"tile": None, "rowsperstrip": 500}, {}):
        path = write(tmp_path / "a.tif", reverse[PIXELS], reverse[HALF], software="x", byteorder="<", **options)
        retag(path, "Software", code=266, kind=3, count=1, value=2, pages=(0, 1))
        with Image.open(path) as image:
            assert np.array_equal(np.asarray(image), PIXELS)
        assert np.array_equal(whole(path), PIXELS)


def test_a_strip_that_is_shorter_than_its_image_is_damaged(tmp_path):
    path = write(tmp_path / "a.tif", tile=None, rowsperstrip=500, byteorder="<")
    retag(path, "StripByteCounts", value=700 * 3 * 150)
    with (
        Slide(path) as slide,
        pytest.raises(ValueError, match="damaged at x = 0, y = 130 of 10 x 30 pixels: its strip of 315000 bytes ends"),
    ):
        slide.read(0, 130, 10, 30)
    found = whole(path, skip_damaged=True)
    assert np.array_equal(found[:128], PIXELS[:128])
    assert (found[128:] == 255).all()


@pytest.mark.parametrize("number", [22610, 34934])
def test_jpeg_xr_whose_damage_nobody_finds_is_not_supported(tmp_path, number):
    path = write(tmp_path / "a.tif", PIXELS)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(number)
    with pytest.raises(ValueError, match=r"^not supported: TIFF compression JPEGXR\w*; convert it"):
        Slide(path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ImageWidth", {"value": 0}, "damaged: an image of 0 x 500 pixels"),
        ("TileByteCounts", {"count": 20}, "damaged: it lists fewer tiles than the 24 it has"),
        ("TileOffsets", {"count": 20}, "damaged: it lists fewer tiles than the 24 it has"),
    ],
)
def test_what_contradicts_itself_is_damaged(tmp_path, name, change, message):
    path = write(tmp_path / "a.tif", PIXELS, byteorder="<")
    with pytest.raises(ValueError, match=message):
        Slide(retag(path, name, **change))


def test_a_resolution_of_0_0_is_none(tmp_path):
    path = write(tmp_path / "a.tif", PIXELS, resolution=(1, 1), resolutionunit="centimeter")
    with tifffile.TiffFile(path) as tiff:
        places = [tiff.pages[0].tags[name].valueoffset for name in ("XResolution", "YResolution")]
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            file.write(bytes(8))
    with Slide(path) as slide:
        assert slide.mpp is None


def test_resolution_of_imagej(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PIXELS, imagej=True, resolution=(4, 4), metadata={"unit": "micron", "axes": "YXS"})
    with Slide(path) as slide:
        assert slide.mpp == (0.25, 0.25)


def test_a_resolution_may_be_given(tmp_path):
    path = write(tmp_path / "a.tif", PIXELS)
    with Slide(path, mpp=0.25) as slide:
        assert slide.mpp == (0.25, 0.25)
    path = make_slide(tmp_path / "a.svs", PIXELS, mpp=0.2528)
    with Slide(path, mpp=0.25) as slide:  # the same, rounded
        assert slide.mpp == (0.2528, 0.2528)
    with pytest.raises(ValueError, match=r"no other resolution than the slide's own, 0.2528 micrometers, got 0.5"):
        Slide(path, mpp=0.5)
    with pytest.raises(ValueError, match="expected micrometers a pixel above 0, got nan"):
        Slide(path, mpp=float("nan"))


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"colorspace": "rgb", "outcolorspace": "ycbcr"}, "YCBCR"),
        ({"colorspace": "rgb", "outcolorspace": "rgb"}, "RGB"),
    ],
)
def test_jpeg_says_its_size_and_colors(options, model):
    pixels = tissue(48, 64)
    data = imagecodecs.jpeg8_encode(pixels, level=100, **options)
    assert frame_of(data) == (64, 48, 3, model)
    # By the model that is said, or that of the TIFF where none is.
    bare = unmarked(data)
    assert frame_of(bare) == (64, 48, 3, None)
    out = decode_jpeg(bare, None, model)
    assert np.array_equal(out, decode_jpeg(data, None, "RGB" if model == "YCBCR" else "YCBCR"))
    assert np.array_equal(out[..., :3], imagecodecs.jpeg8_decode(data))
    assert (out[..., 3] == 255).all()


def unmarked(data):
    """JPEG data without its markers of JFIF and Adobe."""
    place, kept = 2, [data[:2]]
    while data[place + 1] in (0xE0, 0xEE):
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return b"".join([*kept, data[place:]])
