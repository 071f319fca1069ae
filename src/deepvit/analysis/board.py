"""A probe's values on TensorBoard: a scalar per block and measure, the similarity matrices as pictures."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps

from deepvit.engine.board import Board

PIXELS = 8  # side of one pair of blocks in the matrix picture


def draw_probe(board: Board, values: dict[str, Any], step: int) -> dict[str, Any]:
    """Draws what `analysis.probe(..., matrix=True)` gives; returns it without the matrices, to be logged as JSON."""
    kept = values | {"similarity": {}}
    for kind, similarity in values["similarity"].items():
        matrix = np.array(similarity.get("matrix", []))
        if matrix.size:
            board.picture(f"similarity/{kind}", _picture(matrix), step)
        kept["similarity"][kind] = {name: value for name, value in similarity.items() if name != "matrix"}
    board.draw("attention", dict(_scalars(kept)), step)
    return kept


def _picture(matrix: np.ndarray) -> np.ndarray:
    """[L, L] of -1..1 -> uint8 [L * PIXELS, L * PIXELS, 3], dark where blocks are unlike."""
    colours = colormaps["viridis"](np.clip(matrix, 0, 1))[..., :3]  # [L, L, 3]
    return (255 * np.kron(colours, np.ones((PIXELS, PIXELS, 1)))).astype(np.uint8)


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by their path; lists block by block, `entropy/block_03`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/block_{i:02d}", one) for i, one in enumerate(value) if one is not None)
        elif value is not None:
            yield f"{prefix}{name}", value
