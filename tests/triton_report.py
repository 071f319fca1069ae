"""What Triton's compiler makes of the kernels, without a GPU: `python tests/triton_report.py`."""

import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deepvit.ops import triton_core
from deepvit.ops.triton_core import Launch

KERNELS = ("forward", "bwd_dq", "bwd_dkv")
CARDS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # compute capability: KiB of shared memory of a block
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def launch_of(kernel: str, d: int, dtype: torch.dtype) -> Launch:
    """What a block of deepvit32 (12 heads, 197 tokens) with heads of width d launches, on tensors without memory."""
    qkv = torch.empty(8, 197, 3, 12, d, dtype=dtype, device="meta").permute(2, 0, 3, 1, 4).unbind(0)
    mix, lse = torch.empty(12, 12, device="meta"), torch.empty(8, 12, 197, device="meta")
    if kernel == "forward":
        return triton_core.forward_launch(*qkv, mix, d**-0.5)[0]
    grads = torch.empty_like(qkv[0]), torch.empty(8, 12, device="meta"), torch.empty(8, 12, d, device="meta")
    return triton_core.backward_launches(*grads, *qkv, mix, lse, d**-0.5)[0][kernel == "bwd_dkv"]


def _specialised(value: Any) -> tuple[str, bool]:
    """Type of an argument in Triton's words, and whether it is known to be a multiple of 16, as a launch decides."""
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype], True  # whole tensors of the caching allocator
    return ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)


def compiled(launch: Launch, arch: int):
    """Triton's compiled kernel for a launch; an integer that is 1 becomes a constant, as when it is launched."""
    names = launch.kernel.arg_names
    options = dict(launch.options)
    build = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    given = dict(zip(names, launch.arguments))
    constants = options | {name: 1 for name, value in given.items() if isinstance(value, int) and value == 1}
    types = {name: "constexpr" if name in constants else _specialised(given[name])[0] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if name not in constants and _specialised(given[name])[1]}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(launch.kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build)


def _loops(ptx: str) -> list[str]:
    """The text between each label and the branch back to it."""
    found = []
    for branch in re.finditer(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", ptx):
        label = ptx.find(f"\n{branch[1]}:", 0, branch.start())
        if label >= 0:
            found.append(ptx[label:branch.start()])
    return found


def usage(kernel: str, d: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90) -> dict[str, Any]:
    """Of the kernel as it is launched: `registers` and `stack` (bytes that spill) a thread, `shared` memory (bytes); of
    each loop its `barriers` and its `async` copies, which load ahead."""
    launch = launch_of(kernel, d, dtype)
    built = compiled(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        said = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    loops = _loops(built.asm["ptx"])
    count = lambda pattern: [len(re.findall(pattern, loop)) for loop in loops]  # noqa: E731
    tile = "{BM}x{BN}, {num_warps} warps, {num_stages} stages".format(**launch.options)
    return {"kernel": kernel, "d": d, "dtype": str(dtype).removeprefix("torch."), "arch": f"sm_{arch}", "tile": tile,
            "registers": int(registers), "stack": int(stack), "shared": built.metadata.shared,
            "barriers": count(r"\bbar(?:rier)?\.sync"), "async": count(r"cp\.async\.c[ag]")}


def main() -> None:
    for arch, shared in CARDS.items():
        for dtype in triton_core.DTYPES:
            for d in (16, 32, 33, 64):
                if triton_core.shared_memory(d, dtype) > shared:
                    print(f"sm_{arch} | d {d} | {dtype} | tiles of PyTorch", flush=True)
                    continue
                for kernel in KERNELS:
                    print(*(f"{name} {value}" for name, value in usage(kernel, d, dtype, arch).items()), sep=" | ",
                          flush=True)


if __name__ == "__main__":
    main()
