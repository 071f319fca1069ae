"""What the shapes of a model's parameters tell about its settings: everything but a few scalars."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Size

from deepvit.errors import UserError
from deepvit.models import attention_config

Shapes = Mapping[str, Size]


def settings_from_shapes(shapes: Shapes, source: str) -> dict[str, Any]:
    """The keywords of `ViT` that parameters in our names decide.

    Left out is what they do not tell: `num_heads` without a mix or norm of heads, and scalars such as `gelu`.
    `img_size` is a guess for a square picture, and left out where the position rows are no square.

    Raises:
        UserError: a shape that no ViT has.
    """
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight",
                 "blocks.0.mlp.fc1.weight"):
        if name not in shapes:
            raise UserError(f"{source} has nothing that serves as '{name}': it is no ViT with a class token.")
    depth = _depth(shapes, source)
    try:
        return _frame(shapes, depth) | _attention(shapes, depth) | _heads(shapes) | _stem(shapes)
    except (IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{source} has shapes that are no ViT's ({error}).") from None


def _frame(shapes: Shapes, depth: int) -> dict[str, Any]:
    width, hidden = shapes["cls_token"][-1], shapes["blocks.0.mlp.fc1.weight"][0]
    return {"embed_dim": width, "depth": depth, "mlp_ratio": hidden / width,
            "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
            "num_classes": shapes["head.weight"][0] if "head.weight" in shapes else 0,
            "patch_norm": "patch_embed.norm_in.weight" in shapes,
            "representation_size": shapes["pre_logits.0.weight"][0] if "pre_logits.0.weight" in shapes else None,
            # only says that there is a LayerScale: its values are loaded
            "init_values": 1e-5 if "blocks.0.ls1.gamma" in shapes else None}


def native_grid(shapes: Shapes, given: Mapping[str, Any], patch_size: list[int]) -> tuple[int, int] | None:
    """Rows and columns of patches that the position rows stand for: the asked size if it fits, or a square, or None."""
    rows = shapes["pos_embed"][1] - 1
    img_size = given.get("img_size")
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        grid = height // patch_size[0], width // patch_size[1]
        if grid[0] * grid[1] == rows:
            return grid
    side = math.isqrt(max(rows, 0))
    return (side, side) if side and side * side == rows else None


def _depth(shapes: Shapes, source: str) -> int:
    present = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    if present != set(range(len(present))):
        gap = min(set(range(max(present))) - present)
        raise UserError(f"{source} lacks block {gap} of {max(present) + 1}.")
    return len(present)


def _attention(shapes: Shapes, depth: int) -> dict[str, Any]:
    """The attention and the blocks that have it, by the parameters found beside qkv."""
    special = [i for i in range(depth) if any(f"blocks.{i}.attn.{part}.weight" in shapes for part in ("mix", "norm"))]
    if not special:
        return {"attention": attention_config("self"), "reattention_blocks": None}
    at = f"blocks.{special[0]}.attn"
    mix, norm = f"{at}.mix.weight" in shapes, f"{at}.norm.weight" in shapes
    batch_norm = f"{at}.norm.running_mean" in shapes
    name = {(True, True, True): "reattention", (True, True, False): "reattention_ln", (True, False, False):
            "reattention_fc"}.get((mix, norm, batch_norm), "norm_only")
    return {"attention": attention_config(name), "reattention_blocks": None if len(special) == depth else special}


def _heads(shapes: Shapes) -> dict[str, Any]:
    """H by the mix or norm over heads; nothing where all blocks have plain attention."""
    sizes = (shape for name, shape in shapes.items() if re.fullmatch(r"blocks\.\d+\.attn\.(mix|norm)\.weight", name))
    heads = next((shape[0] for shape in sizes), None)
    return {} if heads is None else {"num_heads": heads, **head_width(shapes, heads)}


def head_width(shapes: Shapes, heads: int) -> dict[str, Any]:
    """`head_dim`, None where it is the usual D / H."""
    inner, width = shapes["blocks.0.attn.qkv.weight"][0] // 3, shapes["cls_token"][-1]
    if heads < 1 or inner % heads:
        raise UserError(f"The attention has {inner} channels, which do not divide into {heads} heads: "
                        f"give another num_heads, or get the file again.")
    return {"head_dim": None if inner == width and width % heads == 0 else inner // heads}


def _stem(shapes: Shapes) -> dict[str, Any]:
    kernel = shapes["patch_embed.proj.weight"]
    if len(kernel) != 4:
        raise ValueError(f"a patch embedding of {tuple(kernel)}")
    stem, first, factor = "patch", kernel, 1
    if "patch_embed.conv1.weight" in shapes:
        stem, first, factor = "conv", shapes["patch_embed.conv1.weight"], 2
    elif "patch_embed.root.conv.weight" in shapes:
        units = _units(shapes)
        first, factor = shapes["patch_embed.root.conv.weight"], 4 * 2 ** (len(units) - 1)
        stem = {"name": "hybrid", "layers": units, "width": first[0]}
    patch = [kernel[2] * factor, kernel[3] * factor]
    told = {"stem": stem, "in_chans": first[1], "patch_size": patch[0] if patch[0] == patch[1] else patch}
    if grid := native_grid(shapes, {}, patch):
        told["img_size"] = grid[0] * patch[0] if patch[0] == patch[1] else [grid[0] * patch[0], grid[1] * patch[1]]
    return told


def _units(shapes: Shapes) -> list[int]:
    """Bottleneck units of each stage of a hybrid's ResNet."""
    found = {(int(m[1]), int(m[2])) for name in shapes
             if (m := re.match(r"patch_embed\.body\.block(\d+)\.unit(\d+)\.", name))}
    stages = sorted({stage for stage, _ in found})
    units = [len([1 for stage, _ in found if stage == s]) for s in stages]
    if not stages or stages != list(range(1, len(stages) + 1)) or found != {
            (s, u) for s in stages for u in range(1, units[s - 1] + 1)}:
        raise ValueError("a ResNet stem with gaps between its blocks or units")
    return units

