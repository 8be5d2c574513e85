"""Writes NormalizeStain, alone or before a model, as files that run without this package.

They are of torch.export, ONNX and, with --aoti, AOTInductor.

pip install -e ".[deploy]" && python examples/deploy.py --out deployed --resnet50

Batch, height and width stay free. The files are read back and compared with the module on tiles of other sizes. They
take float32 tensors (N, 3, H, W) in [0, 1].
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from render_tiles import render_tile
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchvision.models import resnet50

from stainnorm_transform import NormalizeStain, weights
from stainnorm_transform.cli.options import path_name

# Batch and sides must be told apart while exporting, and lie above 1.
EXAMPLE = (2, 3, 224, 256)
OTHERS = ((1, 3, 40, 48), (1, 3, 224, 224), (3, 3, 256, 256), (1, 3, 512, 600), (1, 3, 1100, 1300))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=path_name, metavar="DIR", help="folder to write to")
    parser.add_argument("--weights", default=weights.DEFAULT, help="name or path (default: %(default)s)")
    parser.add_argument("--resnet50", action="store_true", help="the normalizer before an untrained ResNet-50")
    parser.add_argument(
        "--aoti",
        action="store_true",
        help="also model_aoti.pt2, compiled for machines like this one; needs a C++ compiler, and a few minutes",
    )
    options = parser.parse_args()
    layers = [NormalizeStain.pretrained(options.weights), *([resnet50()] if options.resnet50 else [])]
    model = nn.Sequential(*layers)
    options.out.mkdir(parents=True, exist_ok=True)
    for path, run in deploy(model.eval(), options.out, options.aoti).items():
        print(f"{path}: differs by at most {difference(model, run):.1e} on {len(OTHERS)} batches of other sizes")


def deploy(model: nn.Module, folder: Path, aoti: bool = False) -> dict[Path, Callable[[Tensor], Tensor]]:
    """Exports a model that takes one tensor (not NormalizeStain itself, which takes samples, but a Sequential of it).

    Writes model.pt2, model.onnx and model_aoti.pt2; returns each with a function that runs what was read back.
    """
    program = export(model)
    torch.export.save(program, folder / "model.pt2")
    exported = torch.export.load(folder / "model.pt2").module()

    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    assert onnx is not None
    onnx.save(folder / "model.onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run_onnx(image: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(session.run(None, {name: image.numpy()})[0]))

    written = {folder / "model.pt2": exported, folder / "model.onnx": run_onnx}
    if aoti:
        path = folder / "model_aoti.pt2"
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
        compiled = torch._inductor.aoti_load_package(str(path))
        written[path] = lambda image: compiled(image.contiguous())
    return written


def export(model: nn.Module) -> ExportedProgram:
    """The program of a model, for any batch, height and width."""
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    return torch.export.export(model, (torch.rand(EXAMPLE),), dynamic_shapes=(sizes,), strict=False)


@torch.no_grad()
def difference(model: nn.Module, run: Callable[[Tensor], Tensor]) -> float:
    """The largest, over tiles of other sizes and one blank among them."""
    largest = 0.0
    for count, _, height, width in OTHERS:
        tiles = torch.stack([render_tile(seed, 256) for seed in range(count)]) / 255
        tiles = tiles.repeat(1, 1, -(-height // 256), -(-width // 256))[..., :height, :width]
        tiles[1:2] = 1
        largest = max(largest, float((run(tiles) - model(tiles)).abs().max()))
    return largest


if __name__ == "__main__":
    main()
