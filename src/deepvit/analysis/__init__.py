"""The attention laboratory: what happens to attention with depth, measured without touching the model.

Everything starts from `attention_maps` or, block by block, from `record(model, x).maps(stage)`. `probe` gives all
measures of a model on a batch as plain numbers. Formulas and sources: docs/analysis.md."""

from deepvit.analysis.measures import (attention_distance, attention_entropy, class_token_mask, diagonal_share,
                                       effective_rank, feature_cosine, linear_cka, norm_variance, patch_grid, rollout,
                                       thetas, token_similarity)
from deepvit.analysis.probe import at_initialisation, block_norms, probe, regime, with_statistics_of
from deepvit.analysis.recording import Recording, attention_maps, record, recordings
from deepvit.analysis.similarity import (adjacent_similarity, centred, column_similarity, cross_layer_similarity,
                                         head_similarity, similar_blocks)

__all__ = ["Recording", "adjacent_similarity", "at_initialisation", "attention_distance", "attention_entropy",
           "attention_maps", "block_norms", "centred", "class_token_mask", "column_similarity",
           "cross_layer_similarity", "diagonal_share", "effective_rank", "feature_cosine", "head_similarity",
           "linear_cka", "norm_variance", "patch_grid", "probe", "record", "recordings", "regime", "rollout",
           "similar_blocks", "thetas", "token_similarity", "with_statistics_of"]
