"""What the time of a compiled program goes to: the device's operations by total time, from a profiler trace."""

import collections
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax

# What a kernel does, by its name and its instruction's; the first that fits.
WORK = [
    ("attention", r"cudnn|fmha|flash"),
    ("matrix products", r"gemm|nvjet|cublas|cutlass|xmma|dot"),
    ("copies", r"memcpy|memset|copy"),
    ("transposes", r"transpose"),
]
# Which part of a step asked for it, by the scopes of `rat_jax`; the first that fits.
PARTS = ["optimizer", "loss", "between_mixers", "mixer", "mlp"]
OWN_KERNELS = (  # how the names of this project's begin
    "attention_decode",
    "between_mixers_",
    "convolved_heads_",
    "gated_delta_",
    "linear_attention_",
    "mlp_",
    "normed_",
    "rat_",
    "residual_norm_",
    "rnn_",
)


class Operation(NamedTuple):
    """All launches of one kernel for one instruction of the compiled program."""

    kernel: str
    instruction: str  # of the compiled program
    scope: str  # where the program's source asked for it
    count: int
    ms: float  # together

    @property
    def group(self) -> str:
        """What it does, and for which part of the step; this project's kernels go by their names."""
        if self.kernel.startswith(OWN_KERNELS):
            return self.kernel.split("(")[0]
        name = f"{self.kernel} {self.instruction}"
        work = next((work for work, pattern in WORK if re.search(pattern, name, re.IGNORECASE)), "element-wise")
        part = next((part for part in PARTS if re.search(rf"\b{part}\b", self.scope)), "elsewhere")
        return f"{work}, {part}"


def name_every_kernel() -> None:
    """Lets every kernel be launched for one instruction, not for a CUDA graph of many; before the first use of jax."""
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="


def trace(compiled: jax.stages.Compiled, arguments: tuple[Any, ...], folder: str) -> list[Operation]:
    """Runs a program once under the profiler, leaves the trace in `folder`; the slowest operations come first."""
    with jax.profiler.trace(folder):
        jax.block_until_ready(compiled(*arguments))
    files = sorted(Path(folder).glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    return operations(jax.profiler.ProfileData.from_file(str(files[-1])), scopes(compiled.as_text()))


def scopes(text: str) -> dict[str, str]:
    """The scope of every instruction of a compiled program's text."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
    return {name: scope for name, scope in pattern.findall(text)}


def operations(profile: jax.profiler.ProfileData, scope_of: dict[str, str]) -> list[Operation]:
    """Device time of a trace by kernel and instruction.

    A GPU's kernels stand on the lines of its streams; other lines repeat them. A CPU has no such plane: there the
    events that name an instruction count, of which a loop repeats those of its body.
    """
    device_lines = [
        line
        for plane in profile.planes
        if plane.name.startswith("/device:")
        for line in plane.lines
        if line.name.startswith("Stream")
    ]
    lines = device_lines or [line for plane in profile.planes for line in plane.lines]
    totals: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for line in lines:
        for event in line.events:
            stats = {name: value for name, value in event.stats}
            instruction = str(stats["hlo_op"]) if "hlo_op" in stats else ""
            if device_lines or instruction:
                total = totals[event.name, instruction]
                total[0] += 1
                total[1] += event.duration_ns / 1e6
    found = [
        Operation(kernel, instruction, scope_of.get(instruction, ""), int(count), ms)
        for (kernel, instruction), (count, ms) in totals.items()
    ]
    return sorted(found, key=lambda operation: -operation.ms)


def report(found: list[Operation], top: int = 25) -> str:
    """Time by group, and the `top` slowest operations."""
    total = sum(operation.ms for operation in found)
    groups: collections.Counter[str] = collections.Counter()
    for operation in found:
        groups[operation.group] += operation.ms
    lines = [f"{total:.1f} ms of device work"]
    lines += [f"{ms:>9.2f} ms {ms / total:>6.1%}  {name}" for name, ms in groups.most_common()]
    lines += ["", f"{'ms':>9} {'times':>6}  kernel | instruction | scope"]
    for operation in found[:top]:
        scope = "/".join(part for part in operation.scope.split("/") if not re.match(r"jit\(|closed_call|while", part))
        lines.append(
            f"{operation.ms:>9.2f} {operation.count:>6}  {operation.kernel[:60]} | {operation.instruction[:40]} | "
            f"{scope[-70:]}"
        )
    return "\n".join(lines)
