"""Draws the parameters that the recorded models had before their training run: writes initial.npz beside itself.

  python tests/testdata/draw_initial.py

The recordings hold `param/` as it stood after the run (see README.md). What it was before is the stream of
`torch.manual_seed(0)`: the release's own initialisation, which leaves the gate biases log(Uniform(1, m - 1)), then for
each parameter in the recorded order but the gate biases a normal draw, times 1 / sqrt(inputs) for matrices, or 1 + 0.1
of it for norms, then the recorded `input_ids` and `labels`. Offsets count draws from the seed on.
"""

import pathlib

import numpy as np
import torch

FOLDER = pathlib.Path(__file__).parent
# Where input_ids stand in the stream; where each gate bias stands, and its m.
INPUT_IDS_AT = {"attention": 83648, "rnn": 83712, "rat": 89856, "attention_swa": 83648, "rat_swa": 86752}
GATE_BIASES_AT = {"rnn": {0: 32576, 1: 44896}, "rat": {0: 35648, 1: 48992}, "rat_swa": {0: 34624}}
TIMESCALE = {"rnn": 64, "rat": 8, "rat_swa": 8}
HEAD = "head.lm_head.weight"


def seed_at(offset: int) -> None:
    torch.manual_seed(0)
    torch.rand(offset)


def initial_parameters(name: str) -> dict[str, np.ndarray]:
    recorded = np.load(FOLDER / f"{name}.npz")
    shapes = {key.removeprefix("param/"): recorded[key].shape for key in recorded.files if key.startswith("param/")}
    drawn = [key for key in shapes if key != HEAD and not key.endswith("gate_bias")]
    parameters = {}
    seed_at(INPUT_IDS_AT[name] - sum(int(np.prod(shapes[key])) for key in drawn))
    for key in drawn:
        normal = torch.randn(shapes[key])
        parameters[key] = (1 + 0.1 * normal if normal.ndim == 1 else normal * normal.shape[1] ** -0.5).numpy()
    if not np.array_equal(torch.randint(3, 61, (2, 64)).numpy(), recorded["input_ids"]):
        raise SystemExit(f"{name}: this torch draws other numbers than the one that recorded the release")
    for layer, offset in GATE_BIASES_AT.get(name, {}).items():
        seed_at(offset)
        key = f"backbone.layers.{layer}.seq_layer.gate_bias"
        parameters[key] = torch.empty(shapes[key]).uniform_(1, TIMESCALE[name] - 1).log().numpy()
    return {f"{name}/{key}": parameters[key] for key in shapes if key != HEAD}


if __name__ == "__main__":
    np.savez_compressed(
        FOLDER / "initial.npz", **{k: v for name in INPUT_IDS_AT for k, v in initial_parameters(name).items()}
    )
