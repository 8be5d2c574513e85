"""Segmenting nuclei: scores by hand and by other libraries, runs on miniatures, and what is said of bad input."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic import disks, make_monuseg, save

pytest.importorskip("monai", reason="needs monai: pip install -e '.[evidence]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of libraries, as they are imported and used

import monuseg  # noqa: E402
import nuclei_networks  # noqa: E402
import nuclei_tables  # noqa: E402
import organ_colors  # noqa: E402
import segment_nuclei  # noqa: E402
from nuclei_networks import HoVer, SmallUNet  # noqa: E402
from peers import lab_of, tissue  # noqa: E402
from segment_nuclei import Bench, color_change, scaled  # noqa: E402

from stainnorm_transform import NormalizeStain, __version__  # noqa: E402
from stainnorm_transform.color import shift_ab  # noqa: E402


def of_strips(*widths):
    """A map of nuclei 2 pixels high, side by side in a row, by their widths; 0 is a gap of 1."""
    numbers = []
    for number, width in enumerate(widths):
        numbers += [number + 1] * width if width else [0]
    return torch.tensor([numbers] * 2)


def scores(found, truth):
    nuclei = monuseg.overlaps(found, truth)
    return monuseg.dice(found, truth), monuseg.aggregated_jaccard(nuclei), monuseg.panoptic_quality(nuclei)


EMPTY = torch.zeros(2, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("found", "truth", "dice", "aji", "pq"),
    [
        pytest.param(of_strips(3, 0, 4), of_strips(3, 0, 4), 1, 1, 1, id="found"),
        pytest.param(of_strips(4, 4), 7 * of_strips(4, 4), 1, 1, 1, id="other numbers"),
        # Both nuclei take the one found: intersections 8 + 8, unions 16 + 16. Neither Jaccard index is above 0.5.
        pytest.param(of_strips(8), of_strips(4, 4), 1, 16 / 32, 0, id="two as one"),
        # The first part is taken, intersection 10 and union 16; the second is added.
        pytest.param(of_strips(5, 3), of_strips(8), 1, 10 / (16 + 6), (10 / 16) / 1.5, id="one as two"),
        pytest.param(of_strips(3, 0, 0, 0, 0, 0), of_strips(3, 0, 4), 12 / 20, 6 / 14, 1 / 1.5, id="one is missed"),
        pytest.param(of_strips(3, 0, 4), of_strips(3, 0, 0, 0, 0, 0), 12 / 20, 6 / 14, 1 / 1.5, id="one too many"),
        pytest.param(EMPTY, of_strips(8), 0, 0, 0, id="none is found"),
        pytest.param(of_strips(8), EMPTY, 0, 0, 0, id="there is none"),
        pytest.param(EMPTY, EMPTY, 1, 1, 1, id="none, rightly"),
        pytest.param(of_strips(4, 0, 0, 0, 0), of_strips(0, 0, 0, 0, 4), 0, 0, 0, id="elsewhere"),
    ],
)
def test_scores_by_hand(found, truth, dice, aji, pq):
    assert scores(found, truth) == pytest.approx((dice, aji, pq))


def test_panoptic_quality_by_torchmetrics_and_monai():
    torchmetrics = pytest.importorskip("torchmetrics.functional.detection", reason="needs torchmetrics")
    from monai.metrics.panoptic_quality import compute_panoptic_quality

    draws = np.random.default_rng(0)
    for _ in range(5):
        truth, found = disks(draws, 64)[0], disks(draws, 64)[0]
        found = torch.where(torch.rand(64, 64) < 0.3, found, truth)
        ours = monuseg.panoptic_quality(monuseg.overlaps(found, truth))
        assert 0 < ours < 1
        assert ours == pytest.approx(float(compute_panoptic_quality(found, truth)), abs=1e-5)
        pairs = (torch.stack([(each > 0).long(), each], dim=-1)[None] for each in (found, truth))
        theirs = torchmetrics.panoptic_quality(*pairs, things={1}, stuffs={0}, return_per_class=True)
        assert ours == pytest.approx(float(theirs[0, 0]), abs=1e-6)


def test_six_seeds_test_every_image_once():
    parts = [monuseg.split(30, seed) for seed in range(7)]
    for training, validation, test in parts:
        assert (len(training), len(validation), len(test)) == (20, 5, 5)
        assert sorted(training + validation + test) == list(range(30))
    assert sorted(number for *_, test in parts[:6] for number in test) == list(range(30))
    assert parts[6][2] not in [test for *_, test in parts[:6]]
    assert monuseg.split(30, 3) == parts[3]


def through(model, instances):
    """The nuclei that a model makes of its own targets, as if it had predicted them."""
    targets = model.targets(instances)
    prediction = targets if model is HoVer else torch.stack([targets[0] > 0, targets[0] == 2]).float()
    return torch.as_tensor(model.separate(prediction, 0.5))


@pytest.mark.parametrize("model", [SmallUNet, HoVer])
def test_what_was_predicted_rightly_becomes_the_true_nuclei(model):
    truth = disks(np.random.default_rng(1), 160)[0]
    touching = (truth[:, 1:] != truth[:, :-1]) & (truth[:, 1:] > 0) & (truth[:, :-1] > 0)
    assert touching.any()
    dice, aji, pq = scores(through(model, truth), truth)
    assert dice > 0.99
    assert aji > 0.95
    assert pq > 0.93
    assert not through(model, torch.zeros(160, 160, dtype=torch.int64)).any()


@pytest.mark.parametrize("model", [SmallUNet, HoVer])
@pytest.mark.parametrize("axes", [(), (-1,), (-2,), (-1, -2)])
def test_targets_of_flipped_nuclei(model, axes):
    truth = disks(np.random.default_rng(2), 64)[0]
    torch.testing.assert_close(model.targets(truth.flip(axes)), model.flip(model.targets(truth), axes))


def test_crops_of_hovernet_are_put_together_where_they_were(monkeypatch):
    model = HoVer()
    middle = slice(model.margin, model.margin + model.seen)

    def see(crops):
        crops = crops[:, :, middle, middle]
        return {"nucleus_prediction": torch.cat([-crops[:, :1], crops[:, :1]], 1), "horizontal_vertical": crops[:, 1:]}

    monkeypatch.setattr(model, "forward", see)
    image = torch.rand(3, 200, 331)
    nucleus, *places = model.predict(image)
    torch.testing.assert_close(nucleus, (2 * image[0]).sigmoid())
    torch.testing.assert_close(torch.stack(places), image[1:])


def test_hovernets_loss_is_least_for_the_truth(monkeypatch):
    model = HoVer()
    middle = slice(model.margin, model.margin + model.seen)
    truth = HoVer.targets(disks(np.random.default_rng(3), 256)[0])[None]

    def loss(predicted):
        nucleus = 20 * (predicted[:, :1, middle, middle] - 0.5)
        branches = {
            "nucleus_prediction": torch.cat([-nucleus, nucleus], 1),
            "horizontal_vertical": predicted[:, 1:, middle, middle],
        }
        monkeypatch.setattr(model, "forward", lambda images: branches)
        return float(model.loss(torch.rand(1, 3, 256, 256), truth))

    assert loss(truth) < 0.01
    assert loss(truth.roll(3, -1)) > 0.2
    assert loss(truth * torch.tensor([1.0, -1, 1]).view(1, 3, 1, 1)) > 0.2


@pytest.mark.slow
def test_hovernet_learns():
    truth, image = disks(np.random.default_rng(4), 256)
    torch.manual_seed(0)
    model = HoVer()
    nuclei_networks.fit(model, [image], [HoVer.targets(truth)], None, 1, 1, 0)
    # Biases before a batch norm may have no gradient.
    assert all(parameter.grad.any() for parameter in model.parameters() if parameter.ndim > 1)
    with torch.inference_mode():
        assert model.predict(image / 255).isfinite().all()


def test_a_network_finds_what_it_was_trained_to_find(monkeypatch):
    monkeypatch.setattr(SmallUNet, "crop", 64)
    draws = np.random.default_rng(5)
    truths, images = zip(*(disks(draws, 96) for _ in range(4)), strict=True)
    torch.manual_seed(0)
    model = SmallUNet()
    assert 400_000 < sum(parameter.numel() for parameter in model.parameters()) < 600_000
    nuclei_networks.fit(model, images[1:], [SmallUNet.targets(truth) for truth in truths[1:]], None, 60, 8, 0)
    with torch.inference_mode():
        found = torch.as_tensor(model.separate(model.predict(images[0] / 255), 0.5))
    dice, aji, _ = scores(found, truths[0])
    assert dice > 0.85
    assert aji > 0.5


# --- The change of color.


def test_a_change_is_scaled():
    raw = disks(np.random.default_rng(6), 96)[1]
    lab = lab_of(raw)
    inside = tissue(lab)
    normalized = shift_ab(raw, torch.tensor([6.0, -4.0]), preserve_white=False)
    assert color_change(lab, normalized, inside) == pytest.approx(52**0.5, rel=0.03)
    assert color_change(lab, raw, inside) == 0
    for share in (0.5, 1.5):
        image = scaled(lab, normalized, share)
        assert color_change(lab, image, inside) == pytest.approx(share * 52**0.5, rel=0.05)
        moved = (lab_of(image) - lab)[:, inside].mean(dim=1)
        torch.testing.assert_close(moved, share * torch.tensor([0.0, 6.0, -4.0]), atol=0.4, rtol=0)


# --- Runs, on miniatures.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_monuseg(tmp_path_factory.mktemp("data"))


@pytest.fixture
def segment(data, tmp_path, monkeypatch, capsys):
    """Runs the example on the miniatures, and returns what it printed and wrote."""
    monkeypatch.setattr(SmallUNet, "crop", 64)
    monkeypatch.setattr(segment_nuclei, "PEER_OF", {})

    def segment(*arguments, data=data, file="nuclei.json"):
        file = tmp_path / file
        given = ["--data", data, "--json", file, "--steps", 2, "--batch", 2, "--device", "cpu", *arguments]
        monkeypatch.setattr("sys.argv", ["segment_nuclei.py", *map(str, given)])
        segment_nuclei.main()
        return capsys.readouterr().out, json.loads(file.read_text())

    return segment


def rows_of(printed):
    """Cells of the tables by the first cell of their row."""
    lines = [line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in reversed(lines)}


def test_runs_are_scored_and_written(segment, data):
    printed, written = segment("--methods", "nothing", "both", "--seeds", 0, 1)
    images = monuseg.digest(monuseg.read_monuseg(data / "monuseg", 64))
    assert written["settings"] == {"version": __version__, "images": images, "model": "unet", "steps": 2, "batch": 2}
    runs = written["runs"]
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("nothing", 0), ("both", 0), ("nothing", 1), ("both", 1),
    ]  # fmt: skip
    samples = {sample.name: sample for sample in monuseg.read_monuseg(data / "monuseg", 64)}
    for run in runs:
        names = list(samples)
        assert [row["image"] for row in run["scores"]] == [names[n] for n in monuseg.split(6, run["seed"])[2]]
        for row in run["scores"]:
            assert row["organ"] == samples[row["image"]].organ
            assert all(0 <= row[score] <= 1 for score in ("dice", "aji", "pq"))
            assert row["aji"] <= row["dice"]
    assert "kept" not in runs[1]
    kept = runs[0]["kept"]
    assert {row["normalizer"] for row in kept} == {
        "ColorNormNet", "mean match (control)", *(f"ColorNormNet to center {center}" for center in (0, 2, 3, 4)),
    }  # fmt: skip
    assert all(row["dE"] == pytest.approx(row["change"], abs=1) for row in kept if row["change"])
    table = rows_of(printed)
    dice = [row["dice"] for run in runs if run["method"] == "nothing" for row in run["scores"]]
    assert table["nothing"][:2] == ["2", f"{np.mean(dice):.3f} ± {np.std(dice, ddof=1):.3f}"]
    assert "better" in table["ColorNormNet and PerturbStain"][1]


def test_what_is_trained_and_tested_on_is_normalized(segment, data, monkeypatch):
    seen = []
    fit = segment_nuclei.fit
    monkeypatch.setattr(
        segment_nuclei, "fit", lambda model, images, *more: (seen.append(images), fit(model, images, *more))
    )
    score = Bench.score
    monkeypatch.setattr(
        Bench, "score", lambda self, model, image, *more: (seen.append(image), score(self, model, image, *more))[1]
    )
    segment("--methods", "normalize", "--seeds", 0)
    images = [sample.image for sample in monuseg.read_monuseg(data / "monuseg", 64)]
    training, _, test = monuseg.split(6, 0)
    normalize = NormalizeStain.pretrained("camelyon17-center1")
    assert all(torch.equal(image, normalize(images[number])) for image, number in zip(seen[0], training, strict=True))
    assert torch.equal(seen[1], normalize(images[test[0]]))


def test_a_run_that_is_done_is_kept(segment, monkeypatch, tmp_path):
    _, first = segment("--methods", "perturb", "--seeds", 0)
    runs = []
    run = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, *which: (runs.append(which), run(self, *which))[1])
    printed, second = segment("--methods", "perturb", "mean-match", "--seeds", 0, "--resume")
    assert runs == [("mean-match", 0)]
    assert second["runs"][0] == first["runs"][0]
    assert {"PerturbStain", "mean match (control)"} <= rows_of(printed).keys()

    def fail(self, method, seed):
        if method == "nothing":
            raise KeyboardInterrupt
        return run(self, method, seed)

    monkeypatch.setattr(Bench, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        segment("--methods", "normalize", "nothing", "--seeds", 0, "--resume")
    kept = json.loads((tmp_path / "nuclei.json").read_text())["runs"]
    assert [row["method"] for row in kept] == ["perturb", "mean-match", "normalize"]
    assert [path.name for path in tmp_path.iterdir()] == ["nuclei.json"]


def test_figures_of_other_images_or_another_version_are_not_resumed(segment, tmp_path_factory, monkeypatch, capsys):
    arguments = ["--methods", "mean-match", "--seeds", 0]
    segment(*arguments)
    # One pixel of one image is another, under the same name.
    other = make_monuseg(tmp_path_factory.mktemp("other"))
    path = min((other / "monuseg/images").iterdir())
    with Image.open(path) as image:
        image.load()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(path)
    with pytest.raises(SystemExit, match="2"):
        segment(*arguments, "--resume", data=other)
    assert "to be of the same images, got others or none" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(segment_nuclei, "__version__", "0.0.1")
    with pytest.raises(SystemExit, match="2"):
        segment(*arguments, "--resume")
    assert "to be of the same version, got others or none" in " ".join(capsys.readouterr().err.split())


def test_a_method_that_is_named_twice_runs_once(segment):
    _, written = segment("--methods", "mean-match", "mean-match", "--seeds", 1, 1)
    assert [(run["method"], run["seed"]) for run in written["runs"]] == [("mean-match", 1)]


def test_a_peer_gives_an_image_the_same_whatever_came_before():
    normalize = segment_nuclei.on_cpu(lambda reference: lambda image: image + np.random.rand(), torch.zeros(1))  # noqa: NPY002
    assert torch.equal(normalize(torch.ones(1)), normalize(torch.ones(1)))


def test_equal_seeds_give_equal_runs(segment):
    one, two = (segment("--methods", "perturb", "--seeds", 3, file=name)[1]["runs"] for name in ("a.json", "b.json"))
    assert one == two


def test_an_image_that_cannot_be_normalized_stays_as_it_is(data, capsys):
    samples = monuseg.read_monuseg(data / "monuseg", 64)
    bench = Bench(samples, [samples[0].image], torch.device("cpu"), "unet", 1, 1)

    def fail(image):
        raise IndexError("no tissue")

    bench.makers["Macenko"] = lambda drawn: fail
    assert torch.equal(bench.normalized("Macenko", 0, 2), samples[2].image)
    assert f"{samples[2].name}: left as it is, Macenko raised IndexError('no tissue')" in capsys.readouterr().err


def test_a_reference_is_one_of_the_images_trained_on(data):
    samples = monuseg.read_monuseg(data / "monuseg", 64)
    bench = Bench(samples, [samples[0].image], torch.device("cpu"), "unet", 1, 1)
    drawn = []
    bench.makers["Reinhard to an image"] = lambda reference: (drawn.append(reference), torch.clone)[1]
    for seed in range(6):
        bench.normalized("Reinhard to an image", seed, 0)
        training = [samples[number].image for number in monuseg.split(6, seed)[0]]
        assert any(torch.equal(drawn[-1], image) for image in training)
    assert len(drawn) == 6


def test_the_plot_is_written(segment, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    segment("--methods", "nothing", "--seeds", 0, "--plot", tmp_path / "nuclei.png")
    with Image.open(tmp_path / "nuclei.png") as image:
        assert image.size in ((1540, 505), (1540, 506))  # matplotlib rounds 505.99... either way


def test_tables_by_hand(capsys):
    def run(method, seed, organs, *dice):
        rows = [{"image": f"{seed}{n}", "organ": "skin", "dice": d, "aji": d, "pq": d} for n, d in enumerate(dice)]
        return {"method": method, "seed": seed, "organs": organs, "scores": rows}

    runs = [run("nothing", 0, [], 0.5, 0.7), run("nothing", 1, ["skin"], 0.8, 0.8), run("perturb", 0, [], 0.6, 0.6)]
    runs[0]["kept"] = [
        {"normalizer": "X", "image": f"0{n}", "organ": "skin", "change": change, "share": share, "dE": 8, "before": 0.5,
         "after": after}
        for n, (change, share, after) in enumerate([(None, 1, 0.5), (None, 1, 0.4), (5, 0.5, 0.5), (5, 2, 0.45)])
    ]  # fmt: skip
    nuclei_tables.print_tables(runs, {"nothing": "nothing", "perturb": "PerturbStain"})
    printed = capsys.readouterr().out
    table = rows_of(printed)
    assert table["nothing"] == ["4", *["0.700 ± 0.141"] * 3]
    assert table["PerturbStain"][:2] == ["2", "0.600 (+0.000 ± 0.100, 1 better)"]
    assert table["skin"] == ["2", "0.800", ""]
    assert table["skin, not in training"] == ["2", "0.600", "0.600"]
    assert table["X"] == [
        "2",
        "8.0",
        "0.900 ± 0.141 (0.900), 0.80, 1 below",
        "0.950 ± 0.071 (0.950), 0.90, 1 below, 1 stretched",
    ]
    assert "images that keep least" in printed
    assert "- X: 01 (skin, dE 8): 0.80, 00 (skin, dE 8): 1.00" in printed
    nuclei_tables.print_tables(runs[1:], {"nothing": "nothing", "perturb": "PerturbStain"})
    assert "keep least" not in capsys.readouterr().out


# --- Colors by organ.


def test_colors_of_a_known_shift(data):
    sample = monuseg.read_monuseg(data / "monuseg", 1)[0]
    same = organ_colors.colors_of(sample, sample.image)
    moved = organ_colors.colors_of(sample, shift_ab(sample.image, torch.tensor([3.0, 4.0]), preserve_white=False))
    assert same.change == 0
    assert moved.change == pytest.approx(5, abs=0.1)
    assert moved.contrast == pytest.approx(same.contrast, abs=0.2)
    assert moved.other - same.other == pytest.approx([3, 4], abs=0.2)
    assert organ_colors.spread([same, moved]) == pytest.approx(2.5, abs=0.1)
    green = sample.image.clone()
    green[1, sample.instances > 0] = 255
    assert organ_colors.colors_of(sample, green).greenish == 1
    assert same.greenish < 0.01


def test_colors_of_organs_are_printed(data, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["organ_colors.py", "--data", str(data)])
    organ_colors.main()
    table = rows_of(capsys.readouterr().out)
    assert table["kidney"][0] == "4, 4"
    assert table["all"][0] == "6, 6"
    assert len(table["TCGA-A0-0000-01Z"]) == 2 + 6
    assert table["center 1"][0] != "0.0 ± 0.0"


# --- Bad input.


def remove(folder, what):
    next((folder / "monuseg" / what).iterdir()).unlink()


def replace(folder, what, image):
    path = min((folder / "monuseg" / what).iterdir())
    save(path, image)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: min((folder / "monuseg/instances").iterdir()).unlink(),
         r"expected the nuclei of TCGA-A0-0000-01Z.png as the instance map .*TCGA-A0-0000-01Z.png, got no such file"),
        (lambda folder: replace(folder, "images", Image.new("L", (144, 144))),
         r"TCGA-A0-0000-01Z.png: expected an image of mode RGB, got L: convert it"),
        (lambda folder: replace(folder, "instances", Image.new("I;16", (144, 96))),
         r"expected a map of 144 x 144 pixels, one channel, as TCGA-A0-0000-01Z.png has, got 96 x 144$"),
        (lambda folder: replace(folder, "instances", Image.new("RGB", (144, 144))), r"got 144 x 144 x 3$"),
        (lambda folder: (replace(folder, "images", Image.new("RGB", (96, 144))),
                         replace(folder, "instances", Image.new("I;16", (96, 144)))),
         r"expected images of one size in .*images, got 144 x 96, 144 x 144: crop them to one"),
        (lambda folder: min((folder / "monuseg/images").iterdir()).unlink(),
         r"expected at least 6 images in .*images to train, validate and test on, got 5"),
        (lambda folder: (folder / "monuseg/organs.csv").unlink(),
         r"expected .*organs.csv, a table with the columns id and organ, got no such file"),
        (lambda folder: (folder / "monuseg/organs.csv").write_text("name\nx\n"),
         r"expected .*organs.csv, a table with the columns id and organ, got name"),
    ],
)  # fmt: skip
def test_bad_images_are_named(tmp_path, spoil, message):
    folder = make_monuseg(tmp_path)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        monuseg.read_monuseg(folder / "monuseg", 64)


def test_images_smaller_than_a_crop_are_named(data):
    with pytest.raises(ValueError, match="expected images of at least 145 x 145 pixels, got smaller ones in"):
        monuseg.read_monuseg(data / "monuseg", 145)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--methods", "perturb", "--seeds", 0],
            "expected a file that is not there yet, got .*nuclei.json: add --resume",
        ),
        (["--resume", "--steps", 3], "expected .*nuclei.json to be of the same steps, got others or none: give"),
        (["--json", "nowhere/a.json"], "expected a folder that is there for nowhere/a.json, got none: make it first"),
        (["--resume", "--seeds", -1], "expected --steps and --batch of 1 or more, and --seeds of 0 or more"),
        (["--resume", "--steps", 0], "expected --steps and --batch of 1 or more, and --seeds of 0 or more"),
        (["--resume", "--device", "nowhere"], "expected a device that is here"),
    ],
)
def test_bad_arguments(segment, data, tmp_path, capsys, arguments, message):
    images = monuseg.digest(monuseg.read_monuseg(data / "monuseg", 64))
    settings = {"version": __version__, "images": images, "model": "unet", "steps": 2, "batch": 2}
    written = json.dumps({"settings": settings, "runs": []})
    (tmp_path / "nuclei.json").write_text(written)
    with pytest.raises(SystemExit, match="2"):
        segment(*arguments)
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert (tmp_path / "nuclei.json").read_text() == written


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"runs": []}',
        '{"settings": [1], "runs": []}',
        '{"settings": {}, "runs": ["a"]}',
        '{"settings": {}, "runs": 1}',
    ],
)
def test_a_file_of_something_else_is_not_resumed(segment, tmp_path, capsys, content):
    (tmp_path / "nuclei.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        segment("--resume")
    assert "nuclei.json: give another --json" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "nuclei.json").read_text() == content
