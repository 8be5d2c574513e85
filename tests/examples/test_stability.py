"""The figures of examples/stability.py."""

import pytest
import stability
import torch
from kornia.color import rgb_to_lab
from render_tiles import LABS, render_tile
from stability import Tissue

from stainnorm_transform import NormalizeStain
from stainnorm_transform.color import as_map
from stainnorm_transform.estimate import tissue_weight

FIRST = torch.tensor([[4.0, 1.0, -2.0, 0.5], [-6.0, -1.0, 0.5, 2.0]])
SECOND = torch.tensor([[3.0, 0.5, 1.0, -0.5], [-4.0, 1.5, -0.5, 1.0]])


@pytest.mark.parametrize("preserve_white", [True, False])
def test_maps_are_as_far_apart_as_what_they_make_of_the_tissue(tile, random_network, preserve_white):
    """Not only in their offsets: against Lab of the images that were normalized by each."""
    normalize = NormalizeStain(random_network, preserve_white)
    copy = 0.2 + 0.6 * tile[:, ::2, ::2] / 255  # far from the limits of the gamut
    by_first, by_second = (rgb_to_lab(normalize.with_map(each)(copy).double())[1:] for each in (FIRST, SECOND))
    weight = tissue_weight(rgb_to_lab(copy[None]))[0, 0]
    # Of which the estimate sees just this copy.
    image = copy.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    square = ((by_first - by_second) ** 2).sum(dim=0)
    expected = float(((weight * square).sum() / weight.sum()).sqrt())
    tissue = Tissue(image, preserve_white)
    assert tissue.root_mean_square(tissue.moved(SECOND - FIRST)) == pytest.approx(expected, abs=1e-3)
    assert expected > 1


class Told:
    """Stands in for a NormalizeStain, and gives one map after another."""

    preserve_white = True

    def __init__(self, *maps):
        self.maps = iter(maps)

    def estimate_map(self, image):
        return next(self.maps)


def test_a_shift_that_is_found_is_no_error(tile):
    shift = torch.tensor([8.0, -5.0])
    offset = torch.tensor([3.0, 1.0])
    told = Told(as_map(offset), as_map(offset + shift))
    assert stability.known_shift(told, tile, shift) == pytest.approx(0, abs=1e-4)
    # One that is not found is one of its size, less where it fades out.
    assert 0.8 * shift.norm() < stability.known_shift(Told(FIRST * 0, FIRST * 0), tile, shift) <= shift.norm() + 1e-4
    # A map that sees shifted colors takes away more of them.
    slopes = torch.tensor([[0.0, 0, 2, 0], [0, 0, 0, 0]])
    found = stability.known_shift(Told(slopes, slopes), tile, torch.tensor([10.0, 0]))
    assert found == pytest.approx(
        0.9 * stability.known_shift(Told(FIRST * 0, FIRST * 0), tile, torch.tensor([10.0, 0])), rel=0.02
    )


def test_flips_of_what_has_no_sides_move_nothing(random_normalize):
    half = render_tile(0, 64, LABS["lab_b"])
    image = torch.cat([half, half.flip(-1)], dim=-1)
    image = torch.cat([image, image.flip(-2)], dim=-2)
    same = Told(FIRST, FIRST, FIRST)
    assert list(stability.MOVES["flipped"](same, image)) == [0, 0]
    moves = {name: list(move(random_normalize, image)) for name, move in stability.MOVES.items()}
    assert all(0 <= moved < 30 for found in moves.values() for moved in found)
    assert min(map(len, moves.values())) >= 1
    assert moves["turned by 90, 180, 270 degrees"][1] < 1.5


def test_the_command(data, monkeypatch, capsys, trained):
    monkeypatch.setattr("sys.argv", ["stability.py", "--data", str(data), "--weights", str(trained), "--every", "500"])
    stability.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" images")
    table = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in table[2:]] == list(stability.MOVES)
    for row in table[2:]:
        quantiles = [float(cell.removesuffix(" |")) for cell in row[2:]]
        assert quantiles == sorted(quantiles)
