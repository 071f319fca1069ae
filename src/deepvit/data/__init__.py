"""Images: data sets, augmentation, and batches that are the same whatever loads them."""

from deepvit.data.decode import open_image, resolve_decoder
from deepvit.data.imageset import ImageSet, Splits
from deepvit.data.loader import Bad, Batch, cached_eval_batches, eval_batches, prefetch, train_batches
from deepvit.data.on_device import OnDevice
from deepvit.data.prepare import Prepare
from deepvit.data.sources import SOURCES, eval_folder, load, real_top1, source_of
from deepvit.data.stream import epoch_steps
from deepvit.data.transforms import Transform, eval_transform, name_of_norm, norm_values, train_transform

__all__ = ["SOURCES", "Bad", "Batch", "ImageSet", "OnDevice", "Prepare", "Splits", "Transform", "cached_eval_batches",
           "epoch_steps", "eval_batches", "eval_folder", "eval_transform", "load", "name_of_norm", "norm_values",
           "open_image", "prefetch", "real_top1", "resolve_decoder", "source_of", "train_batches", "train_transform"]
