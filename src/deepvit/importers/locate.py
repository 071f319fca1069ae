"""Where weights are found: a file, a folder of a run or of the Hugging Face hub, or a name to fetch into a cache."""

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from deepvit.errors import UserError, did_you_mean, reason

RELEASED = Path(__file__).parents[1] / "weights"
GOOGLE = "https://storage.googleapis.com/vit_models"  # google-research/vision_transformer's README
WEIGHTS, CONFIG = "model.safetensors", "config.json"
IMAGES = ("mean", "std", "crop_pct", "interpolation")  # in timm's words
RUN_FILES, FOLDER_FILES = ("best.pt", "last.pt"), (WEIGHTS, "pytorch_model.bin")


def find_checkpoint(source: str | Path) -> tuple[Path, Path | None]:
    """(weights file, its run folder if it lies in one) of a file, a folder, or a name: `timm:NAME`,
    `hf-hub:OWNER/NAME[@REVISION]`, `google:COLLECTION/NAME`, `local-dir:FOLDER`, `deepvit:NAME` (in the package). Only
    safetensors and Google's .npz are fetched; `HF_ENDPOINT`, `HF_HOME` and `TORCH_HOME` are respected. Raises UserError
    for an unknown name, one that cannot be fetched, or a folder without weights."""
    scheme, colon, name = str(source).partition(":")
    source = SCHEMES[scheme](name) if colon and scheme in SCHEMES else Path(source)
    if source.is_dir():
        paths = [source / "checkpoints" / name for name in RUN_FILES] + [source / name for name in FOLDER_FILES]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UserError(f"The folder {source} holds no checkpoints/best.pt or last.pt, and no "
                            f"{' or '.join(FOLDER_FILES)}: give a run's folder or a weights file.")
        return path, source if path.name in RUN_FILES else None
    run = source.parent.parent
    return source, run if source.parent.name == "checkpoints" and (run / "config.yaml").exists() else None


def hub_metadata(path: Path) -> dict[str, Any]:
    """What timm's `config.json` records about the weights beside it: architecture, keywords, classes, normalisation."""
    config = path.with_name(CONFIG)
    if path.name not in FOLDER_FILES or not config.exists():
        return {}
    try:
        content = json.loads(config.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{config} is not JSON ({reason(error)}): get it again.") from None
    content = content if isinstance(content, dict) else {}
    typed = {"arch": ("architecture", str), "model_args": ("model_args", dict), "classes": ("label_names", list)}
    found = {key: content[theirs] for key, (theirs, kind) in typed.items() if isinstance(content.get(theirs), kind)}
    if isinstance(pool := content.get("global_pool"), str):
        found["model_args"] = {"global_pool": pool, **found.get("model_args", {})}
    return found | told_images(content.get("pretrained_cfg"))


def told_images(settings: Any) -> dict[str, Any]:
    """As much as timm's settings tell of how images are prepared: those of `IMAGES` that make sense."""
    told = settings if isinstance(settings, Mapping) else {}
    numbers = {key: values for key in ("mean", "std") if isinstance(values := told.get(key), list | tuple)
               and len(values) == 3 and all(isinstance(one, float | int) for one in values)}
    found = {key: [*map(float, values)] for key, values in numbers.items()} if len(numbers) == 2 else {}
    crop, interpolation = told.get("crop_pct"), told.get("interpolation")
    return (found | ({"crop_pct": float(crop)} if isinstance(crop, float | int) and 0.1 <= crop <= 1 else {})
            | ({"interpolation": interpolation} if interpolation in ("bilinear", "bicubic") else {}))


def released() -> list[str]:
    """Names of the weights that came with the package."""
    return sorted(f"deepvit:{path.stem}" for path in RELEASED.glob("*.safetensors"))


def _released(name: str) -> Path:
    if f"deepvit:{name}" not in released():
        raise UserError(f"deepvit:{name} is not among the weights that came with the package, which are: "
                        f"{', '.join(released())}.{did_you_mean(f'deepvit:{name}', released())}")
    return RELEASED / f"{name}.safetensors"


@cache
def _of_hub(repository: str) -> Path:
    from timm.models._hub import download_from_hf
    try:
        download_from_hf(repository, CONFIG)
        return Path(download_from_hf(repository, WEIGHTS))
    except Exception as error:  # of the network, in a dozen kinds
        why = reason(error.__cause__ or error)
        raise UserError(f"{repository} cannot be fetched from the Hugging Face hub ({why}): check the name and the "
                        f"network, or give the path of a file.") from None


def _of_timm(name: str) -> Path:
    from timm.models import get_pretrained_cfg, list_pretrained
    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        found = None
    if found is None or not found.hf_hub_id:
        raise UserError(f"timm:{name} has no weights on the Hugging Face hub: timm.list_pretrained('vit_*') lists "
                        f"those that do.{did_you_mean(name, list_pretrained('vit_*'))}")
    return _of_hub(found.hf_hub_id)


@cache
def _of_google(name: str) -> Path:
    """A file of Google's, such as `imagenet21k/ViT-B_16`."""
    if not re.fullmatch(r"[\w+-]+/[\w+.-]+", name):
        raise UserError(f"google:{name} is not COLLECTION/NAME: give a name such as google:imagenet21k/ViT-B_16.")
    name = f"{name.removesuffix('.npz')}.npz"
    path = Path(torch.hub.get_dir(), "checkpoints", "vit_models", name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{GOOGLE}/{name}", str(path), progress=False)
    except Exception as error:  # of the network or the disk, in a dozen kinds
        raise UserError(f"google:{name} cannot be fetched from {GOOGLE}/{name} ({reason(error)}): check the name and "
                        f"the network, or download that address elsewhere and give the file's path.") from None
    return path


SCHEMES = {"timm": _of_timm, "hf-hub": _of_hub, "google": _of_google, "local-dir": Path, "deepvit": _released}
