"""The layers and models of this library, through `benchmarks/layers.py` and `benchmarks/model_throughput.py`."""

import functools

import jax

from benchmarks import card, layers, model_throughput
from benchmarks.printed_rows import Row, say
from benchmarks.rivals import jax_passes
from benchmarks.rivals.jax_passes import Layer
from benchmarks.rivals.task import OURS, Task, note, reason, task_of_process
from rat_jax import __version__
from rat_jax.ops import linear_attention

# The fastest settings of docs/performance.md at 8 sequences of 4096 tokens.
AS_TRAINED = {"remat": "dots", "scan_unroll": 24}
SMALL = {"width": 64, "num_layers": 2, "num_heads": 4, "mlp_width": 128, "vocab_size": 256, "seq_len": 64}


def spec(name: str, task: Task) -> str:
    """The layer's name in `benchmarks/layers.py`, with the settings that make it the rivals' shape."""
    head_dim = task.width // task.heads
    settings = {
        "local_attention": f":window={task.keys_seen - 1}",  # earlier tokens
        "gated_deltanet": f":num_heads={3 * task.heads // 8},head_dim={2 * head_dim}",
        "gated_deltanet_square": f":num_heads={task.heads},head_dim={head_dim},expand_v=1.0",
    }
    return name.removesuffix("_square") + settings.get(name, "")


def make_layer(task: Task, name: str, rows: int, tokens: int) -> Layer:
    """The layer; linear_attention is the op by itself, whose values are x."""
    if name == "linear_attention":
        shape = rows, tokens, task.heads, task.width // task.heads
        params = tuple(jax.random.normal(jax.random.key(seed), shape, layers.DTYPE) for seed in (2, 3))
        return Layer(params, attend, "rat_jax.ops.linear_attention, softmax features")
    sizes = layers.Sizes(task.width, task.heads, task.heads, {"rope_base": 10_000.0})
    graphdef, params = layers.make_layer(spec(name, task), sizes)
    return Layer(params, functools.partial(layers.apply_layer, graphdef), f"rat_jax.mixers: {spec(name, task)}")


def attend(params: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
    """Linear attention of queries and keys with the values x [B, T, W]."""
    query, key = params
    return linear_attention(query, key, x.reshape(query.shape)).out.reshape(x.shape)


def model_row(task: Task, name: str, sequences: int) -> Row:
    """Training steps of a config of `configs`."""
    config = model_throughput.load_config(f"configs/{name}.py", sequences, **(SMALL if task.small else AS_TRAINED))
    row: Row = {"model": name, "sequences": sequences, "tokens": config.data.seq_len}
    row["how"] = f"remat {config.model.remat}, scan_unroll {config.model.scan_unroll}"
    try:
        seconds, parameters, held_gb, _ = model_throughput.measure_training(config, task.repeats + 2, None)
    except jax.errors.JaxRuntimeError as error:
        return row | {"error": reason(error)}
    rate = sequences * config.data.seq_len / seconds
    return row | {"step_ms": 1e3 * seconds, "tokens_per_s": rate, "parameters": parameters, "gb": held_gb}


def main() -> None:
    """Prints the card and every row."""
    task = task_of_process()
    note("imports done")
    card.share_memory()
    say({"card": card.describe()})
    about = {"rival": OURS, "version": __version__}
    jax_passes.say_rows(task, functools.partial(make_layer, task), about)
    jax_passes.say_models(task, model_row, about)


if __name__ == "__main__":
    main()
