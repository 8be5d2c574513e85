"""DICOM: found by content, one slide of several files, colors as the header says."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image
from synthetic import tissue

from stainnorm_transform.slides import Slide, dicom, formats, is_slide

MARK = bytes(128) + b"DICM"
PIXEL_DATA = b"\xe0\x7f\x10\x00OB\x00\x00\xff\xff\xff\xff"


def header(model, frame):
    """What is looked at of a file."""
    return MARK + b"\x28\x00\x04\x00CS" + len(model).to_bytes(2, "little") + model + PIXEL_DATA + frame


def jpeg(mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(tissue(32, 32)).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def test_dicom_is_told_by_its_content(tmp_path):
    for name in ("1.2.840.10008.1", "IM_0001", "a.dcm", "DICOMDIR"):
        (tmp_path / name).write_bytes(MARK + b"x")
    (tmp_path / "notes").write_bytes(b"x" * 200)
    (tmp_path / "short").write_bytes(b"")
    (tmp_path / "a.png").write_bytes(MARK)
    found = {path.name for path in tmp_path.iterdir() if is_slide(path)}
    assert found == {"1.2.840.10008.1", "IM_0001", "a.dcm"}


@pytest.mark.parametrize(
    ("model", "frame", "is_refused"),
    [
        (b"RGB ", jpeg(), True),  # JFIF
        (b"YBR_FULL_422", jpeg(), False),
        (b"RGB ", jpeg(keep_rgb=True), False),  # Adobe's mark of RGB
        (b"RGB ", b"\xff\x4f\xff\x51", False),  # JPEG 2000
    ],
)
def test_false_colors_are_refused(tmp_path, model, frame, is_refused):
    path = tmp_path / "a.dcm"
    path.write_bytes(header(model, frame))
    if is_refused:
        with pytest.raises(ValueError, match=r"not supported: its header says RGB, but .* dcmodify -m"):
            dicom.check_colors(path)
    else:
        dicom.check_colors(path)


def test_a_real_slide_of_several_files(data, tmp_path):
    files = []
    for number, path in enumerate(sorted((data / "slides/dicom").iterdir())):
        files.append(tmp_path / f"IM{number}")
        shutil.copyfile(path, files[-1])
    assert formats.without_parts(files) == files[:1]
    with pytest.raises(ValueError, match="its header says RGB, but its JPEG data is YCbCr"):
        Slide(files[0])
    # As the message says to mend it.
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"CS\x04\x00RGB ", b"CS\x0c\x00YBR_FULL_422", 1))
    with Slide(files[0]) as slide:
        found = slide.read(0, 0, 500, 500).permute(1, 2, 0).numpy()
        assert len(slide.level_dimensions) == 12
    first = max(files, key=lambda path: path.stat().st_size).read_bytes()
    frame = Image.open(io.BytesIO(first[first.index(b"\xff\xd8\xff") :]))
    assert np.abs(found.astype(int) - np.asarray(frame.convert("RGB"))).max() <= 2
