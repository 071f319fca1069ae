"""What the figures show of models on some images, computed once and kept in one safetensors file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepvit.analysis.images import Images, class_names, top_classes
from deepvit.analysis.measures import class_token_mask, patch_grid, rollout, thetas
from deepvit.analysis.probe import at_initialisation, probe
from deepvit.analysis.recording import recordings
from deepvit.data.imageset import printable
from deepvit.errors import Failure, UserError
from deepvit.models import ViT

FORMAT = "deepvit attention study 1"
MAX_SHOWN = 8  # images in the figures; the measures are over all
MAX_STATISTICS = 32  # images that set an untrained norm's statistics


@dataclass
class Study:
    """One model on some images. `tensors`: `mean_maps` `[L, N, N]`, final maps, mean over images and heads; `head_maps`
    `[L, H, N, N]` of the first image, float16; `rollout` `[b, rows, columns]` from 0 to 1 and `pixels` uint8 `[b, 3,
    height, width]` of the first 8 images; `theta/<block>` `[H, H]`. `facts`: `name`, `attention`, `pictures` (the
    images' names), `top` (the most probable classes), `probe`, and `initial` (before training), or None."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


@torch.no_grad()
def study(model: ViT, images: Images, name: str) -> Study:
    """Everything the figures need of a model from `deepvit.load_model`, the probe of a fresh one included."""
    x = images.x.to(next(model.parameters()).device)
    tensors, tops = _over_images(model, x)
    tensors["pixels"] = images.pixels[:MAX_SHOWN].contiguous()
    tensors |= {f"theta/{i:02d}": theta for i, theta in enumerate(thetas(model)) if theta is not None}
    # As its run began if the checkpoint tells the seed and it had no `init`, else one like it
    attention, seed = model.config["attention"], (model.load_report.said.get("run") or {}).get("seed", 0)
    before = probe(at_initialisation(model, seed=seed, images=x[:MAX_STATISTICS]), x, matrix=True)
    return Study(tensors, {"name": printable(name), "attention": attention.get("name", attention["class"]),
                           "pictures": [*map(printable, images.names)], "top": tops,
                           "probe": probe(model, x, matrix=True), "initial": before})


def _over_images(model: ViT, x: Tensor) -> tuple[dict[str, Tensor], list]:
    mean_maps, head_maps, masks, logits = 0, None, [], []
    for recording in recordings(model, x):
        maps = recording.maps()
        mean_maps = mean_maps + torch.stack([block.mean(1).sum(0) for block in maps]) / len(x)
        if head_maps is None:
            head_maps = torch.stack([block[0].half() for block in maps])
        logits.append(recording.logits)
        if (room := MAX_SHOWN - sum(map(len, masks))) > 0 and (grid := patch_grid(model, mean_maps.shape[-1])):
            masks.append(class_token_mask(rollout([block[:room] for block in maps]), grid))
    tensors = {"mean_maps": mean_maps, "head_maps": head_maps, **({"rollout": torch.cat(masks)} if masks else {})}
    tops = top_classes(torch.cat(logits)[:MAX_SHOWN], class_names(model)) if model.num_classes else []
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, tops


def refuse_to_save(path: Path) -> None:
    """UserError where `save_studies` would write into no folder, or over anything but studies."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"The maps cannot be written to {path}: there is no folder {path.parent}, create it first.")
    if path.exists():
        try:
            load_studies(path)
        except UserError:
            raise UserError(f"{path} is there already and holds no maps of ours: give another name.") from None


def save_studies(path: Path, studies: Sequence[Study]) -> None:
    """Writes studies to one safetensors file. Raises Failure if it cannot be written."""
    tensors = {f"{i}/{name}": tensor for i, one in enumerate(studies) for name, tensor in one.tensors.items()}
    try:
        save_file(tensors, path, {"format": FORMAT, "facts": json.dumps([one.facts for one in studies])})
    except (OSError, safetensors.SafetensorError) as error:
        raise Failure(f"The maps could not be written to {path}: {error}.") from error


def load_studies(path: Path) -> list[Study]:
    """Reads what `save_studies` wrote. Raises UserError if it is anything else."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # it is no mapping
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"The maps {path} cannot be read ({error}): give a file made with --save-maps, or the "
                        f"published code's attention pickle.") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} holds no maps made by deepvit figures: give a file made with --save-maps.")
    studies = [Study({}, facts) for facts in json.loads(metadata["facts"])]
    for name, tensor in tensors.items():
        number, _, own = name.partition("/")
        studies[int(number)].tensors[own] = tensor
    return studies
