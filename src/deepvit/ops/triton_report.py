"""What Triton's compiler makes of the kernels, without a GPU: `python -m deepvit.ops.triton_report`."""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from deepvit.ops import triton_backward, triton_core, triton_kernels

KERNELS = {"forward": triton_kernels.forward, "by_queries": triton_backward.by_queries,
           "by_keys": triton_backward.by_keys}
FLOATS = {"mix", "lse", "sumsq", "twice", "delta", "dmix", "dtotal"}  # pointers that are float32 whatever the inputs
NUMBERS = {"sb": "i32", "sh": "i32", "sn": "i32", "H": "i32", "N": "i32", "D": "i32", "scale": "fp32", "scale2": "fp32"}


def compiled(kernel: str, d: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90):
    """Triton's compiled kernel, one of `KERNELS`, for head width d, as it would be launched."""
    function = KERNELS[kernel]
    options = triton_core._options(d, dtype, backward=kernel != "forward")
    build = {key: options.pop(key) for key in ("num_warps", "num_stages") if key in options}
    pointer = "*fp32" if dtype == torch.float32 else "*bf16"
    types = {name: "constexpr" if name in options else NUMBERS.get(name, "*fp32" if name in FLOATS else pointer)
             for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names) if "*" in types[name]
               or name in ("sb", "sh", "sn") and d % 16 == 0}
    constants = {(function.arg_names.index(name),): value for name, value in options.items()}
    return triton.compile(ASTSource(function, types, constants, aligned), target=GPUTarget("cuda", arch, 32),
                          options=build)


def usage(kernel: str, d: int, dtype: torch.dtype = torch.bfloat16, arch: int = 90) -> dict[str, str | int]:
    """`registers` a thread, `spills` (bytes stored), `shared` memory (bytes) and the tile, from ptxas -v."""
    built = compiled(kernel, d, dtype, arch)
    target = re.search(r"\.target (\S+)", built.asm["ptx"]).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(built.asm["ptx"])
        said = subprocess.run([get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", source, "-o",
                               Path(folder) / "kernel.cubin"], capture_output=True, text=True, check=True).stderr
    read = lambda pattern: int(re.search(pattern, said).group(1))  # noqa: E731
    rows, cols, warps = triton_core.tiling(d, dtype, kernel != "forward")
    return {"kernel": kernel, "d": d, "dtype": str(dtype).removeprefix("torch."), "arch": f"sm_{arch}",
            "tile": f"{rows}x{cols}, {warps} warps", "registers": read(r"Used (\d+) registers"),
            "spills": read(r"(\d+) bytes spill stores"), "shared": built.metadata.shared}


def main() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for d in (16, 32, 33, 64):
            for kernel in KERNELS:
                print(*(f"{name} {value}" for name, value in usage(kernel, d, dtype).items()), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
