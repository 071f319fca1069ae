"""What re-attention's BatchNorm asks of the model and the engine: groups, a moving average, recomputed blocks."""

import copy

import faults
import pytest
import soak
import torch
from torch.testing import assert_close

import deepvit
from deepvit.commands.cli import hydra_error
from deepvit.engine.ranks import Ranks
from deepvit.errors import UserError
from deepvit.run import build
from deepvit.run.build import read_settings

GROUPED = ["model/attention=reattention", "model.attention.norm_batch=4", "model.stem=conv", "model.drop_path_rate=0",
          "model.drop_rate=0", "schedule.steps=8", "schedule.warmup_steps=2", "schedule.eval_steps=8",
          "engine.device_batch=null", "optimizer.lr=1.0e-3"]


def test_grouped_norms_train_on_two_ranks_as_on_one(tmp_path):
    """Re-attention's and the stem's: the groups are the same, on whatever rank they are."""
    config = soak.compose(*GROUPED)
    alone = soak.train(config, tmp_path / "one")
    pair = faults.start_ranks(2, faults.train, config, tmp_path / "two")
    assert alone.wait(120) == 0, alone.words()
    assert [run.wait(120) for run in pair] == [0, 0], pair[0].words()
    for left, right in zip(soak.lines(tmp_path / "one" / "metrics.jsonl"),
                           soak.lines(tmp_path / "two" / "metrics.jsonl"), strict=True):
        assert left.keys() - {"data_wait"} == right.keys() - {"data_wait"}
        if "loss" in left:
            assert left["loss"] == pytest.approx(right["loss"], rel=2e-4), left["step"]


def test_a_moving_average_takes_the_running_statistics_as_they_are():
    """They begin at 1 and are near 1e-6 in truth: averaged, they would spoil evaluation for thousands of steps."""
    settings = read_settings(soak.compose("ema.decay=0.99"))
    network = build.model(settings, 10)
    state = build.state(settings, network, Ranks(0, 1, torch.device("cpu")))
    before = copy.deepcopy(state.ema.module)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
        for name, buffer in network.named_buffers():
            if "running" in name:
                buffer.fill_(1e-6)
    state.ema.update(network, step=10)
    for name, buffer in state.ema.module.named_buffers():
        assert torch.equal(buffer, network.get_buffer(name)), name
    for name, parameter in state.ema.module.named_parameters():
        assert_close(parameter, before.get_parameter(name) + 0.01, msg=name)


SMALL = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def test_all_norms_of_a_model_take_the_same_groups():
    """A batch of two groups is two batches of one: outputs, gradients, and statistics by their mean."""
    torch.manual_seed(0)
    attention = {**deepvit.models.attention_config("reattention"), "norm_batch": 3}
    whole = deepvit.create_model("vit", **SMALL, attention=attention, stem="conv").train()
    halves = [copy.deepcopy(whole) for _ in range(2)]
    x = torch.randn(6, 3, 16, 16)
    whole(x).square().sum().backward()
    for half, part in zip(halves, x.split(3)):
        half(part).square().sum().backward()
    for name, parameter in whole.named_parameters():
        assert_close(sum(half.get_parameter(name).grad for half in halves), parameter.grad, rtol=1e-3, atol=1e-4)
    for name, buffer in whole.named_buffers():
        assert_close(sum(half.get_buffer(name) for half in halves) / 2, buffer, check_dtype=False, msg=name)


def test_norm_batch_of_a_model():
    """32 by the YAML; the stem's is the attention's if that has one; null in what was built before it existed."""
    published = deepvit.models.attention_config("reattention")
    old = {name: value for name, value in published.items() if name != "norm_batch"}
    for attention, stem, want in (("reattention", "conv", {32}), (old, "conv", {None}), ("norm_only", "patch", {32}),
                                  ("self", "conv", {32}), ("reattention_fc", "patch", set()),
                                  ("self", {"name": "conv", "norm_batch": 8}, {8})):
        assert deepvit.create_model("vit", **SMALL, attention=attention, stem=stem).norm_batches == want
    for wrong in ({"norm_batch": 0}, {"norm_batch": 2.5}, {"sync_norm": False}):
        with pytest.raises(UserError, match="norm_batch"):
            deepvit.create_model("vit", **SMALL, attention={**published, **wrong})
    assert "model.attention.norm_batch" in hydra_error(Exception("Could not override 'model.attention.sync_norm'"))


def test_a_checkpoint_from_before_groups_loads_as_it_was(tmp_path):
    old = {**deepvit.models.attention_config("reattention"), "norm_batch": None}
    model = deepvit.create_model("vit", **SMALL, attention=old).eval()
    del old["norm_batch"]
    torch.save({"format": "deepvit", "version": 1, "model": model.state_dict(),
                "config": {**model.config, "attention": {**old, "sync_norm": True}}}, tmp_path / "old.pt")
    again, x = deepvit.load_model(tmp_path / "old.pt").eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(again(x), model(x)) and again.config["attention"] == old


@pytest.mark.slow
def test_compiled_recomputed_blocks_equal_eager_ones():
    """Outputs, gradients and running statistics, updated once."""
    torch.manual_seed(0)
    model = deepvit.create_model("vit", **SMALL, attention="reattention").train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    compiled = torch.compile(other, backend="aot_eager_decomp_partition")
    x = torch.randn(4, 3, 16, 16)
    for network in (model, compiled):
        network(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert_close(other.get_parameter(name).grad, parameter.grad, msg=name)
    for name, buffer in model.named_buffers():
        assert_close(other.get_buffer(name), buffer, msg=name)


def test_a_run_goes_on_with_scaled_gradients_after_it_had_none():
    settings = [read_settings(soak.compose(f"precision={name}", "ema.decay=null")) for name in ("fp32", "fp16")]
    first, second = (build.state(each, build.model(each, 10), Ranks(0, 1, torch.device("cpu"))) for each in settings)
    second.load_state_dict(first.state_dict())
    assert second.scaler.is_enabled() and second.scaler.get_scale() > 1
