"""Linear attention over the blocks of a row in order: scores inside a block, one matrix-valued state between blocks."""

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.launch.tpu import Interpret, launch, matmul, to_column
from pallas_kernels.linear_attention.tpu_features import Features, features, joined, pull_back
from pallas_kernels.linear_attention.tpu_tiling import Tiling

FORWARD_NAME = "linear_attention_tpu_forward"
BACKWARD_NAME = "linear_attention_tpu_backward"
_GRID = "ppaa"  # rows of the batch, key heads, tiles, parts of a key head's queries


def forward(
    tiling: Tiling,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial: jax.Array | None,
    documents: jax.Array | None,
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """`out` [B, T, N lanes], `final_state` float32 [B, K, features, lanes] and `states` [B, K, tiles, features, lanes].

    Args:
      query: [B, T, N lanes]; `key` and `value` [B, T, K lanes].
      initial: [1 or B, K or N, features, lanes], or None for zero.
      documents: what `document_rows` gives.
    """
    specs = _Specs(tiling, reverse=False)
    state = (tiling.features, tiling.lanes)
    return launch(
        _forward_kernel,
        FORWARD_NAME,
        tiling,
        specs.grid,
        _GRID,
        specs.inputs(query, key, value, initial, documents),
        {
            "out": (jax.ShapeDtypeStruct(query.shape, tiling.dtype), specs.query_columns),
            "final_state": (
                jax.ShapeDtypeStruct((tiling.shape.batch, tiling.shape.key_heads, *state), jnp.float32),
                specs.state,
            ),
            "states": (
                jax.ShapeDtypeStruct((tiling.shape.batch, tiling.shape.key_heads, tiling.tiles, *state), tiling.dtype),
                specs.tile_state,
            ),
        },
        {},
        interpret,
    )


def backward(
    tiling: Tiling,
    states: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_final_state: jax.Array,
    initial: jax.Array | None,
    documents: jax.Array | None,
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """`d_query`, `d_key`, `d_value` like their arrays; `d_initial` float32 [B, K or N, features, lanes] if it is there.

    Args:
      states: before every tile, as `forward` gives them.
      d_out: [B, T, N lanes].
      d_final_state: float32 [B, K, features, lanes].
      The rest is as in `forward`.
    """
    specs = _Specs(tiling, reverse=True)
    inputs = specs.inputs(query, key, value, initial, documents) | {
        "states": (states, specs.tile_state),
        "d_out": (d_out, specs.query_columns),
        "d_final_state": (d_final_state, specs.state),
    }
    outputs = {
        "d_query": (jax.ShapeDtypeStruct(query.shape, tiling.dtype), specs.query_columns),
        "d_key": (jax.ShapeDtypeStruct(key.shape, tiling.dtype), specs.key_columns),
        "d_value": (jax.ShapeDtypeStruct(value.shape, tiling.dtype), specs.key_columns),
    }
    if initial is not None:
        shape = jax.ShapeDtypeStruct((tiling.shape.batch, *initial.shape[1:]), jnp.float32)
        block = (1, tiling.initials, tiling.features, tiling.lanes)
        outputs["d_initial"] = shape, pl.BlockSpec(block, lambda batch, key_head, _, __: (batch, key_head, 0, 0))
    scratch = {"d_state": ((tiling.features, tiling.lanes), jnp.float32)}
    if tiling.parts > 1:
        scratch |= {name: ((tiling.tile, tiling.lanes), jnp.float32) for name in ("d_key_sum", "d_value_sum")}
    return launch(
        _backward_kernel,
        BACKWARD_NAME,
        tiling,
        specs.grid,
        _GRID,
        inputs,
        outputs,
        scratch,
        interpret,
    )


class _Specs:
    """The grid and the blocks of a step, with tiles in order or from the last to the first."""

    def __init__(self, tiling: Tiling, reverse: bool):
        last, parts = tiling.tiles - 1, tiling.parts

        def at(tile):
            return last - tile if reverse else tile

        self.tiling = tiling
        self.grid = (tiling.shape.batch, tiling.shape.key_heads, tiling.tiles, parts)
        state = (tiling.features, tiling.lanes)
        self.query_columns = pl.BlockSpec(
            (1, tiling.tile, tiling.shared * tiling.lanes),
            lambda batch, key_head, tile, part: (batch, at(tile), key_head * parts + part),
        )
        self.key_columns = pl.BlockSpec(
            (1, tiling.tile, tiling.lanes), lambda batch, key_head, tile, _: (batch, at(tile), key_head)
        )
        self.state = pl.BlockSpec((1, 1, *state), lambda batch, key_head, _, __: (batch, key_head, 0, 0))
        self.tile_state = pl.BlockSpec(
            (1, 1, 1, *state), lambda batch, key_head, tile, _: (batch, key_head, at(tile), 0, 0)
        )
        self.documents = pl.BlockSpec((1, 1, 2, tiling.tile), lambda batch, _, tile, __: (batch, at(tile), 0, 0))
        self.initial = pl.BlockSpec((1, tiling.initials_per_step, *state), self._initial_index)

    def _initial_index(self, batch, key_head, _, part):
        tiling = self.tiling
        head = key_head * tiling.parts + part if tiling.initials > 1 else key_head
        return batch if tiling.shape.initial_rows > 1 else 0, head, 0, 0

    def inputs(self, query, key, value, initial, documents) -> dict:
        operands = {
            "query": (query, self.query_columns),
            "key": (key, self.key_columns),
            "value": (value, self.key_columns),
        }
        if initial is not None:
            operands["initial"] = initial, self.initial
        if documents is not None:
            operands["documents"] = documents, self.documents
        return operands


def _forward_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    tile, part = pl.program_id(2), pl.program_id(3)

    @pl.when((tile == 0) & (part == 0))
    def _():
        refs.final_state[...] = jnp.zeros_like(refs.final_state)

    state = refs.final_state[0, 0]
    refs.states[0, 0, 0] = state.astype(tiling.dtype)
    for block in range(tiling.blocks):
        rows = _documents(tiling, refs, block)
        key = joined(tiling, features(tiling, _tokens(tiling, tile, block, refs.key)))
        value = _tokens(tiling, tile, block, refs.value)
        query = joined(tiling, features(tiling, _stack(tiling, refs.query[0, _tokens_of(tiling, block)])))
        scores = _visible(tiling, rows, matmul(query, key, (1, 1))).astype(tiling.dtype)
        carried = matmul(query, state.astype(tiling.dtype), (1, 0))
        out = matmul(scores, value, (1, 0)) + _of_rows(tiling, rows.reads, carried)
        if tiling.initials == 1:
            out += matmul(query, refs.initial[0, 0], (1, 0))
        for head in range(tiling.shared):
            of_head = _of_head(tiling, head, out)
            if tiling.initials > 1:
                of_head += matmul(_of_head(tiling, head, query), refs.initial[0, head], (1, 0))
            refs.out[0, _tokens_of(tiling, block), _channels_of(tiling, head)] = of_head.astype(tiling.dtype)
        state = _kept(rows, state) + matmul(key, _of_rows(tiling, rows.adds, value), (0, 0))

    @pl.when(part == tiling.parts - 1)
    def _():
        refs.final_state[0, 0] = state


def _backward_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    """Blocks come in reverse; A are the visible scores, d_S the gradient of the state after the block.

    d_A = d_out v^T, d_phi(q) = d_A phi(k) + d_out S^T, d_phi(k) = d_A^T phi(q) + v d_S^T,
    d_v = A^T d_out + phi(k) d_S, and the gradient before the block is d_S + phi(q)^T d_out.
    All of it is linear in d_out and d_S: the first part of the queries starts from the d_S after the tile, the others
    from zero, and the sums over parts are those of the tile.
    """
    step, part = pl.program_id(2), pl.program_id(3)
    tile = tiling.tiles - 1 - step

    @pl.when((step == 0) & (part == 0))
    def _():
        refs.d_state[...] = refs.d_final_state[0, 0]
        if tiling.initials:
            refs.d_initial[...] = jnp.zeros_like(refs.d_initial)

    keys, states, state = [], [], refs.states[0, 0, 0].astype(jnp.float32)
    for block in range(tiling.blocks):
        keys.append(features(tiling, _tokens(tiling, tile, block, refs.key)))
        states.append(state.astype(tiling.dtype))
        if block < tiling.blocks - 1:
            rows = _documents(tiling, refs, block)
            value = _of_rows(tiling, rows.adds, _tokens(tiling, tile, block, refs.value))
            state = _kept(rows, state) + matmul(joined(tiling, keys[block]), value, (0, 0))
    d_state = refs.d_state[...]
    if tiling.parts > 1:
        d_state = jnp.where(part == 0, d_state, 0.0)
    for block in reversed(range(tiling.blocks)):
        here, rows = _tokens_of(tiling, block), _documents(tiling, refs, block)
        key, value = joined(tiling, keys[block]), _tokens(tiling, tile, block, refs.value)
        query_halves = features(tiling, _stack(tiling, _tokens(tiling, tile, block, refs.query)))
        query = joined(tiling, query_halves)
        d_out = _stack(tiling, _tokens(tiling, tile, block, refs.d_out))
        d_added = d_state.astype(tiling.dtype)
        scores = _visible(tiling, rows, matmul(query, key, (1, 1))).astype(tiling.dtype)
        d_value = _of_rows(tiling, rows.adds, matmul(key, d_added, (1, 0))) + matmul(scores, d_out, (0, 0))
        d_scores = _visible(tiling, rows, matmul(d_out, value, (1, 1))).astype(tiling.dtype)
        d_key = _of_rows(tiling, rows.adds, matmul(value, d_added, (1, 1)))
        d_key += matmul(d_scores, query, (0, 0))
        d_carried = _of_rows(tiling, rows.reads, d_out)
        d_state = _kept(rows, d_state) + matmul(query, d_carried, (0, 0))
        d_query = matmul(d_scores, key, (1, 0)) + matmul(d_carried, states[block], (1, 1))
        if tiling.initials == 1:
            d_query += matmul(d_out, refs.initial[0, 0], (1, 1))
            refs.d_initial[0, 0] += matmul(query, d_out, (0, 0))
        for head in range(tiling.shared):
            query_of_head, d_out_of_head, d_query_of_head = (_of_head(tiling, head, x) for x in (query, d_out, d_query))
            if tiling.initials > 1:
                d_query_of_head += matmul(d_out_of_head, refs.initial[0, head], (1, 1))
                refs.d_initial[0, part * tiling.shared + head] += matmul(query_of_head, d_out_of_head, (0, 0))
            halves = Features(*(_of_head(tiling, head, half) for half in query_halves))
            d_query_of_head = pull_back(tiling, halves, d_query_of_head)
            refs.d_query[0, here, _channels_of(tiling, head)] = d_query_of_head.astype(tiling.dtype)
        d_key = pull_back(tiling, keys[block], d_key)
        if tiling.parts > 1:
            d_key = _summed(tiling, part, refs.d_key_sum, here, d_key)
            d_value = _summed(tiling, part, refs.d_value_sum, here, d_value)
        refs.d_key[0, here] = d_key.astype(tiling.dtype)
        refs.d_value[0, here] = d_value.astype(tiling.dtype)
    if tiling.parts > 1:
        d_state = _summed(tiling, part, refs.d_state, slice(None), d_state)
    refs.d_state[...] = d_state


def _summed(tiling: Tiling, part: jax.Array, total, here: slice, x: jax.Array) -> jax.Array:
    """Adds x to what the parts before this one have left there."""
    x = jnp.where(part == 0, 0.0, total[here]) + x
    total[here] = x
    return x


def _tokens_of(tiling: Tiling, block: int) -> slice:
    return slice(block * tiling.block, (block + 1) * tiling.block)


def _channels_of(tiling: Tiling, head: int) -> slice:
    return slice(head * tiling.lanes, (head + 1) * tiling.lanes)


def _of_head(tiling: Tiling, head: int, x: jax.Array) -> jax.Array:
    """Its rows among those of `_stack`."""
    return x[head * tiling.block : (head + 1) * tiling.block]


def _tokens(tiling: Tiling, tile: jax.Array, block: int, ref) -> jax.Array:
    """A block of the tile, zero past the last token: anything may be there, and zero times anything may be NaN."""
    x = ref[0, _tokens_of(tiling, block)]
    if not tiling.partial:
        return x
    token = tile * tiling.tile + block * tiling.block + lax.broadcasted_iota(jnp.int32, (tiling.block, 1), 0)
    return jnp.where(token < tiling.shape.tokens, x, jnp.zeros_like(x))


def _stack(tiling: Tiling, x: jax.Array) -> jax.Array:
    """[block, shared lanes] -> [shared block, lanes]."""
    return jnp.concatenate([x[:, _channels_of(tiling, head)] for head in range(tiling.shared)], axis=0)


def _documents(tiling: Tiling, refs: types.SimpleNamespace, block: int) -> types.SimpleNamespace:
    """What documents hide; without them every field is None.

    `same` bool [block, block]; `reads` and `adds` bool [block, 1]: the token's document is that of the state before
    the block, and of the state after it; `keeps` bool [1, 1]: both states are of one document.
    """
    if not tiling.shape.segmented:
        return types.SimpleNamespace(same=None, reads=None, adds=None, keeps=None)
    here = _tokens_of(tiling, block)
    own = refs.documents[0, 0, 0:1, here]
    before = refs.documents[0, 0, 0:1, here.start - 1 : here.start] if block else refs.documents[0, 0, 1:2, 0:1]
    column, last = to_column(own), own[:, tiling.block - 1 :]
    return types.SimpleNamespace(same=column == own, reads=column == before, adds=column == last, keeps=before == last)


def _visible(tiling: Tiling, rows: types.SimpleNamespace, scores: jax.Array) -> jax.Array:
    """float32 [shared block, block], zero where the key is of a later token or of another document."""
    square = (tiling.block, tiling.block)
    visible = lax.broadcasted_iota(jnp.int32, square, 1) <= lax.broadcasted_iota(jnp.int32, square, 0)
    if rows.same is not None:
        visible &= rows.same
    scores = jnp.where(visible[None], scores.reshape(tiling.shared, *square), 0.0)
    return scores.reshape(tiling.rows, tiling.block)


def _of_rows(tiling: Tiling, chosen: jax.Array | None, x: jax.Array) -> jax.Array:
    """The chosen rows of one block, or of every head's; zero elsewhere."""
    if chosen is None:
        return x
    by_head = x.reshape(-1, tiling.block, x.shape[1])
    return jnp.where(chosen[None], by_head, jnp.zeros_like(by_head)).reshape(x.shape)


def _kept(rows: types.SimpleNamespace, state: jax.Array) -> jax.Array:
    return state if rows.keeps is None else jnp.where(rows.keeps, state, 0.0)
