"""The contract that every mixer keeps: its config, its module, its cache, and the facts that others ask it for."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.fields import check_types
from rat_jax.layers import Ahead
from rat_jax.memory import tree_bytes
from rat_jax.parameters import ParameterSpec
from rat_jax.segments import PADDING, SegmentInfo, StreamState, as_segments, check_shape, from_segments
from rat_jax.shapes import Array, Float, Int, Shaped

MixerCache = Any  # a dataclass of arrays that the mixer defines


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a model has in common with all its mixers."""

    width: int  # D, channels of the residual stream
    num_heads: int  # N; a head has H = width / num_heads channels
    # Of mixers with attention over tokens; the others leave both as they are.
    num_kv_heads: int | None = None  # K, key heads that N / K query heads share each (arXiv 2305.13245); None: N
    qk_norm: bool = False  # RMS norm of each head's queries and keys before they are rotated (arXiv 2302.05442)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations and matrix products; parameters are float32

    def __post_init__(self):
        check_types(self)
        for name, value in (("width", self.width), ("num_heads", self.num_heads)):
            require(value >= 1, f"{name} must be 1 or more, got {value}")
        require(
            self.width % self.num_heads == 0,
            f"width must be a multiple of num_heads, got width {self.width} and num_heads {self.num_heads}",
        )
        require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got num_heads {self.num_heads} and num_kv_heads "
            f"{self.num_kv_heads}",
        )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """The settings of one kind of mixer; subclasses have defaults, which are the only ones in the project."""

    def __post_init__(self):
        check_types(self)

    def check(self, shape: ModelShape) -> None:
        """Checks that a model of this shape can have the mixer.

        Raises:
          ConfigError: naming the field.
        """

    def check_cut(self, shape: ModelShape, tokens: int, context: int, tensor: int) -> None:
        """Checks that a mesh can cut rows into `context` parts of `tokens` tokens each, and heads into `tensor` parts.

        Raises:
          ConfigError: naming the two numbers that do not fit.
        """
        for name, heads in (("num_heads", shape.num_heads), ("num_kv_heads", shape.kv_heads)):
            require_divides(name, heads, tensor)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        """Keys that a token of a row of `seq_len` tokens meets on average, for the count of operations.

        A mixer whose state is a matrix counts what is written to and read from it in keys of H channels.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ReleaseCell:
    """How the PyTorch release of RAT (arXiv 2507.04416) describes a mixer in its `model` configuration and weights."""

    name: str  # `_name_` of its `seq_cell`
    fields: Mapping[str, str]  # whole numbers of the cell, and the fields of the mixer's config that they are
    has_heads: bool  # whether the cell says d_head, num_head and k_channel
    rotation: Literal["rope", "interrope"] | None  # positions that it needs: by token, by chunk or none
    parameters: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Besides `in_proj`, `out_proj` and the norm, which all have: names under `seq_layer`, and their paths here."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """What a layer on its own remembers of the rows it has read."""

    memory: MixerCache
    stream: StreamState
    capacity: int = dataclasses.field(metadata={"static": True})  # tokens a row


class Mixer(nnx.Module):
    """Moves information between tokens, [B, T, D] to [B, T, D]; see `rat_jax.mixers` for its use.

    A subclass takes plain arguments, fields of `ModelShape` and of its config, and holds them as `shape` and `config`;
    it has the projections `in_proj` and `out_proj` and defines `mix`, `init_memory` and `step_bytes`. Parameters are
    float32.
    """

    Config: ClassVar[type[MixerConfig]]
    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]]  # by name within the mixer
    RELEASE: ClassVar[ReleaseCell | None] = None  # None: the release has no such mixer

    IMPLEMENTATIONS: ClassVar[tuple[str, ...]] = ()  # names that `implementation` may have
    # Whether the product with the matrix of `in_proj`, by a function of `rat_jax.layers`, is all that it makes of its
    # input. Decoding may then have it multiplied ahead.
    PROJECTS_ONCE: ClassVar[bool] = False

    shape: ModelShape
    config: MixerConfig
    in_proj: nnx.Linear
    out_proj: nnx.Linear
    implementation: str | None = None  # of the mixer's op; None: the fastest on the platform that takes the call

    @classmethod
    def from_config(cls, config: MixerConfig, shape: ModelShape, *, rngs: nnx.Rngs) -> "Mixer":
        """The mixer of a model's layer: its arguments are the fields of both that it takes."""
        arguments = vars(shape) | vars(config)
        known = inspect.signature(cls.__init__).parameters
        return cls(**{name: value for name, value in arguments.items() if name in known}, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | SegmentInfo | None = None
    ) -> Float[Array, "B T D"]:
        """Mixes tokens that start their rows.

        Args:
          x: of the dtype that the mixer computes in.
          segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours
            of the same other value are one document, across whose ends nothing is seen. None: each row is one document.

        Raises:
          ValueError: if x is not [B, T, width] with at least one token, or `segment_ids` have another shape.
        """
        self._check(x)
        return self.out_proj(self.mix(x, as_segments(segment_ids, x.shape[:2]))[0])

    def init_cache(self, batch_size: int, capacity: int) -> LayerCache:
        """An empty cache for rows of at most `capacity` tokens; `extend` reads tokens into it.

        Raises:
          ValueError: if either is not 1 or more.
        """
        check_cache_size(batch_size, capacity)
        return LayerCache(self.init_memory(batch_size, capacity), StreamState.empty(batch_size), capacity)

    def cache_bytes(self, batch_size: int, capacity: int) -> int:
        """Bytes of what `init_cache` makes, without making it; errors as there."""
        return tree_bytes(jax.eval_shape(lambda: self.init_cache(batch_size, capacity)))

    def extend(
        self, x: Float[Array, "B T D"], cache: LayerCache, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """Mixes tokens that follow those in the cache: a prompt, a part of one, or a single step.

        Args:
          x: of the dtype that the mixer computes in.
          cache: from `init_cache` or an earlier call.
          segment_ids: as in `__call__`; a row continues its document if the id is the same. None: no padding.

        Raises:
          ValueError: if x does not fit the layer or the cache, or the call alone has more tokens than the cache has
            room for (which cannot be seen of `segment_ids` under `jax.jit`). Calls that fill it together beyond that
            are not noticed: what does not fit is not remembered.
        """
        self._check(x)
        segments, stream = next_segments(segment_ids, cache.stream, x.shape[:2], cache.capacity)
        self._check_memory(cache)
        mixed, memory = self.mix(x, segments, cache.memory)
        return self.out_proj(mixed), LayerCache(memory, stream, cache.capacity)

    def _check(self, x: Array) -> None:
        if x.ndim != 3 or x.shape[2] != self.shape.width or not x.size:
            raise ValueError(f"x must be [B, T, {self.shape.width}] with at least one row and token, got {x.shape}")

    def _check_memory(self, cache: LayerCache) -> None:
        own = jax.eval_shape(lambda: self.init_memory(cache.stream.segment_id.shape[0], cache.capacity))
        if jax.tree.structure(own) != jax.tree.structure(cache.memory) or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(cache.memory), strict=True)
        ):
            raise ValueError(
                f"the cache holds a {type(cache.memory).__name__} of another layer: extend takes those of this layer's "
                f"init_cache"
            )

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: MixerCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T _"], MixerCache | None]:
        """What `__call__` (memory None) and `extend` share: what `out_proj` multiplies, and the memory after it if any.

        Args:
          x: the tokens.
          segments: of the tokens.
          memory: of earlier tokens.
          ahead: if given, the mixer is of normed tokens; it goes to the functions of `rat_jax.layers` that project x
            by `in_proj`. What reads x besides takes `ahead.norm(x)`, in a mixer that does not say `PROJECTS_ONCE`.
        """
        raise NotImplementedError

    def init_memory(self, batch_size: int, capacity: int) -> MixerCache:
        """What is remembered before the first token, with room for `capacity` tokens a row.

        Where in it a row's tokens are follows from their places in the row (`SegmentInfo`), which all layers share.
        """
        raise NotImplementedError

    def step_bytes(self, memory: MixerCache, position: int) -> int:
        """Bytes that a step at `position` reads at least of a memory (arrays or their shapes)."""
        raise NotImplementedError


def next_segments(
    segment_ids: Int[Array, "B T"] | None, stream: StreamState, shape: tuple[int, int], capacity: int
) -> tuple[SegmentInfo, StreamState]:
    """The segments of [B, T] tokens that continue rows, and where the rows end then; see `Mixer.extend`."""
    check_room(segment_ids, stream, shape, capacity)
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.int32)
    return from_segments(segment_ids, stream)


def check_room(segment_ids: Array | None, stream: StreamState, shape: tuple[int, int], capacity: int) -> None:
    """Raises ValueError if [B, T] tokens do not fit a cache, as far as that can be seen; see `Mixer.extend`."""
    rows = stream.segment_id.shape[0]
    if shape[0] != rows or not shape[1]:
        raise ValueError(
            f"the cache is of {rows} rows, and each call reads 1 token or more: got {shape[0]} x {shape[1]}"
        )
    count = shape[1]
    if segment_ids is not None:
        check_shape(segment_ids, shape)
        if count > capacity:  # padding needs no room
            traced = isinstance(segment_ids, jax.core.Tracer)
            count = 0 if traced else int(jnp.max(jnp.sum(segment_ids != PADDING, axis=1)))
    if count > capacity:
        raise ValueError(
            f"{count} tokens do not fit a cache of capacity {capacity}: make it with init_cache(batch_size, "
            f"capacity={count}) or more"
        )


def check_cache_size(batch_size: int, capacity: int) -> None:
    """Raises ValueError if no cache can have these sizes."""
    for name, size in (("batch_size", batch_size), ("capacity", capacity)):
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of 1 or more, got {size!r}")


def bytes_of(x: Shaped[Array | jax.ShapeDtypeStruct, "B S *axes"], num_slots: int | None = None) -> int:
    """Bytes of an array, or of its first slots along axis 1."""
    share = 1 if num_slots is None else min(num_slots, x.shape[1]) / x.shape[1]
    return round(x.dtype.itemsize * x.size * share)


def require_divides(name: str, count: int, tensor: int) -> None:
    """Refuses a number of heads or channels that the tensor axis of a mesh cannot cut."""
    require(count % tensor == 0, f"{name} {count} does not divide among the {tensor} parts of config.mesh.tensor")


def require_even_heads(rope: bool, shape: ModelShape) -> None:
    """Rotation turns pairs of channels."""
    require(
        not rope or shape.head_dim % 2 == 0,
        f"rope needs an even number of channels a head, got width / num_heads = {shape.head_dim}",
    )
