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
        "import sys, stainnorm_transform as s; s.NormalizeStain.pretrained(); "
        "assert not {'requests', 'huggingface_hub', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_no_pickled_weights_and_no_large_files():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("run in a clone: it asks git for the files")
    for name in files:
        assert not name.endswith((".pt", ".pth", ".pkl", ".npy", ".npz")), name
        assert (ROOT / name).stat().st_size < 400_000, name
