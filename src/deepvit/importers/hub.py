"""Names that stand where a path does: `timm:NAME`, `hf-hub:OWNER/NAME[@REVISION]`, `local-dir:FOLDER`."""

from functools import cache
from pathlib import Path

from deepvit.errors import UserError, did_you_mean

SCHEMES = ("timm:", "hf-hub:", "local-dir:")
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def located(source: str | Path) -> Path:
    """The folder or file that a name stands for, fetched into the Hugging Face cache if need be; a path as it is.

    Only safetensors are fetched. `HF_ENDPOINT` and `HF_HOME` are heeded, as ever.

    Raises:
        UserError: an unknown name, or one that cannot be fetched.
    """
    scheme, _, name = str(source).partition(":")
    if not str(source).startswith(SCHEMES):
        return Path(source)
    return Path(name) if scheme == "local-dir" else _fetched(_of_timm(name) if scheme == "timm" else name)


@cache
def _fetched(repository: str) -> Path:
    from timm.models._hub import download_from_hf
    try:
        download_from_hf(repository, CONFIG)
        return Path(download_from_hf(repository, WEIGHTS))
    except Exception as error:  # of the network, in a dozen kinds
        reason = str(error).strip().splitlines()[0][:100].rstrip(" .:") or type(error).__name__
        raise UserError(f"{repository} cannot be fetched from the Hugging Face hub ({reason}): check the name and the "
                        f"network, or give the path of a file.") from None


def _of_timm(name: str) -> str:
    """The repository of a pretrained model of timm."""
    from timm.models import get_pretrained_cfg, list_pretrained
    try:
        found = get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        found = None
    if found is None or not found.hf_hub_id:
        raise UserError(f"timm:{name} has no weights on the Hugging Face hub: timm.list_pretrained('vit_*') has those "
                        f"that do.{did_you_mean(name, list_pretrained('vit_*'))}")
    return found.hf_hub_id
