"""How a model's parameters start."""

import hashlib
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from deepvit.errors import UserError
from deepvit.models.attention import Attention, HeadMix
from deepvit.models.blocks import DeepNormBlock

STD = 0.02
Stream = Callable[[str], Generator | None]  # name of a parameter -> its own generator; None: torch's


def draw_seed() -> int:
    """A seed from torch's generator: one number, whatever is built with it."""
    return int(torch.randint(2**31, (), device="cpu"))


def streams(seed: int, path: str, device: torch.device) -> Stream:
    """The generators of the parameters of a module at `path` in its model, functions of (seed, full name) alone.

    So models of one seed share all parameters that they have in common, whatever else they are made of.
    """
    def stream(name: str) -> Generator | None:
        if device.type == "meta":
            return None
        full = f"{seed}/{path}.{name}" if path else f"{seed}/{name}"
        return Generator(device).manual_seed(int.from_bytes(hashlib.blake2b(full.encode(), digest_size=4).digest()))

    return stream


def init_weights(model: nn.Module, seed: int | None = None, std: float = STD, mimetic: bool = False) -> None:
    """Initialises all of `model`, by default as the published code does.

    | parameter                          | start                                                             |
    |------------------------------------|-------------------------------------------------------------------|
    | Linear weight                      | normal, `std`                                                     |
    | pos_embed, cls_token               | normal, std 0.02                                                  |
    | Linear bias                        | 0                                                                 |
    | LayerNorm, BatchNorm               | weight 1, bias 0                                                  |
    | convolutions of the stem           | PyTorch's default: uniform, +-1/sqrt(fan-in)                      |
    | Theta (`HeadMix`)                  | U(+-1/sqrt(H)), weight and bias, or as `theta_init` says          |
    | LayerScale                         | `init_values`                                                     |
    | contrast, temperatures, FeatScale  | so that they change nothing                                       |
    | Linear weight in a `DeepNormBlock` | Xavier normal, scaled with depth: see there                       |
    | attention, if `mimetic`            | see `mimic`                                                       |

    Args:
        seed: of the parameters' streams; None: drawn.
    """
    seed = draw_seed() if seed is None else seed
    modules = [(module, streams(seed, path, next(model.parameters()).device)) for path, module in model.named_modules()]
    for module, stream in modules:
        _start(module, stream, std)
    for module, stream in modules:  # after the parts that they are made of
        if isinstance(module, DeepNormBlock):
            module.reset_parameters(stream)
        elif mimetic and isinstance(module, Attention):
            mimic(module, stream)


def _start(module: nn.Module, stream: Stream, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std, generator=stream("weight"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        for name, parameter in module.named_parameters():
            nn.init.uniform_(parameter, -bound, bound, stream(name))
    elif isinstance(module, HeadMix):
        module.reset_parameters(stream)
    for name in ("pos_embed", "cls_token"):
        if isinstance(parameter := getattr(module, name, None), nn.Parameter):
            nn.init.normal_(parameter, std=STD, generator=stream(name))


@torch.no_grad()
def mimic(attention: Attention, stream: Stream) -> None:
    """Trockman & Kolter, "Mimetic Initialization of Self-Attention Layers" (arXiv:2305.09828), with their ViT's values.

    `W_q^T W_k` of each head is the best of its rank for 0.7 Z + 0.7, `W_proj W_v` for 0.4 Z - 0.4; Z is normal with
    variance 1/D. Their sinusoidal positions, another change, are left out.

    Raises:
        UserError: heads that together are wider than the tokens.
    """
    inner, dim = attention.proj.in_features, attention.proj.out_features
    if inner > dim:
        raise UserError(f"weight_init=mimetic needs heads that together are no wider than the tokens: num_heads * "
                        f"head_dim = {inner} is above embed_dim = {dim}.")
    q, k, v = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, dim)
    generator = stream("qkv.weight")
    for head in range(attention.num_heads):
        _factorise(q[head], k[head], 0.7, 0.7, generator)
    _factorise(attention.proj.weight.T, v.flatten(0, 1), 0.4, -0.4, stream("proj.weight"))


def _factorise(left: Tensor, right: Tensor, noise: float, diagonal: float, generator: Generator | None) -> None:
    """Fills `left` and `right` `[rank, D]` so that `left^T right` is nearest to `noise Z + diagonal I`."""
    rank, dim = left.shape
    z = torch.randn(dim, dim, generator=generator, device=left.device) * dim**-0.5
    u, s, vh = torch.linalg.svd(noise * z + diagonal * torch.eye(dim, device=left.device))
    root = s[:rank].sqrt()[:, None]
    left.copy_(root * u.T[:rank])
    right.copy_(root * vh[:rank])
