"""What attention is before any training: `deepvit regime [RUN_FOLDER | settings]`."""

from collections.abc import Sequence

from deepvit import analysis
from deepvit.commands.preview import first_batch, settings_asked
from deepvit.config.settings import Settings
from deepvit.errors import DONE
from deepvit.report.render import printed
from deepvit.run import build

IMAGES = 32  # the group that a norm over heads takes its statistics from
HELP = f"""usage: deepvit regime RUN_FOLDER
       deepvit regime [SETTING=VALUE ...]

Prints what each block's attention does before training, on the first {IMAGES} training images of a run. Settings are
those of `deepvit train`, such as model.depth=16 model/attention=norm_only.

  N std(A)   the softmax maps' deviation from uniform, times the number of tokens
  gain       standard deviation of the final maps over that of the softmax maps
  attention  RMS of the attention branch over that of the residual stream that it is added to
  mlp        the same of the MLP branch"""


def table(settings: Settings) -> str:
    """The regime of the untrained model that `settings` describe, a row for each block."""
    batches, prepare, splits = first_batch(settings)
    images = prepare(batches[0], 0, "cpu", True)[0][:IMAGES]
    found = analysis.regime(build.model(settings, len(splits.class_ids)), images)
    return printed(["block", "N std(A)", "gain", "attention", "mlp"], [
        [str(block), *(f"{value:.4g}" for value in values)] for block, values in enumerate(zip(*found.values()))])


def main(arguments: Sequence[str]) -> int:
    """The program: a run folder, or settings as for train.py."""
    print(HELP if {"-h", "--help"} & {*arguments} else table(settings_asked(arguments)))
    return DONE
