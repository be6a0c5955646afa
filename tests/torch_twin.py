"""A second, short implementation of the mixers and the model in PyTorch, written from the papers' equations.

It works by masks and explicit loops where `rat_jax` uses scans, blocks and caches. `Model.state_dict()` has the
release's names.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def rotate(x, positions, base=10_000.0):
    """x [B, T, N, H] rotated in the plane of the channels i and i + H/2."""
    frequency = base ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    angle = torch.cat([positions[:, None] * frequency] * 2, dim=-1)[:, None, :]
    turned = torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], dim=-1)
    return x * angle.cos() + turned * angle.sin()


def running_mean(gate, value, restart_every):
    """s_t = f_t s_{t-1} + (1 - f_t) v_t with f = sigmoid(gate), from 0 at every multiple of `restart_every`."""
    states, forget = [], torch.sigmoid(gate)
    for t in range(value.shape[1]):
        state = torch.zeros_like(value[:, 0]) if t % restart_every == 0 else states[-1]
        states.append(forget[:, t] * state + (1 - forget[:, t]) * value[:, t])
    return torch.stack(states, dim=1)


class RmsNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Mixer(nn.Module):
    """x + W_o mix(W_i norm(x)); a kind each defines `mix`."""

    def __init__(self, width, num_heads, projected, has_gate):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.input_norm = RmsNorm(width)
        self.in_proj = nn.Linear(width, projected, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        if has_gate:
            self.gate_bias = nn.Parameter(torch.randn(width) + 1)

    def forward(self, x):
        return x + self.out_proj(self.mix(self.in_proj(self.input_norm(x))))

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))


class Attention(Mixer):
    def __init__(self, width, num_heads, window=None, rope=True):
        super().__init__(width, num_heads, 3 * width, has_gate=False)
        self.window, self.rope = window, rope

    def mix(self, projected):
        v, q, k = (self.heads(x) for x in projected.chunk(3, dim=-1))
        t = torch.arange(projected.shape[1])
        if self.rope:
            q, k = rotate(q, t), rotate(k, t)
        distance = t[:, None] - t[None]
        sees = (distance >= 0) & (distance <= (len(t) if self.window is None else self.window))
        scores = torch.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(self.head_dim)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        return torch.einsum("bnts,bsnh->btnh", weights, v).flatten(-2)


class Rnn(Mixer):
    def __init__(self, width):
        super().__init__(width, 1, 3 * width, has_gate=True)

    def mix(self, projected):
        z, v, g = projected.chunk(3, dim=-1)
        return torch.sigmoid(z) * running_mean(g + self.gate_bias, v, restart_every=v.shape[1])


class Rat(Mixer):
    def __init__(self, width, num_heads, num_groups, chunk_size, rope=True):
        head_dim = width // num_heads
        super().__init__(width, num_heads, 3 * width + 2 * num_groups * head_dim, has_gate=True)
        self.sizes = [width] * 3 + [num_groups * head_dim] * 2
        self.chunk_size, self.rope = chunk_size, rope

    def mix(self, projected):
        z, v, g, q, k = projected.split(self.sizes, dim=-1)
        group = torch.arange(self.num_heads) % (q.shape[-1] // self.head_dim)
        v, g, q, k = (
            self.heads(v),
            self.heads(g + self.gate_bias),
            self.heads(q)[:, :, group],
            self.heads(k)[:, :, group],
        )
        value, key = running_mean(g, v, self.chunk_size), running_mean(g, k, self.chunk_size)
        t = torch.arange(projected.shape[1])
        chunk = t // self.chunk_size
        if self.rope:
            q, key = rotate(q, chunk), rotate(key, chunk)
        is_last = (t + 1) % self.chunk_size == 0  # of a chunk: its state sums the chunk up
        sees = (is_last[None] & (chunk[None] < chunk[:, None])) | (t[None] == t[:, None])
        scores = torch.einsum("btnh,bsnh->bnts", q, key) / math.sqrt(self.head_dim)
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        return torch.sigmoid(z) * torch.einsum("bnts,bsnh->btnh", weights, value).flatten(-2)


class Mlp(nn.Module):
    def __init__(self, width, mlp_width):
        super().__init__()
        self.ln = RmsNorm(width)
        self.fc1 = nn.Linear(width, mlp_width, bias=False)
        self.fc2 = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x):
        return x + self.fc2(functional.gelu(self.fc1(self.ln(x))))


class Model(nn.Module):
    """Logits [B, T, V] of tokens [B, T]; `mixers` are those of the layers, in their order."""

    def __init__(self, vocab_size, width, mlp_width, mixers):
        super().__init__()
        layers = [nn.ModuleDict({"seq_layer": mixer, "hidden_layer": Mlp(width, mlp_width)}) for mixer in mixers]
        self.embedding = nn.ModuleDict({"wte": nn.Embedding(vocab_size, width)})
        self.backbone = nn.ModuleDict({"layers": nn.ModuleList(layers), "ln": RmsNorm(width)})
        self.head = nn.ModuleDict({"lm_head": nn.Linear(width, vocab_size, bias=False)})
        self.head["lm_head"].weight = self.embedding["wte"].weight

    def forward(self, tokens):
        x = self.embedding["wte"](tokens)
        for layer in self.backbone["layers"]:
            x = layer["hidden_layer"](layer["seq_layer"](x))
        return self.head["lm_head"](self.backbone["ln"](x))
