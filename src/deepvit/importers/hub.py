"""Names that stand where a path does: `timm:NAME`, `hf-hub:OWNER/NAME[@REVISION]`, `google:COLLECTION/NAME`,
`local-dir:FOLDER`, `deepvit:NAME` (weights of ours that came with the package)."""

import re
from functools import cache
from pathlib import Path

import torch

from deepvit.errors import UserError, did_you_mean, reason

SCHEMES = ("timm:", "hf-hub:", "google:", "local-dir:", "deepvit:")
RELEASED = Path(__file__).parents[1] / "weights"
GOOGLE = "https://storage.googleapis.com/vit_models"  # google-research/vision_transformer's README
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def located(source: str | Path) -> Path:
    """The folder or file that a name stands for, fetched into a cache if need be (the Hugging Face hub's, or torch's
    for Google's files); a path as it is.

    Only safetensors and Google's .npz are fetched. `HF_ENDPOINT`, `HF_HOME` and `TORCH_HOME` are heeded, as ever.

    Raises:
        UserError: an unknown name, or one that cannot be fetched.
    """
    scheme, _, name = str(source).partition(":")
    if not str(source).startswith(SCHEMES):
        return Path(source)
    if scheme == "local-dir":
        return Path(name)
    if scheme == "deepvit":
        return _released(name)
    return _of_google(name) if scheme == "google" else _fetched(_of_timm(name) if scheme == "timm" else name)


def _released(name: str) -> Path:
    there = {path.stem: path for path in sorted(RELEASED.glob("*.safetensors"))}
    if name not in there:
        raise UserError(f"deepvit:{name} is not among the weights that came with the package, which are: "
                        f"{', '.join(there) or 'none yet'}.{did_you_mean(name, there)}")
    return there[name]


@cache
def _fetched(repository: str) -> Path:
    from timm.models._hub import download_from_hf
    try:
        download_from_hf(repository, CONFIG)
        return Path(download_from_hf(repository, WEIGHTS))
    except Exception as error:  # of the network, in a dozen kinds
        raise UserError(f"{repository} cannot be fetched from the Hugging Face hub ({reason(error)}): check the name "
                        f"and the network, or give the path of a file.") from None


@cache
def _of_google(name: str) -> Path:
    """A file of Google's, such as `imagenet21k/ViT-B_16`."""
    if not re.fullmatch(r"[\w+-]+/[\w+.-]+", name):
        raise UserError(f"google:{name} is not COLLECTION/NAME: give e.g. google:imagenet21k/ViT-B_16, "
                        f"google:imagenet21k+imagenet2012/ViT-L_32 or the name of an augreg/ file.")
    name = f"{name.removesuffix('.npz')}.npz"
    path = Path(torch.hub.get_dir(), "checkpoints", "vit_models", name)
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(f"{GOOGLE}/{name}", str(path), progress=False)
    except Exception as error:  # of the network or the disk, in a dozen kinds
        raise UserError(f"google:{name} cannot be fetched from {GOOGLE}/{name} ({reason(error)}): check the name and "
                        f"the network, or download that address elsewhere and give the file's path.") from None
    return path


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
