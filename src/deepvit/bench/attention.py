"""The attention operation alone: ours against SDPA, the published form and vit-pytorch's, interleaved in one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from deepvit import ops
from deepvit.bench.timing import ceilings, interleaved, left_out, summary
from deepvit.engine.device import kept_storages
from deepvit.errors import reason
from deepvit.ops import HeadNorm, reference

HEADS, HEAD_DIM = 12, 32  # deepvit32: width 384
SHAPES = {"cuda": ((256, 197, HEADS, HEAD_DIM), (64, 577, HEADS, HEAD_DIM)),  # batch, tokens, heads, head width
          "cpu": ((8, 197, HEADS, HEAD_DIM), (2, 577, HEADS, HEAD_DIM), (64, 17, 4, 16), (64, 65, 6, 16))}
SMALL = 100  # tokens, below which a shape is measured on one thread, as such models train best
BASE, OURS, PUBLISHED = "self-attention (SDPA)", "re-attention, ours", "re-attention, published"


@dataclass(frozen=True)
class Problem:
    """A packed qkv `[B, N, 3, H, d]` as a projection leaves it, the gradient of the output, the head's parameters."""

    qkv: Tensor
    grad: Tensor  # [B, H, N, d], laid out [B, N, H, d]
    mix: Tensor
    bias: Tensor
    norm: HeadNorm

    @classmethod
    def draw(cls, batch: int, tokens: int, heads: int, head_dim: int, device: str, dtype: torch.dtype,
             std: float = 1.0) -> "Problem":
        """Parameters as the published modules begin: conv and bias uniform in +-1/sqrt(H), norm at identity."""
        rng = torch.Generator().manual_seed(0)
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, generator=rng).mul(std).to(device, dtype)
        grad = torch.randn(batch, tokens, heads, head_dim, generator=rng).to(device, dtype).transpose(1, 2)
        theta = ((2 * torch.rand(heads + 1, heads, generator=rng) - 1) * heads**-0.5).to(device)
        ones, zeros = (lambda: torch.ones(heads, device=device)), (lambda: torch.zeros(heads, device=device))
        leaves = [x.requires_grad_() for x in (qkv, theta[:-1].clone(), theta[-1].clone(), ones(), zeros())]
        return cls(leaves[0], grad, leaves[1], leaves[2], HeadNorm(leaves[3], leaves[4], zeros(), ones()))

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv.permute(2, 0, 3, 1, 4).unbind(0)  # q, k, v [B, H, N, d]


def _published(p: Problem, training: bool) -> Tensor:
    mix, bias = p.mix.to(p.qkv.dtype), p.bias.to(p.qkv.dtype)
    return reference.reattention(*p.split(), mix, bias, norm=p.norm, training=training)


def _vit_pytorch(p: Problem, training: bool) -> Tensor:
    """Heads mixed by an einsum, then LayerNorm over them at each entry (vit-pytorch's deepvit.py, rewritten)."""
    q, k, v = p.split()
    maps = torch.einsum("bhij,hg->bgij", reference.softmax_maps(q, k), p.mix.to(q.dtype))  # [B, H, N, N]
    norm = F.layer_norm(maps.movedim(1, -1), maps.shape[1:2], p.norm.gamma.to(q.dtype), p.norm.beta.to(q.dtype))
    return norm.movedim(-1, 1) @ v


Form = Callable[[Problem, bool], Tensor]  # whether in training -> the output [B, H, N, d]
FORMS: dict[str, Form] = {
    BASE: lambda p, training: F.scaled_dot_product_attention(*p.split()),
    OURS: lambda p, training: ops.reattention(*p.split(), p.mix, p.bias, norm=p.norm, training=training),
    PUBLISHED: _published, "re-attention, vit-pytorch": _vit_pytorch}


def _train(form: Form, p: Problem) -> None:
    leaves = [p.qkv, p.mix, p.norm.gamma, p.norm.beta]
    torch.autograd.grad(form(p, True), leaves, p.grad, allow_unused=True)  # SDPA has no parameters


@torch.inference_mode()
def _evaluate(form: Form, p: Problem) -> None:
    form(p, False)


def measure(device: str = "cpu", *, batch: int | None = None, seconds: float = 20.0) -> Iterator[dict]:
    """Rows with `case`, `name`, `ms`, `spread` and `ratio` to SDPA (see `timing.summary`), `floor` (that ratio by
    counted multiplications), `floor_ms` and, for training, `kept_mb` for backward besides the packed qkv; or `failed`.
    In float32, on a GPU in bfloat16. seconds: for each case."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    threads = torch.get_num_threads()
    for usual, tokens, *width in SHAPES[device]:
        problem = Problem.draw(batch or usual, tokens, *width, device, dtype)
        torch.set_num_threads(1 if tokens < SMALL else threads)
        for job, step in (("forward + backward", _train), ("evaluation", _evaluate)):
            case = f"{job}, N={tokens}, batch {batch or usual}" + (", one thread" if tokens < SMALL else "")
            yield from ({"case": case, **row} for row in _rows(problem, step, device, seconds))
    torch.set_num_threads(threads)


def _rows(problem: Problem, step: Callable[[Form, Problem], None], device: str, seconds: float) -> Iterator[dict]:
    steps, training = {}, step is _train
    for name, form in FORMS.items():
        try:
            step(form, problem)
            steps[name] = partial(step, form, problem)
        except Exception as error:  # one contestant's failure is a row, and the others go on
            yield {"name": name, "failed": reason(error)}
    times = interleaved(steps, device, seconds)
    yield from left_out(steps, times)
    for name, taken in times.items():
        row = {"name": name, **summary(taken, times.get(BASE)), **_floors(name, problem, device, training)}
        if training:
            row["kept_mb"] = sum(kept_storages(partial(FORMS[name], problem, True), [problem.qkv])) / 1e6
        yield row


def _floors(name: str, p: Problem, device: str, training: bool) -> dict[str, float]:
    """Multiplications over SDPA's, and the least time by operations or by bytes."""
    B, N, _, H, d = p.qkv.shape
    # Per map entry and head: products of width d, 2 forward and 5 more backward; re-attention's mixes of width H, 1
    # forward and 3 backward (recomputed, of the maps' gradient, of Theta).
    products, mixes = (7 * d, 4 * H) if training else (2 * d, H)
    floor = 1.0 if name == BASE else (products + mixes) / products
    multiplications = floor * products * B * H * N**2
    moved = p.grad.nbytes * (11 if training else 4)  # q, k, v and the output; backward their gradients and all again
    return {"floor": floor, "floor_ms": ceilings(device).floor_ms(2 * multiplications, moved)}


def half_precision_error(device: str = "cpu") -> Iterator[dict]:
    """Rows with `case`, `name` and `error`: the relative l2 error of the output under bf16 autocast against float64,
    with the parameters of initialisation and q, k, v of the deviation that the published 16-block model begins with."""
    p = Problem.draw(2, 197, HEADS, HEAD_DIM, device, torch.float32, std=0.4)
    q, k, v = p.qkv.detach().bfloat16().float().permute(2, 0, 3, 1, 4).unbind(0)
    wide = [x.detach().double() for x in (q, k, v, p.mix, p.bias)]
    exact = reference.reattention(*wide, norm=HeadNorm(*[x.detach().double() for x in p.norm[:4]]), training=True)
    for name, op in ((OURS, ops.reattention), (PUBLISHED, reference.reattention)):
        with torch.autocast(device, torch.bfloat16), torch.no_grad():
            out = op(q, k, v, p.mix, p.bias, norm=p.norm, training=True)
        yield {"case": "op under bf16 autocast at initialisation, against float64", "name": name,
               "error": float((out.double() - exact).norm() / exact.norm())}
