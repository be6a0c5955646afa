"""How one call of the linear attention kernels is cut into tiles, and the arrays as the kernels see them."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.launch.tpu import LANES


@dataclasses.dataclass(frozen=True)
class LinearTiles:
    """Sizes of what one kernel step works on."""

    tokens: int  # most of a tile, a whole number of blocks; states are saved once a tile
    block: int  # tokens between which scores are made; the state goes from block to block
    rows: int  # most queries of a block, stacked one head above the other


def default_tiles(lanes: int, dtype: jnp.dtype) -> LinearTiles:
    """Tiles that fit 16 MiB of VMEM: the backward pass holds features, scores and both gradients of every row.

    Compiled schedules for v5e, 16 heads of 128 channels on 4 key heads in bfloat16, take 4,200 cycles forward and
    11,200 backward for a key head's tile of 512 tokens, of which the matrix units need 2,800 and 6,900; in tiles of
    256, 4,900 and 11,400; in blocks of 256 tokens, 6,300 and 14,300.
    """
    size = 512 * 256 // (lanes * jnp.dtype(dtype).itemsize)
    return LinearTiles(tokens=size, block=128, rows=size)


def initial_bytes(head_dim: int, initials: int) -> int:
    """Size in VMEM of float32 states of `initials` heads."""
    lanes = -(-head_dim // LANES) * LANES
    return 4 * initials * lanes * (lanes if 2 * head_dim <= lanes else 2 * lanes)


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """Static sizes of one call.

    Kernels see heads padded to `lanes` channels. Features are padded alike, unless both halves fit `lanes` together.
    A step works on a tile of tokens and `shared` of the R = N / K query heads that read one key head.
    """

    batch: int
    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    lanes: int  # head_dim rounded up to 128
    tile: int
    block: int  # divides tile
    shared: int  # query heads of a step; divides R
    dtype: jnp.dtype
    feature_map: str
    segmented: bool
    initial_rows: int  # 0 without an initial state, else 1 or `batch`
    initial_heads: int  # 0, or `key_heads` or `heads`

    @property
    def group(self) -> int:
        """R."""
        return self.heads // self.key_heads

    @property
    def parts(self) -> int:
        """Steps that take the queries of one tile and key head."""
        return self.group // self.shared

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
        return -(-self.tokens // self.tile)

    @property
    def partial(self) -> bool:
        """Whether the last tile has rows past the last token, which hold anything."""
        return self.tokens % self.tile != 0

    @property
    def folded(self) -> bool:
        """Whether m(-x) stands in the lanes that m(x) leaves free."""
        return 2 * self.head_dim <= self.lanes

    @property
    def features(self) -> int:
        """Lanes of phi(x)."""
        return self.lanes if self.folded else 2 * self.lanes

    @property
    def initials(self) -> int:
        """Initial states that the queries of one key head read: 0, 1 or R."""
        return self.initial_heads // self.key_heads

    @property
    def initials_per_step(self) -> int:
        return min(self.initials, self.shared)


def make_plan(
    query: jax.Array,
    key: jax.Array,
    *,
    feature_map: str,
    initial_state: jax.Array | None,
    segmented: bool,
    tiles: LinearTiles | None,
) -> LinearPlan:
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    lanes = -(-head_dim // LANES) * LANES
    group = heads // key_heads
    if tiles is None:
        tiles = default_tiles(lanes, query.dtype)
    return LinearPlan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        lanes=lanes,
        tile=min(tiles.tokens, -(-tokens // tiles.block) * tiles.block),
        block=tiles.block,
        shared=max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * tiles.block <= tiles.rows)),
        dtype=jnp.dtype(query.dtype),
        feature_map=feature_map,
        segmented=segmented,
        initial_rows=0 if initial_state is None else initial_state.shape[0],
        initial_heads=0 if initial_state is None else initial_state.shape[1],
    )


def to_columns(plan: LinearPlan, x: jax.Array) -> jax.Array:
    """[B, T, n, H] -> [B, T, n lanes]."""
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, plan.lanes - plan.head_dim)])
    return x.reshape(*x.shape[:2], -1)


def from_columns(plan: LinearPlan, x: jax.Array) -> jax.Array:
    """[B, T, n lanes] -> [B, T, n, H]."""
    return x.reshape(*x.shape[:2], -1, plan.lanes)[..., : plan.head_dim]


def pad_state(plan: LinearPlan, state: jax.Array) -> jax.Array:
    """[b, n, 2 H, H] -> [b, n, features, lanes]."""
    free = plan.lanes - plan.head_dim
    if plan.folded:
        return jnp.pad(state, [(0, 0), (0, 0), (0, plan.features - 2 * plan.head_dim), (0, free)])
    halves = state.reshape(*state.shape[:2], 2, plan.head_dim, plan.head_dim)
    return jnp.pad(halves, [(0, 0)] * 3 + [(0, free)] * 2).reshape(*state.shape[:2], plan.features, plan.lanes)


def unpad_state(plan: LinearPlan, state: jax.Array) -> jax.Array:
    """[b, n, features, lanes] -> [b, n, 2 H, H]."""
    if plan.folded:
        return state[:, :, : 2 * plan.head_dim, : plan.head_dim]
    halves = state.reshape(*state.shape[:2], 2, plan.lanes, plan.lanes)[..., : plan.head_dim, : plan.head_dim]
    return halves.reshape(*state.shape[:2], 2 * plan.head_dim, plan.head_dim)


def document_rows(plan: LinearPlan, documents: jax.Array | None) -> jax.Array | None:
    """int32 [B, tiles, 2, tile]: the document of each token, and in every column that of the token before the tile."""
    if documents is None:
        return None
    own = jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, plan.tiles * plan.tile - plan.tokens)), mode="edge")
    own = own.reshape(plan.batch, plan.tiles, plan.tile)
    before = jnp.concatenate([own[:, :1, :1], own[:, :-1, -1:]], axis=1)
    return jnp.stack([own, jnp.broadcast_to(before, own.shape)], axis=2)
