"""Features of the tissue of an archive of slides, in the colors of the target, on a Ray cluster: a task a slide.

pip install ".[slides,ray]" && python examples/ray_features.py slides --out features --gpus 1

Every slide becomes a file of features (N, 2048) and corners (N, 2), as safetensors. Tasks whose process dies are begun
again; slides whose file is there are left out, so that the same command goes on where it stopped.
"""

import argparse
import os
from pathlib import Path

import ray
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet50
from torchvision.transforms import v2
from tqdm import tqdm

from stainnorm_transform import NormalizeStain
from stainnorm_transform.cli.options import path_name
from stainnorm_transform.files import replacing
from stainnorm_transform.folders import find
from stainnorm_transform.slides import SlideTiles, is_slide
from stainnorm_transform.slides.formats import SUFFIXES, TIFF_SUFFIXES


@ray.remote(max_retries=3)
@torch.inference_mode()
def features(slide: Path, output: Path) -> None:
    device = "cuda" if ray.get_gpu_ids() else "cpu"
    tiles = SlideTiles(slide, NormalizeStain.pretrained(), side=224, mpp=0.5)
    torch.manual_seed(0)
    encoder = resnet50()  # load your weights here
    encoder.fc = nn.Identity()
    model = nn.Sequential(v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), encoder).to(device).eval()
    found = [torch.zeros(0, 2048)]
    for batch in DataLoader(tiles, batch_size=64):
        found.append(model(batch["image"].to(device) / 255).cpu())
    with replacing(output) as temporary:
        save_file({"features": torch.cat(found), "corners": torch.tensor(tiles.corners).view(-1, 2)}, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=path_name, help="a slide, or folder of them, searched with its subfolders")
    parser.add_argument("--out", type=path_name, required=True, help="folder that all machines of the cluster share")
    parser.add_argument("--cpus", type=int, default=1, help="of a task (default: %(default)s)")
    parser.add_argument(
        "--gpus", type=float, default=0, help="of a task; 0.5 lets two share one (default: %(default)s)"
    )
    options = parser.parse_args()
    try:
        found = find([options.slides], skip=options.out, suffixes=SUFFIXES + TIFF_SUFFIXES)
    except ValueError as error:
        parser.error(f"expected slides: {error}")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(log_to_driver=False)
    options.out.mkdir(parents=True, exist_ok=True)
    waiting = {}
    for path in filter(is_slide, found):
        output = options.out.absolute() / f"{found[path]}.safetensors"
        if not output.exists():
            output.parent.mkdir(parents=True, exist_ok=True)
            task = features.options(num_cpus=options.cpus, num_gpus=options.gpus)
            waiting[task.remote(path, output)] = path
    failed = 0
    with tqdm(total=len(waiting), unit="slide") as bar:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            path = waiting.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                failed += 1
                bar.write(f"{path}: {str(error).splitlines()[-1]}")
            bar.update()
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
