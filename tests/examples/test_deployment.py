import re

import deploy
import pytest
import torch
from torch import nn

from stainnorm_transform import NormalizeStain

needs_exporters = pytest.mark.skipif(torch.__version__ < "2.9", reason="needs torch 2.9 or newer")


def before_a_model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(NormalizeStain.pretrained(), *layers)


@needs_exporters
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exported_files_do_the_same_at_any_size(tmp_path):
    model = before_a_model().eval()
    written = deploy.deploy(model, tmp_path)
    assert [path.name for path in written] == ["model.pt2", "model.onnx"]
    for run in written.values():
        assert deploy.difference(model, run) < 1e-4


@needs_exporters
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--resnet50"], ["model.pt2", "model.onnx"]),
        (["--aoti"], ["model.pt2", "model.onnx", "model_aoti.pt2"]),
    ],
)
def test_the_example_as_it_is_run(tmp_path, monkeypatch, capsys, options, names):
    """Before a ResNet-50, and compiled ahead of time."""
    monkeypatch.setattr("sys.argv", ["deploy.py", "--out", str(tmp_path), *options])
    torch.manual_seed(0)
    deploy.main()
    printed = re.findall(r"(\S+): differs by at most (\S+)", capsys.readouterr().out)
    assert [path.rpartition("/")[2] for path, _ in printed] == names
    assert all(float(difference) < 1e-4 for _, difference in printed)
