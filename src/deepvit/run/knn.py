"""`deepvit eval knn=20`: how well the features of each block tell the classes apart, by the nearest training images."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit import data as inputs
from deepvit.config.settings import Data, EvalSettings
from deepvit.engine.folder import write_text_synced
from deepvit.engine.ranks import Ranks
from deepvit.engine.signals import StopRequest
from deepvit.errors import UserError
from deepvit.models import ViT
from deepvit.report.render import printed
from deepvit.run import build, eval_results
from deepvit.run.evaluate import PREPARATION, data_settings, load, name_of_images, out_folder, prepare_evaluation
from deepvit.run.launch import Stopped

TEMPERATURE = 0.07  # Wu et al., arXiv:1805.01978, as in DINO, arXiv:2104.14294
QUERIES = 1024  # images whose similarities to the training set are held at once
log = logging.getLogger(__name__)


def neighbours_of_all(config: Mapping[str, Any], ranks: Ranks, stop: StopRequest) -> None:
    """Top-1 by the `config["knn"]` nearest training images for every block of every checkpoint; prints a table of each
    and writes knn.json. The data may have other classes than the model. Raises what `evaluate_all` does, and UserError
    for more neighbours than there are training images."""
    asked, paths = prepare_evaluation(config, ranks)
    for path in paths:
        with ranks.sync_errors():
            model = load(path, asked)
            data = data_settings(model, asked)
            folder = out_folder(model, f"{name_of_images(model, data)}-knn", asked)
            if ranks.is_main:
                eval_results.check_place(folder)
        result = _neighbours(model, data, asked, ranks, stop)
        rows = [[str(i), f"{top1:.2f}"] for i, top1 in enumerate(result["top1_by_block"])]
        log.info("%s on %s\n%s", eval_results.label(path), data.source,
                 printed(["block", f"top-1 % by {asked.knn} neighbours"], rows, markdown=True))
        with ranks.sync_errors():
            if ranks.is_main:
                with eval_results.results_in(folder):
                    write_text_synced(folder / "knn.json", json.dumps(result, indent=1) + "\n")


def _neighbours(model: ViT, data: Data, asked: EvalSettings, ranks: Ranks, stop: StopRequest) -> dict[str, Any]:
    splits = build.shared_splits(data, ranks)
    k, precision = asked.knn, build.precision(asked.precision, ranks.device)
    if k > len(splits.train):
        raise UserError(f"knn={k} is more than the {len(splits.train)} training images: give fewer.")
    model, prepare = model.to(ranks.device), build.prepare(data, len(splits.class_ids))

    @torch.no_grad()
    def features_of(images: inputs.ImageSet) -> tuple[Tensor, Tensor]:
        """This rank's unit vectors `[L, n, D]`, on the CPU, and classes `[n]`, -1 for an image that cannot be used."""
        features, targets = [], []

        def take(batch: inputs.Batch) -> None:
            x, y = prepare(batch, 0, ranks.device, training=False)
            with precision.autocast(ranks.device):
                features.append(F.normalize(block_features(model, x).float(), dim=-1).cpu())
            targets.append(y.cpu().masked_fill(~batch.usable, -1))
            for bad in batch.bad:
                log.warning("%s cannot be used (%s): it counts as wrong, never as a neighbour.", bad.name, bad.reason)

        batches = build.eval_batches(data, images, ranks)()
        if not ranks.for_each(batches, take, lambda: ranks.any_asked_to_stop(bool(stop))):
            raise Stopped("Stopped on request.")
        return torch.cat(features, 1), torch.cat(targets)

    train, val = features_of(splits.train), features_of(splits.val)
    return {
        "checkpoint": str(model.load_report.path), "weights": model.load_report.weights, "data": data.source,
        "root": data.root, **{name: getattr(data, name) for name in PREPARATION}, "k": k,
        "temperature": TEMPERATURE, "train_images": len(splits.train), "n": len(splits.val),
        "top1_by_block": _by_block(train, val, k, len(splits.class_ids), ranks)}


def block_features(model: ViT, x: Tensor) -> Tensor:
    """Images `[B, C, height, width]` -> `[L, B, D]`: what the classifier would see if the model ended after a block."""
    taken = model.forward_intermediates(x, norm=True, output_fmt="NLC", return_prefix_tokens=True,
                                        intermediates_only=True)
    return torch.stack([model.forward_head(torch.cat([prefix, patches], 1), pre_logits=True)
                        for patches, prefix in taken])


def _by_block(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor], k: int, classes: int, ranks: Ranks
              ) -> list[float]:
    """Top-1 in percent of each block, over the images of all ranks; of class -1 none is right, or a neighbour."""
    usable = train[1] >= 0
    shares = ranks.gather((train[0][:, usable].numpy(), train[1][usable].numpy()))
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
