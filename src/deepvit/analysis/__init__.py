"""The attention laboratory: what happens to attention with depth, measured without touching the model.

Everything starts from `attention_maps` or, block by block, from `record(model, x).maps(stage)`. `probe` gives all
measures of a model on a batch as plain numbers. Formulas and sources: docs/analysis.md.
"""

from deepvit.analysis.recording import Recording, attention_maps, frozen, record, recordings
from deepvit.analysis.similarity import (
    adjacent_similarity,
    centred,
    column_similarity,
    cross_layer_similarity,
    head_similarity,
    similar_blocks,
    similarity_matrix,
)

__all__ = ["Recording", "adjacent_similarity", "attention_maps", "centred", "column_similarity",
           "cross_layer_similarity", "frozen", "head_similarity", "record", "recordings", "similar_blocks",
           "similarity_matrix"]
