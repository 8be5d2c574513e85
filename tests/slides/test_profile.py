"""The color map of a slide as an ICC profile and as a .cube table."""

import io

import numpy as np
import openslide
import pytest
import torch
import torch.nn.functional as F
from kornia.color import rgb_to_lab
from PIL import Image, ImageCms
from synthetic import make_slide, swapped_profile, tissue

from stainnorm_transform import ColorNormNet, NormalizeStain
from stainnorm_transform.color import shift_ab
from stainnorm_transform.slides import Slide
from stainnorm_transform.slides.profile import GRID, color_cube, color_profile

MAPS = {
    "map": torch.tensor([[12.0, 1.5, 3.25, -0.5], [-15.0, 0.75, -1.0, 2.0]]),
    "steep": torch.tensor([[-8.0, 6.0, -6.0, 4.0], [18.0, -5.0, 3.0, 7.0]]),
    "none": torch.zeros(2, 4),
}
EVERY_MAP = pytest.mark.parametrize("color_map", MAPS.values(), ids=MAPS)


@pytest.fixture(scope="module")
def pixels():
    """Tissue of two labs, with glass and black beside it."""
    both = np.concatenate([tissue(300, 400), tissue(300, 400, "lab_c")])
    both[:40], both[-20:] = 250, 0
    return both


def fixed(color_map, preserve_white=True):
    return NormalizeStain(ColorNormNet(), preserve_white, target='a "lab"\n', fixed_map=color_map)


def exactly(pixels, color_map, preserve_white=True):
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return shift_ab(image, -color_map, preserve_white).permute(1, 2, 0).numpy()


def shown(pixels, profile):
    """In sRGB, as a viewer shows colors that have this profile."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    return np.asarray(ImageCms.profileToProfile(Image.fromarray(pixels), source, srgb, renderingIntent=0))


def assert_looks_like(found, expected):
    lab, other = (rgb_to_lab(torch.from_numpy(each.copy()).permute(2, 0, 1) / 255.0) for each in (found, expected))
    difference = (lab - other).norm(dim=0)
    assert difference.mean() < 0.25
    assert difference.quantile(0.99) <= 1


@pytest.mark.parametrize(("name", "preserve_white"), [*((name, True) for name in MAPS), ("map", False)])
def test_littlecms_shows_the_slide_normalized(tmp_path, pixels, name, preserve_white):
    color_map = MAPS[name]
    with Slide(make_slide(tmp_path / "a.svs", pixels)) as slide:
        profile = color_profile(slide, fixed(color_map, preserve_white))
    # Where white and black are shifted, too, they end at the border of the gamut, which a table does not follow.
    inside = slice(None) if preserve_white else slice(40, -20)
    assert_looks_like(shown(pixels, profile)[inside], exactly(pixels, color_map, preserve_white)[inside])
    assert len(profile) < 250_000
    read = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile
    assert (read.xcolor_space.strip(), read.connection_space.strip(), read.device_class) == ("RGB", "Lab", "scnr")
    assert read.profile_description.startswith("a ?lab??, stainnorm")


def test_it_is_composed_with_the_profile_of_the_slide(tmp_path, pixels):
    color_map, own = MAPS["map"], swapped_profile()
    with Slide(make_slide(tmp_path / "a.svs", pixels, iccprofile=own)) as slide:
        profile = color_profile(slide, fixed(color_map))
        assert color_profile(slide, fixed(color_map)) == profile
    assert_looks_like(shown(pixels, profile), shown(exactly(pixels, color_map), own))


@EVERY_MAP
def test_libvips_shows_the_slide_normalized(tmp_path, pixels, color_map):
    pyvips = pytest.importorskip("pyvips")
    with Slide(make_slide(tmp_path / "a.svs", pixels)) as slide:
        (tmp_path / "a.icc").write_bytes(color_profile(slide, fixed(color_map)))
    image = pyvips.Image.new_from_array(pixels)
    profile = str(tmp_path / "a.icc")
    found = image.icc_transform("srgb", input_profile=profile, embedded=False, intent="perceptual").numpy()
    assert_looks_like(found, exactly(pixels, color_map))


@EVERY_MAP
def test_the_cube_is_the_color_map(pixels, color_map):
    lines = color_cube(fixed(color_map)).splitlines()
    assert lines[0].startswith('TITLE "a ?lab??, stainnorm')
    assert lines[1] == f"LUT_3D_SIZE {GRID}"
    values = torch.tensor([[float(value) for value in line.split()] for line in lines[2:]])
    # The first index is that of blue, and grid_sample names coordinates in the order x, y, z: red, green, blue.
    table = values.T.reshape(1, 3, GRID, GRID, GRID)
    places = torch.from_numpy(pixels)[None, None] / 255 * 2 - 1
    found = F.grid_sample(table, places, align_corners=True)[0, :, 0].permute(1, 2, 0)
    assert_looks_like((found * 255).round().byte().numpy(), exactly(pixels, color_map))


@pytest.mark.parametrize("kind", ["damaged", "of another color model"])
def test_a_profile_that_cannot_be_used_is_refused(tmp_path, pixels, kind):
    damaged = swapped_profile()[:200]
    profile = damaged if kind == "damaged" else ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with Slide(make_slide(tmp_path / "a.svs", pixels, iccprofile=profile)) as slide:
        assert slide.icc_profile == profile
        with pytest.raises(ValueError, match="its ICC profile cannot be used: "):
            color_profile(slide, fixed(MAPS["map"]))


def test_openslide_and_deep_zoom_give_the_profile_on(tmp_path, pixels):
    """Viewers that take the profile from the file see it in a TIFF that has it instead of its own."""
    with Slide(make_slide(tmp_path / "a.svs", pixels)) as slide:
        profile = color_profile(slide, fixed(MAPS["map"]))
    with openslide.OpenSlide(make_slide(tmp_path / "b.svs", pixels, iccprofile=profile)) as slide:
        region = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB")
        converted = ImageCms.profileToProfile(region, slide.color_profile, ImageCms.createProfile("sRGB"))
    assert_looks_like(np.asarray(converted), exactly(pixels, MAPS["map"]))
