"""Tokens from a model: prompts are read a chunk at a time, then tokens are chosen one by one, all rows together."""

import dataclasses
import functools
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.decoder import Decoder, DecoderModule, ModelCache
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.memory import free_bytes, gib, is_out_of_memory
from rat_jax.model import LanguageModel
from rat_jax.sampling.prefill import cache_bytes, cache_capacity, prefill
from rat_jax.sampling.sampling_params import LARGEST_PENALTY, SMALLEST, SamplingParams, choose_tokens
from rat_jax.shapes import Array, Bool, Float, Int

STEPS_PER_CALL = 16  # tokens of a row that the device chooses before the host looks at them
_FINISHED = -1  # stands for a token in rows that have met the end
_NOT_FINITE = -2  # stands for a token where the logits are NaN or infinite


class SamplingError(RatJaxError, ValueError):
    """Prompts or settings that cannot be sampled from; the message names the row and the value."""


class SamplingStopped(SamplingError, RunStopped):
    """Sampling that had begun and cannot go on; completions that were handed out are good."""


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    batch_size: int | None = None,
    first: int = 0,
    on_tokens: Callable[[int, list[int]], bool | None] | None = None,
) -> list[list[int]]:
    """Continues every prompt, or those from `first` on.

    A prompt's result does not depend on the others: with `temperature` above 0 its random numbers follow from `seed`,
    the prompt itself, and how many equal prompts precede it in `prompts` (so that n equal prompts give n samples).
    Hence n different prompts give one by one what they give together, up to rounding of the logits.

    Args:
      model: what predicts.
      prompts: ids in [0, V), at least one each; lengths may differ. To start from nothing, give the id that ends
        documents.
      max_new_tokens: the most tokens a row gets.
      temperature: 0 takes the likeliest token, 1 draws from the model's distribution; see
        `sampling_params.adjust_logits`.
      top_k: draw from the k likeliest tokens. None: from all. Wants a temperature above 0, as `top_p` does.
      top_p: draw from the likeliest tokens that reach this probability together. None: from all.
      repetition_penalty: above 1 makes tokens less likely that the prompt or the new tokens hold. 1: does not.
      seed: of the random numbers.
      eos_id: the token that ends a row; it is not part of the result. None: rows end at `max_new_tokens`.
      batch_size: prompts that are continued at a time. None: all.
      first: index of the first prompt that is continued. Those before it were continued earlier, and only count as
        equal prompts.
      on_tokens: called with a prompt's index and its next new tokens as soon as they are there, and with an empty list
        when there will be no more. If it returns True the prompt gets no more tokens.

    Returns:
      The new tokens of each prompt that was continued, without the prompt.

    Raises:
      SamplingError: a prompt without tokens, a token outside the vocabulary, a setting out of range or without effect,
        or caches larger than what the device has free.
      SamplingStopped: logits that are not finite, or a device that runs out of memory.
    """
    vocab_size = model.config.vocab_size
    check_prompts(prompts, vocab_size)
    rule = _make_rule(temperature, top_k, top_p, repetition_penalty)
    _require(max_new_tokens >= 1, f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    _require(0 <= seed < 2**32, f"seed must lie between 0 and 2**32 - 1, got {seed}")
    if eos_id is not None:
        _require(0 <= eos_id < vocab_size, f"eos_id {eos_id} is outside the vocabulary of {vocab_size}")
    _require(batch_size is None or batch_size >= 1, f"batch_size must be 1 or more, got {batch_size}")
    _require(first >= 0, f"first must be 0 or more, got {first}")
    decoder, keys = model.decoder(), _row_keys(prompts, seed)
    size = batch_size or len(prompts)
    batches = [slice(start, start + size) for start in range(first, len(prompts), size or 1)]
    _check_memory(decoder, [prompts[batch] for batch in batches], max_new_tokens)
    results: list[list[int]] = []
    for batch in batches:
        blocks = _token_blocks(decoder, prompts[batch], rule, keys[batch], max_new_tokens, eos_id)
        try:
            results += _collect(blocks, len(prompts[batch]), batch.start, on_tokens or (lambda row, tokens: None))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise SamplingStopped(
                f"{len(prompts[batch])} prompts at a time are more than the device has memory for: lower batch_size"
            ) from None
    return results


def _check_memory(decoder: Decoder, batches: Sequence[Sequence[Sequence[int]]], max_new_tokens: int) -> None:
    """Refuses caches that a device has no room for, before anything is computed."""
    sizes = {(len(batch), max(map(len, batch))) for batch in batches}
    for _, longest in sizes:
        _require(
            longest + max_new_tokens < 2**31,
            f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} are more than 2**31 - 1, up to which "
            f"positions are counted",
        )
    free = free_bytes(next(iter(jax.tree.leaves(decoder.params)[0].devices())))  # not `pop`: the set is the array's own
    for num_rows, longest in sizes if free is not None else ():
        capacity = cache_capacity(longest + max_new_tokens - 1)
        needed = cache_bytes(decoder.graphdef, decoder.params, num_rows, capacity)
        _require(
            needed <= free,
            f"the caches of {num_rows} prompts of up to {longest:,} tokens with max_new_tokens {max_new_tokens:,} take "
            f"{gib(needed)}, the device has {gib(free)} free: lower max_new_tokens or batch_size",
        )


def _collect(
    blocks: Iterator[np.ndarray], num_rows: int, first_row: int, on_tokens: Callable[[int, list[int]], bool | None]
) -> list[list[int]]:
    """The tokens of each row of a batch, from its blocks."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    open_rows = dict.fromkeys(range(num_rows))
    for block in blocks:
        for row in list(open_rows):
            tokens = block[row]
            if _NOT_FINITE in tokens:
                position = len(rows[row]) + int(np.argmax(tokens == _NOT_FINITE))
                raise SamplingStopped(
                    f"prompt {first_row + row}: the logits of new token {position} are not finite: the model's "
                    f"parameters are damaged, or too large for its dtype"
                )
            new = tokens[tokens != _FINISHED].tolist()
            rows[row] += new
            has_enough = bool(new) and on_tokens(first_row + row, new)
            if has_enough or len(new) < len(tokens):
                del open_rows[row]
                on_tokens(first_row + row, [])
        if not open_rows:
            break
    for row in open_rows:
        on_tokens(first_row + row, [])
    return rows


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuses prompts that a model of this vocabulary cannot read.

    Raises:
      SamplingError: naming row, position and id.
    """
    for row, prompt in enumerate(prompts):
        _require(len(prompt) > 0, f"prompt {row} has no tokens: give at least one, such as the end of a document")
        for position, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise SamplingError(
                    f"prompt {row}, position {position}: token id {token} is outside the vocabulary of {vocab_size}"
                )


def _make_rule(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> SamplingParams:
    _require(
        temperature == 0 or SMALLEST <= temperature < math.inf,
        f"temperature must be 0, which takes the likeliest token, or {SMALLEST} or more, got {temperature}",
    )
    _require(top_k is None or top_k >= 1, f"top_k must be 1 or more, got {top_k}")
    _require(top_p is None or SMALLEST <= top_p <= 1, f"top_p must lie between {SMALLEST} and 1, got {top_p}")
    for name, value in (("top_k", top_k), ("top_p", top_p)):
        _require(
            value is None or temperature > 0,
            f"{name} {value} has no effect at temperature 0, which always takes the likeliest token: give a "
            f"temperature above 0, or leave {name} out",
        )
    _require(
        1 / LARGEST_PENALTY <= repetition_penalty <= LARGEST_PENALTY,
        f"repetition_penalty must lie between {1 / LARGEST_PENALTY} and {LARGEST_PENALTY}, got {repetition_penalty}",
    )
    greedy = temperature == 0
    return SamplingParams(
        temperature=None if greedy else temperature,
        top_k=top_k,
        top_p=None if top_p == 1 else top_p,
        repetition_penalty=None if repetition_penalty == 1 else repetition_penalty,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SamplingError(message)


def _row_keys(prompts: Sequence[Sequence[int]], seed: int) -> Array:
    """One key for each prompt, from the seed, the prompt and the number of equal prompts before it."""
    digests = [zlib.crc32(np.asarray(prompt, "<u4").tobytes()) for prompt in prompts]
    before: Counter[int] = Counter()
    copies = []
    for digest in digests:
        copies.append(before[digest])
        before[digest] += 1
    key = jax.random.key(seed, impl="threefry2x32")  # under vmap its numbers do not depend on the batch

    def row_key(digest, copy):
        return jax.random.fold_in(jax.random.fold_in(key, digest), copy)

    return jax.vmap(row_key)(np.asarray(digests, np.uint32), np.asarray(copies, np.uint32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """All rows between two tokens."""

    cache: ModelCache
    token: Int[Array, " B"]  # chosen and not yet read; negative in rows that are finished
    seen: Bool[Array, "B V"] | None  # None without a repetition penalty
    keys: Array  # [B]
    num_new: Int[Array, ""]  # tokens chosen


def _token_blocks(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    rule: SamplingParams,
    keys: Array,
    max_new_tokens: int,
    eos_id: int | None,
) -> Iterator[np.ndarray]:
    """New tokens of all rows, [B, up to STEPS_PER_CALL] at a time; the device computes one block ahead of the host."""
    graphdef, params = decoder.graphdef, decoder.params
    eos_id = jnp.int32(_FINISHED if eos_id is None else eos_id)
    capacity = cache_capacity(max(map(len, prompts)) + max_new_tokens - 1)  # the last token is never read
    hidden, cache = prefill(graphdef, params, prompts, capacity)
    rows = _first_tokens(graphdef, params, rule, hidden, cache, keys, _seen(prompts, decoder, rule), eos_id)
    block, num_chosen = jnp.copy(rows.token)[:, None], 1
    while block is not None:
        following = None
        if num_chosen < max_new_tokens:
            num_steps = min(STEPS_PER_CALL, max_new_tokens - num_chosen)
            rows, following = _next_tokens(graphdef, params, rule, rows, jnp.int32(num_steps), eos_id)
            num_chosen += num_steps
        tokens = np.asarray(block)
        yield tokens
        block = None if (tokens[:, -1] < 0).all() else following


def _seen(prompts: Sequence[Sequence[int]], decoder: Decoder, rule: SamplingParams) -> np.ndarray | None:
    if rule.repetition_penalty is None:
        return None
    seen = np.zeros((len(prompts), decoder.config.vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    return seen


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames=("cache", "seen"))
def _first_tokens(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rule: SamplingParams,
    hidden: Float[Array, "B D"],
    cache: ModelCache,
    keys: Array,
    seen: Bool[Array, "B V"] | None,
    eos_id: Int[Array, ""],
) -> _Rows:
    rows = _Rows(cache, token=jnp.zeros(hidden.shape[:1], jnp.int32), seen=seen, keys=keys, num_new=jnp.int32(0))
    return _choose(nnx.merge(graphdef, params), rule, hidden, rows, eos_id)


@functools.partial(jax.jit, static_argnames="graphdef", donate_argnames="rows")
def _next_tokens(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    rule: SamplingParams,
    rows: _Rows,
    num_steps: Int[Array, ""],
    eos_id: Int[Array, ""],
) -> tuple[_Rows, Int[Array, "B T"]]:
    """Up to `num_steps` steps, fewer if all rows finish; what is left of STEPS_PER_CALL is marked finished."""

    def goes_on(carry):
        step, rows, _ = carry
        return (step < num_steps) & jnp.any(rows.token >= 0)

    def advance(carry):
        step, rows, tokens = carry
        decoder = nnx.merge(graphdef, params)
        active = (rows.token >= 0)[:, None]
        read = jnp.where(active, rows.token[:, None], 0)
        hidden, cache = decoder.hidden(read, rows.cache, active.astype(jnp.int32))
        rows = _choose(decoder, rule, hidden[:, 0], dataclasses.replace(rows, cache=cache), eos_id)
        return step + 1, rows, tokens.at[:, step].set(rows.token)

    nothing = jnp.full((rows.token.shape[0], STEPS_PER_CALL), _FINISHED, jnp.int32)
    _, rows, tokens = jax.lax.while_loop(goes_on, advance, (jnp.int32(0), rows, nothing))
    return rows, tokens


def _choose(decoder: DecoderModule, rule: SamplingParams, hidden: Array, rows: _Rows, eos_id: Array) -> _Rows:
    """The rows after one more token each, which follows from the last token's hidden state [B, D]."""
    logits = decoder.logits(hidden[:, None])[:, 0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows.keys, rows.num_new)
    token = choose_tokens(logits, rows.seen, keys, rule)
    token = jnp.where(jnp.isfinite(logits).all(axis=-1), token, _NOT_FINITE)
    token = jnp.where((rows.token < 0) | (token == eos_id), _FINISHED, token)
    seen = rows.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), jnp.where(token < 0, seen.shape[1], token)].set(True, mode="drop")
    return dataclasses.replace(rows, token=token, seen=seen, num_new=rows.num_new + 1)
