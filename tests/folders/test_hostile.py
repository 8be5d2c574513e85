"""Damaged and hostile files: a clear error, the file left as it was, nothing half written, nothing run.

For minutes of it: pytest tests/folders/test_hostile.py --hypothesis-profile=fuzz --hypothesis-show-statistics
"""

import contextlib
import io
import json
import pickle
import struct
import zlib

import numpy as np
import pytest
import safetensors.torch
import tifffile
import torch
from hypothesis import HealthCheck, currently_in_test_context, event, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from render_tiles import render_tile
from synthetic import png, tissue
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import ColorNormNet, TrainConfig, weights
from stainnorm_transform.cli.main import main
from stainnorm_transform.folders import Offsets
from stainnorm_transform.folders.record import FIELDS, MAP_FIELDS, Record
from stainnorm_transform.slides import Slide, is_slide
from stainnorm_transform.training import checkpoint

FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck))
# A slide takes some ten times as long as an image.
FUZZ_SLIDES = settings(FUZZ, max_examples=settings().max_examples // 4)
pytestmark = pytest.mark.filterwarnings("error")
SIZE = 24


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode_tiff(**options):
    file = io.BytesIO()
    tifffile.imwrite(file, np.array(TILE), photometric="rgb", **options)
    return file.getvalue()


TILE = to_pil_image(render_tile(0, SIZE))
EXIF = Image.Exif()
EXIF[0x010E], EXIF[0x0112] = "a tile", 6
GOOD = {
    "rgb.png": encode(TILE, "PNG", icc_profile=b"profile" * 9, dpi=(300, 300)),
    "rgba.png": encode(TILE.convert("RGBA"), "PNG", exif=EXIF),
    "palette.png": encode(TILE.convert("P"), "PNG", transparency=b"\0\x80\xff"),
    "baseline.jpg": encode(TILE, "JPEG", exif=EXIF, icc_profile=b"profile" * 9),
    "progressive.jpeg": encode(TILE, "JPEG", progressive=True, subsampling=2),
    "deflate.tif": encode(TILE, "TIFF", compression="tiff_adobe_deflate", description="a tile"),
    "lzw.tif": encode(TILE, "TIFF", compression="tiff_lzw"),
    "jpeg.tif": encode(TILE, "TIFF", compression="jpeg"),
    "rgb.bmp": encode(TILE, "BMP", dpi=(300, 300)),
    "rgb.webp": encode(TILE, "WEBP", lossless=True, exif=EXIF),
    "rgb.jp2": encode(TILE, "JPEG2000"),
    "packbits.tiff": encode(TILE, "TIFF", compression="packbits"),
    "tiled.tif": encode_tiff(tile=(16, 16)),
    "big.tif": encode_tiff(bigtiff=True),
}
INTEGERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, 1 << 30]


def count(outcome):
    """For --hypothesis-show-statistics."""
    if currently_in_test_context():
        event(outcome)


@st.composite
def damaged(draw, content):
    """Bytes after up to eight edits: cut, bits turned, bytes put in, taken out or replaced, lengths made absurd."""
    content = bytearray(content)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3, 8]))):
        place = draw(st.integers(0, max(0, len(content) - 1)))
        kind = draw(st.sampled_from(["flip", "flip", "flip", "number", "number", "cut", "insert", "delete", "copy"]))
        if kind == "cut":
            del content[place:]
        elif kind == "flip" and content:
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "insert":
            content[place:place] = draw(st.binary(max_size=40))
        elif kind == "delete":
            del content[place : place + draw(st.integers(1, 200))]
        elif kind == "number":
            order, size = draw(st.sampled_from(["<", ">"])), draw(st.sampled_from("BHIQ"))
            number = draw(st.sampled_from(INTEGERS)) % (1 << 8 * struct.calcsize(size))
            content[place : place + struct.calcsize(size)] = struct.pack(order + size, number)
        elif kind == "copy":
            content[place:place] = content[: draw(st.integers(0, 100))]
    return bytes(content)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs stainnorm normalize on a file of this name and content, and checks what must hold for any."""
    folder = tmp_path_factory.mktemp("hostile")
    trained = folder / "test.safetensors"
    weights.save(ColorNormNet(), trained, TrainConfig())

    def run(name, content, capsys):
        path, out = folder / "in" / name, folder / "out"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        status = main(["normalize", str(path), "--out", str(out), "--weights", str(trained)])
        captured = capsys.readouterr()
        assert path.read_bytes() == content
        path.unlink()
        results = sorted(result.name for result in out.iterdir())
        (out / "offsets.csv").unlink()
        if status == 0:
            assert len(results) == 2
            result = out / (set(results) - {"offsets.csv"}).pop()
            if is_slide(result):
                with Slide(result) as slide:
                    slide.read(0, 0, *slide.dimensions)
            else:
                assert result.name == name
                with Image.open(result) as image:
                    image.load()
                    # What damage made flat is copied.
                    assert image.mode in ("RGB", "RGBA") or result.read_bytes() == content
            result.unlink()
            count("normalized")
            return ""
        assert status == 1
        assert results == ["offsets.csv"]
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("  ")]
        assert len(lines) == 1
        reason = lines[0].split(f"{name}: ")[1]
        assert len(reason) > 10, reason
        count("refused")
        return reason

    return run


@pytest.mark.parametrize("name", GOOD)
def test_what_is_damaged_here_is_good(command, capsys, name):
    assert command(name, GOOD[name], capsys) == ""


@given(data=st.data())
@FUZZ
def test_damaged_images(command, capsys, data):
    name = data.draw(st.sampled_from(sorted(GOOD)))
    suffix = data.draw(st.sampled_from([name.rpartition(".")[2]] * 4 + ["png", "jpg", "tif", "jp2"]))
    command(f"x.{suffix}", data.draw(damaged(GOOD[name])), capsys)


def slide(ome=False, planes=False, **options):
    file = io.BytesIO()
    pixels = tissue(400, 300)
    options = {"tile": (128, 128), "photometric": "rgb"} | options
    if planes:
        with tifffile.TiffWriter(file, ome=True) as tiff:
            for number, level in enumerate((pixels, pixels[::2, ::2])):
                axes = {"axes": "CYX"} if number == 0 else None
                level = np.moveaxis(level, -1, 0).copy()
                tiff.write(level, subifds=1 - number, subfiletype=number, metadata=axes, **options)
        return file.getvalue()
    text = {} if ome else {"description": "Aperio Image Library v0|AppMag = 20|MPP = 0.5"}
    with tifffile.TiffWriter(file, bigtiff=True, ome=ome) as tiff:
        tiff.write(pixels, subifds=int(ome), metadata={"axes": "YXS"} if ome else None, **text, **options)
        if not ome:
            tiff.write(pixels[::4, ::4], photometric="rgb", metadata=None, description="Aperio Image Library v0")
        tiff.write(pixels[::2, ::2], subfiletype=int(ome), metadata=None, **text, **options)
    return file.getvalue()


SLIDES = {
    "x.svs": slide(compression="jpeg"),
    "deflate.svs": slide(compression="zlib", predictor=True),
    "x.tif": slide(compression="lzw"),
    "x.ome.tif": slide(ome=True, compression="jpeg"),
    "planes.ome.tif": slide(planes=True, photometric="minisblack", compression="packbits"),
    "j2k.tif": slide(ome=True, compression="jpeg2000"),
    "strips.tif": slide(ome=True, compression="webp", tile=None, rowsperstrip=64),
}


@pytest.mark.parametrize("name", SLIDES)
def test_the_slides_damaged_here_are_good(command, capsys, name):
    assert command(name, SLIDES[name], capsys) == ""


@given(data=st.data())
@FUZZ_SLIDES
def test_damaged_slides(command, capsys, data):
    name = data.draw(st.sampled_from(sorted(SLIDES)))
    # Most bytes are pixels: what tells of them stands at both ends.
    content = SLIDES[name]
    part = data.draw(st.sampled_from([slice(0, 1000), slice(len(content) - 3000, None), slice(None)]))
    start, stop, _ = part.indices(len(content))
    command(name, content[:start] + data.draw(damaged(content[start:stop])) + content[stop:], capsys)


@given(content=st.binary(max_size=300), magic=st.sampled_from([value[:8] for value in GOOD.values()]))
@FUZZ
def test_random_bytes_are_no_image(command, capsys, content, magic):
    command("x.png", magic + content, capsys)


BOMBS = {
    "100 gigapixels": (png(2**31 - 1, 2**31 - 1, (b"IDAT", b"")), "decompression bomb"),
    "just over the limit": (png(20_000, 20_000, (b"IDAT", zlib.compress(b""))), "decompression bomb"),
    "no pixels": (png(0, 0, (b"IDAT", b"")), ""),
    "a row of a million, and no data": (png(1_000_000, 100, (b"IDAT", zlib.compress(b"\0" * 99))), "truncated"),
    "100 MB of text": (png(2, 2, (b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), "too large"),
    "100 MB of profile": (png(2, 2, (b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))), ""),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(command, capsys, name):
    content, message = BOMBS[name]
    assert message in command("bomb.png", content, capsys).lower()


def test_what_pillow_reads_halfway_is_not_asked_for():
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


CONFIG = {"preserve_white": True, "slope": 0.3}
METADATA = {"stainnorm_transform": json.dumps({"format": weights.FORMAT, "target": "t", "config": CONFIG})}
GOOD_WEIGHTS = safetensors.torch.save(ColorNormNet().state_dict(), METADATA)


def load(folder, content):
    """The error of a weights file, after a check that it is a clear one; '' if it loads."""
    path = folder / "x.safetensors"
    path.write_bytes(content)
    try:
        loaded = weights.load(path)
    except ValueError as error:
        assert "x.safetensors" in str(error)
        count("refused")
        return str(error)
    finally:
        assert path.read_bytes() == content
    assert isinstance(loaded.target, str)
    assert all(tensor.isfinite().all() for tensor in loaded.network.state_dict().values())
    count("loaded")
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("weights")


def test_the_weights_damaged_here_are_good(folder):
    assert load(folder, GOOD_WEIGHTS) == ""


@given(content=damaged(GOOD_WEIGHTS))
@FUZZ
def test_damaged_weights(folder, content):
    load(folder, content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
PARTS = ["format", "target", "config", "data", "metrics", "date", "network", "preserve_white", "slope"]


@given(changes=st.dictionaries(st.sampled_from(PARTS) | st.text(max_size=5), JSON, max_size=4))
@FUZZ
def test_odd_metadata(folder, changes):
    metadata = {"format": weights.FORMAT, "target": "t", "config": CONFIG, **changes}
    text = json.dumps(metadata)
    load(folder, safetensors.torch.save(ColorNormNet().state_dict(), {"stainnorm_transform": text}))


TENSOR = {
    "dtype": st.sampled_from(["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"]),
    "shape": st.lists(st.integers(-1, 10) | st.sampled_from(INTEGERS), max_size=5),
    "data_offsets": st.lists(st.integers(0, 10_000) | st.sampled_from(INTEGERS), min_size=1, max_size=3),
}


@given(data=st.data())
@FUZZ
def test_odd_headers(folder, data):
    size = int.from_bytes(GOOD_WEIGHTS[:8], "little")
    header = json.loads(GOOD_WEIGHTS[8 : 8 + size])
    for name in data.draw(st.lists(st.sampled_from(sorted(header)), min_size=1, max_size=3)):
        change = data.draw(st.one_of(JSON, *[st.fixed_dictionaries({key: TENSOR[key]}) for key in TENSOR]))
        old = header[name]
        header[name] = {**old, **change} if isinstance(change, dict) and isinstance(old, dict) else change
    text = json.dumps(header).encode()
    length = data.draw(st.sampled_from([len(text)] * 9 + INTEGERS))
    load(folder, struct.pack("<Q", length) + text + GOOD_WEIGHTS[8 + size :])


HOSTILE = {
    "a pickle": pickle.dumps(Trap()),
    "a torch archive": b"PK\x03\x04" + pickle.dumps(Trap()),
    "a header of a gigabyte": struct.pack("<Q", 10**9) + b"{" * 1000,
    "a header of 2**64": struct.pack("<Q", 2**64 - 1) + b"{}",
    "deep metadata": safetensors.torch.save({}, {"stainnorm_transform": "[" * 100_000}),
    "a number of 10,000 digits": safetensors.torch.save({}, {"stainnorm_transform": "1" * 10_000}),
    "other text": safetensors.torch.save({}, {"stainnorm_transform": "\x00\x1b[2J"}),
    "too large for float32": safetensors.torch.save(
        {**ColorNormNet().state_dict(), "stem.bias": torch.full((3,), 1e300, dtype=torch.float64)}, METADATA
    ),
    "an overflow in the network": safetensors.torch.save(
        {**ColorNormNet().state_dict(), "head.weight": torch.full((3, 3, 3, 3), 3e38)}, METADATA
    ),
    "a negative variance": safetensors.torch.save(
        {
            name: -tensor if name.endswith("running_var") else tensor
            for name, tensor in ColorNormNet().state_dict().items()
        },
        METADATA,
    ),
    "an unprintable target": safetensors.torch.save(
        ColorNormNet().state_dict(),
        {"stainnorm_transform": METADATA["stainnorm_transform"].replace('"t"', r'"\ud800"')},
    ),
    "two of a name": struct.pack("<Q", 40) + b'{"a":{},"a":{},"__metadata__":{}}       ',
}


with contextlib.suppress(KeyError):  # Older versions of safetensors have no complex numbers.
    HOSTILE["complex"] = safetensors.torch.save(
        {**ColorNormNet().state_dict(), "stem.bias": torch.zeros(3, dtype=torch.complex64)}, METADATA
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights(folder, name):
    assert load(folder, HOSTILE[name])


def state():
    network = ColorNormNet()
    return network, torch.optim.Adam(network.parameters())


@pytest.fixture(scope="module")
def good_checkpoint(folder):
    checkpoint.save(folder / "run.safetensors", *state(), 3, TrainConfig(), torch.zeros(2, 3))
    return (folder / "run.safetensors").read_bytes()


@given(data=st.data())
@FUZZ
def test_damaged_checkpoints(good_checkpoint, data):
    try:
        iteration = checkpoint.restore(data.draw(damaged(good_checkpoint)), *state(), TrainConfig(), torch.zeros(2, 3))
    except ValueError as error:
        assert len(str(error)) > 10
        count("refused")
        return
    assert isinstance(iteration, int)
    count("loaded")


@given(data=st.data())
@FUZZ
def test_damaged_tables_of_offsets(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    header = ",".join(("input", "offset_a", "offset_b", *MAP_FIELDS)).encode() + b"\n"
    path.write_bytes(data.draw(damaged(header + b"a.png,1,2,1,2,3,4,5,6,7,8\n/in/b.svs,1,2,,,,,,,,\n")))
    try:
        found = Offsets.parse(str(path))
    except ValueError as error:
        assert f"{path}, line " in str(error)
        count("refused")
        return
    for shift in found.by_path.values():
        assert (shift.offset.shape, shift.color_map.shape) == ((2,), (2, 4))
        assert shift.offset.isfinite().all()
        assert shift.color_map.isfinite().all()
    count("read")


@given(data=st.data())
@FUZZ
def test_damaged_records(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("record")
    path, output = folder / "in.png", folder / "out.png"
    path.write_bytes(b"in")
    output.write_bytes(b"out")
    header = ",".join(FIELDS).encode() + b"\n"
    content = header + data.draw(damaged(b'/in.png,"out,\n.png",1,2,1,2,3,4,5,6,7,8,9,0.5,stainnorm,1,2,3,4\n')) * 2
    (folder / "offsets.csv").write_bytes(content)
    try:
        with Record(folder, "test") as made:
            assert not made.is_current(path, output)
            made.add(made.source(path), output, [1, 2], range(8), output)
            assert made.is_current(path, output)
        count("read")
    except ValueError as error:
        assert "is not a record of this version" in str(error)
        assert (folder / "offsets.csv").read_bytes() == content
        count("refused")
