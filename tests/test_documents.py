"""README and docs: the page of all settings is complete, and every command is typed in a fresh shell: in the checkout,
and from a copy installed elsewhere.

A fenced block of commands follows a comment that makes them small, or says why they are not typed here:

    <!-- typed with: 16,24,32 => 1,2; + model.embed_dim=24 -->     replacements, and settings for each train and eval
    <!-- not typed: needs a cluster -->

Names in capitals and paths that a reader replaces by his own are replaced by those of `PLACEHOLDERS`.
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path

import pytest
import reference_pages
from setting_data import save_images

from deepvit.config.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("python ", "python3 ", "bash ", "deepvit ", "make ", "torchrun ", "tensorboard ", "srun ", "sbatch ",
            "pip ", "git ", "cd ", "OMP_NUM_THREADS")
PLACEHOLDERS = {
    "/path/to/imagenet": "{data}/images", "/path/to/images": "{data}/images",
    "data.root=...": "data.root={data}/images",
    "/path/to/cifar100": "{data}/cifar", "/path/to/cifar10": "{data}/cifar", "FOLDER_OF_JPEGS": "{data}/images",
    "CHECKPOINT": "runs/one/checkpoints/best.pt", "A.pt": "runs/one/checkpoints/best.pt",
    "B.pt": "runs/two/checkpoints/best.pt", "image.jpg": "{data}/images/val/n01440764/0.png"}
SMALL = ["model.img_size=16", "model.patch_size=8", "model.depth=2", "model.embed_dim=24", "model.num_heads=2",
         "schedule.epochs=1", "schedule.warmup_epochs=0", "data.batch_size=8", "data.workers=0"]


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    mark: str | None
    commands: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that hold commands, each with the comment above it."""
    found, lines, number = [], page.read_text().splitlines(), 0
    while number < len(lines):
        if lines[number].startswith("```"):
            end = next(k for k in range(number + 1, len(lines)) if lines[k].startswith("```"))
            commands = commands_of("\n".join(lines[number + 1:end]))
            if lines[number] in ("```", "```bash", "```sh") and commands:
                above = next((line for line in reversed(lines[:number]) if line.strip()), "")
                mark = re.fullmatch(r"<!-- ((?:not )?typed.*) -->", above)
                found.append(Block(page.name, number + 1, mark and mark[1], tuple(commands)))
            number = end
        number += 1
    return found


def commands_of(text: str) -> list[str]:
    """The lines of a block that are commands, without their remarks; a line that ends in a backslash goes on."""
    joined = re.sub(r"\\\n\s*", "", text).splitlines()
    return [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in joined if line.startswith(PROGRAMS)]


def typed(block: Block, data: Path) -> list[str]:
    """A block's commands with the comment's replacements and settings, and with data that is here."""
    changes, settings = [], ""
    for part in re.sub(r"^typed( with)?:", "", block.mark or "").split(";"):
        if "=>" in part:
            changes.append([side.strip() for side in part.split("=>")])
        elif part.strip().startswith("+"):
            settings = part.strip()[1:].strip().replace("SMALL", " ".join(SMALL))
    found = []
    for command in block.commands:
        for old, new in changes:
            command = command.replace(old, new.replace("{data}", str(data)))
        for old, new in PLACEHOLDERS.items():
            command = command.replace(old, new.format(data=data))
        trains = re.search(r"train\.py|eval\.py|eval\.sh|deepvit (train|eval)", command)
        if command:
            found.append(f"{command} {settings}" if settings and trains else command)
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
TYPED = [block for block in BLOCKS if block.mark and block.mark.startswith("typed")]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.page}:{block.line}")
def test_each_block_is_typed_or_says_why_not(block):
    assert block.mark, f"{block.page}:{block.line} wants a comment above it: {__doc__}"
    assert block.mark.startswith("typed") or re.fullmatch("not typed: .{5,}", block.mark)


def test_the_page_of_settings_is_that_of_conf_and_every_setting_says_what_it_is():
    page = reference_pages.settings_page()
    assert reference_pages.SETTINGS.read_text() == page, "run `python tests/reference_pages.py`"
    assert not re.findall(r"^.*\|\s*\|$", page.replace("| default | |", "").replace("| choice | |", ""), re.MULTILINE)
    names = set(re.findall(r"^\| `([\w.]+)`", page, re.MULTILINE))
    for name, hint in typing.get_type_hints(Settings).items():
        fields = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else []
        missing = {f"{name}.{field.name}" for field in fields} or {name}
        assert name in ("model", "origin") or not missing - names


def test_the_page_of_public_names_is_that_of_the_code():
    assert reference_pages.API.read_text() == reference_pages.api_page(), "run `python tests/reference_pages.py`"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for root, first, second in (("images", "train", "val"), ("cifar", "train", "test")):
        for split, count in ((first, 8), (second, 3)):
            for seed, name in enumerate(("n01440764", "n01443537", "n01484850")):
                save_images(folder / root / split / name, count, seed)
    return folder


def shell(command: str, place: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True,
                          timeout=600, stdin=subprocess.DEVNULL)


def fresh(**more: str) -> dict[str, str]:
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", **more}


def train_two(place: Path, program: str, environment: dict[str, str], data: Path) -> None:
    for name in ("one", "two"):
        done = shell(f"{program} model=deepvit16 recipe=folder data.root={data}/images {' '.join(SMALL)} "
                     f"schedule.epochs=2 engine.keep_epochs=1 hydra.run.dir=runs/{name}", place, environment)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, data) -> tuple[Path, dict[str, str]]:
    """The checkout as a reader has it, runs/ apart: a folder of links to what is tracked, and to the environment."""
    place = tmp_path_factory.mktemp("checkout")
    for entry in ("train.py", "eval.py", "eval.sh", "conf", "src", "tests", "docs", "Makefile", "pyproject.toml"):
        (place / entry).symlink_to(ROOT / entry)
    (place / ".venv").symlink_to(Path(sys.executable).parents[1])
    python = place / "bin"
    python.mkdir()
    (python / "python").symlink_to(shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable)
    environment = fresh(PATH=f"{python}:/usr/local/bin:/usr/bin:/bin")
    train_two(place, "python train.py", environment, data)
    return place, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory, data) -> tuple[Path, dict[str, str]]:
    """An empty folder, and the package as pip installs it."""
    target, place = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("anywhere")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target",
                    str(target), str(ROOT)], check=True)
    environment = fresh(PYTHONPATH=str(target), PATH=f"{target}/bin:{Path(sys.executable).parent}:/usr/bin:/bin")
    train_two(place, "deepvit train", environment, data)
    return place, environment


@pytest.mark.slow
@pytest.mark.parametrize("block", TYPED, ids=lambda block: f"{block.page}:{block.line}")
def test_in_the_checkout(block, checkout, data):
    place, environment = checkout
    activated = ".venv/bin/activate" in next(page for page in PAGES if page.name == block.page).read_text()
    for command in typed(block, data):
        needs = re.match(r"deepvit|torchrun|tensorboard|pip", command)
        assert activated or not needs, f"{block.page} does not say that {command!r} needs the environment."
        done = shell(f"source .venv/bin/activate; {command}" if needs else command, place, environment)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("block", TYPED, ids=lambda block: f"{block.page}:{block.line}")
def test_installed_elsewhere(block, installed, data):
    place, environment = installed
    for command in typed(block, data):
        command = re.sub(r"python (train|eval)\.py", r"deepvit \1", command)
        if command.startswith("deepvit"):
            done = shell(command, place, environment)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
