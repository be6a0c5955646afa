"""One layer by itself: x + mixer(norm(x)) with a mixer of the library, its passes and its decode steps."""

import ast
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.cudnn_attention import BASELINES
from rat_jax.layers import Ahead, RmsNorm
from rat_jax.mixers import MIXERS, Mixer, ModelShape
from rat_jax.mixers.base import MixerCache
from rat_jax.segments import SegmentInfo, whole_rows
from rat_jax.shapes import Array, Float, Int

DTYPE = jnp.bfloat16
NAMES = [*BASELINES, *MIXERS]
IMPLEMENTATIONS = [f"{kind}:implementation={x}" for kind, mixer in MIXERS.items() for x in mixer.IMPLEMENTATIONS]


class Sizes(NamedTuple):
    """Of all layers of a table."""

    width: int  # D
    heads: int  # N
    key_heads: int  # K, of the mixers that have key heads of their own
    settings: dict[str, Any]  # fields of mixers' configs, for the mixers that have them


class Layer(nnx.Module):
    """A mixer with its norm and the residual; operands of matrix products are bfloat16, as in decoding."""

    def __init__(self, mixer: Mixer):
        self.norm = RmsNorm(mixer.shape.width)
        self.mixer = mixer

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Rows that are one document each."""
        x, normed = self.norm.beside_residual(x)
        return x + self.mixer.out_proj(self.mixer.mix(normed, whole_rows(*x.shape[:2]))[0])

    def step(
        self, x: Float[Array, "B 1 D"], position: Int[Array, ""], memory: MixerCache
    ) -> tuple[Float[Array, "B 1 D"], MixerCache]:
        """One token a row, all at the same position."""
        positions = jnp.full(x.shape[:2], position, jnp.int32)
        segments = SegmentInfo(jnp.ones_like(positions), positions, positions, contiguous=False)
        mixed, memory = self.mixer.mix(x, segments, memory, Ahead(self.norm))
        return x + self.mixer.out_proj(mixed), memory


def make_layer(name: str, sizes: Sizes) -> tuple[nnx.GraphDef, nnx.State]:
    """A layer split into its structure and its parameters.

    Args:
      name: a kind of `MIXERS` or of `BASELINES`; after a colon settings of its own: rattention:window=2048 or
        rat:implementation=xla.
      sizes: of the table.

    Raises:
      ValueError: if there is no such kind or setting.
    """
    kind, _, changes = name.partition(":")
    classes = MIXERS | BASELINES
    if kind not in classes:
        raise ValueError(f"no layer is called {kind!r}; there are {', '.join(classes)}")
    cls = classes[kind]
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    settings = {field: value for field, value in sizes.settings.items() if field in fields}
    implementation = None
    for change in filter(None, changes.split(",")):
        field, equals, value = change.partition("=")
        if field == "implementation" and value in cls.IMPLEMENTATIONS:
            implementation = value
        elif field in fields and equals:
            settings[field] = _literal(value)
        else:
            known = ", ".join([*sorted(fields), *(f"implementation={name}" for name in cls.IMPLEMENTATIONS)])
            raise ValueError(f"{kind!r} has no setting {change!r}; its settings are {known}")
    shape = ModelShape(
        width=sizes.width, num_heads=sizes.heads, num_kv_heads=sizes.key_heads, dtype=jnp.dtype(DTYPE).name
    )

    def make() -> Layer:
        mixer = cls.from_config(cls.Config(**settings), shape, rngs=nnx.Rngs(0))
        mixer.implementation = implementation
        return Layer(mixer)

    return nnx.graphdef(nnx.eval_shape(make)), jax.jit(lambda: _cast(nnx.state(make()), cls))()


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a name: "relu"
        return text


def _cast(params: nnx.State, cls: type[Mixer]) -> nnx.State:
    flat = []
    for path, param in nnx.to_flat_state(params):
        spec = cls.PARAMETERS.get(".".join(path[1:])) if path[0] == "mixer" else None
        flat.append((path, param.replace(param[...].astype(DTYPE)) if spec is not None and spec.matmul else param))
    return nnx.from_flat_state(flat)


def apply_layer(graphdef: nnx.GraphDef, params: nnx.State, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """The output."""
    return nnx.merge(graphdef, params)(x)


def train_layer(graphdef: nnx.GraphDef, params: nnx.State, x: Array, d_out: Array) -> tuple[Array, Any]:
    """The output and the gradients of parameters and input."""
    out, pull = jax.vjp(functools.partial(apply_layer, graphdef), params, x)
    return out, pull(d_out)


def init_memory(graphdef: nnx.GraphDef, params: nnx.State, rows: int, capacity: int) -> MixerCache:
    """An empty cache."""
    return nnx.merge(graphdef, params).mixer.init_memory(rows, capacity)


def decode(
    graphdef: nnx.GraphDef, steps: int, params: nnx.State, x: Array, memory: MixerCache, position: Int[Array, ""]
) -> tuple[Array, MixerCache]:
    """The `steps` steps of a layer that end before `position`, each fed with the output of the one before.

    The memory, to be donated, is the carry of the loop, so that it is updated in place.
    """
    first = position - steps

    def step(i, carry):
        return nnx.merge(graphdef, params).step(carry[0], first + i, carry[1])

    return jax.lax.fori_loop(0, steps, step, (x, memory))


def product_operations(graphdef: nnx.GraphDef, params: nnx.State, batch: int, tokens: int) -> tuple[float, float]:
    """Operations of the projections, and of the scores and weighted sums, in one forward pass."""
    mixer = nnx.merge(graphdef, params).mixer
    count, shape = batch * tokens, mixer.shape
    projections = 2.0 * count * sum(math.prod(shape) for _, shape in _projections(mixer))
    return projections, 4.0 * count * mixer.config.mean_keys(shape, tokens) * shape.width


def min_bytes(graphdef: nnx.GraphDef, params: nnx.State, count: int) -> tuple[int, int]:
    """Bytes that norm and mixing move at least for `count` tokens: by the forward pass, by both passes.

    Forward: x in, normed out; projected in, mixed out. Backward: projected and the mixed tokens' gradient in, that of
    projected out; x and two gradients in, that of x out, and one more for the recomputed norm.
    """
    mixer = nnx.merge(graphdef, params).mixer
    width = mixer.shape.width
    channels = sum(shape[1] for axes, shape in _projections(mixer) if axes[0] == "width")
    mixed = sum(shape[0] for axes, shape in _projections(mixer) if axes[1] == "width")
    forward = channels + mixed + 2 * width
    backward = 2 * channels + mixed + 4 * width
    size = jnp.dtype(DTYPE).itemsize
    return size * count * forward, size * count * (forward + backward)


def step_bytes(graphdef: nnx.GraphDef, params: nnx.State, rows: int, position: int) -> int:
    """Bytes that a decode step at `position` reads at least: the cache and the matrices."""
    mixer = nnx.merge(graphdef, params).mixer
    memory = jax.eval_shape(lambda: mixer.init_memory(rows, position))
    matrices = jnp.dtype(DTYPE).itemsize * sum(math.prod(shape) for _, shape in _projections(mixer))
    return mixer.step_bytes(memory, position) + matrices


def _projections(mixer: Mixer) -> list[tuple[tuple[str | None, ...], tuple[int, ...]]]:
    """Logical axes and shapes of the matrices that every token is multiplied by."""
    specs = [(mixer.PARAMETERS[".".join(path)], param.shape) for path, param in nnx.to_flat_state(nnx.state(mixer))]
    return [(spec.axes, shape) for spec, shape in specs if spec.matmul and "width" in spec.axes]
