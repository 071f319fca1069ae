"""How a model's parameters start."""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor, nn

from deepvit.errors import UserError
from deepvit.models.attention import Attention, HeadMix
from deepvit.models.blocks import DeepNormBlock

STD = 0.02
Stream = Callable[[str], Generator | None]  # name of a parameter -> its own generator; None: torch's


def draw_seed() -> int:
    """One number of torch's generator for a whole model; 0 on the meta device, where nothing is drawn."""
    return 0 if torch.get_default_device().type == "meta" else int(torch.randint(2**31, (), device="cpu"))


def stream(seed: int, path: str, device: torch.device, name: str) -> Generator | None:
    """The generator of parameter `name` of the module at `path`, by (seed, full name): models of a seed share it."""
    if device.type == "meta":
        return None
    digest = hashlib.blake2b(f"{seed}/{path}.{name}".encode(), digest_size=4).digest()  # what a CPU's generator takes
    return Generator(device).manual_seed(int.from_bytes(digest))


def init_weights(model: nn.Module, std: float | None, seed: int | None = None, mimetic: bool = False) -> None:
    """Initialises all of `model`, by default as the published code does. `std`: `init_std` of a ViT (None: 0.02).

    | parameter                          | start                                                             |
    |------------------------------------|-------------------------------------------------------------------|
    | Linear weight                      | normal, `std`                                                     |
    | pos_embed, cls_token               | normal, std 0.02                                                  |
    | Linear bias; norm weight, bias     | 0; 1, 0                                                           |
    | convolutions of the stem           | PyTorch's default: uniform, +-1/sqrt(fan-in)                      |
    | Theta (`HeadMix`)                  | U(+-1/sqrt(H)), weight and bias, or as `theta_init` says          |
    | LayerScale                         | `init_values`                                                     |
    | contrast, temperatures, FeatScale  | so that they change nothing                                       |
    | Linear weight in a `DeepNormBlock` | Xavier normal, scaled with depth: see there                       |
    | attention, if `mimetic`            | see `mimic`                                                       |"""
    seed, std = draw_seed() if seed is None else seed, STD if std is None else std
    device = next(model.parameters(), torch.empty(0)).device
    modules = [(module, partial(stream, seed, path, device)) for path, module in model.named_modules()]
    for module, draws in modules:
        _start(module, draws, std)
    for module, draws in modules:  # after the parts that they are made of
        if isinstance(module, DeepNormBlock):
            module.reset_parameters(draws)
        elif mimetic and isinstance(module, Attention):
            mimic(module, draws)


def _start(module: nn.Module, draws: Stream, std: float) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std, generator=draws("weight"))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        bound = module.weight[0].numel() ** -0.5
        for name, parameter in module.named_parameters():
            nn.init.uniform_(parameter, -bound, bound, draws(name))
    elif isinstance(module, HeadMix):
        module.reset_parameters(draws)
    for name in ("pos_embed", "cls_token"):
        if isinstance(parameter := getattr(module, name, None), nn.Parameter):
            nn.init.normal_(parameter, std=STD, generator=draws(name))


@torch.no_grad()
def mimic(attention: Attention, draws: Stream) -> None:
    """Trockman & Kolter, "Mimetic Initialization of Self-Attention Layers" (arXiv:2305.09828), with their ViT's values:
    `W_q^T W_k` of each head is the best of its rank for 0.7 Z + 0.7, `W_proj W_v` for 0.4 Z - 0.4; Z is normal with
    variance 1/D. Their sinusoidal positions, another change, are left out."""
    inner, dim = attention.proj.in_features, attention.proj.out_features
    if inner > dim:
        raise UserError(f"weight_init=mimetic needs num_heads * head_dim = {inner} to be at most embed_dim = {dim}.")
    q, k, v = attention.qkv.weight.view(3, attention.num_heads, attention.head_dim, dim)
    generator = draws("qkv.weight")
    for head in range(attention.num_heads):
        _factorise(q[head], k[head], 0.7, 0.7, generator)
    _factorise(attention.proj.weight.T, v.flatten(0, 1), 0.4, -0.4, draws("proj.weight"))


def _factorise(left: Tensor, right: Tensor, noise: float, diagonal: float, generator: Generator | None) -> None:
    """Fills `left` and `right` `[rank, D]` so that `left^T right` is nearest to `noise Z + diagonal I`."""
    rank, dim = left.shape
    z = torch.randn(dim, dim, generator=generator, device=left.device) * dim**-0.5
    u, s, vh = torch.linalg.svd(noise * z + diagonal * torch.eye(dim, device=left.device))
    root = s[:rank].sqrt()[:, None]
    left.copy_(root * u.T[:rank])
    right.copy_(root * vh[:rank])
