"""Records Gated DeltaNet as a public PyTorch implementation computes it: writes gated_delta_net.npz beside itself.

  pip install torch transformers==5.24.0
  python tests/testdata/record_gated_delta_net.py

The implementation is that of Qwen3-Next in `transformers`, in float32 on a CPU. It scales queries by 1 / sqrt(Hk); what
is recorded for the op has the scale taken out. Its layer has one matrix for several projections, with rows sorted by
head; what is recorded is one matrix for each projection, rows sorted by head and then by channel.
"""

import pathlib

import numpy as np
import torch
import transformers
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

FOLDER = pathlib.Path(__file__).parent
HEADS, KEY_DIM, VALUE_DIM, WIDTH = 2, 8, 16, 24


def op() -> dict[str, torch.Tensor]:
    """Inputs, outputs and gradients of the chunked rule over 75 tokens, chunks of 16; the recurrent one agrees."""
    batch, tokens = 2, 75
    inputs = {
        "query": torch.randn(batch, tokens, HEADS, KEY_DIM),
        "key": torch.nn.functional.normalize(torch.randn(batch, tokens, HEADS, KEY_DIM), dim=-1),
        "value": torch.randn(batch, tokens, HEADS, VALUE_DIM),
        "log_decay": -torch.exp(torch.randn(batch, tokens, HEADS) - 2),
        "write_strength": torch.sigmoid(torch.randn(batch, tokens, HEADS)),
        "initial_state": torch.randn(batch, HEADS, KEY_DIM, VALUE_DIM),
    }
    for x in inputs.values():
        x.requires_grad_()
    arguments = {
        "query": inputs["query"] * KEY_DIM**0.5,
        "key": inputs["key"],
        "value": inputs["value"],
        "g": inputs["log_decay"],
        "beta": inputs["write_strength"],
        "initial_state": inputs["initial_state"],
        "output_final_state": True,
    }
    out, final_state = qwen3_next.torch_chunk_gated_delta_rule(chunk_size=16, **arguments)
    with torch.no_grad():
        again = qwen3_next.torch_recurrent_gated_delta_rule(**arguments)
    for found, want in zip(again, (out, final_state), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    d_out, d_final_state = torch.randn_like(out), torch.randn_like(final_state)
    gradients = torch.autograd.grad((out, final_state), list(inputs.values()), (d_out, d_final_state))
    results = {"out": out, "final_state": final_state, "d_out": d_out, "d_final_state": d_final_state}
    return inputs | results | {f"d_{name}": x for name, x in zip(inputs, gradients, strict=True)}


def split_by_projection(fused: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of parameters or their gradients: the fused matrices [out, in] and the fused convolution, cut up."""
    per_head = fused["in_proj_qkvz.weight"].reshape(HEADS, -1, WIDTH)
    parts = per_head.split([KEY_DIM, KEY_DIM, VALUE_DIM, VALUE_DIM], dim=1)
    split = {f"{name}_proj": x.reshape(-1, WIDTH) for name, x in zip("qkvg", parts, strict=True)}
    write, decay = fused["in_proj_ba.weight"].reshape(HEADS, 2, WIDTH).unbind(1)
    convolutions = fused["conv1d.weight"][:, 0].split([HEADS * KEY_DIM, HEADS * KEY_DIM, HEADS * VALUE_DIM])
    split |= {"write_proj": write, "decay_proj": decay}
    split |= {f"{name}_convolution": x for name, x in zip("qkv", convolutions, strict=True)}
    return split | {
        "A_log": fused["A_log"],
        "dt_bias": fused["dt_bias"],
        "norm": fused["norm.weight"],
        "out_proj": fused["out_proj.weight"],
    }


def layer() -> dict[str, torch.Tensor]:
    """A whole layer: its parameters, an input of 40 tokens, the output and the gradients of both."""
    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY_DIM,
        linear_value_head_dim=VALUE_DIM,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    module = qwen3_next.Qwen3NextGatedDeltaNet(config, 0).float()
    with torch.no_grad():
        module.dt_bias.copy_(torch.randn(HEADS))
        module.A_log.copy_(torch.randn(HEADS) - 1)
        module.norm.weight.copy_(1 + 0.1 * torch.randn(VALUE_DIM))
    x = torch.randn(2, 40, WIDTH, requires_grad=True)
    y = module(x)
    d_y = torch.randn_like(y)
    names, parameters = zip(*module.named_parameters(), strict=True)
    d_x, *gradients = torch.autograd.grad(y, (x, *parameters), d_y)
    recorded = {"x": x, "y": y, "d_y": d_y, "d_x": d_x}
    for prefix, arrays in (("param", parameters), ("grad", gradients)):
        split = split_by_projection(dict(zip(names, arrays, strict=True)))
        recorded |= {f"{prefix}/{name}": array for name, array in split.items()}
    return recorded


if __name__ == "__main__":
    torch.manual_seed(0)
    recorded = {f"op/{name}": x for name, x in op().items()} | {f"layer/{name}": x for name, x in layer().items()}
    versions = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    np.savez_compressed(
        FOLDER / "gated_delta_net.npz",
        versions=versions,
        **{name: x.detach().numpy() for name, x in recorded.items()},
    )
