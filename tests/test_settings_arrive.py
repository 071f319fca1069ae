"""Every setting arrives: each entry changes one setting of the real config and names what must change with it.

The table is complete by construction: a setting without an entry fails. Those of the model and of the attentions stand
in `test_settings_of_models`.
"""

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache, reduce
from typing import Any, NamedTuple, get_type_hints
from unittest import mock

import pytest
import setting_outcomes as see
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from setting_data import make_data
from setting_outcomes import DATA, Run

from deepvit.config.compose import compose
from deepvit.config.settings import Settings
from deepvit.errors import UserError

BASE = ["model=vit", "recipe=folder", "augment=none", "data.root=PHOTOS", "data.workers=0", "data.batch_size=6",
        "data.crop_pct=1", "model.depth=2", "model.embed_dim=16", "model.num_heads=2", "model.img_size=16",
        "model.patch_size=8", "model.drop_path_rate=0", "schedule.epochs=4", "schedule.warmup_epochs=1",
        "schedule.decay_from=warmup", "optimizer.lr=1e-2", "engine.accelerator=cpu", "probe.images=0"]
EPOCH = 3  # steps: 18 images in batches of 6


class Case(NamedTuple):
    """What `look` sees changes with `change`, beside what is `given`; to `wanted` (or what holds that), where told."""

    look: Callable[[Run], Any]
    change: str
    given: tuple[str, ...] = ()
    wanted: Any = None
    followed: bool = False  # by other settings, through conf's interpolations


ERASING, MIXING, CROPPED = ("augment.random_erasing=1",), ("augment.mixup=1", "augment.cutmix=1"), (
    "augment.crop_scale=[0.5,1]",)
STEPS = (
    "schedule.epochs=null", "schedule.steps=10", "schedule.warmup_epochs=null", "schedule.warmup_steps=2",
    "schedule.eval_epochs=null", "schedule.eval_steps=4")
SHORT = ("schedule.epochs=2", "schedule.warmup_epochs=0", "logger=null")
THERE, FLIPPED, JITTERED = ("data.on_device=true",), ("augment.hflip=0.5",), ("augment.color_jitter=0.4",)
NORM = ("model/attention=norm_only", "model.attention.norm_batch=6")
INIT, SGD, NAN = ("init=WEIGHTS", *NORM), ("optimizer=sgd",), (*SHORT, "optimizer.lr=1e30")
DIGITS, BAD = ("recipe=digits", "data.root=null"), ("data.root=BAD",)
TARS = ("data=timm", "data.root=TARS", "data.workers=0", "data.batch_size=6")
CASES: dict[str, Case | list[Case]] = {
    "data.source": Case(see.classes, "digits", ("data.root=null",), [str(digit) for digit in range(10)]),
    "data.root": Case(see.classes, "OTHER", wanted=["one", "two"]),
    "data.img_size": Case(see.shapes, "32", ("model.img_size=32", "data.img_size=16"),  # which is refused
                          [(6, 3, 32, 32), (6, 3, 32, 32)]),
    "data.batch_size": [Case(see.plan("batch_size"), "9", wanted=9), Case(see.shapes, "9")],
    "data.eval_batch_size": Case(see.shapes, "4", wanted=[(6, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]),
    "data.workers": [Case(see.workers, "2", wanted=2),
                     Case(see.evaluating_workers, "1", ("data.in_memory_mb=0",), 1),
                     Case(see.calibration_workers, "2", (*NORM, "calibrate=12"), 2)],
    "data.norm": [Case(see.inputs, "imagenet"), Case(see.evaluated, "imagenet"),
                  Case(see.probed, "imagenet", ("probe.images=2",)),
                  Case(see.filling, "imagenet", ("augment.auto_augment=rand-m9",), (124, 116, 104))],
    "data.crop_pct": [Case(see.images, "0.5"), Case(see.evaluated, "0.5")],
    "data.interpolation": Case(see.evaluated, "bilinear"),
    "data.hflip": Case(see.images, "1", ("augment=light", "augment.crop_scale=null"), followed=True),
    "data.fraction": Case(see.sizes, "0.34", ("data.fraction=0.5",), (6, 6)),
    "data.classes": [Case(see.classes, "2", wanted=["a", "b"]), Case(see.classes, "2", DIGITS, ["0", "1"])],
    "data.val_fraction": [Case(see.sizes, "0.5", ("data.root=FLAT", "data.val_fraction=0.2"), wanted=(4, 4)),
                          Case(see.sizes, "0.6", (*TARS, "data.root=TAR", "data.val_fraction=0.3"), wanted=(2, 4))],
    "data.decoder": [Case(see.kinds_of_images, "pil", given, ("Image",) * 3) for given in ((), DIGITS, TARS)],
    "data.max_bad": [Case(see.trained, "0", BAD), Case(see.trained, "0", (*BAD, *THERE)),
                     Case(see.evaluated, "0", (*BAD, *NORM, "calibrate=12", "data.on_error=report"))],
    "data.on_error": Case(see.evaluated, "report", BAD),
    "data.in_memory_mb": [Case(see.in_memory, "0", wanted=False), Case(see.images, "0", THERE),  # refused
                          Case(see.kept_batches, "0", DIGITS, wanted=False)],
    "data.on_device": [Case(lambda run: type(next(run.built.make_batches(0, 1))[0].erasures).__name__, "true",
                            wanted="Rectangles"),
                       Case(see.images, "true", FLIPPED), Case(see.images, "true", JITTERED)],
    "data.exclude": Case(see.sizes, "UNUSED", wanted=(17, 5)),
    "data.name": Case(see.classes, "wds", TARS),
    "data.train_split": Case(see.sizes, "more", TARS, wanted=(8, 4)),
    "data.val_split": Case(see.sizes, "more", TARS, wanted=(6, 8)),
    "augment.crop_scale": [Case(see.images, "[0.2,0.5]", CROPPED), Case(see.images, "[0.2,0.5]", (*CROPPED, *THERE))],
    "augment.crop_ratio": [Case(see.images, "[0.3,0.4]", CROPPED), Case(see.images, "[0.3,0.4]", (*CROPPED, *THERE))],
    "augment.interpolation": [Case(see.images, "bilinear", given) for given in ((), CROPPED, (*CROPPED, *THERE))] + [
        Case(see.images, "random", (*CROPPED, "augment.interpolation=bilinear", *there)) for there in ((), THERE)],
    "augment.hflip": [Case(see.images, "1", FLIPPED), Case(see.images, "1", (*FLIPPED, *THERE))],
    "augment.vflip": [Case(see.images, "1", ("augment.vflip=0.5", *there)) for there in ((), THERE)],
    "augment.color_jitter": Case(see.images, "0.8", JITTERED),
    "augment.auto_augment": Case(see.images, "rand-m3", ("augment.auto_augment=rand-m9",)),
    "augment.grayscale_prob": Case(see.images, "1", ("augment.grayscale_prob=0.5",)),
    "augment.gaussian_blur_prob": Case(see.images, "1", ("augment.gaussian_blur_prob=0.5",)),
    "augment.random_erasing": [Case(see.inputs, "1", ("augment.random_erasing=0.3", *there)) for there in ((), THERE)],
    "augment.erasing_mode": [Case(see.inputs, mode, (*ERASING, *there)) for mode in ("const", "rand")
                             for there in ((), THERE)],
    "augment.erasing_count": [Case(see.inputs, "9", (*ERASING, "augment.erasing_mode=const", *there))
                              for there in ((), THERE)],
    "augment.repeats": [Case(see.indices, "2"), Case(see.indices, "2", THERE),
                        Case(see.plan("epoch_size"), "5", ("data.batch_size=5",), 15),
                        Case(see.rates, "5", ("data.batch_size=5",))],
    "augment.mixup": [Case(see.inputs, "1", ("augment.mixup=0.2",)), Case(see.trained, "1", ("augment.mixup=0.2",)),
                      Case(see.smallest_micro_batch, "1", wanted=2),
                      Case(see.smallest_micro_batch, "1", (NORM[0], "model.attention.norm_batch=3"), 6)],
    "augment.cutmix": [Case(see.inputs, "1", ("augment.cutmix=0.2",)), Case(see.smallest_micro_batch, "1", wanted=2)],
    "augment.mix_prob": [Case(see.inputs, value, MIXING) for value in ("0", "0.3")],
    "augment.switch_prob": Case(see.inputs, "1", MIXING),
    "augment.label_smoothing": [Case(see.inputs, "0.3", ("augment.label_smoothing=0.1", *mixing))
                                for mixing in ((), MIXING)],
    "optimizer.opt": Case(lambda run: type(run.built.state.optimizer).__name__, "lion", wanted="Lion"),
    "optimizer.lr": [Case(see.rates, "0.5"),
                     Case(lambda run: run.built.state.optimizer.defaults["lr"], "0.5", wanted=0.5)],
    "optimizer.weight_decay": Case(see.trained, "0.5"),
    "optimizer.momentum": [Case(see.option("momentum"), "0.5", SGD, 0.5), Case(see.option("momentum"), "0", SGD, 0)],
    "optimizer.betas": Case(see.option("betas"), "[0.5,0.6]", wanted=(0.5, 0.6)),
    "optimizer.eps": Case(see.option("eps"), "0.1", wanted=0.1),
    "optimizer.kwargs": [Case(see.trained, "{maximize: true}"),
                         Case(see.option("fused"), "{fused: false}", wanted=False)],
    "optimizer.layer_decay": Case(see.trained, "0.5", ("optimizer.layer_decay=0.8",)),
    "optimizer.clip_grad": Case(see.trained, "0.01", (*SGD, "optimizer.clip_grad=0.1")),
    "schedule.kind": [Case(see.rates, "linear"), Case(see.trained, "linear", ("schedule.warmup_epochs=0",))],
    "schedule.epochs": Case(see.plan("total"), "5", wanted=5 * EPOCH),
    "schedule.steps": Case(see.plan("total"), "11", STEPS, 11),
    "schedule.warmup_epochs": Case(see.rates, "2"),
    "schedule.warmup_steps": Case(see.rates, "3", STEPS),
    "schedule.cooldown_epochs": Case(see.plan("total"), "2", wanted=6 * EPOCH),
    "schedule.warmup_lr": Case(lambda run: see.rates(run)[0], "0.004", wanted=pytest.approx(0.006)),  # a third to 0.01
    "schedule.min_lr": Case(lambda run: see.rates(run)[-1], "0.004", wanted=pytest.approx(0.004)),
    "schedule.decay_from": Case(see.rates, "start"),
    "schedule.eval_epochs": Case(see.plan("eval_every"), "2", wanted=2 * EPOCH),
    "schedule.eval_steps": [Case(see.plan("eval_every"), "3", STEPS, 3),
                            Case(see.whole, "5", STEPS, {"evaluated": [5, 10]})],
    "precision.dtype": [Case(see.trained, "bfloat16"), Case(see.evaluated, "bfloat16"),
                        Case(see.calibrated, "bfloat16", (*NORM, "calibrate=12"))],
    "precision.tf32": [Case(see.tf32, "true", given, (True, True)) for given in (SHORT, (*SHORT, "dry=true"))],
    "precision.scale_gradients": Case(see.gradient_scale, "true", wanted=2**16),
    "engine.devices": Case(see.launched, "2", wanted=(2, 3)),
    "engine.accelerator": [Case(see.joined, "auto", wanted=("auto", 1800)),
                           Case(see.launched_beside_gpus, "auto", wanted=(2, 3))],
    "engine.device_batch": [Case(see.shapes, "2"), Case(see.shapes, "2", THERE),
                            Case(see.sizes_tried, "auto", ("engine.device_batch=2",), [6, 3, 2, 1]),
                            Case(see.smallest_micro_batch, "2", (NORM[0], "model.attention.norm_batch=null"), 2)],
    "engine.threads": [Case(see.threads, "3", given, 3) for given in (SHORT, (*SHORT, "dry=true"))],
    "engine.log_every": Case(see.whole, "4", SHORT, {"logged": [4, 6]}),
    "engine.save_every": Case(see.whole, "5", SHORT, {"saved": [6, 5]}),
    "engine.keep_epochs": [Case(see.plan("keep_every"), "2", wanted=2 * EPOCH),
                           Case(see.whole, "1", SHORT, {"kept": ["step-3.pt", "step-6.pt"]})],
    "engine.grad_checkpointing": [Case(see.blocks_passed, "true", wanted=2),
                                  Case(see.is_checkpointing_advised, "true", wanted=False)],
    "engine.deterministic": [Case(see.deterministic, "true", given, (True, ":4096:8"))
                             for given in (SHORT, (*SHORT, "dry=true"))],
    "engine.compile": [Case(see.compiled_in_mode, "true", wanted="default"),
                       Case(see.compiled_in_mode, "reduce-overhead", wanted="reduce-overhead")],
    "engine.timeout_s": Case(see.joined, "60", wanted=("cpu", 60)),
    "engine.max_restarts": Case(see.launched, "1", ("engine.devices=2",), (2, 1)),
    "engine.keep": [Case(see.whole, "best", SHORT, {"checkpoints": ["best.pt"]}),
                    Case(see.left_of_a_finished_run, "best", SHORT, ["best.pt"])],
    "engine.profile": Case(see.whole, "2", SHORT, {"profiled": ["steps-5-6.txt"]}),
    "engine.max_skipped": Case(see.skipped, "2", NAN, 2),
    "ema.decay": [Case(see.trained, "0.5"), Case(see.trained, "0.5", ("ema.decay=0.9",)),
                  *(Case(see.part_of_whole(name), "0.5", (*SHORT, "probe.images=2")) for name in ("losses", "probe"))],
    "ema.warmup": Case(see.trained, "true", ("ema.decay=0.999",)),
    "loss.kind": [Case(see.trained, "bce"), Case(see.trained, "bce", ("loss.cosine_blocks=1",)),
                  Case(see.trained, "multi_label", ("loss.kind=bce", "augment.mixup=1"))],
    "loss.cosine_blocks": Case(see.trained, "2", ("model.depth=3", "loss.cosine_blocks=1")),
    "loss.cosine_weight": Case(see.trained, "9", ("loss.cosine_blocks=1",)),
    "probe.images": Case(see.whole, "5", (*SHORT, "probe.images=2")),
    "probe.every_epochs": Case(see.whole, "1", (*SHORT, "probe.images=2"), {"probed": [0, 3, 6]}),
    "seed": [Case(see.initial, "1"), Case(see.indices, "1"), Case(see.indices, "1", THERE),
             Case(see.image_by_image, "1", FLIPPED), Case(see.image_by_image, "1", (*FLIPPED, *THERE)),
             Case(see.mixing, "1", MIXING), Case(see.branch_masks, "1", ("model.drop_path_rate=0.5",)),
             Case(see.noise, "1", (*ERASING, *THERE)), Case(see.drawn_in_an_update, "1")],  # as by dropout
    "init": [Case(see.initial, "WEIGHTS", NORM), Case(see.part_of_whole("losses"), "WEIGHTS", (*NORM, *SHORT)),
             Case(see.first_probe_is_as_later_ones, "WEIGHTS", (*NORM, "probe.images=2"), True)],
    "dialect": Case(see.initial, "google", INIT),
    "freeze": [Case(see.trained_parameters, "backbone", INIT, 2),
               Case(see.trained_parameters, "1", (*INIT, "freeze=0"))],
    "head": [Case(lambda run: run.built.model.head.weight.abs().sum().item(), "zero", INIT, 0),
             Case(see.initial, "reset", (*INIT, "head=zero"))],
    "calibrate": [Case(see.evaluated, "12", NORM), Case(see.calibrated_images, "12", (*NORM, "calibrate=6"), 12),
                  Case(see.calibrated_images, "auto", (*NORM, "calibrate=6"), 0),
                  Case(see.calibrated_images, "auto", (*NORM, "calibrate=6", "ema.decay=0.9"), 18)],
    "logger": Case(see.whole, "tensorboard", SHORT),
    "fresh": [Case(see.made_again, "true", SHORT, True),
              Case(see.dtype_after_bfloat16, "true", (*SHORT, "precision.dtype=auto"), "float32")],
    "origin": Case(see.recorded_origin, "{recipe: ours}", SHORT, ({"recipe": "ours"},) * 2),
    "dry": Case(see.whole, "true", SHORT, {"files": []}),
}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory):
    DATA.update(make_data(tmp_path_factory.mktemp("data")), TMP=tmp_path_factory.mktemp("runs"))
    DATA["WEIGHTS"] = see.finished(Run(composed(*NORM, "schedule.epochs=1", "logger=null"))) / "checkpoints" / "best.pt"


def placed(word: str) -> str:
    """Names in capitals become the paths of what they name."""
    key, _, value = word.partition("=")
    return f"{key}={DATA.get(value, value)}"


@cache
def composed(*overrides: str) -> dict[str, Any]:
    return compose([placed(word) for word in (*BASE, *overrides)])


def config_of(given: tuple[str, ...], change: str | None, followed: bool) -> dict[str, Any]:
    """As composed; a change that no other setting follows is made afterwards, as composing takes 0.1 s."""
    if change is None or followed:
        return composed(*given, *([change] if change else []))
    config = copy.deepcopy(composed(*given))
    override = OverridesParser.create().parse_override(placed(change))
    *groups, key = override.key_or_group.split(".")
    reduce(dict.__getitem__, groups, config)[key] = override.value()
    return config


@cache
def outcome(look: Callable[[Run], Any], given: tuple[str, ...], change: str | None = None, followed: bool = False
            ) -> Any:
    """What is seen of a run; of one that is refused, the sentence."""
    threads = torch.get_num_threads()
    try:
        return look(Run(config_of(given, change, followed)))
    except UserError as error:
        return str(error)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


EACH = [pytest.param(name, case, id=f"{name}-{number}") for name, cases in CASES.items()
        for number, case in enumerate(cases if isinstance(cases, list) else [cases])]


@pytest.mark.parametrize(("name", "case"), EACH)
def test_it_arrives(name, case):
    before = outcome(case.look, case.given)
    after = outcome(case.look, case.given, f"{name}={case.change}", case.followed)
    assert after != before
    wanted = after if case.wanted is None else case.wanted
    assert after == wanted if not isinstance(wanted, dict) else wanted.items() <= after.items()


@pytest.mark.parametrize(("change", "begun"), [(True, None), (False, {"masks": "image"})], ids=["compiled", "resumed"])
def test_all_of_it_arrives_in_a_run_that_is(change, begun):
    plain = composed(*SGD, "optimizer.clip_grad=0.1", "optimizer.layer_decay=0.8", "optimizer.weight_decay=0.3",
                     "schedule.warmup_epochs=0", "schedule.kind=linear", "model.drop_path_rate=0.5", "ema.decay=0.5",
                     "model.drop_rate=0.2", "augment.mixup=0.2", "augment.hflip=0.5", "loss.kind=bce", "seed=1",
                     "loss.cosine_blocks=1", "precision.dtype=bfloat16", "engine.grad_checkpointing=true",
                     "engine.device_batch=2", "data.norm=imagenet")
    other = {**plain, "engine": {**plain["engine"], "compile": change}}
    with mock.patch("torch.compile", side_effect=lambda network, **options: network):
        for look in (see.trained, see.blocks_passed, see.rates, see.inputs):
            assert look(Run(other, begun)) == look(Run(plain))


def names(settings: type, prefix: str = "") -> set[str]:
    hints = get_type_hints(settings)
    return {name for field in fields(settings) for name in (
        names(hints[field.name], f"{field.name}.") if is_dataclass(hints[field.name]) else {prefix + field.name})}


def test_every_setting_has_an_entry():
    assert set(CASES) == names(Settings) - {"model"}
