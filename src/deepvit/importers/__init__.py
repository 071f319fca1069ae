"""Weights of every known implementation, read into our models: `deepvit.load_model(path)`."""

from deepvit.importers.dialect import Report
from deepvit.importers.files import open_weights
from deepvit.importers.load import DIALECTS, load_model, load_weights, open_model, told_settings
from deepvit.importers.locate import find_checkpoint
from deepvit.importers.ours import save_model

__all__ = ["DIALECTS", "Report", "find_checkpoint", "load_model", "load_weights", "open_model", "open_weights",
           "save_model", "told_settings"]
