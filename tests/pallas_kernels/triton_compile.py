"""Compiles launches of the Triton kernels ahead of time, for GPUs that are not there."""

import dataclasses
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pallas_kernels.launch.triton import Launch

TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32", "int32": "*i32"}


@dataclasses.dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    text: str  # PTX


def compile_launch(launch: Launch, input_dtypes: tuple[str, ...], capability: int) -> Resources:
    """Compiles a launch as jax-triton does: 16-byte aligned arrays, run-time integers without assumptions."""
    constants = dict(launch.constants)
    types = [TYPES[dtype] for dtype in input_dtypes] + ["i32"] * len(launch.integers)
    types += [TYPES[dtype] for _, dtype in launch.outputs] + [TYPES[input_dtypes[i]] for i in launch.overwritten]
    names = [name for name in launch.kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    positions = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    aligned = {(positions[name],): [["tt.divisibility", 16]] for name, kind in signature.items() if kind[0] == "*"}
    constexprs = {(positions[name],): value for name, value in constants.items()}
    source = ASTSource(launch.kernel, signature, constexprs=constexprs, attrs=aligned)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    registers, spilled = _usage(compiled.asm["ptx"], capability)
    return Resources(registers, spilled, compiled.metadata.shared, compiled.asm["ptx"])


def _usage(ptx: str, capability: int) -> tuple[int, int]:
    ptxas = triton.knobs.nvidia.ptxas.path
    arch = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={arch}", "-o", "/dev/null", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
