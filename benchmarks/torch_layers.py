"""RAT and attention layers in PyTorch under torch.compile: what a user of the PyTorch release would run.

A twin written from the paper's equations and the release's shapes, on the tools that PyTorch has for them: the chunk
recurrence as a loop over the L places of all chunks side by side, in float32, with a backward pass of its own;
attention over the chunk summaries by flex_attention with a block mask; attention by scaled_dot_product_attention.

Run as a program it prints one line of JSON for each layer and length, each compiled in a process of its own because
that takes most of the time; they run on the device in turn. `layer_latency.py` does that before JAX takes the
device, so that both stand in one table:

  python benchmarks/torch_layers.py --lengths 4096 16384 131072
"""

import argparse
import fcntl
import functools
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.printed_rows import Row, say
from benchmarks.timing import time_calls

EPSILON = 1e-6
ROPE_BASE = 10_000.0
LAYERS = ("attention", "rat")
Params = dict[str, torch.Tensor]


class ChunkScan(torch.autograd.Function):
    """h_l = f_l h_{l-1} + u_l along axis 2 of [B, C, L, X], from 0; only f and h are kept for the backward pass."""

    @staticmethod
    def forward(ctx, forget: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        """All h."""
        state, states = update[:, :, 0], [update[:, :, 0]]
        for place in range(1, update.shape[2]):
            state = forget[:, :, place] * state + update[:, :, place]
            states.append(state)
        states = torch.stack(states, dim=2)
        ctx.save_for_backward(forget, states)
        return states

    @staticmethod
    def backward(ctx, d_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same recurrence from the other end gives the gradient of u; times the state before, that of f."""
        forget, states = ctx.saved_tensors
        last = d_states.shape[2] - 1
        gradient = d_states[:, :, last]
        d_updates = [gradient]
        for place in range(last - 1, -1, -1):
            gradient = d_states[:, :, place] + forget[:, :, place + 1] * gradient
            d_updates.append(gradient)
        d_update = torch.stack(d_updates[::-1], dim=2)
        before = functional.pad(states[:, :, :-1], (0, 0, 1, 0))
        return d_update * before, d_update


def summary_mask(tokens: int, chunk_size: int, device: str) -> BlockMask:
    """Token t sees chunk c if c < t // L."""
    return create_block_mask(
        lambda b, h, t, c: c < t // chunk_size, None, None, tokens, tokens // chunk_size, device=device
    )


def rat(
    params: Params, x: torch.Tensor, *, heads: int, groups: int, chunk_size: int, mask: BlockMask | None
) -> torch.Tensor:
    """x + W_o mix(W_i norm(x)) with RAT's mixing; x [B, T, D], T a multiple of L."""
    batch, tokens, width = x.shape
    head_dim, chunks = width // heads, tokens // chunk_size
    z, value, gate, query, key = functional.linear(_norm(x, params["scale"]), params["in"]).split(
        [width] * 3 + [groups * head_dim] * 2, dim=-1
    )
    query, key = (_tile(part, heads, groups) for part in (query, key))
    forget = torch.sigmoid(gate.float() + params["gate_bias"])
    both = torch.cat([key.flatten(-2).float(), value.float()], dim=-1)
    forget = torch.cat([forget, forget], dim=-1)
    states = ChunkScan.apply(
        *(part.view(batch, chunks, chunk_size, 2 * width) for part in (forget, (1 - forget) * both))
    )
    running_key, running_value = (
        part.reshape(batch, tokens, heads, head_dim) for part in states.split([width] * 2, dim=-1)
    )
    chunk = torch.arange(tokens, device=x.device) // chunk_size
    query, running_key = _rotate(query.float(), chunk).to(x.dtype), _rotate(running_key, chunk).to(x.dtype)
    running_value = running_value.to(x.dtype)
    # The pair of a chunk's last token sums the chunk up.
    last = slice(chunk_size - 1, None, chunk_size)
    earlier, aux = flex_attention(
        query.transpose(1, 2),
        running_key[:, last].transpose(1, 2),
        running_value[:, last].transpose(1, 2),
        block_mask=mask,
        return_aux=AuxRequest(lse=True),
    )
    own_score = (query.float() * running_key.float()).sum(-1) / math.sqrt(head_dim)
    own = torch.sigmoid(own_score - aux.lse.transpose(1, 2))[..., None]
    mixed = own * running_value.float() + (1 - own) * earlier.transpose(1, 2).float()
    gated = (torch.sigmoid(z.float()) * mixed.reshape(batch, tokens, width)).to(x.dtype)
    return x + functional.linear(gated, params["out"])


def attention(params: Params, x: torch.Tensor, *, heads: int) -> torch.Tensor:
    """x + W_o mix(W_i norm(x)) with causal softmax attention."""
    projected = functional.linear(_norm(x, params["scale"]), params["in"])
    value, query, key = (part.unflatten(-1, (heads, -1)) for part in projected.chunk(3, dim=-1))
    position = torch.arange(x.shape[1], device=x.device)
    query, key = (_rotate(part.float(), position).to(x.dtype) for part in (query, key))
    mixed = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
    )
    return x + functional.linear(mixed.transpose(1, 2).flatten(-2), params["out"])


def _norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPSILON) * scale).to(x.dtype)


def _tile(x: torch.Tensor, heads: int, groups: int) -> torch.Tensor:
    """[B, T, G H] -> [B, T, N, H]; head n has group n mod G."""
    return x.unflatten(-1, (groups, -1)).repeat(1, 1, heads // groups, 1)


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotates the channel pairs (i, i + H/2) of x [B, T, N, H], float32."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float32) / half
    phases = (positions[:, None].float() * ROPE_BASE**-exponents)[None, :, None]
    cos, sin = phases.cos(), phases.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_params(kind: str, width: int, heads: int, groups: int, dtype: torch.dtype, device: str) -> Params:
    """Random parameters that want gradients; matrices (out, in) in the compute dtype."""
    channels = 3 * width + (2 * groups * (width // heads) if kind == "rat" else 0)
    params = {
        "scale": torch.ones(width, device=device),
        "in": 0.02 * torch.randn(channels, width, device=device),
        "out": 0.02 * torch.randn(width, width, device=device),
    }
    params["in"], params["out"] = params["in"].to(dtype), params["out"].to(dtype)
    if kind == "rat":
        params["gate_bias"] = torch.randn(width, device=device) + 2
    return {name: tensor.requires_grad_() for name, tensor in params.items()}


class Turn:
    """The right to run on the device, which processes that compile side by side take in turn."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_RDWR)

    def take(self) -> None:
        """Waits until no other process has the turn; nothing if this one has it."""
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def give_back(self) -> None:
        """Lets another process run."""
        fcntl.flock(self.file, fcntl.LOCK_UN)

    def compile(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """The compiler behind torch.compile, with the turn taken when the compiled graph is first called."""
        from torch._inductor.compile_fx import compile_fx  # here, because it takes seconds to import

        compiled = compile_fx(graph, inputs)

        def run(*arguments):
            self.take()
            return compiled(*arguments)

        return run


def measure(kind: str, tokens: int, turn: Turn, flags: argparse.Namespace) -> dict[str, Any]:
    """The row of one layer at one length, as `layer_latency.py` has it for JAX's layers."""
    torch.manual_seed(0)
    params = make_params(kind, flags.width, flags.heads, flags.groups, torch.bfloat16, "cuda")
    shape = (flags.tokens // tokens, tokens, flags.width)
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
    d_out = torch.randn_like(x)
    options: dict[str, Any] = {"heads": flags.heads}
    if kind == "rat":
        mask = summary_mask(tokens, flags.chunk_size, "cuda")
        options |= {"groups": flags.groups, "chunk_size": flags.chunk_size, "mask": mask}
    run = torch.compile(
        functools.partial(_LAYERS[kind], **options), backend=turn.compile, dynamic=False, fullgraph=True
    )

    def train():
        return torch.autograd.grad(run(params, x), [x, *params.values()], d_out)

    def prefill():
        with torch.no_grad():
            return run(params, x)

    def wait(_):
        torch.cuda.synchronize()

    row: Row = {"tokens": tokens, "layer": f"torch:{kind}"}
    for name, call in (("train", train), ("prefill", prefill)):
        torch.cuda.reset_peak_memory_stats()
        times = time_calls(call, wait, flags.repeats)
        row |= {f"{name}_ms": times.ms, f"{name}_spread_ms": times.spread_ms}
        row[f"{name}_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.empty_cache()
        turn.give_back()
    return row


_LAYERS: dict[str, Callable[..., torch.Tensor]] = {"attention": attention, "rat": rat}


def main() -> None:
    """Prints a row for each layer and length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 131072])
    parser.add_argument("--tokens", type=int, default=262_144, help="of every row")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--chunk_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU")
    rows = [(kind, tokens) for tokens in flags.lengths for kind in flags.layers]
    with tempfile.NamedTemporaryFile() as file:
        turns = [
            torch.multiprocessing.get_context("spawn").Process(target=print_row, args=(*row, file.name, flags))
            for row in rows
        ]
        for process in turns:
            process.start()
        for process in turns:
            process.join()


def print_row(kind: str, tokens: int, turn_file: str, flags: argparse.Namespace) -> None:
    """Prints the row of one layer at one length, or why there is none, as JSON."""
    row: Row = {"tokens": tokens, "layer": f"torch:{kind}"}
    try:
        row |= measure(kind, tokens, Turn(turn_file), flags)
    except RuntimeError as error:  # out of memory, too: the table says so
        row["error"] = str(error).replace("\n", " ")[:150]
    say(row)


if __name__ == "__main__":
    main()
