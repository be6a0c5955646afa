"""The layers of flash-linear-attention, whose package is called `fla`, as they come: not under torch.compile."""

import functools
import importlib.util
from importlib import metadata

import torch
from fla.layers import Attention, GatedDeltaNet, HGRNAttention
from fla.modules import RMSNorm, RotaryEmbedding
from fla.ops.attn import parallel_attn
from fla.ops.linear_attn import chunk_linear_attn

from benchmarks.rivals import torch_passes
from benchmarks.rivals.task import FLA, Task, note, task_of_process
from benchmarks.rivals.torch_passes import Layer

EPSILON = 1e-6
VECTORS = ("A_log", "dt_bias")  # stay float32


class OwnAttention(torch.nn.Module):
    """The package's layer has flash-attn's kernels alone; this is the same layer on the package's own."""

    def __init__(self, width: int, heads: int, keys_seen: int | None):
        super().__init__()
        self.heads, self.keys_seen = heads, keys_seen
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            torch.nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.rotary = RotaryEmbedding(dim=width // heads, base=10_000.0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        """In a tuple, as the package's layers give it."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotary(query, key)
        return (self.o_proj(parallel_attn(query, key, value, window_size=self.keys_seen).flatten(-2)),)


def mixer(task: Task, name: str) -> tuple[torch.nn.Module, str]:
    """The module of a layer, and in words what it is."""
    width, heads, head_dim = task.width, task.heads, task.width // task.heads
    if name in ("attention", "local_attention"):
        keys_seen = task.keys_seen if name == "local_attention" else None
        if importlib.util.find_spec("flash_attn") is None:
            return OwnAttention(width, heads, keys_seen), f"fla.ops.attn.parallel_attn, no flash-attn, {_kernels()}"
        layer = Attention(hidden_size=width, num_heads=heads, window_size=keys_seen, layer_idx=0)
        return layer, f"fla.layers.Attention, flash-attn {metadata.version('flash-attn')}"
    common = {"hidden_size": width, "layer_idx": 0, "norm_eps": EPSILON}
    if name == "rnn":
        return HGRNAttention(expand_ratio=1, **common), "fla.layers.HGRNAttention"
    shape = {
        "gated_deltanet": {"num_heads": 3 * heads // 8, "head_dim": 2 * head_dim, "expand_v": 2},
        "gated_deltanet_square": {"num_heads": heads, "head_dim": head_dim, "expand_v": 1},
    }[name]
    return GatedDeltaNet(**shape, **common), f"fla.layers.GatedDeltaNet, {_kernels()}"


def _kernels() -> str:
    """Which packages the package has kernels from: it chooses among them by itself."""
    names = [name for name in ("triton", "tilelang", "flash_qla") if importlib.util.find_spec(name) is not None]
    return ", ".join(map(_with_version, names))


def _with_version(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:  # it came under another name
        return name


def make_layer(task: Task, name: str, rows: int, tokens: int) -> Layer:
    """x + mixer(norm(x)); linear_attention is the op by itself, whose values are x."""
    if name == "linear_attention":
        shape = rows, tokens, task.heads, task.width // task.heads
        query, key = (torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
        how = "fla.ops.linear_attn.chunk_linear_attn, features under torch.compile"
        return Layer(functools.partial(attend, query, key, torch.compile(features, dynamic=False)), (query, key), how)
    layer, how = mixer(task, name)
    norm = RMSNorm(task.width, eps=EPSILON).to(torch.bfloat16)
    vectors = {key: value.detach() for key, value in layer.named_parameters() if key in VECTORS}
    layer = layer.to(torch.bfloat16)
    for key, value in vectors.items():
        setattr(layer, key, torch.nn.Parameter(value))
    return Layer(lambda x: x + layer(norm(x))[0], (*norm.parameters(), *layer.parameters()), how)


def features(part: torch.Tensor) -> torch.Tensor:
    """phi(x) = [softmax(x), softmax(-x)] over the channels."""
    part32 = part.float()
    return torch.cat([part32.softmax(-1), (-part32).softmax(-1)], dim=-1).to(part.dtype)


def attend(query: torch.Tensor, key: torch.Tensor, phi, x: torch.Tensor) -> torch.Tensor:
    """out_t = sum_{s <= t} phi(q_t) phi(k_s)^T v_s with the values x [B, T, W]."""
    out, _ = chunk_linear_attn(phi(query), phi(key), x.reshape(query.shape), scale=1.0, normalize=False)
    return out.reshape(x.shape)


def main() -> None:
    """Prints every row."""
    task = task_of_process()
    note("imports done")
    if not torch.cuda.is_available():
        raise SystemExit("its Triton kernels need a GPU, and PyTorch sees none")
    about = {"rival": FLA, "version": metadata.version("flash-linear-attention")}
    torch_passes.say_rows(task, functools.partial(make_layer, task), about)


if __name__ == "__main__":
    main()
