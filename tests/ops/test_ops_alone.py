"""Ops as `rat_jax.ops` exports them: with plain arrays, optional arguments left out, and documents by their ids."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax import ops
from rat_jax.ops import KeyInfo
from rat_jax.segments import from_segments, whole_rows
from tests import reference

IDS = np.array([[4] * 5 + [2] * 9 + [0] * 2, [0] * 3 + [1] * 13])


def arrays(*shapes):
    keys = jax.random.split(jax.random.key(len(shapes)), len(shapes))
    return [jax.random.normal(key, (2, 16, *shape)) for key, shape in zip(keys, shapes, strict=True)]


QUERY, KEY, VALUE = arrays((4, 8), (2, 8), (2, 8))
PROJECTED, GATE_BIAS = arrays((3 * 16 + 2 * 16,))[0], jnp.linspace(-1.0, 2.0, 16)
OPS = {
    "rat_mix": lambda **ids: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=2, chunk_size=4, **ids).out,
    "rnn_mix": lambda **ids: ops.rnn_mix(PROJECTED[..., :48], GATE_BIAS, **ids).out,
    "attention": lambda **ids: ops.attention(QUERY, KEY, VALUE, **ids).out,
    "windowed_attention": lambda **ids: ops.attention(QUERY, KEY, VALUE, window=3, **ids).out,
    "gated_recurrence": lambda **ids: ops.gated_recurrence(QUERY, QUERY, **ids),
    "chunked_recurrence": lambda **ids: ops.gated_recurrence(QUERY, QUERY, chunk_size=4, **ids),
    "linear_attention": lambda **ids: ops.linear_attention(QUERY, KEY, VALUE, **ids).out,
    "lagged_linear_attention": lambda **ids: ops.linear_attention(QUERY, KEY, VALUE, key_lag=3, **ids).out,
    "residual_linear_attention": lambda **ids: ops.residual_linear_attention(QUERY, KEY, VALUE, window=2, **ids).out,
}


@pytest.mark.parametrize("name", [name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))])
def test_an_op_names_its_source(name):
    assert re.search(r"arXiv \d{4}\.\d{5}", getattr(ops, name).__doc__)


def run(name, **ids):
    return jax.jit(lambda ids: OPS[name](**ids))(ids)


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=2e-6)


# The code of these is in the others: of residual linear attention, and of the chunked recurrence.
SLOW = ("windowed_attention", "lagged_linear_attention", "gated_recurrence")
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OPS]


@pytest.mark.parametrize("name", MARKED)
def test_rows_are_one_document_each_without_ids(name):
    close(run(name), run(name, segment_ids=jnp.ones((2, 16), jnp.int32)))


@pytest.mark.parametrize("name", MARKED)
def test_a_packed_document_is_what_it_is_alone(name, monkeypatch):
    packed = run(name, segment_ids=jnp.asarray(IDS))
    whole = {name: globals()[name] for name in ("QUERY", "KEY", "VALUE", "PROJECTED")}
    for row, start, end in ((0, 0, 5), (0, 5, 14), (1, 3, 16)):
        for array, x in whole.items():
            monkeypatch.setitem(globals(), array, x[row : row + 1, start:end])
        close(packed[row, start:end], run(name)[0])


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("name", OPS)
def test_ids_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=r"tokens' shape \(2, 16\), got \(2, 15\)"):
        OPS[name](segment_ids=jnp.ones((2, 15), jnp.int32))


def test_attention_of_a_cache_reads_what_its_infos_say():
    info = KeyInfo.of(whole_rows(2, 16))
    last = KeyInfo(info.segment_ids[:, 12:], info.token_index[:, 12:])
    attend = jax.jit(ops.attention)
    whole = attend(QUERY, KEY, VALUE).out
    close(attend(QUERY[:, 12:], KEY, VALUE, query_info=last, key_info=info).out, whole[:, 12:])
    close(
        whole,
        reference.attention(*(np.repeat(x, 4 // x.shape[2], axis=2) for x in (QUERY, KEY, VALUE))),
    )
    with pytest.raises(ValueError, match="give segment_ids, or query_info and key_info together"):
        ops.attention(QUERY, KEY, VALUE, query_info=info)
    with pytest.raises(ValueError, match="give segment_ids, or query_info and key_info together"):
        ops.attention(QUERY, KEY, VALUE, segment_ids=whole_rows(2, 16), query_info=info, key_info=info)
    with pytest.raises(ValueError, match="16 keys to 4 queries need query_info and key_info"):
        ops.attention(QUERY[:, 12:], KEY, VALUE)


@pytest.mark.parametrize("cuts", [(1, 1, 5, 1, 8), (16,), (7, 9)])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_attention_continues_from_its_state(cuts, packed):
    @jax.jit
    def read():
        state, out, start, end = None, [], 0, None
        for size in cuts:
            part = slice(start, start + size)
            segments = None
            if packed:
                segments, end = from_segments(jnp.asarray(IDS[:, part]), end)
            arrays = QUERY[:, part], KEY[:, part], VALUE[:, part]
            mixed = ops.linear_attention(*arrays, segment_ids=segments, state=state)
            out.append(mixed.out)
            state, start = mixed.state, start + size
        return jnp.concatenate(out, axis=1), state

    ids = jnp.asarray(IDS) if packed else None
    whole = jax.jit(lambda: ops.linear_attention(QUERY, KEY, VALUE, segment_ids=ids))()
    is_token = (IDS != 0)[:, :, None, None] if packed else True
    out, state = read()
    close(out * is_token, whole.out * is_token)
    close(state, whole.state)


def test_a_new_document_does_not_read_the_state_of_linear_attention():
    state = jnp.ones((2, 2, 16, 8))
    attend = jax.jit(lambda **options: ops.linear_attention(QUERY, KEY, VALUE, **options))
    for found, expected in zip(attend(segment_ids=whole_rows(2, 16), state=state), attend(), strict=True):
        close(found, expected)


def test_padding_adds_nothing_to_the_state_of_linear_attention():
    attend = jax.jit(ops.linear_attention)
    found = attend(QUERY, KEY, VALUE, segment_ids=jnp.asarray(IDS))
    alone = [attend(*(x[r : r + 1, p] for x in (QUERY, KEY, VALUE))) for r, p in ((0, slice(5, 14)), (1, slice(3, 16)))]
    close(found.state, jnp.concatenate([x.state for x in alone]))


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_linear_attention_cannot_compute_is_refused():
    state = jnp.zeros((2, 2, 16, 8))
    with pytest.raises(ValueError, match=r"a key_lag \(2\) is not taken together with a state"):
        ops.linear_attention(QUERY, KEY, VALUE, key_lag=2, state=state)
    with pytest.raises(ops.UnsupportedError, match="'triton' cannot run this call: it takes a state beside one token"):
        ops.linear_attention(QUERY, KEY, VALUE, state=state, implementation="triton")
    with pytest.raises(ValueError, match=r"key and value must be \[B, T, K, H\]"):
        ops.linear_attention(QUERY, KEY, VALUE[:, :15])


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.attention(QUERY, KEY, VALUE, window=-1), "window must be a whole number of 0 or more"),
        (lambda: ops.attention(QUERY, KEY[:1], VALUE[:1]), r"key and value must be \[B, S, K, H\]"),
        (lambda: ops.attention(QUERY, KEY, VALUE[:, :, :1]), r"key and value must be \[B, S, K, H\]"),
        (lambda: ops.attention(QUERY, KEY, VALUE[..., :4]), r"key and value must be \[B, S, K, H\]"),
        (lambda: ops.attention(QUERY, KEY, VALUE.astype(int)), "value must be of floating numbers, got int32"),
        (lambda: ops.linear_attention(QUERY, KEY, VALUE.astype(int)), "value must be of floating numbers"),
        (lambda: ops.gated_recurrence(QUERY, QUERY, chunk_size=0), "chunk_size must be a whole number"),
        (lambda: ops.gated_recurrence(QUERY, QUERY, block_size=0), "block_size must be a whole number"),
        (lambda: ops.gated_recurrence(QUERY, QUERY, block_size=None), "block_size must be a whole number"),
        (lambda: ops.gated_recurrence(QUERY[:, :0], QUERY[:, :0]), "at least one token"),
        (lambda: ops.gated_recurrence(QUERY[:, :1], QUERY), r"gate and value must be \[B, T, \*c\]"),
        (lambda: ops.gated_recurrence(QUERY[:1], QUERY), r"gate and value must be \[B, T, \*c\]"),
        (lambda: ops.gated_recurrence(QUERY, KEY[..., :3]), r"gate and value must be \[B, T, \*c\]"),
        (lambda: ops.gated_recurrence(QUERY[0, 0, 0], QUERY[0, 0, 0]), r"gate and value must be \[B, T, \*c\]"),
        (lambda: ops.gated_recurrence(QUERY, QUERY, initial_state=QUERY[:, 0, 0]), "initial_state must be"),
        (lambda: ops.attention(QUERY[0], KEY, VALUE), r"query must be \[batch, tokens, heads, channels\]"),
        (lambda: ops.attention(QUERY, KEY, VALUE, window=1.5), "window must be a whole number of 0 or more, got 1.5"),
        (lambda: ops.linear_attention(QUERY, KEY[0], VALUE), r"key must be \[batch, tokens, heads, channels\]"),
        (lambda: ops.linear_attention(QUERY, KEY, VALUE, state=QUERY), "state must be"),
        (lambda: ops.linear_attention(QUERY, KEY, VALUE, key_lag=0.5), "key_lag must be a whole number"),
        (lambda: ops.residual_linear_attention(QUERY, KEY, VALUE[0], window=1), r"value must be \[batch, tokens"),
        (lambda: ops.residual_linear_attention(QUERY, KEY, VALUE, window=1.0), "window must be a whole number"),
        (
            lambda: ops.gated_delta_rule(*[QUERY.astype(int)] * 3, QUERY[..., 0], QUERY[..., 0]),
            "query must be of floating numbers, got int32",
        ),
        (lambda: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=2, chunk_size=2.0), "chunk_size must be a whole number"),
        (lambda: ops.rat_mix(PROJECTED[0], GATE_BIAS, num_heads=2, chunk_size=4), r"projected must be \[B, T"),
        (lambda: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=2, chunk_size=0), "chunk_size must be a whole number"),
        (lambda: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=0, chunk_size=4), "num_heads must be a whole number"),
        (
            lambda: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=2, chunk_size=4, rope_base=0),
            "rope_base must be above 1",
        ),
        (lambda: ops.rat_mix(PROJECTED, PROJECTED[0], num_heads=2, chunk_size=4), r"gate_bias must be \[D\]"),
    ],
)
def test_nonsense_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usefixtures("annotations_unchecked")
@pytest.mark.parametrize("ids", [None, jnp.ones((2, 16), jnp.int32)], ids=["none", "plain"])
def test_a_state_of_rat_needs_segments_that_continue(ids):
    state = ops.RatState.empty(2, 16, 2, 8, 4, jnp.float32)
    with pytest.raises(ValueError, match="a state holds no positions: give a SegmentInfo"):
        ops.rat_mix(PROJECTED, GATE_BIAS, ids, num_heads=2, chunk_size=4, state=state)


def test_plain_ids_leave_nothing_to_continue_from_a_state():
    ids = jnp.asarray(IDS)
    with pytest.raises(ValueError, match="nothing continues from state"):
        ops.linear_attention(QUERY, KEY, VALUE, segment_ids=ids, state=jnp.zeros((2, 2, 16, 8)))
    with pytest.raises(ValueError, match="nothing continues from initial_state"):
        ops.gated_recurrence(QUERY, QUERY, segment_ids=ids, initial_state=jnp.zeros((2, 4, 8)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="names implementations of other platforms")
@pytest.mark.parametrize(
    ("call", "platform"),
    [
        (lambda: ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=2, chunk_size=4, implementation="triton"), "NVIDIA GPUs"),
        (lambda: ops.linear_attention(QUERY, KEY, VALUE, implementation="triton"), "NVIDIA GPUs"),
    ],
)
def test_an_implementation_of_another_platform_says_so(call, platform):
    with pytest.raises(ops.UnsupportedError, match=f"it runs on {platform}, and this program is traced for the cpu"):
        call()


def test_rat_continues_from_its_state():
    sizes = {"num_heads": 2, "chunk_size": 4}

    @jax.jit
    def read(projected):
        state, out, end = ops.RatState.empty(2, 16, 2, 8, 4, jnp.float32), [], None
        for part in (slice(0, 6), slice(6, 7), slice(7, 16)):
            segments, end = from_segments(jnp.ones_like(projected[:, part, 0], jnp.int32), end)
            mixed = ops.rat_mix(projected[:, part], GATE_BIAS, segments, state=state, **sizes)
            out.append(mixed.out)
            state = mixed.state
        return jnp.concatenate(out, axis=1)

    close(read(PROJECTED), run("rat_mix"))


def test_groups_and_rotation_have_defaults():
    sizes = {"num_heads": 2, "chunk_size": 4, "num_groups": 2, "rope_base": 1e4}
    close(run("rat_mix"), jax.jit(lambda: ops.rat_mix(PROJECTED, GATE_BIAS, **sizes).out)())
    with pytest.raises(ValueError, match="the 16 channels of gate_bias must be a multiple of num_heads, got 3"):
        ops.rat_mix(PROJECTED, GATE_BIAS, num_heads=3, chunk_size=4)
