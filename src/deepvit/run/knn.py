"""`deepvit eval knn=20`: how well the features of each block tell the classes apart, by the nearest training images."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit import data as images
from deepvit.config.settings import Data, read_evaluation
from deepvit.engine.device import prepare_device
from deepvit.engine.folder import write_text_synced
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.engine.step import Precision, Prepare
from deepvit.errors import UserError
from deepvit.models import ViT
from deepvit.report.render import printed
from deepvit.run import build, eval_results
from deepvit.run.evaluate import Candidate, checkpoints, data_settings, load, out_folder

TEMPERATURE = 0.07  # Wu et al., arXiv:1805.01978, as in DINO, arXiv:2104.14294
QUERIES = 1024  # images whose similarities to the training set are held at once
log = logging.getLogger(__name__)


def neighbours_of_all(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> list[dict[str, Any]] | None:
    """Top-1 by the `config["knn"]` nearest training images for every block of every checkpoint; prints a table of each
    and writes knn.json. The data may have other classes than the model.

    Returns:
        the results; None if it was asked to stop.
    Raises:
        UserError: as `evaluate_all`; no number of neighbours, or more than there are training images.
    """
    with ranks.sync_errors():
        asked = read_evaluation(config)
        paths, precision = checkpoints(asked.checkpoint), build.precision(asked.precision, ranks.device)
    prepare_device(precision, ranks, asked.engine.threads, asked.engine.deterministic)
    k, results = asked.knn, []
    for path in paths:
        with ranks.sync_errors():
            candidate = load(path, config)
            chosen = data_settings(candidate, config)
            folder = out_folder(candidate, f"{chosen.source}-knn", config["out"])
        found = _of_one(candidate, chosen, k, ranks, precision, stop)
        if found is None:
            return None
        results.append(found)
        with ranks.sync_errors():
            if ranks.is_main:
                _tell(found, folder)
    return results


def _of_one(candidate: Candidate, chosen: Data, k: int, ranks: Ranks, precision: Precision, stop: StopRequest
            ) -> dict[str, Any] | None:
    splits = build.shared_splits(chosen, ranks)
    if k > len(splits.train):
        raise UserError(f"knn={k} is more than the {len(splits.train)} training images: give fewer.")
    model, prepare = candidate.model.to(ranks.device), build.prepare(chosen, len(splits.class_ids))
    train, val = (_features(model, build.eval_batches(chosen, part, ranks)(), prepare, ranks, precision, stop)
                  for part in (splits.train, splits.val))
    return None if train is None or val is None else {
        "checkpoint": str(candidate.path), "weights": candidate.weights, "data": chosen.source, "k": k,
        "temperature": TEMPERATURE, "train_images": len(splits.train), "n": len(splits.val),
        "top1_by_block": _by_block(train, val, k, len(splits.class_ids), ranks)}


def _tell(found: Mapping[str, Any], folder: Path) -> None:
    rows = [[str(i), f"{top1:.2f}"] for i, top1 in enumerate(found["top1_by_block"])]
    log.info("%s on %s\n%s", eval_results.label(found["checkpoint"]), found["data"],
             printed(["block", f"top-1 % by {found['k']} neighbours"], rows, markdown=True))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_synced(folder / "knn.json", json.dumps(found, indent=1) + "\n")
    except OSError as error:
        raise eval_results.unwritable(folder, error) from error


@torch.no_grad()
def _features(model: ViT, batches: Iterable[images.Batch], prepare: Prepare, ranks: Ranks, precision: Precision,
              stop: StopRequest) -> tuple[Tensor, Tensor] | None:
    """Of this rank's images: `[L, n, D]` unit vectors, on the CPU, and classes `[n]`; None: one was asked to stop."""
    features, targets = [], []

    def take(batch: images.Batch) -> None:
        x, y = prepare(batch, 0, ranks.device, training=False)
        with precision.autocast(ranks.device):
            features.append(F.normalize(block_features(model, x).float(), dim=-1).cpu())
        targets.append(y.cpu())

    complete = ranks.for_each(batches, take, lambda: ranks.any_asked_to_stop(bool(stop)))
    return (torch.cat(features, 1), torch.cat(targets)) if complete else None


def block_features(model: ViT, x: Tensor) -> Tensor:
    """Images `[B, C, height, width]` -> `[L, B, D]`: what the classifier would see if the model ended after a block."""
    taken = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True,
                                        intermediates_only=True)
    return torch.stack([model.forward_head(torch.cat([prefix, patches], 1), pre_logits=True)
                        for patches, prefix in taken])


def _by_block(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], k: int, classes: int, ranks: Ranks
              ) -> list[float]:
    """Top-1 in percent of each block, over the images of all ranks."""
    shares = ranks.gather((train[0].numpy(), train[1].numpy()))
    bank, labels = (torch.from_numpy(np.concatenate([share[i] for share in shares], 1 - i)) for i in (0, 1))
    right = [vote(queries.to(ranks.device), known.to(ranks.device), labels.to(ranks.device), k, classes).cpu() == val[1]
             for queries, known in zip(val[0], bank, strict=True)]
    counts = np.sum(ranks.gather([*(int(one.sum()) for one in right), len(val[1])]), axis=0)
    return (100 * counts[:-1] / counts[-1]).tolist()


def vote(queries: Tensor, bank: Tensor, labels: Tensor, k: int, classes: int) -> Tensor:
    """The class of each query `[m, D]` by its `k` nearest of `bank` `[n, D]`, unit vectors of classes `labels`; each
    has a vote of exp(cosine / TEMPERATURE)."""
    guesses = []
    for some in queries.split(QUERIES):
        near, places = (some @ bank.T).topk(k)  # [q, k]
        votes = torch.zeros(len(some), classes, device=some.device)
        guesses.append(votes.scatter_add_(1, labels[places], (near / TEMPERATURE).exp()).argmax(1))
    return torch.cat(guesses)
