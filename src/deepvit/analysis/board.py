"""The similarity matrices of a probe as images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps

PIXELS = 8  # side of one pair of blocks


def matrix_images(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `analysis.probe(..., matrix=True)` gives, without its matrices; and these as images by name."""
    kept, images = {**values, "similarity": {}}, {}
    for kind, similarity in values["similarity"].items():
        matrix = np.array(similarity.get("matrix", []))
        if matrix.size:
            images[f"similarity/{kind}"] = _image(matrix)
        kept["similarity"][kind] = {name: value for name, value in similarity.items() if name != "matrix"}
    return kept, images


def _image(matrix: np.ndarray) -> np.ndarray:
    """[L, L] of -1..1 -> uint8 [L * PIXELS, L * PIXELS, 3], dark where blocks are unlike."""
    colours = colormaps["viridis"](np.clip(matrix, 0, 1))[..., :3]  # [L, L, 3]
    return (255 * np.kron(colours, np.ones((PIXELS, PIXELS, 1)))).astype(np.uint8)
