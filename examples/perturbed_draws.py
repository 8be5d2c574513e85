"""Shows nine draws of PerturbStain for each strength, on one tile, before you train with it.

python examples/perturbed_draws.py --out draws.jpg
python examples/perturbed_draws.py --tile examples/tiles/lab_c/tile_1.png --max-offset 15 --out draws.jpg

The tile comes first. Over each draw stand its offsets in L*, a* and b* for tissue of L* = 60, in Lab units. All
strengths take the same random numbers, so draws at the same place differ in size alone; L* stops at -20 and +23.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from render_tiles import LABS, render_tile
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import PerturbStain
from stainnorm_transform.cli.options import file_name, path_name
from stainnorm_transform.files import replacing
from stainnorm_transform.folders import images

STRENGTHS = [10.0, 25.0]
DRAWS, COLUMNS = 9, 5
SIDE, LINE, MARGIN = 96, 16, 4  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tile", type=file_name, help="RGB image, shown small (default: a synthetic tile)")
    parser.add_argument(
        "--max-offset",
        type=float,
        nargs="+",
        default=STRENGTHS,
        help="one or more max_offset of PerturbStain (default: 10 25)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--out", type=path_name, required=True, help="image file to write, such as draws.jpg")
    options = parser.parse_args()
    try:
        check_output(options.out, options.tile)
        tile = read(options.tile) if options.tile else synthetic_tile()
        perturbations = [PerturbStain(strength) for strength in options.max_offset]
    except ValueError as error:
        parser.error(str(error))
    sheet = contact_sheet(tile, perturbations, options.seed)
    with replacing(options.out) as temporary:
        sheet.save(temporary, Image.registered_extensions()[options.out.suffix.lower()], quality=80, subsampling=0)


def check_output(out: Path, tile: Path | None) -> None:
    """Raises ValueError where the picture could not be written, or would replace the tile."""
    if out.suffix.lower() not in images.SUFFIXES:
        raise ValueError(f"expected --out to end in {', '.join(images.SUFFIXES)}, got '{out}'")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"expected a folder that is there for {out}, got none: make it first")
    if tile and out.exists() and out.samefile(tile):
        raise ValueError(f"expected --out to be another file than --tile, got '{out}' for both")


def read(path: Path) -> Image.Image:
    """An image on white glass.

    Raises:
        ValueError: it is damaged, or of a kind without stain colors.
    """
    try:
        return images.flatten(images.read(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def synthetic_tile() -> Image.Image:
    return to_pil_image(render_tile(1, SIDE, LABS["lab_b"]))


def contact_sheet(tile: Image.Image, perturbations: list[PerturbStain], seed: int = 0) -> Image.Image:
    """For each strength, under its caption, the tile and nine draws."""
    small = tile.copy()
    small.thumbnail((SIDE, SIDE))
    rows = -(-(1 + DRAWS) // COLUMNS)
    width, height = SIDE + MARGIN, SIDE + LINE + MARGIN
    block = LINE + MARGIN + rows * height
    sheet = Image.new("RGB", (COLUMNS * width + MARGIN, len(perturbations) * block), "white")
    draw = ImageDraw.Draw(sheet)
    for number, perturb in enumerate(perturbations):
        top = number * block
        title = f"PerturbStain(max_offset={perturb.max_offset:g}): L*, a*, b*"
        draw.text((MARGIN, top + 2), title, "black", ImageFont.load_default(13))
        for place, (caption, image) in enumerate([("the tile", small), *draws(small, perturb, seed)]):
            x = MARGIN + place % COLUMNS * width
            y = top + LINE + MARGIN + place // COLUMNS * height
            draw.text((x, y + 2), caption, "black", ImageFont.load_default(10))
            sheet.paste(image, (x, y + LINE))
    return sheet


def draws(tile: Image.Image, perturb: PerturbStain, seed: int) -> list[tuple[str, Image.Image]]:
    """Nine draws, each with what was drawn."""
    made = []
    for number in range(DRAWS):
        torch.manual_seed(seed * DRAWS + number)
        params = perturb.make_params([tile])
        ((color_map, factor),) = params["changes"].values()
        lightness, a, b = (round(value) for value in [60 * (float(factor) - 1), *color_map[:, 0].tolist()])
        made.append((f"{lightness:+d}, {a:+d}, {b:+d}", perturb.transform(tile, params)))
    return made


if __name__ == "__main__":
    main()
