"""The rows that an engine continues, on the device: prompts put into free slots, and tokens chosen for all."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax.decoder import DecoderLayout, DecoderModule, ModelCache
from rat_jax.mesh import constrain_rows, put_rows, replicate
from rat_jax.ops.platform import expected_platform
from rat_jax.sampling.prefill import PromptRows
from rat_jax.sampling.sampling_params import SamplingParams, choose_tokens
from rat_jax.shapes import Array, Bool, Float, Float32, Int

STEPS_PER_CALL = 8  # tokens of a row that the device chooses before the host looks at them
ENDED = -1  # stands for a token in slots whose row has ended, or that are free
NOT_FINITE = -2  # stands for a token where the logits are NaN or infinite
_KEY_KIND = "threefry2x32"  # under vmap its numbers do not depend on the batch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All rows between two tokens."""

    cache: ModelCache
    token: Int[Array, " B"]  # chosen and not yet read; negative where no row goes on
    log_prob: Float32[Array, " B"]  # of that token
    seen: Bool[Array, "B V"] | None  # tokens read or chosen; None without a repetition penalty
    keys: Array  # uint32 [B, 2], of each row's random numbers
    num_new: Int[Array, " B"]  # tokens chosen
    min_new: Int[Array, " B"]  # the end of a document is not chosen before so many
    max_new: Int[Array, " B"]  # tokens after which a row ends

    @property
    def goes_on(self) -> Bool[Array, " B"]:
        """Rows that get another token."""
        return (self.token >= 0) & (self.num_new < self.max_new)


class Entries(NamedTuple):
    """Which rows of prompts go where; a place that is no slot's puts nothing. All [B] with the prompts' B."""

    row: np.ndarray  # int32, of the prompts
    slot: np.ndarray  # int32; no slot twice
    digest: np.ndarray  # uint32, of the prompt
    copy: np.ndarray  # uint32, equal prompts before it
    min_new: np.ndarray  # int32
    max_new: np.ndarray  # int32

    @classmethod
    def none(cls, num_rows: int, num_slots: int) -> "Entries":
        """Nothing to put; to be filled from the front."""
        entries = cls(*(np.zeros((num_rows,), dtype) for dtype in ("i4", "i4", "u4", "u4", "i4", "i4")))
        entries.slot[:] = num_slots + np.arange(num_rows)  # each its own, as scatters of different places promise
        return entries


class Block(NamedTuple):
    """Tokens of STEPS_PER_CALL steps or none; column 0 has those that were chosen before the first step."""

    tokens: Int[Array, "B _"]  # negative where a row had none any more
    log_probs: Float32[Array, "B _"]


@functools.partial(jax.jit, static_argnames=("layout", "num_slots", "capacity", "with_seen"))
def empty_slots(layout: DecoderLayout, arrays: list[Array], *, num_slots: int, capacity: int, with_seen: bool) -> Slots:
    """Slots that are all free."""
    decoder = layout.merge(arrays)

    def zeros() -> Array:
        return jnp.zeros((num_slots,), jnp.int32)

    slots = Slots(
        cache=decoder.init_cache(num_slots, capacity),
        token=zeros() + ENDED,
        log_prob=jnp.zeros((num_slots,), jnp.float32),
        seen=jnp.zeros((num_slots, decoder.config.vocab_size), bool) if with_seen else None,
        keys=jnp.zeros((num_slots, 2), jnp.uint32),
        num_new=zeros(),
        min_new=zeros(),
        max_new=zeros(),
    )
    return constrain_rows(slots)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="slots")
def insert(
    layout: DecoderLayout,
    arrays: list[Array],
    rule: SamplingParams,
    slots: Slots,
    prompts: PromptRows,
    entries: Entries,
    seed_key: Array,
    eos_id: Int[Array, ""],
) -> Slots:
    """Chooses the first token of rows whose prompts have been read, and puts them into slots.

    A row's random numbers follow from `seed_key`, the prompt's digest and the number of equal prompts before it.
    """
    slots, prompts = constrain_rows(slots), replicate(prompts)

    def row_key(digest: Array, copy: Array) -> Array:
        key = jax.random.wrap_key_data(seed_key, impl=_KEY_KIND)
        return jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, digest), copy))

    rows = Slots(
        cache=prompts.cache.take_rows(entries.row),
        token=jnp.zeros_like(entries.row),
        log_prob=jnp.zeros(entries.row.shape, jnp.float32),
        seen=None if prompts.seen is None else prompts.seen[entries.row],
        keys=jax.vmap(row_key)(entries.digest, entries.copy),
        num_new=jnp.zeros_like(entries.row),
        min_new=entries.min_new,
        max_new=entries.max_new,
    )
    rows = _choose(layout.merge(arrays), rule, prompts.hidden[entries.row], rows, eos_id)
    return constrain_rows(put_rows(slots, rows, entries.slot))


@functools.partial(jax.jit, static_argnames="layout")
def first_tokens(layout: DecoderLayout, arrays: list[Array], slots: Slots) -> Block:
    """The tokens that rows have from their insertion, without a step."""
    del layout, arrays
    return replicate(Block(slots.token[:, None], slots.log_prob[:, None]))


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="slots")
def decode_block(
    layout: DecoderLayout,
    arrays: list[Array],
    rule: SamplingParams,
    slots: Slots,
    stopped: Bool[Array, " B"],
    eos_id: Int[Array, ""],
) -> tuple[Slots, Block]:
    """STEPS_PER_CALL steps of all rows but those `stopped`."""
    slots = constrain_rows(slots)
    slots = dataclasses.replace(slots, token=jnp.where(stopped, ENDED, slots.token))

    def advance(step: Int[Array, ""], carry: tuple[Slots, Block]) -> tuple[Slots, Block]:
        slots, block = carry
        decoder = layout.merge(arrays)
        active = slots.goes_on
        read = jnp.where(active, slots.token, 0)[:, None]
        hidden, cache = decoder.hidden(read, slots.cache, active[:, None].astype(jnp.int32))
        new = _choose(decoder, rule, hidden[:, 0], dataclasses.replace(slots, cache=cache), eos_id)
        new = dataclasses.replace(
            new,
            token=jnp.where(active, new.token, ENDED),
            num_new=jnp.where(active, new.num_new, slots.num_new),
        )
        return constrain_rows(new), _write(block, step + 1, new)

    shape = (slots.token.shape[0], 1 + STEPS_PER_CALL)
    block = Block(jnp.full(shape, ENDED, jnp.int32), jnp.zeros(shape, jnp.float32))
    carry = slots, constrain_rows(_write(block, 0, slots))
    if expected_platform() != "cpu":
        # The number of steps is fixed: a GPU's host would wait for each step to know whether there is another.
        slots, block = jax.lax.fori_loop(0, STEPS_PER_CALL, advance, carry)
    else:
        _, (slots, block) = jax.lax.while_loop(
            lambda loop: (loop[0] < STEPS_PER_CALL) & jnp.any(loop[1][0].goes_on),
            lambda loop: (loop[0] + 1, advance(*loop)),
            (jnp.int32(0), carry),
        )
    return slots, replicate(block)  # every host reads all of it


def _write(block: Block, column: int | Array, slots: Slots) -> Block:
    return Block(block.tokens.at[:, column].set(slots.token), block.log_probs.at[:, column].set(slots.log_prob))


def _choose(
    decoder: DecoderModule, rule: SamplingParams, hidden: Float[Array, "B D"], slots: Slots, eos_id: Int[Array, ""]
) -> Slots:
    """The rows after one more token each, which follows from the last token's hidden state."""
    logits = decoder.logits(hidden[:, None])[:, 0]
    is_eos = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] == eos_id
    possible = jnp.where((slots.num_new < slots.min_new)[:, None] & is_eos, -jnp.inf, logits)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(slots.keys, impl=_KEY_KIND), slots.num_new)
    token = choose_tokens(possible, slots.seen, keys, rule)
    log_prob = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=1)
    token = jnp.where(token == eos_id, ENDED, token)
    token = jnp.where(jnp.isfinite(logits).all(axis=1), token, NOT_FINITE)
    seen = slots.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), jnp.where(token < 0, seen.shape[1], token)].set(True, mode="drop")
    return dataclasses.replace(slots, token=token, log_prob=log_prob, seen=seen, num_new=slots.num_new + 1)
