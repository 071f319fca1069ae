"""ImageNet's reassessed labels (Beyer et al., "Are we done with ImageNet?", arXiv:2006.07159), as timm ships them."""

import os
from collections.abc import Sequence
from functools import cache

import numpy as np

from deepvit.errors import UserError


@cache
def _labels() -> dict[str, list[int]]:
    from timm.data import RealLabelsImagenet
    return RealLabelsImagenet(filenames=range(50_000)).real_labels


def real_top1(predictions: np.ndarray, names: Sequence[str]) -> float:
    """ReaL top-1 in percent: right if among the image's labels; images without any label are left out.

    Args:
        predictions: class indices in the order of the sorted wnids, [n].
        names: the images' paths, [n], with ImageNet's own file names.
    Raises:
        UserError where a name is no ImageNet validation file, or none of the images has a label.
    """
    right = []
    for prediction, name in zip(predictions, names, strict=True):
        labels = _labels().get(os.path.basename(name))
        if labels is None:
            raise UserError(f"{name} has no ReaL label: these exist for ILSVRC2012_val_00000001.JPEG to 00050000.")
        if labels:
            right.append(int(prediction) in labels)
    if not right:
        raise UserError("None of these images has a ReaL label.")
    return 100.0 * float(np.mean(right))
