"""deepvit: how deep can a Vision Transformer go, and what happens to its attention on the way down?

Light to import: the names below load torch when they are first used, and the models join timm's registry when timm is
imported (or now, if it is already)."""

import importlib

from deepvit import _timm_plugin

__version__ = "0.1.0"

_LAZY = {
    "create_model": "deepvit.models", "list_models": "deepvit.models", "ViT": "deepvit.models",
    "ReAttention": "deepvit.models", "load_model": "deepvit.importers", "load_weights": "deepvit.importers",
    "save_model": "deepvit.importers",
}
_SUBMODULES = {"analysis", "data", "engine", "importers", "models", "ops"}
__all__ = sorted({*_LAZY, *_SUBMODULES})


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"deepvit.{name}")
    raise AttributeError(f"module 'deepvit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_timm_plugin.register_when_timm_is_imported()
