"""Training through torch.compile: the same updates, and memory that CUDA graphs may rely on."""

import pytest
import soak
import torch

from deepvit.config.settings import read_settings
from deepvit.engine.ranks import Ranks
from deepvit.engine.step import Status
from deepvit.errors import UserError
from deepvit.run import build

STEPS = 8


def built(mode: bool | str, device: str = "cpu", *words: str) -> build.Built:
    """Re-attention with stochastic depth and the average on, in two micro-batches; no dropout, which is drawn anew."""
    config = soak.compose("data.on_device=true", "augment.auto_augment=null", "model.drop_rate=0.0", "model.depth=2",
                          "schedule.warmup_steps=1", f"schedule.steps={STEPS}", f"engine.compile={mode}",
                          "precision=fp32", *words)
    return build.build(read_settings(config), Ranks(0, 1, torch.device(device)))


def losses(run: build.Built) -> list[float]:
    made = [run.stepper.update(run.state, batches) for batches in run.make_batches(0, STEPS)]
    assert {status for status, _ in made} == {Status.DONE}
    return [float(update.loss) for _, update in made]


@pytest.mark.parametrize(("mode", "device"), [
    pytest.param("default", "cpu", marks=pytest.mark.slow),
    pytest.param("reduce-overhead", "cuda", marks=pytest.mark.gpu),
    pytest.param("max-autotune", "cuda", marks=[pytest.mark.gpu, pytest.mark.slow])])
def test_compiled_updates_are_the_eager_ones(mode, device):
    torch._dynamo.utils.counters.clear()
    compiled, eager = built(mode, device), built(False, device)
    assert losses(compiled) == pytest.approx(losses(eager), abs=2e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all blocks, steps and micro-batches
    for (name, one), other in zip(compiled.model.named_buffers(), eager.model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("word", ["loss.cosine_blocks=1",
                                  pytest.param("model.attention.norm=frozen", marks=pytest.mark.slow)])
def test_statistics_move_once_in_blocks_that_no_graph_holds_whole(word, monkeypatch):
    """Such blocks are recomputed as without torch.compile, whose graphs would be broken by what looks into them."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiler(network, backend="aot_eager", dynamic=False))
    compiled, eager = (built(mode, "cpu", word, "engine.grad_checkpointing=true") for mode in ("default", False))
    assert losses(compiled) == pytest.approx(losses(eager), abs=2e-4)
    for (name, one), other in zip(compiled.model.named_buffers(), eager.model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=name)


def test_what_a_cuda_graph_reads_stays_where_it_is():
    """Weights, buffers and masks, through updates, a skipped one, and the loading of a checkpoint."""
    run = built(False)

    def addresses() -> list[int]:
        masks = [module.keep for module in run.model.modules() if hasattr(module, "keep")]
        return [tensor.data_ptr() for tensor in (*run.model.parameters(), *run.model.buffers(), *masks)]

    batches = list(run.make_batches(0, 4))
    run.stepper.update(run.state, batches[0])
    before = addresses()
    run.stepper.update(run.state, batches[1])
    run.state.load_state_dict(run.state.state_dict())
    with torch.no_grad():
        run.model.head.bias.fill_(float("nan"))
    _, update = run.stepper.update(run.state, batches[2])
    assert update.skipped and addresses() == before


@pytest.mark.parametrize("mode", ["fast", "max_autotune", 1])
def test_modes_that_are_none_are_refused(mode):
    with pytest.raises(UserError, match="engine.compile is .*max-autotune"):
        read_settings(soak.compose(f"engine.compile={mode}"))
