"""From settings to objects."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.utils import ModelEmaV3
from torch import nn

from deepvit import data as pictures
from deepvit.config import settings as asked
from deepvit.config.settings import Augment, Data, Optimizer, PrecisionSettings, Settings
from deepvit.engine.ranks import Ranks
from deepvit.engine.schedule import Plan, Schedule
from deepvit.engine.state import TrainState
from deepvit.engine.step import OBJECTIVES, Objective, Precision, Stepper, allocate_moments, is_out_of_memory
from deepvit.errors import UserError, did_you_mean
from deepvit.models import ViT, build_model
from deepvit.models.registry import check_model
from deepvit.models.stochastic_depth import BranchMasks
from deepvit.run.micro_batches import choose as choose_micro_batch
from deepvit.run.micro_batches import unit

FUSED = ("adam", "adamw", "momentum", "sgd")  # torch's own, which update all parameters in one kernel
log = logging.getLogger(__name__)


def read_settings(config: Mapping[str, Any]) -> Settings:
    """`config.settings.read_settings`, with the model's own settings checked as well."""
    settings = asked.read_settings(config)
    check_model(settings.model, "model")
    if settings.model.get("pool") == "":
        raise UserError("model.pool='' gives logits of every token, which no loss here takes: choose cls, mean or avg.")
    return settings


@dataclass(frozen=True)
class Built:
    """What a run is made of, on one rank."""

    settings: Settings
    ranks: Ranks
    splits: pictures.Splits
    schedule: Schedule
    plan: Plan
    model: ViT
    state: TrainState
    stepper: Stepper
    make_batches: Callable[[int, int], Iterator[list[pictures.Batch]]]
    micro_batch: int  # images that a device takes at once
    memory: str  # what they take of it, in words, where that was measured


def build(settings: Settings, ranks: Ranks, begun: Mapping[str, Any] | None = None) -> Built:
    """Everything that a run needs.

    Args:
        begun: content of the checkpoint that is continued, if any; `settings.init` is not read then.
    Raises:
        UserError: on every rank alike.
    """
    found = shared_splits(settings.data, ranks)
    with ranks.together():
        made_schedule, plan = schedule_and_plan(settings, len(found.train))
        network = model(settings, len(found.class_ids), continued=begun is not None, classes=found.class_ids)
        # A run begun before masks belonged to images draws them on each rank, as it began.
        masks = begun is None or begun.get("masks") == "image"
        made = state(settings, network, ranks)
        called = stepper(settings, network, made_schedule, len(found.class_ids), ranks, masks)
    ranks.broadcast([weight.detach() for weight in made.all_weights()])
    micro_batch, memory = choose_micro_batch(settings, network.config["in_chans"], made, called, begun)
    return Built(settings, ranks, found, made_schedule, plan, network, made, called,
                 batch_maker(settings, found.train, ranks, micro_batch), micro_batch, memory)


# Data

def shared_splits(data: Data, ranks: Ranks) -> pictures.Splits:
    """The images; where they may have to be downloaded, the first rank of each machine goes before the others."""
    is_first = data.source not in pictures.DOWNLOADING or int(os.environ.get("LOCAL_RANK", 0)) == 0
    for mine in (is_first, not is_first):
        with ranks.together():
            if mine:
                found = splits(data)
    return found


def splits(data: Data) -> pictures.Splits:
    """The data set that `data` names."""
    if data.source == "digits" and data.root is not None:
        raise UserError(f"data.root={data.root} is given, but the digits are built in: to train on your pictures add "
                        f"recipe=imagenet (train/ and val/ folders of classes), recipe=cifar10 or recipe=folder.")
    return pictures.load(data.source, root=data.root, fraction=data.fraction, classes=data.classes,
                         val_fraction=data.val_fraction, decoder=data.decoder, in_memory_mb=data.in_memory_mb,
                         name=data.name, train_split=data.train_split, val_split=data.val_split)


def train_transform(data: Data, augment: Augment) -> pictures.Transform:
    mixing = ("repeats", "mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")
    options = {name: value for name, value in vars(augment).items() if name not in mixing}
    mean, _ = pictures.norm_values(data.norm)
    return pictures.train_transform(data.img_size, crop_pct=data.crop_pct, mean=mean, **options)


def eval_transform(data: Data) -> pictures.Transform:
    return pictures.eval_transform(data.img_size, data.crop_pct, data.interpolation)


def prepare(data: Data, num_classes: int, augment: Augment | None = None, seed: int = 0) -> pictures.Prepare:
    """Normalisation, and in training the mixing that `augment` names."""
    mixing = {} if augment is None else {name: getattr(augment, name) for name in (
        "mixup", "cutmix", "mix_prob", "switch_prob", "label_smoothing")}
    return pictures.Prepare(*pictures.norm_values(data.norm), num_classes, seed=seed, **mixing)


def batch_maker(settings: Settings, train: pictures.ImageSet, ranks: Ranks, micro_batch: int
                ) -> Callable[[int, int], Iterator[list[pictures.Batch]]]:
    """`(start, count) -> iterator` over the micro-batches of `count` global batches from number `start`."""
    transform = train_transform(settings.data, settings.augment)
    parts = settings.data.batch_size // ranks.world // micro_batch

    def batches(start: int, count: int) -> Iterator[list[pictures.Batch]]:
        steps = pictures.train_batches(
            train, transform, seed=settings.seed, batch_size=settings.data.batch_size, steps=start + count,
            start_step=start, rank=ranks.rank, world=ranks.world, accumulation=parts, workers=settings.data.workers,
            repeats=settings.augment.repeats, max_bad=settings.data.max_bad, pin=ranks.device.type == "cuda")
        return pictures.ahead(steps, ranks.device)

    return batches


def eval_batches(data: Data, images: pictures.ImageSet, ranks: Ranks) -> Callable[[], Iterator[pictures.Batch]]:
    """Called for each evaluation: this rank's batches."""
    return pictures.eval_batches_again(
        images, eval_transform(data), batch_size=data.eval_batch_size, rank=ranks.rank, world=ranks.world,
        workers=data.workers, on_error=data.on_error, pin=ranks.device.type == "cuda", in_memory_mb=data.in_memory_mb,
        device=ranks.device)


# Model and optimizer

def model(settings: Settings, num_classes: int, continued: bool = False, classes: Sequence[str] | None = None) -> ViT:
    """The model of `settings.model` for `num_classes`, initialised from `settings.seed` and `settings.init` alone; of
    a run that is `continued` the latter is not read again. Averaged weights are taken where the file has them.

    classes: their names in order, with which a kept head must agree.
    """
    asked = settings.model.get("num_classes")
    if asked is not None and asked != num_classes:
        raise UserError(f"model.num_classes={asked}, but the data has {num_classes} classes: leave it null.")
    torch.manual_seed(settings.seed)
    built = build_model({**settings.model, "num_classes": num_classes})
    built.set_grad_checkpointing(settings.engine.grad_checkpointing)
    if settings.init is not None and not continued:
        from deepvit.importers import load_weights, takes_average
        load_weights(built, settings.init, dialect=settings.dialect, ema=takes_average(settings.init),
                     head=settings.head, classes=classes)
    return built


def optimizer(network: nn.Module, chosen: Optimizer) -> torch.optim.Optimizer:
    """By timm's factory: no decay on biases, norms and the embeddings that the model names.

    A layer-wise decay gives each group its `lr_scale`.
    """
    if chosen.opt not in list_optimizers():
        raise UserError(f"optimizer.opt={chosen.opt} is not one of timm's."
                        f"{did_you_mean(chosen.opt, list_optimizers())}")
    given = {name: getattr(chosen, name) for name in ("betas", "eps") if getattr(chosen, name) is not None}
    given |= {"fused": True} if chosen.opt in FUSED else {}
    try:
        return create_optimizer_v2(network, chosen.opt, lr=chosen.lr, weight_decay=chosen.weight_decay,
                                   momentum=chosen.momentum, layer_decay=chosen.layer_decay, **given)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer.opt={chosen.opt} does not take these settings: {error}.") from error


def state(settings: Settings, network: ViT, ranks: Ranks) -> TrainState:
    network.to(ranks.device)
    ema = settings.ema
    # Buffers are copied: a head norm's variance starts at 1 and is truly near 1e-6, so its average would stay wrong.
    average = ModelEmaV3(network, ema.decay, use_warmup=ema.warmup, exclude_buffers=True) if ema.decay else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=settings.precision.scale_gradients)
    chosen = optimizer(network, settings.optimizer)
    try:
        allocate_moments(chosen)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"The weights of this model and the moments of optimizer.opt={settings.optimizer.opt} do not "
                        f"fit into the memory of this device: take a smaller model or another optimizer.") from error
    return TrainState(network, chosen, scaler, average)


def stepper(settings: Settings, network: ViT, schedule: Schedule, num_classes: int, ranks: Ranks,
            masks: bool = True) -> Stepper:
    called = torch.compile(network) if settings.engine.compile else network
    return Stepper(called, prepare(settings.data, num_classes, settings.augment, settings.seed), schedule,
                   precision(settings.precision), ranks, settings.seed, objective(settings),
                   settings.optimizer.clip_grad, BranchMasks(network, settings.seed, ranks.device) if masks else None,
                   unit(settings))


def precision(chosen: PrecisionSettings) -> Precision:
    dtype = getattr(torch, chosen.dtype)
    return Precision(None if dtype is torch.float32 else dtype, chosen.scale_gradients, chosen.tf32)


def objective(settings: Settings) -> Objective:
    """The loss over hard or soft targets, with the published regularisation of adjacent maps if asked for."""
    blocks, weight = settings.loss.cosine_blocks, settings.loss.cosine_weight
    if blocks < 0 or blocks >= settings.model["depth"]:
        raise UserError(f"loss.cosine_blocks={blocks} compares pairs of adjacent blocks: give 0 (off) to "
                        f"{settings.model['depth'] - 1} for a model of {settings.model['depth']} blocks.")

    plain = OBJECTIVES[settings.loss.kind]
    if not blocks:
        return plain
    from deepvit.models.cosine_reg import cosine_regularisation, record_maps

    def regularised(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with record_maps(network, first=blocks + 1) as maps:
            loss = plain(network, x, y)
        return loss + weight * cosine_regularisation(maps, blocks)

    return regularised


# Durations: epochs become steps here and nowhere else

def schedule_and_plan(settings: Settings, epoch_size: int) -> tuple[Schedule, Plan]:
    chosen, batch = settings.schedule, settings.data.batch_size
    per_epoch = pictures.epoch_steps(epoch_size, batch, settings.augment.repeats)
    counted = epoch_size // settings.augment.repeats * settings.augment.repeats

    def steps(epochs: float | None, given: int | None) -> int:
        return given if epochs is None else math.ceil(epochs * per_epoch)

    schedule = Schedule(
        lr=settings.optimizer.lr, steps=steps(chosen.epochs, chosen.steps), kind=chosen.kind,
        warmup_steps=steps(chosen.warmup_epochs, chosen.warmup_steps),
        cooldown_steps=math.ceil(chosen.cooldown_epochs * per_epoch) if chosen.steps is None else 0,
        warmup_lr=chosen.warmup_lr,
        min_lr=chosen.min_lr, decay_from=chosen.decay_from)
    if schedule.warmup_steps > schedule.steps:
        raise UserError(f"The warm-up ({schedule.warmup_steps} steps) is longer than the run ({schedule.steps}): lower "
                        f"schedule.warmup_epochs or schedule.warmup_steps.")
    engine, epoch = settings.engine, math.ceil(per_epoch)
    plan = Plan(total=schedule.total, batch_size=batch, epoch_size=counted, log_every=engine.log_every,
                save_every=engine.save_every or epoch,
                eval_every=max(1, steps(chosen.eval_epochs, chosen.eval_steps)),
                keep_every=engine.keep_epochs and engine.keep_epochs * epoch,
                probe_every=settings.probe.every_epochs and settings.probe.every_epochs * epoch,
                max_skipped=engine.max_skipped)
    return schedule, plan


def changed(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The settings that differ: dotted key -> (before, now)."""
    differences: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences |= changed(old, new, f"{prefix}{name}.")
        elif old != new:
            differences[prefix + name] = (old, new)
    return differences
