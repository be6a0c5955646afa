"""The backward pass of the gated recurrence inside chunks of whole rows, on Hopper.

The equations are those of `triton_recurrence_backward`. A program is a warpgroup, each thread of which has one channel
of a head, so that nothing is exchanged between threads. Chunks come one after the other, and the heads of a group
inside of each; what these share stays in registers for a chunk, and so do the states of its tokens. Copies of whole
tiles bring the next head while one is computed, and take its gradients, which lie where its values were.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import LOG2_E, cdiv
from pallas_kernels.rat.shape import RatShape

STAGES = 2  # heads in shared memory
CHUNKS = 4  # of a program
TURNS = 2  # chunks in shared memory


def rat_recurrence_backward_mosaic(
    projected,  # [B, T, 3 N + 2 G, H]
    gate_bias,  # [N, H] float32
    cosines,  # [C, H] float32, of both halves of the channels
    sines,  # [C, H] float32, those of the upper half negative
    current_weights,  # [B, N / G, G, T] float32: p
    d_current_scores,  # as current_weights: ds, times 1 / sqrt(H)
    d_heads,  # [B, T, N, H]
    d_rotated_queries,  # [B, T, G, H] float32
    d_summary_keys,  # [B, C, N, H] float32, of the rotated keys
    d_summary_values,  # [B, C, N, H] float32
    d_projected,  # as projected: dv, dg, dq, dk are written, dz is there already
    d_bias,  # [B, programs of a row and group, N, H] float32: partial sums
    head_ring,  # [STAGES, 3, L, H]: v, g and do of a head; in the place of v and g then dv and dg
    shared_ring,  # [TURNS, 2, L, H]: q and k of a chunk; in their place then dq and dk
    score_ring,  # [TURNS, 2, N / G, L] float32: p and ds of a chunk
    query_tile,  # [L, H] float32: gradients of a chunk's rotated queries
    bias_sums,  # [N / G, H] float32
    head_filled,
    chunk_filled,
    queries_filled,
    *,
    shape: RatShape,
):
    """One program: CHUNKS chunks of a row, the heads of a group one after the other."""
    N, G, L, heads = shape.num_heads, shape.num_groups, shape.chunk_size, shape.heads_per_group
    program, blocks = lax.axis_index("program"), cdiv(shape.num_chunks, CHUNKS)
    g, block, row = lax.rem(program, G), lax.rem(lax.div(program, G), blocks), lax.div(program, G * blocks)
    first_chunk = block * CHUNKS
    chunks = jnp.minimum(CHUNKS, shape.num_chunks - first_chunk)

    def tokens_of(i):
        return pl.ds((first_chunk + i) * L, L)

    def fill_head(step):
        at, n = tokens_of(lax.div(step, heads)), g + lax.rem(step, heads) * G
        stage = lax.rem(step, STAGES)
        tiles, filled = head_ring.at[stage], head_filled.at[stage]
        plgpu.copy_gmem_to_smem(projected.at[row, at, N + n], tiles.at[0], filled)
        plgpu.copy_gmem_to_smem(projected.at[row, at, 2 * N + n], tiles.at[1], filled)
        plgpu.copy_gmem_to_smem(d_heads.at[row, at, n], tiles.at[2], filled)

    def fill_chunk(i):
        at, turn = tokens_of(i), lax.rem(i, TURNS)
        shared, scores, filled = shared_ring.at[turn], score_ring.at[turn], chunk_filled.at[turn]
        plgpu.copy_gmem_to_smem(projected.at[row, at, 3 * N + g], shared.at[0], filled)
        plgpu.copy_gmem_to_smem(projected.at[row, at, 3 * N + G + g], shared.at[1], filled)
        plgpu.copy_gmem_to_smem(current_weights.at[row, :, g, at], scores.at[0], filled)
        plgpu.copy_gmem_to_smem(d_current_scores.at[row, :, g, at], scores.at[1], filled)

    fill_chunk(jnp.int32(0))
    for step in range(STAGES - 1):
        fill_head(jnp.int32(step))

    @pl.loop(0, heads)
    def _clear(j):
        bias_sums.at[j][...] = launch.row_of_zeros(shape.head_dim)

    @pl.loop(0, chunks)
    def _chunk(i):
        chunk, turn, at = first_chunk + i, lax.rem(i, TURNS), tokens_of(i)
        (q, k), (p, ds) = ((ring.at[turn, 0], ring.at[turn, 1]) for ring in (shared_ring, score_ring))
        plgpu.copy_gmem_to_smem(d_rotated_queries.at[row, at, g], query_tile, queries_filled)
        plgpu.barrier_wait(chunk_filled.at[turn])
        angles = (launch.load_row(cosines.at[chunk]), launch.load_row(sines.at[chunk])) if shape.rope else None

        def add_head(j, carry):
            step, n = i * heads + j, g + j * G
            stage = lax.rem(step, STAGES)
            v, gate, do = (head_ring.at[stage, tile] for tile in range(3))
            completes = (chunk + 1) * L <= shape.tokens
            d_v_state = jnp.where(completes, launch.load_row(d_summary_values.at[row, chunk, n]), 0.0)
            d_k_state = jnp.where(completes, _rotated_back(d_summary_keys.at[row, chunk, n], angles), 0.0)
            bias = launch.load_row(gate_bias.at[n])
            plgpu.barrier_wait(head_filled.at[stage])
            dq, kept = _forward(v, gate, k, ds.at[j], bias, carry[0])
            # What the head before has left is read from its stage by now, which the next one may have.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            ahead = step + (STAGES - 1)
            pl.when(ahead < chunks * heads)(lambda: fill_head(ahead))
            pl.when((j == 0) & (i + 1 < chunks))(lambda: fill_chunk(i + 1))
            dk, bias_sum = _back(v, gate, do, q, p.at[j], ds.at[j], d_v_state, d_k_state, kept, carry[1])
            bias_sums.at[j][...] = bias_sums[j] + bias_sum
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v, d_projected.at[row, at, N + n])
            plgpu.copy_smem_to_gmem(gate, d_projected.at[row, at, 2 * N + n])
            return dq, dk

        zeros = (launch.row_of_zeros(shape.head_dim),) * L
        dq, dk = lax.fori_loop(0, heads, add_head, (zeros, zeros))
        plgpu.barrier_wait(queries_filled)
        for t in range(L):
            q.at[t][...] = (dq[t] + _rotated_back(query_tile.at[t], angles)).astype(q.dtype)
            k.at[t][...] = dk[t].astype(k.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, d_projected.at[row, at, 3 * N + g])
        plgpu.copy_smem_to_gmem(k, d_projected.at[row, at, 3 * N + G + g])

    @pl.loop(0, heads)
    def _store(j):
        d_bias.at[row, block, g + j * G][...] = bias_sums[j]

    plgpu.wait_smem_to_gmem(0)


def _forward(v, gate, k, ds, bias, dq):
    """The states of one head, added to dq, and of every token 1 - f and what a step adds to its v and k."""
    v_state = k_state = launch.row_of_zeros(bias.shape[0])
    new_dq, kept = [], []
    for t, dq_t in enumerate(dq):
        # 1 / (1 + ratio) is a square, as there is a fast inverse square root and no fast division.
        ratio = jnp.exp2(jnp.minimum((gate[t].astype(jnp.float32) + bias) * -LOG2_E, 80 * LOG2_E))
        root = lax.rsqrt(1.0 + ratio)
        f = root * root
        v_t, k_t = v[t].astype(jnp.float32), k[t].astype(jnp.float32)
        v_step, k_step = f * (v_state - v_t), f * (k_state - k_t)
        v_state, k_state = v_t + v_step, k_t + k_step
        new_dq.append(dq_t + ds[t] * k_state)
        kept.append((ratio * f, v_step, k_step))
    return tuple(new_dq), kept


def _back(v, gate, do, q, p, ds, d_v_state, d_k_state, kept, dk):
    """Leaves dv in v and dg in gate; what a head adds to dk, and the sum of its dg."""
    new_dk, bias_sum = list(dk), launch.row_of_zeros(d_v_state.shape[0])
    for t, (w, v_step, k_step) in reversed(list(enumerate(kept))):
        d_v_state = d_v_state + p[t] * do[t].astype(jnp.float32)
        d_k_state = d_k_state + ds[t] * q[t].astype(jnp.float32)
        dv, d_key = w * d_v_state, w * d_k_state
        dg = dv * v_step + d_key * k_step
        bias_sum = bias_sum + dg
        new_dk[t] = new_dk[t] + d_key
        v.at[t][...], gate.at[t][...] = dv.astype(v.dtype), dg.astype(gate.dtype)
        d_v_state, d_k_state = d_v_state - dv, d_k_state - d_key
    return tuple(new_dk), bias_sum


def _rotated_back(ref, angles):
    """A row turned by minus the angle of its chunk: the channel pairs (i, i + H / 2)."""
    if angles is None:
        return launch.load_row(ref)
    cosine, sine = angles
    return launch.load_row(ref) * cosine + launch.load_row_of_other_half(ref) * sine


def backward(
    shape: RatShape,
    projected: jax.Array,
    gate_bias: jax.Array,
    cosines: jax.Array,
    sines: jax.Array,
    current_weights: jax.Array,
    d_current_scores: jax.Array,
    d_heads: jax.Array,
    d_rotated_queries: jax.Array,
    d_summary_keys: jax.Array,
    d_summary_values: jax.Array,
    d_projected: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """`d_projected` with the gradients of v, g, q and k, and partial sums of that of the bias [B, blocks, D].

    Args:
      shape: sizes of which `mosaic_gpu_tiling.takes_backward_recurrence`.
      d_projected: overwritten where it is not read again.
      others: those of `triton_recurrence_backward.rat_recurrence_backward`.
    """
    batch, tokens, heads, groups, head_dim = (
        shape.batch, shape.tokens, shape.num_heads, shape.num_groups, shape.head_dim,
    )  # fmt: skip
    length, sharing, dtype = shape.chunk_size, shape.heads_per_group, jnp.dtype(shape.dtype)
    blocks = cdiv(shape.num_chunks, CHUNKS)
    in_heads = (batch, tokens, 3 * heads + 2 * groups, head_dim)
    by_group = (batch, sharing, groups, tokens)
    d_bias, found = launch.overwriting_kernel(
        functools.partial(rat_recurrence_backward_mosaic, shape=shape),
        name=rat_recurrence_backward_mosaic.__name__,
        programs=batch * blocks * groups,
        out_type=(jax.ShapeDtypeStruct((batch, blocks, heads, head_dim), jnp.float32),),
        scratch_types=(
            plgpu.SMEM((STAGES, 3, length, head_dim), dtype),
            plgpu.SMEM((TURNS, 2, length, head_dim), dtype),
            plgpu.SMEM((TURNS, 2, sharing, length), jnp.float32),
            plgpu.SMEM((length, head_dim), jnp.float32),
            plgpu.SMEM((sharing, head_dim), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=STAGES),
            plgpu.Barrier(num_arrivals=4, num_barriers=TURNS),
            plgpu.Barrier(num_arrivals=1),
        ),
    )(
        projected.reshape(in_heads),
        gate_bias.reshape(heads, head_dim),
        jnp.concatenate([cosines, cosines], axis=1),
        jnp.concatenate([sines, -sines], axis=1),
        current_weights.reshape(by_group),
        d_current_scores.reshape(by_group),
        d_heads,
        d_rotated_queries,
        d_summary_keys,
        d_summary_values,
        d_projected.reshape(in_heads),
    )
    return found.reshape(d_projected.shape), d_bias.reshape(batch, blocks, shape.width)
