"""What the READMEs say can be done: their code blocks, options, paths and links.

A block of ``python`` is run, with stand-ins for the reader's images. A block of ``sh`` is run by bash with a function
in place of every program, which writes down how it was called. Then ``stainnorm`` is run with what it was given, and
of other programs it is checked that they would take theirs. A block of another kind fails, and so does one that calls a
program that is not in ``PROGRAMS``.
"""

import argparse
import ast
import contextlib
import io
import re
import shlex
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from render_tiles import LABS, render_tile
from synthetic import ROOT, make_slide, save
from torch.distributed.run import get_args_parser
from torchvision.transforms.v2.functional import to_pil_image

from stainnorm_transform import weights
from stainnorm_transform.cli.main import main

PAGES = sorted(path for folder in (".", "weights", "examples", ".github") for path in (ROOT / folder).glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^ *(?:```|~~~)", re.MULTILINE)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Less work than the reader's.
REDUCED = {
    "num_workers=4": "num_workers=0",
    "workers=4": "workers=0",
    "TrainConfig()": "TrainConfig(iterations=2, report_every=2)",
    "/archive": "archive",
    "/shared": "shared",
}


class Block(NamedTuple):
    name: str
    kind: str
    code: str


def blocks_of(path):
    found = []
    for indent, kind, code in BLOCK.findall(path.read_text()):
        code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
        found.append(Block(f"{path.relative_to(ROOT)}-{len(found) + 1}", kind, code))
    return found


def commands_of(path):
    """The commands in the docstring of an example, as blocks."""
    lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
    code = [line for line in lines if line.startswith(("pip install ", "python "))]
    return [Block(path.name, "sh", "\n".join(code))] if code else []


def without_blocks(path):
    return BLOCK.sub("", path.read_text())


def inline_code(path):
    return re.findall(r"`([^`\n]+)`", without_blocks(path))


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
INLINE = [
    Block(f"{path.relative_to(ROOT)}: {code}", "sh", code)
    for path in PAGES
    for code in inline_code(path)
    if code.startswith(("pip install ", "python "))
]
COMMANDS = [*INLINE, *(block for path in EXAMPLES for block in commands_of(path))]


def parametrize(blocks):
    return pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in blocks])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_block_is_of_a_kind_that_is_run(path):
    blocks = blocks_of(path)
    assert 2 * len(blocks) == len(FENCE.findall(path.read_text()))
    assert {block.kind for block in blocks} <= {"python", "sh"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What a reader has, small: tiles and slides."""
    folder = tmp_path_factory.mktemp("reader")
    for name, lab, count in (("tiles", "lab_a", 2), ("apart", "lab_a", 1), ("slides_of_another_lab", "lab_b", 1)):
        for seed in range(count):
            save(folder / name / f"{seed}.png", to_pil_image(render_tile(seed + 10 * count, 96, LABS[lab])))
    one, two = (np.asarray(Image.open(ROOT / f"examples/tiles/lab_a/tile_{number}.png")) for number in (1, 2))
    pixels = np.concatenate([np.concatenate([one, two]), np.concatenate([two, one])], axis=1)
    slide = make_slide(folder / "slide.svs", pixels, levels=())
    for name in ("slides_of_a_lab", "archive"):
        (folder / name).mkdir()
        shutil.copy(slide, folder / name / "a.svs")
    shutil.copy(weights.FOLDER / "camelyon17-center2.safetensors", folder / "mylab.safetensors")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


@pytest.fixture
def reader(material, tmp_path, monkeypatch):
    """Works in a folder with what a reader has."""
    folder = tmp_path / "reader"
    shutil.copytree(material, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@parametrize([block for block in BLOCKS if block.kind == "python"])
def test_python(block, reader):
    torch.manual_seed(0)
    images = torch.stack([render_tile(seed, 96) for seed in range(4)]) / 255
    stand_ins = {
        "images": images,
        "other_images": images[:2],
        "batch": images,
        "tiles": images,
        "masks": (images[:, :1] < 0.5).float(),
        "boxes": torch.tensor([10.0, 20.0, 50.0, 60.0]).expand(4, 1, 4),
    }
    exec(compile(reduced(block.code), block.name, "exec"), stand_ins)


def reduced(code):
    for whole, part in REDUCED.items():
        code = code.replace(whole, part)
    return code


@parametrize([block for block in BLOCKS if block.kind == "sh"])
def test_shell(block, reader, tmp_path):
    for program, *arguments in calls(block.code, tmp_path):
        # A README shows both how weights are made and how they are used.
        if "train" in arguments:
            (reader / "mylab.safetensors").unlink(missing_ok=True)
        PROGRAMS[program](arguments)


@parametrize(COMMANDS)
def test_command(block, reader, tmp_path):
    for program, *arguments in calls(block.code, tmp_path):
        PROGRAMS[program](arguments)


def calls(code, folder):
    """The programs that a block calls, with their arguments, in bash's reading of it."""
    (folder / "bin").mkdir()
    for name in ("find", "sed", "wc"):
        (folder / "bin" / name).symlink_to(shutil.which(name))
    lines = ["set -euo pipefail", 'record() { printf \'%s\\0\' $# "$@" >> "$RECORD"; }']
    lines += [f'{program}() {{ record {program} "$@"; }}' for program in PROGRAMS]
    lines += ['sbatch() { record sbatch "$@"; eval "${@: -1}"; }', reduced(code)]
    environment = {
        "PATH": str(folder / "bin"),
        "RECORD": str(folder / "calls"),
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "1",
    }
    bash = [shutil.which("bash"), "--norc", "-c", "\n".join(lines)]
    done = subprocess.run(bash, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    words = iter((folder / "calls").read_text().split("\0")[:-1])
    return [[next(words) for _ in range(int(count))] for count in words]


def stainnorm(arguments):
    if "--ray" in arguments:
        # A cluster takes seconds to start; other tests start one.
        assert "--ray" in help_of(arguments[0])
        arguments = [argument for argument in arguments if argument != "--ray"]
    if "--help" in arguments:
        assert help_of(arguments[0])
        return
    if arguments[0] == "train":
        arguments = [*arguments, "--iterations", "2", "--report-every", "2"]
    assert main(arguments) == 0
    out = Path(arguments[arguments.index("--out") + 1])
    assert out.is_file() or (out / "offsets.csv").is_file()
    assert ("--overview" in arguments) == (out / "overview.png").is_file()


def help_of(*command):
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        main([*command, "--help"])
    return out.getvalue()


def pip(arguments):
    """Asks for extras that there are."""
    extras = set(metadata.metadata("stainnorm-transform").get_all("Provides-Extra"))
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        name, asked = re.fullmatch(r"([\w.-]+)(?:\[([\w,-]+)\])?", argument).groups()
        assert asked is None or name in (".", "stainnorm-transform")
        assert set((asked or "").split(",")) - {""} <= extras


def python(arguments):
    """An example takes these arguments."""
    script, *arguments = arguments
    assert re.fullmatch(r"examples/\w+\.py", script)
    parser = _Parser()
    for names, options in declared(ROOT / script):
        parser.add_argument(*names, **options)
    parser.parse_args(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise AssertionError(message)


def declared(script) -> list[tuple[list[str], dict[str, Any]]]:
    """The arguments that a script declares, from its text: its libraries need not be installed."""
    source = script.read_text()
    found = (
        declared(script.with_name("camelyon17.py"))
        if re.search("^from camelyon17 .*add_data_option", source, re.M)
        else []
    )
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            options = {each.arg: each.value.value for each in node.keywords if isinstance(each.value, ast.Constant)}
            kept = {key: options[key] for key in ("action", "nargs", "required") if key in options}
            found.append(([name.value for name in node.args], kept))
    return found


def torchrun(arguments):
    options = get_args_parser().parse_args(arguments)
    assert options.no_python
    PROGRAMS[options.training_script](options.training_script_args)


def sbatch(arguments):
    parser = _Parser()
    for name in ("--array", "--cpus-per-task", "--mem", "--wrap"):
        parser.add_argument(name, required=True)
    parser.add_argument("--requeue", action="store_true")
    parser.parse_args(arguments)


def run_pytest(arguments):
    parser = _Parser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-m", choices=["slow"])
    parser.add_argument("--hypothesis-profile", type=hypothesis.settings.get_profile)
    assert all((ROOT / path).exists() for path in parser.parse_args(arguments).paths)


def takes(*known, file):
    """Checks a program of which the READMEs call a few forms, and which needs a file of the repository."""

    def check(arguments):
        assert shlex.join(arguments) in known
        assert (ROOT / file).is_file()

    return check


PROGRAMS = {
    "stainnorm": stainnorm,
    "pip": pip,
    "python": python,
    "torchrun": torchrun,
    "sbatch": sbatch,
    "pytest": run_pytest,
    "ruff": takes("check .", "format .", file="pyproject.toml"),
    "mypy": takes("", file="pyproject.toml"),
    "lint-imports": takes("", file="pyproject.toml"),
    "nox": takes("", file="noxfile.py"),
    ".ci/run": takes("", file=".ci/run"),
}


def test_a_program_that_nobody_checks_fails(tmp_path):
    with pytest.raises(AssertionError, match="conda"):
        calls("conda install stainnorm-transform", tmp_path)


def test_calls_are_as_bash_reads_them(tmp_path):
    assert calls('pip install "a b" && python x.py \\\n    $((1 + 1))', tmp_path) == [
        ["pip", "install", "a b"],
        ["python", "x.py", "2"],
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_in_the_text_exist(path):
    known = set(re.findall(r"--[a-z][\w-]*", help_of() + help_of("normalize") + help_of("train")))
    known |= {name for script in EXAMPLES for names, _ in declared(script) for name in names}
    used = {option for code in inline_code(path) for option in re.findall(r"(?<!\S)--[a-z][\w-]*", code)}
    assert used - {"--hypothesis-profile"} <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_folders_in_the_text_exist(path):
    named = {code for code in inline_code(path) if re.fullmatch(r"[\w./-]+(\.py|/)", code)} - {"normalized/"}
    places = ROOT, ROOT / "stainnorm_transform", path.parent
    assert {name for name in named if not any((place / name).exists() for place in places)} == set()


def slugs(path):
    """The anchors of a page, as GitHub makes them of its headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT.resolve()), link
        assert not anchor or anchor in slugs(target), link


def test_the_readme_is_short():
    content = (ROOT / "README.md").read_bytes()
    assert len(content) <= 9000
    assert len(content.splitlines()) <= 180


def test_every_example_is_listed():
    listed = re.findall(r"\]\((\w+\.py)\)", (ROOT / "examples/README.md").read_text())
    assert set(listed) == {path.name for path in EXAMPLES}
