"""What a model makes of images: `deepvit figures` draws what it attends to, `deepvit predict` says what it sees."""

import argparse
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from deepvit.analysis import plots
from deepvit.analysis.images import class_names, read_images, top_classes
from deepvit.analysis.pickled import read_pickled_maps, study_of_maps
from deepvit.analysis.study import Study, load_studies, refuse_to_save, save_studies, study
from deepvit.commands.main import add_weights, parser_of
from deepvit.config.compare import flat, labels
from deepvit.errors import BAD_INPUT, DONE, UserError, writing
from deepvit.importers import open_model
from deepvit.importers.files import is_safetensors
from deepvit.importers.settings import paths_and_keywords
from deepvit.models import ViT

SIGNED = {"Creator": "deepvit"}  # in every image, which tells our own from a user's


def _studies(given: argparse.Namespace) -> tuple[list[Study], list[str]]:
    """What is to be drawn, and a sentence for each image that is of no use."""
    if given.maps:
        return _drawn_before(given.maps), []
    checkpoints = [path for path in (given.checkpoint, given.compare) if path]
    paths, keywords = paths_and_keywords(given.images)
    models = [open_model(path, given.weights, **keywords) for path in checkpoints]
    studies, refused = [], []
    for model, name in zip(models, _names(models, checkpoints), strict=True):
        images = read_images(model, paths)
        studies.append(study(model, images, name))
        refused = images.refused
    return studies, refused


def draw(studies: Sequence[Study], folder: Path, suffix: str = "png") -> list[Path]:
    """Writes every figure of the studies, side by side where there are two, and returns the files."""
    with rc_context({"text.parse_math": False}):  # a $ in a name is a $
        figures: dict[str, Figure | None] = {
            "maps_mean": plots.mean_maps(studies),
            **{f"maps_heads_{i}" if len(studies) > 1 else "maps_heads": plots.head_maps(one)
               for i, one in enumerate(studies, 1)},
            "rollout": plots.rolled_out(studies) if all("rollout" in one.tensors for one in studies) else None,
            "similarity_matrix": plots.similarity_matrices(studies),
            "similarity_depth": plots.similarity_with_depth(studies),
            "measures_depth": plots.measures_with_depth(studies),
            "theta": plots.theta(studies)}
    drawn = {folder / f"{name}.{suffix}": figure for name, figure in figures.items() if figure is not None}
    with writing("The figures", folder, "choose another folder with --out"):
        for path in drawn:
            refuse_strange(path)
        folder.mkdir(parents=True, exist_ok=True)
        for path, figure in drawn.items():
            figure.savefig(path, metadata=SIGNED)
    return [*drawn]


def refuse_strange(path: Path) -> None:
    """UserError for an existing image that no command of ours has drawn."""
    if path.exists() and SIGNED["Creator"].encode() not in path.read_bytes():
        raise UserError(f"{path} is there already and was not drawn here: choose another name or folder.")


def _run_or_file(path: Path) -> Path:
    """The run's folder for its best.pt and last.pt."""
    path = path.resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def _of_figures(source: Path) -> str:
    """A file's stem; of a run its place below here or runs/, as many are named `default`."""
    run = _run_or_file(source)
    if run.is_file():
        return run.stem
    *above, name = run.relative_to(Path.cwd()).parts if Path.cwd() in run.parents else [run.name]
    return "-".join([*(above[1:] if above[:1] == ["runs"] else above), name])


def _names(models: Sequence[ViT], checkpoints: Sequence[Path]) -> list[str]:
    """What differs between the models' settings, or the attention of one alone; the files' names if that is no help."""
    settings = [dict(flat({**(model.load_report.said.get("run") or {}), "model": model.config})) for model in models]
    names = labels(settings) if len(settings) > 1 else [settings[0].get("model.attention.name", "")]
    files = [_run_or_file(path).name for path in checkpoints]
    return names if all(names) and len({*names}) == len(names) else [
        textwrap.fill(f"{'AB'[at]}: {name}" if len(files) > 1 else name, 40) for at, name in enumerate(files)]


def _drawn_before(path: Path) -> list[Study]:
    """What --save-maps wrote, or the published code's pickle, recognised by its first bytes."""
    with path.open("rb") as file:
        start = file.read(9)
    is_pickle = start[:1] == b"\x80" and not is_safetensors(start)
    return [study_of_maps(read_pickled_maps(path), path.name)] if is_pickle else load_studies(path)


def main(arguments: Sequence[str]) -> int:
    parser = parser_of("figures")
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a run folder, or a checkpoint of any dialect")
    parser.add_argument("images", nargs="*", metavar="IMAGE|KEY=VALUE", help="images or folders of them (none: "
                        "built-in examples), and settings that a file does not say, such as num_heads=12")
    parser.add_argument("--out", type=Path, help="folder of the figures (default: figures/<run or file name>)")
    parser.add_argument("--compare", type=Path, help="a second checkpoint, drawn beside the first")
    parser.add_argument("--format", choices=("png", "svg"), default="png")
    parser.add_argument("--save-maps", type=Path, help="also write what was computed, as safetensors")
    parser.add_argument("--maps", type=Path, help="draw what --save-maps wrote, or the published code's pickle")
    add_weights(parser)
    given = parser.parse_intermixed_args(arguments)
    if (given.maps is None) == (given.checkpoint is None) or given.maps and given.compare:
        raise UserError("Give a checkpoint (and another with --compare), or --maps FILE to draw what was computed "
                        "before, and not both.")
    if given.save_maps:
        refuse_to_save(given.save_maps)
    studies, refused = _studies(given)
    if given.save_maps:
        save_studies(given.save_maps, studies)
    # A folder for each model or pair, so that one's figures do not replace another's
    names = [_of_figures(path) for path in (given.maps or given.checkpoint, given.compare) if path]
    out = given.out or Path("figures", "-and-".join(name[-120:].replace(":", "-") for name in names))
    for path in draw(studies, out, given.format):
        print(path)
    for sentence in refused:
        print(f"Left out: {sentence}", file=sys.stderr)
    return BAD_INPUT if refused else DONE


def predict(arguments: Sequence[str]) -> int:
    parser = parser_of("predict")
    parser.add_argument("checkpoint", help="a run folder, a checkpoint of any dialect, or a name such as timm:NAME")
    parser.add_argument("images", nargs="+", metavar="IMAGE|KEY=VALUE", help="images or folders of them, and settings "
                        "that the file does not say about its model, such as num_heads=12")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    add_weights(parser)
    given = parser.parse_intermixed_args(arguments)
    paths, keywords = paths_and_keywords(given.images)
    if given.top < 1:
        raise UserError(f"--top {given.top} is too few: give 1 or more.")
    model = open_model(given.checkpoint, given.weights, **keywords)
    images = read_images(model, paths)
    with torch.no_grad():
        logits = model(images.x)  # [B, C]
    for name, guesses in zip(images.names, top_classes(logits, class_names(model), given.top), strict=True):
        print(name, *(f"  {probability:7.2%}  {label}" for label, probability in guesses), sep="\n")
    for sentence in images.refused:
        print(sentence, file=sys.stderr)
    return BAD_INPUT if images.refused else DONE
