import re
import subprocess
import sys
from importlib import metadata

import pytest
from synthetic import ROOT

import stainnorm_transform


def test_one_version():
    assert metadata.version("stainnorm-transform") == stainnorm_transform.__version__
    written = [
        path
        for path in (ROOT / "pyproject.toml", *(ROOT / "stainnorm_transform").glob("*.py"))
        if re.search(r"^_*version_* = \"", path.read_text(), re.MULTILINE)
    ]
    assert written == [ROOT / "stainnorm_transform/__init__.py"]


def test_works_from_any_folder_and_loads_no_network_code_at_import(tmp_path):
    code = (
        "import sys, stainnorm_transform as s; assert 'torch' not in sys.modules; s.NormalizeStain.pretrained(); "
        "assert not {'requests', 'huggingface_hub', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_what_is_exported():
    assert set(stainnorm_transform.__all__) < set(dir(stainnorm_transform))
    for name in stainnorm_transform.__all__:
        assert getattr(stainnorm_transform, name).__name__ == name
    assert stainnorm_transform.transform.NormalizeStain is stainnorm_transform.NormalizeStain
    with pytest.raises(AttributeError, match="has no attribute 'normalise'"):
        stainnorm_transform.normalise  # noqa: B018


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_the_command_answers_without_torch(arguments):
    code = (
        "import sys; from stainnorm_transform.cli.main import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_no_pickled_weights_and_no_large_files():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("run in a clone: it asks git for the files")
    for name in files:
        assert not name.endswith((".pt", ".pth", ".pkl", ".npy", ".npz")), name
        assert (ROOT / name).stat().st_size < 400_000, name


def test_the_package_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "stainnorm_transform", "--version"], capture_output=True, text=True)
    assert done.stdout == f"stainnorm {stainnorm_transform.__version__}\n"
