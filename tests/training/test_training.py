import json

import pytest
import safetensors.torch
import torch
from kornia.color import rgb_to_lab
from render_tiles import render_tile
from torch.utils.data import DataLoader

from stainnorm_transform import ColorNormNet, NormalizeStain, TrainConfig, train
from stainnorm_transform.color import as_map, shift_ab
from stainnorm_transform.estimate import tissue_weight
from stainnorm_transform.training import offset_errors
from stainnorm_transform.training.crops import Batch, batches
from stainnorm_transform.training.loop import shift_loss, warmup_cosine

SHORT = TrainConfig(iterations=4, batch_size=4, crop=32, scales=(1.0, 2.0), report_every=2)
TILES = [render_tile(seed, 64) for seed in range(3)]


def constant(*offset: float) -> ColorNormNet:
    """A network that predicts the same offset everywhere."""
    network = ColorNormNet().eval()
    with torch.no_grad():
        network.head.weight.zero_()
        network.head.bias.copy_(torch.tensor(offset) / network.offset_scale)
    return network


def fade(lab, preserve_white):
    lightness = lab[:, :1]
    return torch.minimum((97 - lightness) / 37, (lightness - 5) / 5).clamp(0, 1) ** int(preserve_white)


class Faded(ColorNormNet):
    """Predicts an offset that fades out towards white and black, and an error of its own."""

    def __init__(self, offset, preserve_white=True, error=(0.0, 0.0, 0.0)):
        super().__init__()
        self.offset, self.preserve_white = offset.view(-1, 2, 1, 1), preserve_white
        self.error = torch.tensor(error).view(3, 1, 1)

    def forward(self, lab):
        shown = fade(lab, self.preserve_white) * self.offset
        return torch.nn.functional.pad(shown, (0, 0, 0, 0, 1, 0)) + self.error


class Told(ColorNormNet):
    """Predicts what it is told."""

    def __init__(self, distance, error=(0.0, 0.0, 0.0)):
        super().__init__()
        self.distance, self.error = distance, torch.tensor(error).view(3, 1, 1)

    def forward(self, lab):
        return torch.nn.functional.pad(self.distance, (0, 0, 0, 0, 1, 0)) + self.error


def shifted_by(batch, preserve_white):
    """How far maps shift every pixel: w B z."""
    lightness, a, b = rgb_to_lab(batch.crops).unbind(1)
    z = torch.stack([torch.ones_like(a), (lightness - 60) / 20, (a - 20) / 20, (b + 12) / 20], dim=1)
    return fade(rgb_to_lab(batch.crops), preserve_white) * (batch.shift @ z.flatten(2)).unflatten(2, a.shape[1:])


def test_loss_is_l1_plus_lambda_l2_of_pixels_and_mean():
    crops = torch.stack([render_tile(seed) for seed in range(3)]) / 255
    shift = as_map(torch.tensor([[5.0, -7.0]] * 3))
    batch = Batch(crops, tissue_weight(rgb_to_lab(crops)), shift, torch.ones(3, 2))
    uniform = {"preserve_white": False}
    right = shift_loss(constant(0.0, 5.0, -7.0), batch, TrainConfig(**uniform))
    assert right.item() == pytest.approx(0, abs=1e-4)
    wrong = shift_loss(constant(1.0, 5.0, -3.0), batch, TrainConfig(l2_weight=0.5, **uniform))
    # Errors (1, 0, 4) everywhere: L1 + 0.5 L2 is 1.5 and 12, averaged over channels, for the pixels and their mean.
    assert wrong.item() == pytest.approx(2 * (1.5 + 12) / 3, rel=1e-4)
    assert shift_loss(constant(0.0, 5.0, -7.0), batch, TrainConfig()).item() > 1


@pytest.mark.parametrize("preserve_white", [True, False])
def test_loss_is_zero_for_a_network_that_knows_how_far_every_pixel_was_shifted(preserve_white):
    config = TrainConfig(iterations=1, batch_size=4, scales=(1.0, 2.0), l2_weight=0.5, preserve_white=preserve_white)
    (batch,) = batches(TILES, config, 0)
    assert batch.shift[..., 1:].ne(0).all()
    assert batch.jitter.ne(1).all()
    distance = shifted_by(batch, preserve_white)
    # Whatever the jitter, it is the shift that is to be predicted.
    for jitter in (batch.jitter, torch.ones(4, 2)):
        right = shift_loss(Told(distance), batch._replace(jitter=jitter), config)
        assert right.item() == pytest.approx(0, abs=1e-4)
        wrong = shift_loss(Told(distance, (1.0, 0.0, 4.0)), batch._replace(jitter=jitter), config)
        assert wrong.item() == pytest.approx(2 * (1.5 + 12) / 3, rel=1e-3)


@pytest.mark.parametrize("preserve_white", [True, False])
def test_the_network_sees_crops_whose_pixels_were_shifted_as_far_as_it_is_to_predict(preserve_white):
    config = TrainConfig(iterations=1, batch_size=4, scales=(1.0, 2.0), max_offset=5, preserve_white=preserve_white)
    (batch,) = batches(TILES, config, 0)
    batch = batch._replace(jitter=torch.ones(4, 2))
    before, after = rgb_to_lab(batch.crops), seen_by_the_network(batch, config)
    shifted = shift_ab(batch.crops, batch.shift, preserve_white)
    inside = ((shifted > 1e-4) & (shifted < 1 - 1e-4)).all(dim=1, keepdim=True)
    assert inside.float().mean() > 0.9
    expected = before + torch.nn.functional.pad(shifted_by(batch, preserve_white), (0, 0, 0, 0, 1, 0))
    torch.testing.assert_close(torch.where(inside, after, 0), torch.where(inside, expected, 0), atol=0.02, rtol=0)


@pytest.mark.parametrize("preserve_white", [True, False])
def test_without_slopes_the_network_learns_offsets_that_fade_out(preserve_white):
    # Small, so that L* stays: the network knows the share of an offset by that alone.
    config = TrainConfig(
        iterations=1, batch_size=4, max_offset=5, slope=0, darkness_jitter=0, preserve_white=preserve_white
    )
    (batch,) = batches([render_tile(seed) for seed in range(3)], config, 0)
    assert batch.shift[..., 1:].eq(0).all()
    offsets = batch.shift[..., 0]
    assert shift_loss(Faded(offsets, preserve_white), batch, config).item() == pytest.approx(0, abs=0.01)
    assert shift_loss(Faded(offsets, not preserve_white), batch, config).item() > 0.3


def test_offset_errors_are_estimated_minus_true_offsets():
    images = [render_tile(seed) for seed in range(2)]
    network, how = constant(0.0, 1.0, 2.0), {"preserve_white": False, "max_offset": 20, "draws": 100}
    errors = offset_errors(network, images, **how)
    assert errors.shape == (2, 100, 2)
    assert errors.std(dim=1).mean().item() == pytest.approx(20 / 3**0.5, rel=0.15)
    assert ((errors - torch.tensor([1.0, 2.0])).abs() <= 20 + 1e-4).all()
    frozen = NormalizeStain(network).network
    assert torch.equal(errors, offset_errors(frozen, images, **how))
    faded = offset_errors(Faded(torch.tensor([1.0, 2.0])), images[:1], max_offset=20, draws=100)
    torch.testing.assert_close(faded, errors[:1], atol=1e-4, rtol=0)


def test_training_learns_the_offset():
    reports = []
    tiles = [render_tile(seed) for seed in range(4)]
    config = TrainConfig(iterations=200, batch_size=8, crop=32, scales=(1.0, 1.0), report_every=100)
    network = train(tiles, config, held_out=[render_tile(9)], report=reports.append)
    assert [report.iteration for report in reports] == list(range(1, 201))
    assert [report.iteration for report in reports if report.measured] == [100, 200]
    assert reports[98].held_out_error is None
    assert reports[198].held_out_error == reports[99].held_out_error != reports[199].held_out_error
    # Offsets of up to 30 are 15 off on average when nothing is learned.
    assert max(reports[-1].held_out_error) < 8
    normalize = NormalizeStain(network)
    tile = render_tile(10)
    shifted = shift_ab(tile, torch.tensor([15.0, 15.0]))
    moved = (normalize.estimate_offset(shifted) - normalize.estimate_offset(tile))[1:]
    assert moved.min() > 5


def test_the_same_seed_gives_the_same_network():
    tiles = [render_tile(0), render_tile(1, 100) / 255]
    first, second = (train(tiles, SHORT, report=lambda _: None).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(tiles, TrainConfig(**{**vars(SHORT), "seed": 1}), report=lambda _: None).state_dict()
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_the_number_of_threads_changes_nothing():
    before, networks = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            networks.append(train([render_tile(0)], SHORT, report=lambda _: None).state_dict())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])


def test_returns_a_frozen_network_and_prints_progress(capsys):
    network = train([render_tile()], SHORT, held_out=[render_tile(1)])
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("iteration 4: loss ")
    assert "held-out error a* " in lines[1]


def interrupted_at(iteration):
    def report(report):
        if report.iteration == iteration:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("iteration", [1, 5, 8, 11])
def test_a_run_interrupted_anywhere_ends_as_if_it_had_not_been(tmp_path, iteration):
    config = TrainConfig(**{**vars(SHORT), "iterations": 12, "report_every": 4})
    expected = train(TILES, config, report=lambda _: None).state_dict()
    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(TILES, config, checkpoint=checkpoint, report=interrupted_at(iteration))
    reports = []
    state = train(TILES, config, checkpoint=checkpoint, report=reports.append).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    # The report of a measurement comes after its checkpoint; only what followed is repeated.
    assert reports[0].iteration == iteration // 4 * 4 + 1
    reports.clear()
    again = train(TILES, config, checkpoint=checkpoint, report=reports.append).state_dict()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert reports == []


def test_a_checkpoint_of_another_run_or_half_of_one_is_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(TILES, SHORT, checkpoint=checkpoint, report=lambda _: None)
    whole = checkpoint.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(learning_rate 0\.01, now 0\.1, seed 0, now 3\)"):
        train(TILES, TrainConfig(**{**vars(SHORT), "seed": 3, "learning_rate": 0.1}), checkpoint=checkpoint)
    with pytest.raises(ValueError, match=r"other settings \(slope 0\.3, now 0\)"):
        train(TILES, TrainConfig(**{**vars(SHORT), "slope": 0}), checkpoint=checkpoint)
    # Fewer iterations than it has done are another setting, not a damaged file.
    with pytest.raises(ValueError, match=r"other settings \(iterations \d+, now 1\)"):
        train(TILES, TrainConfig(**{**vars(SHORT), "iterations": 1}), checkpoint=checkpoint)
    with pytest.raises(ValueError, match="the run had other images, or the same in another order"):
        train([render_tile(7, 64)], SHORT, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == whole
    for size in [0, 1, 8, 100, len(whole) // 2, len(whole) - 1]:
        checkpoint.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="expected the checkpoint of a training run"):
            train(TILES, SHORT, checkpoint=checkpoint)
    tensors = safetensors.torch.load(whole)
    metadata = json.loads(bytes(tensors["metadata"].tolist()))
    assert metadata["format"] == 3
    older = torch.tensor(list(json.dumps({**metadata, "format": 2}).encode()), dtype=torch.uint8)
    safetensors.torch.save_file({**tensors, "metadata": older}, checkpoint)
    with pytest.raises(ValueError, match="it is of another version of the package"):
        train(TILES, SHORT, checkpoint=checkpoint)
    safetensors.torch.save_file({"metadata": torch.zeros(1)}, checkpoint)
    with pytest.raises(ValueError, match="expected the checkpoint of a training run"):
        train(TILES, SHORT, checkpoint=checkpoint)


def test_a_checkpoint_that_cannot_be_written_is_noticed_before_training(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(TILES, SHORT, checkpoint=tmp_path / "missing" / "run.safetensors", report=interrupted_at(1))


@pytest.mark.parametrize("changed", range(3))
def test_one_image_that_changed_is_noticed(tmp_path, changed):
    config = TrainConfig(**{**vars(SHORT), "iterations": 16})
    train(TILES, config, checkpoint=tmp_path / "run", report=lambda _: None)
    others = [render_tile(7, 64) if number == changed else tile for number, tile in enumerate(TILES)]
    with pytest.raises(ValueError, match="the run had other images"):
        train(others, config, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="the run had other images"):
        train([*TILES, TILES[0]], config, checkpoint=tmp_path / "run")


def test_an_iterable_is_resumed_where_it_stopped(tmp_path):
    loader = DataLoader(TILES, batch_size=2)
    expected = train(loader, SHORT, report=lambda _: None).state_dict()
    with pytest.raises(KeyboardInterrupt):
        train(loader, SHORT, checkpoint=tmp_path / "run", report=interrupted_at(3))
    state = train(loader, SHORT, checkpoint=tmp_path / "run", report=lambda _: None).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    shuffled = DataLoader(TILES, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(4))
    with pytest.raises(ValueError, match="the same in another order"):
        train(shuffled, SHORT, checkpoint=tmp_path / "run")


def test_held_out_images_of_any_kind():
    errors = []
    for held_out in (TILES[:2], [(tile, 1) for tile in TILES[:2]], DataLoader(TILES[:2], batch_size=2)):
        train(TILES[2:], SHORT, held_out=held_out, report=lambda report: errors.append(report.held_out_error))
    assert errors[:4] == errors[4:8] == errors[8:]
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    with pytest.raises(ValueError, match="held-out images with tissue, got one without"):
        train(TILES, SHORT, held_out=[TILES[0], white])
    with pytest.raises(ValueError, match="at least one image, got none"):
        offset_errors(ColorNormNet(), [])


def test_the_number_of_workers_does_not_change_the_network():
    states = [train(TILES, SHORT, workers=workers, report=lambda _: None).state_dict() for workers in (0, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_paper_recipe_shifts_white_as_well():
    shift = as_map(torch.tensor([[10.0, 10.0]]))
    batch = Batch(torch.ones(1, 3, 16, 16), torch.ones(1, 1, 16, 16), shift, torch.ones(1, 2))
    for preserve_white, moved in ((True, False), (False, True)):
        lab = seen_by_the_network(batch, TrainConfig(preserve_white=preserve_white))
        assert (lab[:, 1:].abs().max() > 0.1) == moved


@pytest.mark.parametrize("preserve_white", [True, False])
def test_jitter_changes_darkness_and_contrast_but_not_the_mean_color_of_the_tissue(preserve_white):
    config = TrainConfig(preserve_white=preserve_white)
    crops = torch.stack([render_tile(seed) for seed in range(2)]) / 255
    weight = tissue_weight(rgb_to_lab(crops))
    shift = torch.zeros(2, 2, 4)
    before = seen_by_the_network(Batch(crops, weight, shift, torch.ones(2, 2)), config)
    after = seen_by_the_network(Batch(crops, weight, shift, torch.tensor([[1.5, 0.8], [0.7, 1.25]])), config)
    torch.testing.assert_close(before, rgb_to_lab(crops), atol=1e-3, rtol=0)
    darkness = torch.tensor([0.8, 1.25]).view(2, 1, 1) * (100 - before[:, 0])
    torch.testing.assert_close(100 - after[:, 0], darkness.clamp(max=100), atol=1e-3, rtol=0)
    tissue = weight.expand(-1, 2, -1, -1)
    means = [(tissue * lab[:, 1:]).sum(dim=(-1, -2)) / tissue.sum(dim=(-1, -2)) for lab in (before, after)]
    torch.testing.assert_close(*means, atol=1e-3, rtol=0)
    spreads = [lab[:, 1:].amax(dim=(-1, -2)) - lab[:, 1:].amin(dim=(-1, -2)) for lab in (before, after)]
    assert (spreads[1][0] > spreads[0][0]).all()
    assert (spreads[1][1] < spreads[0][1]).all()


def seen_by_the_network(batch, config):
    seen = []
    network = ColorNormNet()
    network.stem.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    shift_loss(network, batch, config)
    return seen[0] * network.lab_scale + network.lab_shift


def test_workers_cannot_be_fewer_than_none():
    with pytest.raises(ValueError, match="workers >= 0, got -1"):
        train(TILES, SHORT, workers=-1)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_any_number_of_iterations_and_the_callers_generator(iterations):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    train([render_tile()], TrainConfig(iterations=iterations, batch_size=2, crop=32), report=lambda _: None)
    assert torch.rand(1) == expected


def test_schedule_warms_up_and_ends_at_zero():
    shares = [warmup_cosine(step / 100) for step in range(101)]
    assert shares[0] == 0.01
    assert 0.9 < max(shares) <= 1
    assert shares.index(max(shares)) == 10
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[-1] == 0


def test_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at iteration"):
        train([render_tile()], TrainConfig(iterations=50, batch_size=2, crop=32, learning_rate=1e30))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations >= 1, got 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"scales": (0.5, 2)}, r"scales \(low, high\)"),
        ({"scales": (4, 2)}, r"got \(4, 2\)"),
        ({"scales": (1, 2, 3)}, r"got \(1, 2, 3\)"),
        ({"max_offset": float("nan")}, "finite max_offset > 0, got nan"),
        ({"learning_rate": 0}, "finite learning_rate > 0"),
        ({"min_tissue": 2}, "0 < min_tissue <= 1"),
        ({"l2_weight": -1}, "l2_weight >= 0, got -1"),
        ({"slope": -0.1}, "finite slope >= 0, got -0.1"),
        ({"slope": float("nan")}, "finite slope >= 0, got nan"),
        ({"slope": float("inf")}, "finite slope >= 0, got inf"),
        ({"darkness_jitter": -1}, "0 <= darkness_jitter <= 2, got -1"),
        ({"contrast_jitter": float("inf")}, "0 <= contrast_jitter <= 2, got inf"),
        ({"seed": -1}, "seed from 0 to .*, got -1"),
        ({"seed": 2**63}, "seed from 0 to"),
        ({"iterations": 2.5}, "a whole number iterations >= 1, got 2.5"),
        ({"preserve_white": "no"}, "preserve_white True or False, got 'no'"),
        ({"scales": (1, float("inf"))}, r"got \(1, inf\)"),
    ],
)
def test_bad_config(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**fields)
