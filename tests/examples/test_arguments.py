"""What examples say where data is missing, or a path is empty because a variable is not set."""

import ast
import importlib
import re

import pytest
from synthetic import ROOT

CAMELYON17 = "Data in weights/README.md says which images these are and where to get them"
MISSING = {
    "make_slide": ("--out out.tif", f"expected a folder with camelyon17/center_0, .* {CAMELYON17}"),
    "train_camelyon17": ("--out out", f"camelyon17/center_4, got 'nowhere': {CAMELYON17}"),
    "compare_camelyon17": ("", f"edge_cases, monuseg/images, got 'nowhere': {CAMELYON17}"),
    "segment_nuclei": ("", "monuseg/images, monuseg/instances, camelyon17/center_1, got 'nowhere': " + CAMELYON17),
    "organ_colors": ("", f"a folder with monuseg/images, monuseg/instances, got 'nowhere': {CAMELYON17}"),
    "stability": ("", f"camelyon17, camelyon16, monuseg/images, got 'nowhere': {CAMELYON17}"),
    "classify_labs": (
        "nowhere",
        "expected images of two labs or more, got none in nowhere: give folders that hold LAB/LABEL",
    ),
    "robustness_index": (
        "nowhere",
        "expected images of two labs or more, got none in nowhere: give folders that hold LAB/LABEL",
    ),
    "finetune_resnet": ("--data nowhere", "expected a folder with one folder of images a class, like examples/tiles"),
    "lightning_module": ("--data nowhere", "expected a folder with one folder of images a class, like examples/tiles"),
    "embed_tiles": ("--slides nowhere", "expected a folder with one folder of tiles a slide, like examples/tiles"),
    "kornia_pipeline": ("--tiles nowhere", "expected a folder of PNG tiles of one size, like examples/tiles"),
    "monai_pipeline": ("--tiles nowhere", "expected a folder of PNG tiles, like examples/tiles, got nowhere"),
    "timm_model": ("--tiles nowhere", "expected a folder of PNG tiles, like examples/tiles, got nowhere"),
    "torchvision_pipeline": ("--tiles nowhere", "expected a folder of PNG tiles, like examples/tiles, got nowhere"),
    "multi_crop": ("--tile nowhere", "expected a file that is there, got 'nowhere'"),
    "albumentations_transform": ("--tile nowhere", "expected a file that is there, got 'nowhere'"),
    "from_torchstain": ("--target nowhere", "expected a file that is there, got 'nowhere'"),
    "perturbed_draws": ("--tile nowhere --out draws.jpg", "expected a file that is there, got 'nowhere'"),
    "slide_resnet": ("nowhere", "expected a file that is there, got 'nowhere'"),
    "read_normalized": ("nowhere", "expected a file that is there, got 'nowhere'"),
    "slide_sample": ("nowhere", "expected a file that is there, got 'nowhere'"),
    "benchmark_slides": ("nowhere", "expected a file that is there, got 'nowhere'"),
    "ray_features": ("nowhere --out out", "expected slides: nowhere does not exist"),
}
LIBRARIES = {
    "lightning_module": "lightning",
    "embed_tiles": "timm",
    "monai_pipeline": "monai",
    "segment_nuclei": "monai",
    "organ_colors": "monai",
    "timm_model": "timm",
    "albumentations_transform": "albumentations",
    "from_torchstain": "torchstain",
    "ray_features": "ray",
}


@pytest.fixture
def fail(monkeypatch, tmp_path, capsys):
    """Runs an example that must end in a message, and returns that."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAINNORM_DATA", "nowhere")

    def fail(name, *arguments):
        if name in LIBRARIES:
            pytest.importorskip(
                LIBRARIES[name], reason=f"needs {LIBRARIES[name]}: pip install -e '.[ecosystem,evidence,ray]'"
            )
        monkeypatch.setattr("sys.argv", [f"{name}.py", *arguments])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(name).main()
        assert end.value.code == 2
        assert list(tmp_path.iterdir()) == []
        return " ".join(capsys.readouterr().err.split())

    return fail


@pytest.mark.filterwarnings("ignore")  # of libraries, as they are imported
@pytest.mark.parametrize("name", MISSING)
def test_data_that_is_missing_is_named(fail, name):
    arguments, message = MISSING[name]
    assert re.search(message, fail(name, *arguments.split()))


def test_tiles_of_camelyon16_are_asked_for_where_they_are_trained_on(fail, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for center in range(5):
        (folder / f"camelyon17/center_{center}").mkdir(parents=True)
    message = fail("train_camelyon17", "--out", "out", "--data", str(folder), "--camelyon16")
    assert f"expected a folder with camelyon16, got '{folder}': {CAMELYON17}" in message


def test_a_slide_that_cannot_be_used_is_named(fail, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.svs"
    path.write_text("no slide")
    assert f"{path}: not a slide of a format that OpenSlide reads" in fail("slide_resnet", str(path))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("make_slide", ["--out", ""]),
        ("train_camelyon17", ["--out", "out", "--data", ""]),
        ("finetune_resnet", ["--data", ""]),
        ("slide_resnet", [""]),
        ("render_tiles", ["--out", ""]),
        ("perturbed_draws", ["--out", ""]),
    ],
)
def test_an_empty_name_is_no_path(fail, name, arguments):
    assert "expected a file or folder, got an empty name" in fail(name, *arguments)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_every_path_option_refuses_an_empty_name(path):
    types = [
        keyword.value.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        for keyword in node.keywords
        if keyword.arg == "type"
    ]
    assert set(types) <= {"int", "float", "path_name", "file_name", "folder"}


@pytest.mark.parametrize(("name", "option"), [("multi_crop", "--local-crops"), ("torchvision_pipeline", "--workers")])
def test_a_number_below_zero_is_refused(fail, name, option):
    assert f"expected {option} of 0 or more, got -1" in fail(name, option, "-1")
