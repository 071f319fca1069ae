"""Weights of every known implementation, read into our models. One file a dialect: `deepvit.load_model(path)`."""

from deepvit.importers.files import open_weights
from deepvit.importers.load import DIALECTS, Report, load_model, load_weights

__all__ = ["DIALECTS", "Report", "load_model", "load_weights", "open_weights"]
