"""The RAT layer of the paper's PyTorch release, from a checkout of it, as its own benchmark builds it.

As in its src/benchmark_eff/rat_eff.py: chunks of 16, two groups, float32 parameters and inputs under bfloat16 autocast,
the layer under torch.compile. Norm and residual are parts of its layer.
"""

import functools
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.rivals import torch_passes
from benchmarks.rivals.task import RELEASE, Task, note, task_of_process
from benchmarks.rivals.torch_passes import Layer

CHUNK_SIZE, GROUPS = 16, 2


def make_layer(task: Task, name: str, rows: int, tokens: int) -> Layer:
    """Its one layer."""
    from src.model.backbone.rat import RAT  # of the checkout; it imports all of the release's models
    from src.model.embedding.pe import InterRoPE

    shape = {"d_model": task.width, "num_head": task.heads, "chunk_size": CHUNK_SIZE, "ngroups": GROUPS}
    layer = RAT(**shape, layer_id=0)
    # The release was written for a PyTorch that asked the signature of a mask how many arguments it has. Since then
    # PyTorch counts those of its code, with and without torch.compile; the layer's own mask is a bound method, whose
    # code has one more, and is refused. This is the same mask as a function.
    layer.block_causal_mask = earlier_chunks
    with torch.no_grad():
        torch.nn.init.uniform_(layer.gate_bias, 1, CHUNK_SIZE - 1).log_()
    torch._dynamo.reset()
    compiled = torch.compile(layer)
    rotation = InterRoPE(
        dim=task.width // task.heads, chunk_size=CHUNK_SIZE, max_num_chunk=-(-tokens // CHUNK_SIZE), device="cuda"
    )
    _, angles = rotation(0, tokens, "cuda", torch.bfloat16)

    def apply(x):
        with torch.amp.autocast("cuda", dtype=torch.bfloat16):
            return compiled(x, cache=None, **angles)

    how = "src.model.backbone.rat.RAT, autocast, torch.compile"
    return Layer(apply, tuple(layer.parameters()), how, torch.float32)


def earlier_chunks(b, h, q_idx, kv_idx):
    """Whether a token sees a chunk, all of which must come before its own."""
    return q_idx // CHUNK_SIZE > kv_idx


def version(folder: str) -> str:
    """The commit of the checkout; empty for a copy without one."""
    if not (Path(folder) / ".git").exists():  # git would answer for a folder around it
        return ""
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    """Prints every row."""
    task = task_of_process()
    note("imports done")
    if not torch.cuda.is_available():
        raise SystemExit("its layer needs a GPU, and PyTorch sees none")
    sys.path.insert(0, task.release)
    about = {"rival": RELEASE, "version": version(task.release)}
    torch_passes.say_rows(task, functools.partial(make_layer, task), about)


if __name__ == "__main__":
    main()
