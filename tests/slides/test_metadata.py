"""What a slide says about itself."""

import pytest
import tifffile
from synthetic import make_slide, tissue, write_ome

from stainnorm_transform.slides import Slide, metadata


@pytest.mark.parametrize("properties", [{"mpp": None}, {"mpp": 0}, {"mpp": "nan"}, {"mpp": "abc"}])
def test_no_resolution_is_none(tmp_path, properties):
    with Slide(make_slide(tmp_path / "a.svs", tissue(256, 256), objective=None, **properties)) as slide:
        assert slide.mpp is None
        assert slide.objective is None


@pytest.mark.parametrize(("unit", "factor"), [("nm", 1e-3), ("µm", 1), ("mm", 1e3), (None, 1)])
def test_units_of_ome_tiff(tmp_path, unit, factor):
    metadata = {}
    for axis, value in (("X", 0.25), ("Y", 0.3)):
        metadata[f"PhysicalSize{axis}"] = value / factor
        if unit:
            metadata[f"PhysicalSize{axis}Unit"] = unit
    with Slide(write_ome(tmp_path / "a.ome.tif", tissue(300, 300), metadata=metadata)) as slide:
        assert slide.mpp == pytest.approx((0.25, 0.3))


def test_the_objective_is_that_of_the_image(tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", tissue(300, 300))
    text = tifffile.tiffcomment(path)
    two = "".join(f'<Objective ID="O:{i}" NominalMagnification="{m}"/>' for i, m in enumerate((4, 40)))
    for used, expected in (('<ObjectiveSettings ID="O:1"/>', 40), ('<ObjectiveSettings ID="O:0"/>', 4), ("", None)):
        changed = text.replace("<Image ", f'<Instrument ID="I:0">{two}</Instrument><Image ', 1)
        tifffile.tiffcomment(path, changed.replace("<Pixels ", f"{used}<Pixels ", 1).encode())
        with Slide(path) as slide:
            assert slide.objective == expected


def test_absurd_resolutions_are_none(tmp_path):
    for mpp in (1e-7, 1e300, -1):
        with Slide(make_slide(tmp_path / "a.svs", tissue(300, 300), mpp=mpp)) as slide:
            assert slide.mpp is None


def test_the_background_is_that_of_the_slide():
    assert metadata._rgba("F0E1D2") == (240, 225, 210, 255)
    assert metadata._rgba(None) == metadata._rgba("no color") == (255, 255, 255, 255)
