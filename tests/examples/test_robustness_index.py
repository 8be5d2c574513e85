"""What features tell of lab and label: counted by hand and by brute force, and on made images of two labs."""

import json
import re

import numpy as np
import pytest
import robustness_index
import torch
from kornia.color import rgb_to_lab
from lab_features import auc, held_out, nearest, other_labs, ratio, resampled, same_and_other
from lab_models import Encoder
from PIL import Image
from render_tiles import LABS, render_tile
from robustness_index import WAYS, blur, gray
from sklearn.metrics import roc_auc_score
from synthetic import save
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

LABELS = ("normal", "tumor")
FIGURES = ["robustness index", "lab told", "tumor across", "inside"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two labs of four slides, three images each; tumor is darker. One image is no tumor and no normal tissue."""
    root = tmp_path_factory.mktemp("labs")
    for lab in ("lab_a", "lab_b"):
        for label in (0, 1):
            for number in range(12):
                pixels = render_tile(100 * label + number, 64, LABS[lab]) * (0.6 if label else 1.0)
                path = root / lab / LABELS[label] / f"{LABELS[label]}_{number % 4}_x{number}_y7.png"
                save(path, to_pil_image(pixels.to(torch.uint8)))
        save(root / lab / "mixed" / "left_out.png")
    return root


class Colors(nn.Module):
    def forward(self, images):
        return (rgb_to_lab(images).mean(dim=(2, 3)) - torch.tensor([54.0, 22.0, -14.0])) * torch.tensor([0.5, 1, 1])


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the example with an encoder of mean colors, less those of a usual tile."""

    def call(*arguments):
        made = lambda name, side, device: Encoder(Colors(), side or 32, (0, 0, 0), (1, 1, 1))  # noqa: E731
        with monkeypatch.context() as patch:
            if "--encoder" not in arguments:
                patch.setattr(robustness_index, "load_encoder", made)
            patch.setattr("sys.argv", ["robustness_index.py", "--device", "cpu", *map(str, arguments)])
            robustness_index.main()
        return capsys.readouterr()

    return call


# --- Neighbors.

# On a circle, so that the nearest are those of the nearest angle.
ANGLES = np.deg2rad([0, 10, 25, 45])
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1) * [[1], [5], [0.2], [3]]
CIRCLE_LABS, CIRCLE_LABELS = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("units", "neighbors", "same", "other"),
    [
        ("abcd", 1, [0, 0, 0, 0], [1, 1, 0, 1]),
        ("abcd", 2, [1, 0, 0, 1], [1, 1, 1, 1]),
        # The first two are of one slide.
        ("aacd", 2, [1, 1, 0, 1], [0, 0, 1, 1]),
    ],
)
def test_neighbors_by_hand(units, neighbors, same, other):
    counts = same_and_other(CIRCLE, CIRCLE_LABS, CIRCLE_LABELS, np.array(list(units)), neighbors)
    assert counts.tolist() == [same, other]


def test_neighbors_of_one_label_by_hand():
    share, chance = other_labs(CIRCLE, CIRCLE_LABS, np.array(list("abcd")), 2)
    assert share.tolist() == [0.5, 0.5, 0.5, 0.5]
    assert chance.tolist() == [2 / 3] * 4
    share, chance = other_labs(CIRCLE, CIRCLE_LABS, np.array(list("aacd")), 2)
    assert share.tolist() == [1, 1, 0.5, 0.5]
    assert chance.tolist() == [1, 1, 2 / 3, 2 / 3]


def made_features(count=40, seed=0):
    """Features with something of the lab and the label in them."""
    generator = np.random.default_rng(seed)
    labs, labels = generator.integers(2, size=(2, count))
    units = np.array([f"{lab}/{unit}" for lab, unit in zip(labs, generator.integers(5, size=count), strict=True)])
    features = generator.normal(size=(count, 6))
    features[:, 0] += 2 * labs
    features[:, 1] += 2 * labels
    return features, labs, labels, units


@pytest.mark.parametrize("neighbors", [1, 7, 20])
def test_the_index_by_brute_force(neighbors):
    features, labs, labels, units = made_features()
    good = bad = 0
    for i in range(len(features)):
        others = [j for j in range(len(features)) if units[j] != units[i]]
        cosine = {
            j: features[i] @ features[j] / np.linalg.norm(features[i]) / np.linalg.norm(features[j]) for j in others
        }
        for j in sorted(others, key=cosine.get)[-neighbors:]:
            good += labels[i] == labels[j] and labs[i] != labs[j]
            bad += labels[i] != labels[j] and labs[i] == labs[j]
    same, other = same_and_other(features, labs, labels, units, neighbors)
    assert ratio(same, same + other, np.ones((1, len(labs)))) == pytest.approx(good / (good + bad))
    assert 0 < good < good + bad
    assert nearest(features, units, neighbors).shape == (len(labs), neighbors)


def test_the_index_is_one_where_only_labels_matter_and_zero_where_only_labs_do():
    labs, labels = np.repeat([0, 1, 0, 1], 5), np.repeat([0, 0, 1, 1], 5)
    units = np.arange(20).astype(str)
    for of, expected in ((labels, 1), (labs, 0)):
        same, other = same_and_other(np.eye(2)[of], labs, labels, units, 9)
        assert ratio(same, same + other, np.ones((1, 20))) == [expected]


def test_resamples_are_of_the_slides_of_each_lab():
    _, labs, _, units = made_features()
    drawn = resampled(labs, units, 50, seed=3)
    assert drawn.shape == (51, 40)
    assert (drawn[0] == 1).all()
    names = np.unique(units)
    for lab in (0, 1):
        of_lab = [name for name in names if name.startswith(str(lab))]
        # Images of a slide together, and as many slides of a lab as there are.
        by_unit = [drawn[:, units == name] for name in of_lab]
        assert all((each == each[:, :1]).all() for each in by_unit)
        assert (sum(each[:, 0] for each in by_unit) == len(of_lab)).all()
    assert np.array_equal(drawn, resampled(labs, units, 50, seed=3))
    assert not np.array_equal(drawn, resampled(labs, units, 50, seed=4))
    part, whole = np.arange(40), np.arange(40) + 1
    expected = np.repeat(part, drawn[7]).sum() / np.repeat(whole, drawn[7]).sum()
    assert ratio(part, whole, drawn)[7] == pytest.approx(expected)


def test_what_there_is_none_of_has_no_share():
    assert np.isnan(ratio(np.zeros(3), np.zeros(3), np.ones((2, 3)))).all()


# --- Probes.


def test_slides_are_held_out():
    # Slides have features of their own, by which nothing but the slide is told, and labels at random.
    generator = np.random.default_rng(0)
    units = np.repeat([f"slide {number}" for number in range(20)], 10)
    classes = np.repeat(np.arange(20) % 2, 10)
    features = np.repeat(generator.normal(size=(20, 200)), 10, axis=0) + 0.1 * generator.normal(size=(200, 200))
    alone = np.arange(200).astype(str)
    scores = {name: held_out(features, classes, each, seed=0) for name, each in (("apart", units), ("mixed", alone))}
    assert roc_auc_score(classes, scores["mixed"][:, 1]) > 0.99
    assert roc_auc_score(classes, scores["apart"][:, 1]) < 0.75


def test_classes_of_which_nothing_is_left_to_fit_to_are_refused():
    # Without the last two slides, which are held out together, there is none of the second class.
    units, classes = np.repeat([0, 1, 2], [5, 3, 1]), np.repeat([0, 1], [6, 3])
    with pytest.raises(ValueError, match=r"expected images of each lab and label on other slides .* give more slides"):
        held_out(np.eye(9), classes, units, seed=0)


def test_the_area_of_several_classes_and_of_resamples():
    generator = np.random.default_rng(0)
    classes = generator.integers(3, size=60)
    scores = generator.dirichlet((1, 1, 1), size=60) + 0.3 * np.eye(3)[classes]
    scores /= scores.sum(axis=1, keepdims=True)
    drawn = generator.integers(3, size=(4, 60))
    expected = [
        np.mean([roc_auc_score(classes == each, scores[:, each], sample_weight=weight) for each in range(3)])
        for weight in drawn
    ]
    assert auc(classes, scores, drawn) == pytest.approx(expected)


# --- Colors.


def test_gray_keeps_lightness_alone():
    images = torch.stack([render_tile(seed, 32, LABS["lab_a"]) for seed in (0, 1)])
    after = gray(images)
    assert (after == after[:, :1]).all()
    assert (rgb_to_lab(after / 255) - rgb_to_lab(images / 255))[:, 0].abs().max() < 0.5
    flat = WAYS["gray-equalized"].after(images)
    assert (flat == flat[:, :1]).all()
    assert flat.float().std() > after.float().std()


def test_blur_is_of_two_pixels_in_256():
    image = torch.zeros(1, 3, 256, 256)
    image[..., 128, 128] = 255
    column = blur(image)[0, 0].sum(dim=0)
    places = torch.arange(256) - 128
    assert column.sum() == pytest.approx(255, rel=1e-3)
    assert ((column * places**2).sum() / column.sum()).sqrt() == pytest.approx(2, abs=0.05)
    half = blur(image[..., 64:192, 64:192])[0, 0].sum(dim=0)
    assert ((half * places[64:192] ** 2).sum() / half.sum()).sqrt() == pytest.approx(1, abs=0.05)


# --- The whole.


def test_normalization_makes_the_features_forget_the_lab(folder, tmp_path, call, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[evidence]'")
    monkeypatch.setattr(robustness_index, "RESAMPLES", 100)
    out, picture = tmp_path / "figures.json", tmp_path / "features.png"
    names = ["nothing", "gray", "colornormnet", "control"]
    printed = call(
        folder, "--json", out, "--plot", picture, "--methods", *names, "--limit", 10, "--draws", 2, "--neighbors", 15
    )
    content = json.loads(out.read_text())
    rows = content["methods"]
    titles = dict(zip(names, rows, strict=True))
    assert list(titles.values()) == [
        "nothing", "gray (L* alone)", "ColorNormNet, a tile, to camelyon17", "mean match (control), to lab_a"
    ]  # fmt: skip
    assert content["settings"]["labs"]["lab_a"] == {"images": 24, "units": 8}
    for row in rows.values():
        assert list(row) == [*FIGURES, "points"]
        assert all(len(row[figure]["draws"]) == 2 and len(row[figure]["resampled"]) == 100 for figure in FIGURES)
        assert np.shape(row["points"]) == (40, 2)
    mean = {name: {figure: np.mean(rows[titles[name]][figure]["draws"]) for figure in FIGURES} for name in names}
    assert mean["nothing"]["robustness index"] < 0.1
    assert mean["nothing"]["lab told"] > 0.75
    for name in names[1:]:
        assert mean[name]["robustness index"] > 0.9
        assert mean[name]["lab told"] < 0.65
        assert mean[name]["tumor across"] > 0.9
        assert mean[name]["inside"] > 0.9
    # The table says the same.
    cells = re.search(r"\| gray \(L\* alone\) \| ([\d.]+) ± [\d.]+ \|[^|]+\| ([\d.]+) ± ", printed.out)
    assert float(cells[1]) == pytest.approx(mean["gray"]["robustness index"], abs=6e-4)
    assert float(cells[2]) == pytest.approx(mean["gray"]["lab told"], abs=6e-4)
    assert "lab_a: 24 images, 8 resampled apart" in printed.out
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert image.width > image.height > 300


def test_a_label_that_a_lab_lacks_is_left_out(folder, tmp_path, call):
    for lab, label in (("lab_a", "normal"), ("lab_a", "tumor"), ("lab_b", "tumor")):
        (tmp_path / lab).mkdir(exist_ok=True)
        (tmp_path / lab / label).symlink_to(folder / lab / label)
    out = tmp_path / "figures.json"
    printed = call(tmp_path, "--json", out, "--methods", "nothing", "--draws", 1, "--neighbors", 5)
    assert "left out: normal, of which there are no images in lab_b" in printed.err
    content = json.loads(out.read_text())
    assert content["settings"]["labels"] == ["tumor"]
    assert list(content["methods"]["nothing"]) == ["neighbors from another lab", "chance", "lab told", "points"]
    # Of 24 images, 3 are of the slide.
    assert content["methods"]["nothing"]["chance"]["draws"] == [pytest.approx(12 / 21, abs=1e-4)]
    assert "(0.57)" in printed.out


def test_an_interrupted_call_goes_on(folder, tmp_path, call, refuse, monkeypatch):
    monkeypatch.setattr(robustness_index, "RESAMPLES", 10)
    out = tmp_path / "figures.json"
    arguments = (folder, "--draws", 1, "--neighbors", 5, "--json", out, "--methods")
    call(*arguments, "nothing")
    first = json.loads(out.read_text())
    measured = []
    measure = robustness_index.measure
    monkeypatch.setattr(robustness_index, "measure", lambda *given: measured.append(given) or measure(*given))
    printed = call(*arguments, "gray", "nothing").out
    assert len(measured) == 1
    assert printed.index("| gray") < printed.index("| nothing")
    second = json.loads(out.read_text())
    assert second["methods"]["nothing"] == first["methods"]["nothing"]
    assert second["methods"]["gray (L* alone)"] != first["methods"]["nothing"]
    assert f"expected {out} to be of the same neighbors, got others" in refuse(*arguments, "gray", "--neighbors", 6)
    out.write_text("[]")
    assert f"expected figures that this script wrote, got {out}: give another --json" in refuse(*arguments, "gray")
    assert out.read_text() == "[]"


def test_images_of_wilds(folder, tmp_path):
    rows = ["patient,node,x_coord,y_coord,tumor,slide,center", "1,0,1,2,0,7,2", "1,0,3,4,1,7,2", "2,1,3,4,1,9,3"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    found, labels = robustness_index.find([tmp_path], ["stroma", "tumor"])
    assert labels == ["tumor"]
    assert [(image.lab, image.label, image.slide) for image in found] == [("center2", 0, "7"), ("center3", 0, "9")]


def test_a_method_for_each_target(folder):
    titles = [
        (title, target)
        for title, _, target in robustness_index.plan(
            ["gray", "colornormnet", "control"], ["camelyon17", "camelyon17-center2"], ["lab_b"], ["lab_a", "lab_b"]
        )
    ]
    assert titles == [
        ("gray (L* alone)", "camelyon17"),
        ("ColorNormNet, a tile, to camelyon17", "camelyon17"),
        ("ColorNormNet, a tile, to camelyon17-center2", "camelyon17-center2"),
        ("mean match (control), to lab_b", "lab_b"),
    ]


# --- Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--neighbors", "46"), "expected at least 46 images that are not of the same slide, got 45: give more images"),
        (("--limit", "1", "--neighbors", "2"), "expected two slides or more of each lab and label, got 1 of 'normal'"),
        (("--labels", "stroma"), "expected images of two labs or more, got none in"),
        (("--draws", "0"), "expected --draws of 1 or more, got 0"),
        (("--weights", "camelyon18"), "camelyon18"),
        (("--json", "nowhere/a.json"), "expected a folder that is there for nowhere/a.json, got none: make it first"),
        (("--references", "lab_c"), "expected --references of labs that there are, lab_a or lab_b, got 'lab_c'"),
        (("--encoder", "resnet_none"), "resnet_none"),
    ],
)
def test_bad_options_are_refused(folder, refuse, options, message):
    assert message in refuse(folder, *options)


def test_an_encoder_that_takes_another_size(folder, refuse):
    timm = pytest.importorskip("timm", reason="needs timm: pip install -e '.[evidence]'")
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
        message = refuse(folder, "--encoder", "vit_tiny_patch16_224", "--side", "100")
    assert "expected the side that vit_tiny_patch16_224 takes, 224, got 100: leave --side out" in message


def test_one_lab_and_labs_without_a_common_label_are_refused(folder, tmp_path, refuse):
    (tmp_path / "one/lab_a").mkdir(parents=True)
    (tmp_path / "one/lab_a/normal").symlink_to(folder / "lab_a/normal")
    assert "expected images of two labs or more, got lab_a in" in refuse(tmp_path / "one")
    (tmp_path / "one/lab_b").mkdir()
    (tmp_path / "one/lab_b/tumor").symlink_to(folder / "lab_b/tumor")
    message = "expected a label that all labs have, got lab_a: normal; lab_b: tumor: give other --labels"
    assert message in refuse(tmp_path / "one")


def test_images_that_are_no_rgb_are_refused(folder, tmp_path, refuse):
    for lab in ("lab_a", "lab_b"):
        (tmp_path / lab / "normal").mkdir(parents=True)
        for path in (folder / lab / "normal").iterdir():
            (tmp_path / lab / "normal" / path.name).symlink_to(path)
    gray_path = tmp_path / "lab_a/normal/normal_9_x1_y1.png"
    Image.new("L", (48, 48)).save(gray_path)
    out = tmp_path / "figures.json"
    message = refuse(tmp_path, "--neighbors", 3, "--methods", "nothing", "--limit", 20, "--json", out)
    assert f"expected images of mode RGB, got L in {gray_path}" in message
    assert not out.exists()
