"""The Mosaic GPU kernels of the RAT op: lowered for CUDA, emulated on any machine, and run on a Hopper GPU.

The interpreter for Mosaic GPU (jax 0.10) multiplies from shared memory only, while these kernels hold weights in
registers, so that without a GPU `mosaic_emulator` runs them.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rat import mosaic_gpu_attention, mosaic_gpu_attention_backward, mosaic_gpu_tiling
from pallas_kernels.rat.seen_slots import continued_slots, seen_slots, slot_tiles, token_tiles
from pallas_kernels.rat.shape import RatShape
from tests.pallas_kernels import mosaic_emulator

FORWARD_KERNELS = ("rat_attention_forward_mosaic",)
BACKWARD_KERNELS = ("rat_queries_backward_mosaic", "rat_summaries_backward_mosaic")
SHAPES = {  # B, T, N, G, H, L, dtype
    "plain": (2, 512, 4, 2, 128, 16, "bfloat16"),
    "half_heads": (1, 1024, 6, 3, 64, 8, "bfloat16"),
    "float16": (1, 512, 2, 1, 128, 16, "float16"),
    "ragged": (2, 333, 2, 2, 128, 10, "bfloat16"),
    "long_chunks": (1, 700, 2, 1, 64, 200, "bfloat16"),
    "attention": (1, 300, 2, 1, 128, 1, "bfloat16"),
    "one_token": (3, 1, 2, 1, 128, 16, "bfloat16"),
    "many_summaries": (1, 4160, 2, 1, 128, 2, "bfloat16"),
}
# Lengths of documents and, negative, of padding between them, of each row in turn.
PACKED = {
    "ragged": [[100, 5, -20, 150, 58], [-30, 303]],
    "half_heads": [[1, 7, 8, 9, 240, -135, 600, 24]],
    "long_chunks": [[150, 410, -10, 130]],
    "attention": [[130, -40, 1, 129]],
    "one_token": [[1], [-1], [1]],
    "many_summaries": [[2000, 3, 1500, 657]],
}
BLOCKS = [(128, 2, 1, True), (128, 2, 1, False), (64, 2, 2, False)]  # fields of `mosaic_gpu_attention.Blocks`
FEW = ("ragged", "one_token")  # quick to emulate
LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}


def shape_of(sizes, **changes) -> RatShape:
    return RatShape(**dict(zip(FIELDS, sizes, strict=True), rope_base=10_000.0, segmented=False) | changes)


FIELDS = ("batch", "tokens", "num_heads", "num_groups", "head_dim", "chunk_size", "dtype")


def documents(p: RatShape, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions of packed rows."""
    segment_ids, positions = np.zeros((p.batch, p.tokens), np.int32), np.zeros((p.batch, p.tokens), np.int32)
    for row in range(p.batch):
        place = 0
        for number, length in enumerate(PACKED[name][row], start=1):
            part = slice(place, place + abs(length))
            if length > 0:
                segment_ids[row, part], positions[row, part] = number, np.arange(length)
            place += abs(length)
        assert place == p.tokens
    return segment_ids, positions


def seen_by_tokens(p: RatShape, packed: tuple[np.ndarray, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
    """[B, T, C] whether a token sees what is in a slot, and [B, C] whether a chunk completes it, token by token."""
    segment_ids, positions = packed or (np.ones((p.batch, p.tokens)), np.tile(np.arange(p.tokens), (p.batch, 1)))
    seen = np.zeros((p.batch, p.tokens, p.num_chunks), bool)
    complete = np.zeros((p.batch, p.num_chunks), bool)
    for b in range(p.batch):
        for end in range(p.tokens):
            if segment_ids[b, end] and positions[b, end] % p.chunk_size == p.chunk_size - 1:
                complete[b, end // p.chunk_size] = True
                later = np.arange(p.tokens) > end
                seen[b, later & (segment_ids[b] == segment_ids[b, end]), end // p.chunk_size] = True
    return seen, complete


def inputs(p: RatShape, seed: int = 0, packed=None) -> dict[str, jax.Array]:
    """Random arrays; in whole rows slots that no chunk completes are NaN."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))
    heads, summaries = (p.batch, p.tokens, p.num_heads, p.head_dim), (p.batch, p.num_chunks, p.num_heads, p.head_dim)
    rows = (p.batch, p.num_heads, p.tokens)
    draw = functools.partial(jax.random.normal, dtype=jnp.dtype(p.dtype))
    query = draw(next(keys), (p.batch, p.tokens, p.num_groups, p.head_dim))
    is_number = True if packed else jnp.asarray(seen_by_tokens(p, packed)[1])[:, :, None, None]
    return {
        "projected": draw(next(keys), (p.batch, p.tokens, p.projected_width)),
        "running_values": draw(next(keys), heads),
        "current_scores": jax.random.normal(next(keys), rows),
        "rotated_queries": (query * (2 * p.score_scale)).astype(p.dtype),
        "summary_keys": jnp.where(is_number, draw(next(keys), summaries), jnp.nan),
        "summary_values": jnp.where(is_number, draw(next(keys), summaries), jnp.nan),
        "d_heads": draw(next(keys), heads),
    }


def run_forward(p, x, packed=None):
    names = ("projected", "running_values", "current_scores", "rotated_queries", "summary_keys", "summary_values")
    return mosaic_gpu_attention.forward(p, *(x[name] for name in names), packed and seen_slots(p, *packed))


def run_backward(p, x, delta, lse, packed=None):
    names = ("rotated_queries", "summary_keys", "summary_values", "current_scores")
    seen = packed and seen_slots(p, *packed)
    return mosaic_gpu_attention_backward.backward(p, x["d_heads"], delta, lse, *(x[name] for name in names), seen)


def truth(p: RatShape, x: dict[str, jax.Array], packed=None) -> dict[str, np.ndarray]:
    """Everything in float64 NumPy, head by head."""
    x = {name: np.asarray(value.astype(jnp.float32), np.float64) for name, value in x.items()}
    seen, complete = seen_by_tokens(p, packed)
    names = ("heads", "lse", "delta", "current_weights", "d_current_scores")
    found = {name: np.zeros((p.batch, p.num_heads, p.tokens)) for name in names[1:]}
    found["out"] = np.zeros((p.batch, p.tokens, p.num_heads, p.head_dim))
    found["d_rotated_queries"] = np.zeros(x["rotated_queries"].shape)
    found["d_summary_keys"] = np.zeros((p.batch, p.num_chunks, p.num_heads, p.head_dim))
    found["d_summary_values"] = np.zeros((p.batch, p.num_chunks, p.num_heads, p.head_dim))
    gates = x["projected"][..., : p.width].reshape(found["out"].shape)
    for b in range(p.batch):
        for n in range(p.num_heads):
            q, do = x["rotated_queries"][b, :, n % p.num_groups], x["d_heads"][b, :, n]
            k, v = (np.where(complete[b, :, None], x[name][b, :, n], 0) for name in ("summary_keys", "summary_values"))
            own, value = x["current_scores"][b, n], x["running_values"][b, :, n]
            scores = np.where(seen[b], q @ k.T, -np.inf)
            lse = np.log2(np.exp2(scores).sum(1) + np.exp2(own))
            weights, current_weight = np.exp2(scores - lse[:, None]), np.exp2(own - lse)
            o = weights @ v + current_weight[:, None] * value
            delta = (do * o).sum(1)
            d_scores = weights * (do @ v.T - delta[:, None])
            found["out"][b, :, n] = o / (1 + np.exp(-gates[b, :, n]))
            found["lse"][b, n], found["delta"][b, n], found["current_weights"][b, n] = lse, delta, current_weight
            found["d_current_scores"][b, n] = -d_scores.sum(1) / math.sqrt(p.head_dim)
            found["d_rotated_queries"][b, :, n % p.num_groups] += d_scores @ k / math.sqrt(p.head_dim)
            found["d_summary_keys"][b, :, n] = d_scores.T @ q * math.log(2)
            found["d_summary_values"][b, :, n] = weights.T @ do
    return found


@pytest.mark.parametrize(("name", "segmented"), [(n, False) for n in SHAPES] + [(n, True) for n in FEW])
def test_kernels_lower_for_cuda_with_the_shapes_of_the_call(name, segmented):
    p = shape_of(SHAPES[name], segmented=segmented)
    packed = documents(p, name) if segmented else None
    x = jax.eval_shape(lambda: inputs(p))
    rows = jax.ShapeDtypeStruct((p.batch, p.num_heads, p.tokens), jnp.float32)
    forward = jax.jit(functools.partial(run_forward, p, packed=packed)).trace(x)
    backward = jax.jit(functools.partial(run_backward, p, packed=packed)).trace(x, rows, rows)
    for traced, kernels in ((forward, FORWARD_KERNELS), (backward, BACKWARD_KERNELS)):
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert all(kernel in text for kernel in kernels)
    out, lse = forward.out_info
    assert (out.shape, out.dtype) == ((p.batch, p.tokens, p.width), jnp.dtype(p.dtype))
    assert (lse.shape, lse.dtype) == (rows.shape, jnp.float32)
    gradients = backward.out_info
    summaries = (p.batch, p.num_chunks, p.num_heads, p.head_dim)
    queries = (p.batch, p.tokens, p.num_groups, p.head_dim)
    assert [g.shape for g in gradients] == [queries, rows.shape, rows.shape, summaries, summaries]
    assert all(g.dtype == jnp.float32 for g in gradients)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "bfloat16, float16"),
        ({"head_dim": 96}, "head_dim 96 .* nearest is (64|128)"),
        ({"head_dim": 256}, "nearest is 128"),
        ({"capability": (8, 0)}, r"compute capability 9\.0, this one has 8\.0"),
        ({"batch": 1 << 30}, "too many programs"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    assert mosaic_gpu_tiling.unsupported_reason(shape_of(SHAPES["plain"])) is None
    assert re.search(reason, mosaic_gpu_tiling.unsupported_reason(shape_of(SHAPES["plain"], **changes)))


def check_values(p, forward, backward, packed=None):
    x = inputs(p, packed=packed)
    want = truth(p, x, packed)
    out, lse = forward(p, x, packed)
    gradients = backward(p, x, *(jnp.asarray(want[row], jnp.float32) for row in ("delta", "lse")), packed)
    names = ("d_rotated_queries", "d_current_scores", "current_weights", "d_summary_keys", "d_summary_values")
    got = {"out": out.reshape(want["out"].shape), "lse": lse} | dict(zip(names, gradients, strict=True))
    for result, value in got.items():
        error = np.linalg.norm(np.asarray(value, np.float64) - want[result])
        size = np.linalg.norm(want[result])
        assert error <= LIMITS[p.dtype] * size, (result, error, size)  # false for NaN too


def test_what_tokens_see_lies_between_two_bounds():
    """Of random rows whose first document may have begun before them, slot by slot; and of tiles."""
    generator = np.random.default_rng(0)
    for _ in range(40):
        chunk_size, tokens = int(generator.integers(1, 9)), int(generator.integers(1, 5)) * 24
        segment_ids, positions, place = np.zeros((1, tokens), np.int32), np.zeros((1, tokens), np.int32), 0
        for number in range(1, 1 + tokens):
            length, gap = generator.integers(1, 40), generator.integers(0, 6) * generator.integers(0, 2)
            start = place + gap
            part = slice(start, min(start + length, tokens))
            first_position = generator.integers(0, 20) if start == 0 else 0
            count = max(part.stop - part.start, 0)
            segment_ids[0, part], positions[0, part] = number, first_position + np.arange(count)
            place = start + length
        p = shape_of((1, tokens, 2, 1, 64, chunk_size, "bfloat16"), segmented=True)
        wanted, _ = seen_by_tokens(p, (segment_ids, positions))
        found = seen_slots(p, segment_ids, positions)
        slots = np.arange(p.num_chunks)
        first, end = np.asarray(found.first)[..., None], np.asarray(found.end)[..., None]
        np.testing.assert_array_equal((slots >= first) & (slots < end), wanted)
        assert (np.diff(found.first) >= 0).all() and (np.diff(found.end) >= 0).all()
        block, tile = 24, int(generator.integers(1, 6))
        check_tiles(np.asarray(slot_tiles(found, block, tile))[0], wanted[0], block, tile)
        blocks = -(-p.num_chunks // block)
        check_tiles(np.asarray(token_tiles(found, block, blocks, tile))[0], wanted[0].T, block, tile)


def check_tiles(bounds, seen, block, tile):
    """Of what blocks of rows see: outside of the outer bounds tiles hold nothing, inside of the inner ones all."""
    for number, (any_from, all_from, all_to, any_to) in enumerate(bounds):
        rows = seen[number * block : (number + 1) * block]
        assert 0 <= any_from <= all_from <= all_to <= any_to
        assert not rows[:, : any_from * tile].any() and not rows[:, any_to * tile :].any()
        assert rows[:, all_from * tile : all_to * tile].all()


def packed_case(name):
    p = shape_of(SHAPES[name], segmented=True)
    return p, documents(p, name)


def check_blocks(p, blocks):
    x = inputs(p)
    shape = (p.batch, p.tokens, -1, p.head_dim)
    arguments = (x["current_scores"], x["rotated_queries"], x["summary_keys"], x["summary_values"])
    out, lse = mosaic_gpu_attention.attend(
        p, x["projected"].reshape(shape), x["running_values"], *arguments, mosaic_gpu_attention.Blocks(*blocks)
    )
    want = truth(p, x)
    assert np.linalg.norm(np.asarray(out, np.float64) - want["out"]) <= 4e-3 * np.linalg.norm(want["out"])
    np.testing.assert_allclose(lse, want["lse"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ragged", "long_chunks"])
def test_emulated_values_are_those_of_float64(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0)
    check_values(shape_of(SHAPES[name]), run_forward, run_backward)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FEW)) for n in PACKED])
def test_emulated_values_of_packed_documents_are_those_of_float64(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0)
    p, packed = packed_case(name)
    check_values(p, run_forward, run_backward, packed)


# Of a row: where in its stream its tokens begin, the position there in a document, and lengths as of PACKED.
CONTINUED = [(530, 530, [40, 100, -7, 53]), (83, 20, [200]), (0, 0, [-10, 9, 181])]


def check_continued(forward):
    """Tokens that read the slots of a cache, in which more slots are than their chunks fill."""
    p = shape_of((3, 200, 4, 2, 64, 4, "bfloat16"), segmented=True, continued=True)
    x, capacity = inputs(p), 190
    caches = jax.random.normal(jax.random.key(1), (2, p.batch, capacity, p.num_heads, p.head_dim), jnp.bfloat16)
    segment_ids, positions = np.zeros((p.batch, p.tokens), np.int32), np.zeros((p.batch, p.tokens), np.int32)
    first_slots, seen = np.zeros_like(positions), np.zeros((p.batch, p.tokens, capacity), bool)
    for row, (index, position, lengths) in enumerate(CONTINUED):
        place = 0
        for number, length in enumerate(lengths, start=1):
            for t in range(place, place + length):
                segment_ids[row, t], positions[row, t] = number, position + t - place
                first_slots[row, t] = (index - position) // p.chunk_size
                seen[row, t, first_slots[row, t] : first_slots[row, t] + positions[row, t] // p.chunk_size] = True
            if length > 0:
                index, position = index + length, 0
            place += abs(length)
    slots = continued_slots(p, segment_ids, positions, first_slots, capacity)
    arrays = (x["projected"], x["running_values"], x["current_scores"], x["rotated_queries"], *caches)
    out, lse = forward(p, *arrays, slots)
    values, own, q, keys, cached = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays[1:])
    for b in range(p.batch):
        for n in range(p.num_heads):
            scores = np.where(seen[b], q[b, :, n % p.num_groups] @ keys[b, :, n].T, -np.inf)
            want = np.log2(np.exp2(scores).sum(1) + np.exp2(own[b, n]))
            heads = (
                np.exp2(scores - want[:, None]) @ cached[b, :, n] + np.exp2(own[b, n] - want)[:, None] * values[b, :, n]
            )
            gate = np.asarray(x["projected"][b, :, n * p.head_dim : (n + 1) * p.head_dim], np.float64)
            heads /= 1 + np.exp(-gate)
            found = np.asarray(out[b, :, n * p.head_dim : (n + 1) * p.head_dim], np.float64)
            assert np.linalg.norm(found - heads) <= 4e-3 * np.linalg.norm(heads)
            np.testing.assert_allclose(lse[b, n], want, rtol=1e-4, atol=1e-4)


def test_emulated_values_of_tokens_that_read_a_cache(monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0)
    check_continued(mosaic_gpu_attention.forward)


@pytest.mark.gpu
def test_values_of_tokens_that_read_a_cache(hopper):
    check_continued(jax.jit(mosaic_gpu_attention.forward, static_argnums=0))


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_choice_of_blocks_gives_the_same_emulated(blocks, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0)
    check_blocks(shape_of((1, 768, 2, 1, 64, 2, "bfloat16")), blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_values_are_those_of_float64(hopper, name):
    check_values(shape_of(SHAPES[name]), *(jax.jit(run, static_argnums=0) for run in (run_forward, run_backward)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_values_of_packed_documents_are_those_of_float64(hopper, name):
    p, packed = packed_case(name)
    check_values(p, *(jax.jit(run, static_argnums=0) for run in (run_forward, run_backward)), packed)


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_choice_of_blocks_gives_the_same(hopper, blocks):
    check_blocks(shape_of((1, 2048, 2, 1, 128, 8, "bfloat16")), blocks)
