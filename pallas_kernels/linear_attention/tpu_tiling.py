"""Which calls the TPU kernels of linear attention take, how one is cut, and the arrays as the kernels see them."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.launch.sizes import LANES, cdiv
from pallas_kernels.linear_attention.shape import LinearAttentionShape

DTYPES = ("bfloat16", "float32")
MAX_HEAD_DIM = 256
_MAX_INITIAL_BYTES = 2**21  # of the initial states of one key head's queries, whose gradients stay in VMEM


def unsupported_reason(shape: LinearAttentionShape) -> str | None:
    """Why the TPU kernels cannot run a call and what comes nearest; None where they can.

    Any T runs; heads are padded to a multiple of 128 channels.
    """
    if shape.continued:
        return "it takes no state; implementation 'xla' does"
    if shape.key_lag:
        return f"it takes no key_lag ({shape.key_lag}); shift keys and values instead"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}; nearest: float32"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"it takes heads of at most {MAX_HEAD_DIM} channels, got {shape.head_dim}; nearest: {MAX_HEAD_DIM}"
    states = shape.initial_heads // shape.key_heads
    if states > 1 and initial_bytes(shape.head_dim, states) > _MAX_INITIAL_BYTES:
        limit = _MAX_INITIAL_BYTES // initial_bytes(shape.head_dim, 1)
        return (
            f"it takes at most {limit} initial states of {shape.head_dim} channels a key head, got {states}; nearest: "
            f"one for each of {shape.key_heads} key heads"
        )
    return None


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of what one kernel step works on."""

    tokens: int  # most of a tile, a whole number of blocks; states are saved once a tile
    block: int  # tokens between which scores are made; the state goes from block to block
    rows: int  # most queries of a block, stacked one head above the other


def default_tiles(lanes: int, dtype: jnp.dtype) -> Tiles:
    """Tiles that fit 16 MiB of VMEM: the backward pass holds features, scores and both gradients of every row.

    Compiled schedules for v5e, 16 heads of 128 channels on 4 key heads in bfloat16, take 4,200 cycles forward and
    11,200 backward for a key head's tile of 512 tokens, of which the matrix units need 2,800 and 6,900; in tiles of
    256, 4,900 and 11,400; in blocks of 256 tokens, 6,300 and 14,300.
    """
    size = 512 * 256 // (lanes * jnp.dtype(dtype).itemsize)
    return Tiles(tokens=size, block=128, rows=size)


def initial_bytes(head_dim: int, initials: int) -> int:
    """Size in VMEM of float32 states of `initials` heads."""
    lanes = -(-head_dim // LANES) * LANES
    return 4 * initials * lanes * (lanes if 2 * head_dim <= lanes else 2 * lanes)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut.

    Kernels see heads padded to `lanes` channels. Features are padded alike, unless both halves fit `lanes` together.
    A step works on a tile of tokens and `shared` of the R = N / K query heads that read one key head.
    """

    shape: LinearAttentionShape
    lanes: int  # head_dim rounded up to 128
    tile: int
    block: int  # divides tile
    shared: int  # query heads of a step; divides R

    @classmethod
    def of(cls, shape: LinearAttentionShape, tiles: Tiles | None) -> "Tiling":
        lanes = cdiv(shape.head_dim, LANES) * LANES
        group = shape.heads_per_key
        if tiles is None:
            tiles = default_tiles(lanes, shape.dtype)
        return cls(
            shape,
            lanes,
            tile=min(tiles.tokens, cdiv(shape.tokens, tiles.block) * tiles.block),
            block=tiles.block,
            shared=max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * tiles.block <= tiles.rows)),
        )

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.shape.dtype)

    @property
    def parts(self) -> int:
        """Steps that take the queries of one tile and key head."""
        return self.shape.heads_per_key // self.shared

    @property
    def rows(self) -> int:
        """Stacked queries of a block."""
        return self.shared * self.block

    @property
    def blocks(self) -> int:
        """Of a tile."""
        return self.tile // self.block

    @property
    def tiles(self) -> int:
        return -(-self.shape.tokens // self.tile)

    @property
    def partial(self) -> bool:
        """Whether the last tile has rows past the last token, which hold anything."""
        return self.shape.tokens % self.tile != 0

    @property
    def folded(self) -> bool:
        """Whether m(-x) is in the lanes that m(x) leaves free."""
        return 2 * self.shape.head_dim <= self.lanes

    @property
    def features(self) -> int:
        """Lanes of phi(x)."""
        return self.lanes if self.folded else 2 * self.lanes

    @property
    def initials(self) -> int:
        """Initial states that the queries of one key head read: 0, 1 or R."""
        return self.shape.initial_heads // self.shape.key_heads

    @property
    def initials_per_step(self) -> int:
        return min(self.initials, self.shared)


def to_columns(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, T, n, H] -> [B, T, n lanes]."""
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, tiling.lanes - tiling.shape.head_dim)])
    return x.reshape(*x.shape[:2], -1)


def from_columns(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[B, T, n lanes] -> [B, T, n, H]."""
    return x.reshape(*x.shape[:2], -1, tiling.lanes)[..., : tiling.shape.head_dim]


def pad_state(tiling: Tiling, state: jax.Array) -> jax.Array:
    """[b, n, 2 H, H] -> [b, n, features, lanes]."""
    free = tiling.lanes - tiling.shape.head_dim
    if tiling.folded:
        return jnp.pad(state, [(0, 0), (0, 0), (0, tiling.features - 2 * tiling.shape.head_dim), (0, free)])
    halves = state.reshape(*state.shape[:2], 2, tiling.shape.head_dim, tiling.shape.head_dim)
    return jnp.pad(halves, [(0, 0)] * 3 + [(0, free)] * 2).reshape(*state.shape[:2], tiling.features, tiling.lanes)


def unpad_state(tiling: Tiling, state: jax.Array) -> jax.Array:
    """[b, n, features, lanes] -> [b, n, 2 H, H]."""
    if tiling.folded:
        return state[:, :, : 2 * tiling.shape.head_dim, : tiling.shape.head_dim]
    halves = state.reshape(*state.shape[:2], 2, tiling.lanes, tiling.lanes)[
        ..., : tiling.shape.head_dim, : tiling.shape.head_dim
    ]
    return halves.reshape(*state.shape[:2], 2 * tiling.shape.head_dim, tiling.shape.head_dim)


def document_rows(tiling: Tiling, segment_ids: jax.Array | None) -> jax.Array | None:
    """int32 [B, tiles, 2, tile]: the document of each token, and in every column that of the token before the tile."""
    if segment_ids is None:
        return None
    own = jnp.pad(
        segment_ids.astype(jnp.int32), ((0, 0), (0, tiling.tiles * tiling.tile - tiling.shape.tokens)), mode="edge"
    )
    own = own.reshape(tiling.shape.batch, tiling.tiles, tiling.tile)
    before = jnp.concatenate([own[:, :1, :1], own[:, :-1, -1:]], axis=1)
    return jnp.stack([own, jnp.broadcast_to(before, own.shape)], axis=2)
