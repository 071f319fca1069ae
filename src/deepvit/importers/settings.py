"""What the shapes of a model's parameters tell about its settings: everything but a few scalars."""

import inspect
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers import to_2tuple
from torch import Size

from deepvit.config.signature import fits
from deepvit.errors import UserError, did_you_mean, reason
from deepvit.models import ViT, attention_config, build_model

Shapes = Mapping[str, Size]
Grid = tuple[int, int]  # rows, columns of patches
OF_A_FILE = ("arch", "dialect", "grid_size", "head")  # what `load_model` takes besides the keywords of `ViT`
NEEDED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
# A parameter beside qkv whose first side is H -> the attention it tells, the first that is there
PER_HEAD = {"mix_logits.weight": "talking_heads", "log_sharpness": "temperature", "contrast": "attn_scale",
            "mix.weight": "reattention_fc", "norm.weight": "norm_only"}


def settings_from_shapes(shapes: Shapes, source: str) -> dict[str, Any]:
    """The keywords of `ViT` that parameters in our names decide: not `num_heads` without parameters per head,
    `img_size`, or scalars such as `gelu`. Raises UserError for a shape that no ViT has."""
    for name in NEEDED:
        if name not in shapes:
            raise UserError(f"{source} has nothing that serves as '{name}': it is not a ViT with a class token.")
    depth, positions = _depth(shapes, source), shapes["pos_embed"]
    try:
        width, hidden = shapes["cls_token"][-1], shapes["blocks.0.mlp.fc1.weight"][0]
        if len(positions) != 3 or positions[::2] != (1, width):
            raise UserError(f"{source} has position embeddings of {tuple(positions)}, not [1, 1 + N, {width}].")
        return {"embed_dim": width, "depth": depth, "mlp_ratio": hidden / width,
                "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
                "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
                "patch_norm": "patch_embed.norm_in.weight" in shapes,
                "feat_scale": "blocks.0.feat_scale.shared" in shapes,
                "representation_size": shapes["pre_logits.0.weight"][0] if "pre_logits.0.weight" in shapes else None,
                # only switches LayerScale on: its values are loaded
                "init_values": 1e-5 if "blocks.0.ls1.gamma" in shapes else None,
                **_attention(shapes, depth), **_stem(shapes)}
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source} has shapes that no ViT has ({error}).") from None


def settings_from_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What the shapes of a model of these settings tell, to be compared with what a file's tell."""
    shapes = {name: tensor.shape for name, tensor in empty_model(config, source).state_dict().items()}
    return settings_from_shapes(shapes, source)


def empty_model(config: Mapping[str, Any], source: str) -> ViT:
    """The model without storage: its shapes are compared with the file's before any memory is taken."""
    try:
        with torch.device("meta"):
            return build_model(config)
    except UserError as error:
        raise UserError(f"{source} makes no model with these settings: {error}") from None
    except (RuntimeError, ValueError, TypeError, OverflowError, ZeroDivisionError, IndexError) as error:
        raise UserError(f"{source} has settings that make no model ({reason(error)}).") from None


def paths_and_keywords(words: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """The words of a command line that are paths, and its settings for `load_model`."""
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    return [Path(word) for word in words if word not in settings], as_keywords(settings)


def as_keywords(words: Sequence[str]) -> dict[str, Any]:
    """`num_heads=12` or `model.num_heads=12` -> {"num_heads": 12}, for `load_model`; values as in YAML."""
    keywords = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            keywords[re.sub(r"^\+*model[./]", "", name)] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals:
            raise UserError(f"{word} is not a setting of the form KEY=VALUE, such as num_heads=12.")
    return checked(keywords)


def checked(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The settings; refuses any that `load_model` does not take."""
    known = [*inspect.signature(ViT).parameters, *OF_A_FILE]
    for name in keywords:
        if name not in known:
            raise UserError(f"{name} is not a setting of a model.{did_you_mean(name, known)} "
                            f"The settings are: {', '.join(sorted(known))}.")
    return dict(keywords)


def grid_of(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> Grid:
    """Rows and columns of patches in an image, sizes in pixels, each one number or (height, width)."""
    if not fits(img_size, int | tuple[int, int]) or min(to_2tuple(img_size)) < 1:
        raise UserError(f"img_size={img_size!r} is not an image size: give one number of pixels, or [height, width].")
    (height, width), (rows, columns) = to_2tuple(img_size), to_2tuple(patch_size)
    return height // rows, width // columns


def _depth(shapes: Shapes, source: str) -> int:
    present = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    if present != set(range(len(present))):
        gap = min(set(range(max(present))) - present)
        raise UserError(f"{source} lacks block {gap} of {max(present) + 1}.")
    return len(present)


def _attention(shapes: Shapes, depth: int) -> dict[str, Any]:
    """The attention, the blocks that have it, and H where its parameters tell."""
    special = [i for i in range(depth) if any(f"blocks.{i}.attn.{part}" in shapes for part in PER_HEAD)]
    if not special:
        return {"attention": attention_config("self"), "reattention_blocks": None}
    at = f"blocks.{special[0]}.attn"
    part, name = next((part, name) for part, name in PER_HEAD.items() if f"{at}.{part}" in shapes)
    if name == "reattention_fc" and f"{at}.norm.weight" in shapes:
        name = "reattention" if f"{at}.norm.running_mean" in shapes else "reattention_ln"
    return {"attention": attention_config(name), "num_heads": shapes[f"{at}.{part}"][0],
            "reattention_blocks": None if len(special) == depth else special}


def _stem(shapes: Shapes) -> dict[str, Any]:
    kernel = shapes["patch_embed.proj.weight"]
    stem, first, factor = "patch", kernel, 1
    if "patch_embed.conv1.weight" in shapes:
        stem, first, factor = "conv", shapes["patch_embed.conv1.weight"], 2
    elif "patch_embed.root.conv.weight" in shapes:
        units = _units(shapes)
        first, factor = shapes["patch_embed.root.conv.weight"], 4 * 2 ** (len(units) - 1)
        stem = {"name": "hybrid", "layers": units, "width": first[0]}
    if len(kernel) != 4 or 0 in kernel[2:]:
        raise ValueError(f"a patch embedding of {tuple(kernel)}")
    patch = [kernel[2] * factor, kernel[3] * factor]
    return {"stem": stem, "in_chans": first[1], "patch_size": patch[0] if patch[0] == patch[1] else patch}


def _units(shapes: Shapes) -> list[int]:
    """Bottleneck units of each stage of a hybrid's ResNet."""
    found = {m[0]: int(m[1]) for name in shapes if (m := re.match(r"patch_embed\.body\.block(\d+)\.unit\d+\.", name))}
    if not found:
        raise ValueError("a ResNet stem without units")
    return [count for _, count in sorted(Counter(found.values()).items())]
