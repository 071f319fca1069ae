"""Weights of every known implementation, read into our models. One file a dialect: `deepvit.load_model(path)`."""

from deepvit.importers.files import open_weights, takes_average
from deepvit.importers.load import DIALECTS, Report, load_model, load_weights, open_model, told_settings
from deepvit.importers.save import save_model

__all__ = ["DIALECTS", "Report", "load_model", "load_weights", "open_model", "open_weights", "save_model",
           "takes_average", "told_settings"]
