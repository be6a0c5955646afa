"""The PyTorch layers that the benchmarks compare with, against the twin that the models are tested with."""

import pytest

torch = pytest.importorskip("torch")
torch_layers = pytest.importorskip("benchmarks.torch_layers")
twin = pytest.importorskip("tests.torch_twin")

WIDTH, HEADS, GROUPS, CHUNK_SIZE, TOKENS = 32, 4, 2, 4, 24
DEVICE = "cpu"


def make_twin(kind, params):
    layer = twin.Rat(WIDTH, HEADS, GROUPS, CHUNK_SIZE) if kind == "rat" else twin.Attention(WIDTH, HEADS)
    names = {"scale": "input_norm.weight", "in": "in_proj.weight", "out": "out_proj.weight", "gate_bias": "gate_bias"}
    layer.load_state_dict({names[name]: tensor.detach().clone() for name, tensor in params.items()})
    return layer, {name: dict(layer.named_parameters())[names[name]] for name in params}


def make_inputs(kind):
    torch.manual_seed(0)
    params = torch_layers.make_params(kind, WIDTH, HEADS, GROUPS, torch.float32, DEVICE)
    with torch.no_grad():  # matrices large enough that attention is not uniform
        params["in"] *= 20
        params["out"] *= 5
    return params, torch.randn(2, TOKENS, WIDTH, device=DEVICE, requires_grad=True)


def run_layer(kind, params, x):
    if kind == "attention":
        return torch_layers.attention(params, x, heads=HEADS)
    mask = torch_layers.summary_mask(TOKENS, CHUNK_SIZE, DEVICE)
    return torch_layers.rat(params, x, heads=HEADS, groups=GROUPS, chunk_size=CHUNK_SIZE, mask=mask)


@pytest.mark.parametrize("kind", torch_layers.LAYERS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_output(kind):
    params, x = make_inputs(kind)
    with torch.no_grad():
        want = make_twin(kind, params)[0](x)
        torch.testing.assert_close(run_layer(kind, params, x), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_gradients_of_attention():  # flex_attention has none on the CPU
    params, x = make_inputs("attention")
    layer, twin_params = make_twin("attention", params)
    d_out = torch.randn_like(x)
    gradients = torch.autograd.grad(run_layer("attention", params, x), [x, *params.values()], d_out)
    want = torch.autograd.grad(layer(x), [x, *twin_params.values()], d_out)
    for gradient, expected in zip(gradients, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_gradients_of_the_scan():
    gate, value, d_out = (torch.randn(2, TOKENS, 3, dtype=torch.float64) for _ in range(3))
    gate.requires_grad_(), value.requires_grad_()
    forget = torch.sigmoid(gate)
    cut = [x.view(2, -1, CHUNK_SIZE, 3) for x in (forget, (1 - forget) * value)]
    out = torch_layers.ChunkScan.apply(*cut).reshape(value.shape)
    want = twin.running_mean(gate, value, CHUNK_SIZE)
    torch.testing.assert_close(out, want)
    gradients, expected = (torch.autograd.grad(x, (gate, value), d_out) for x in (out, want))
    torch.testing.assert_close(gradients, expected)
