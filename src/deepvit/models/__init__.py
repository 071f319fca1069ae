"""The Vision Transformer, its attention variants and its named configurations."""

from deepvit.models.attention import (ATTENTIONS, Attention, AttnScale, DecayedTemperature, HeadMix, LearnedTemperature,
                                      ReAttention, ReAttentionLN, SelfAttention, TalkingHeads)
from deepvit.models.blocks import Block
from deepvit.models.registry import (attention_config, build_model, create_model, list_attentions, list_models,
                                     model_config, register_with_timm)
from deepvit.models.vit import ViT

__all__ = ["ATTENTIONS", "Attention", "AttnScale", "Block", "DecayedTemperature", "HeadMix", "LearnedTemperature",
           "ReAttention", "ReAttentionLN", "SelfAttention", "TalkingHeads", "ViT", "attention_config", "build_model",
           "create_model", "list_attentions", "list_models", "model_config"]

register_with_timm()
