"""Tokens from a model: prompts in, their continuations out, through an engine."""

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import NamedSharding

from rat_jax.decoder import Decoder
from rat_jax.mesh import BATCH_AXES, mesh_of_rows
from rat_jax.model import LanguageModel
from rat_jax.program_store import ProgramStore
from rat_jax.sampling.caches import cache_capacity
from rat_jax.sampling.engine import Engine
from rat_jax.sampling.errors import not_finite, require
from rat_jax.sampling.prefill import CHUNK_SIZES, sizes_for
from rat_jax.sampling.request import Event, Request, check_ids
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.submitted import prompt_digest

_FEW_PROMPTS = 8


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
      batch_size: prompts that are continued at a time, another as soon as one ends; on a mesh a multiple of its devices
        are. None: all.
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
    for row, prompt in enumerate(prompts):
        check_ids(f"prompt {row}", prompt, vocab_size)
    rule = SamplingParams.of(temperature, top_k, top_p, repetition_penalty)
    require(max_new_tokens >= 1, f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    require(batch_size is None or batch_size >= 1, f"batch_size must be 1 or more, got {batch_size}")
    require(first >= 0, f"first must be 0 or more, got {first}")
    num_rows = max(0, len(prompts) - first)
    if num_rows == 0:
        return []
    results: list[list[int]] = [[] for _ in range(num_rows)]

    def add(event: Event, row: int) -> bool:
        result = results[row - first]
        result += event.tokens
        if event.end == "not_finite":
            raise not_finite(f"prompt {row}", len(result))
        if on_tokens is None:
            return False
        has_enough = bool(event.tokens) and bool(on_tokens(row, event.tokens))
        if event.end is not None:
            on_tokens(row, [])
        return has_enough

    def requests() -> Iterator[Request]:
        copies: Counter[int] = Counter()
        for row, prompt in enumerate(prompts):
            digest = prompt_digest(prompt)
            if row >= first:
                yield Request(
                    prompt,
                    max_new_tokens,
                    on_event=functools.partial(add, row=row),
                    copies_before=copies[digest],
                )
            copies[digest] += 1

    engine = make_engine(
        model,
        num_rows=num_rows,
        lengths=[len(prompt) for prompt in prompts[first:]],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size or num_rows,
        rule=rule,
        eos_id=eos_id,
        seed=seed,
    )
    for _ in engine.serve(requests()):
        pass
    return results


def make_engine(
    model: LanguageModel,
    *,
    num_rows: int,
    lengths: Sequence[int],
    max_new_tokens: int,
    batch_size: int,
    rule: SamplingParams,
    eos_id: int | None,
    seed: int,
    store: ProgramStore | None = None,
) -> Engine:
    """An engine for so many rows, no larger than they need, whose programs are compiled.

    Args:
      model: what predicts; its mesh is the engine's.
      num_rows: texts that will be made.
      lengths: of their prompts, in tokens; of many equal ones a few suffice.
      max_new_tokens: the most tokens of a text.
      batch_size: texts that are made at a time.
      rule: how tokens are chosen.
      eos_id: the token that ends a row.
      seed: of the random numbers.
      store: of the model's programs; None for a model whose code is not that of files.

    Raises:
      SamplingError: as `Engine`, or too long a row.
      SamplingStopped: if a device runs out of memory.
    """
    longest = max(lengths)
    require(
        longest + max_new_tokens < 2**31,
        f"a prompt of {longest} tokens and max_new_tokens {max_new_tokens} are more than 2**31 - 1, up to which "
        f"positions are counted",
    )
    decoder = model.decoder()
    mesh = mesh_of(decoder)
    num_devices = 1 if mesh is None else mesh.size
    engine = Engine(
        decoder,
        num_slots=-(-min(batch_size, num_rows) // num_devices) * num_devices,
        capacity=cache_capacity(longest + max_new_tokens - 1),  # the last token is never read
        rule=rule,
        eos_id=eos_id,
        seed=seed,
        mesh=mesh,
        chunk_sizes=_chunk_sizes(lengths),
    )
    if max_new_tokens > 1:  # else no steps are needed
        engine.compile(lengths, store)
    return engine


def mesh_of(decoder: Decoder) -> jax.sharding.Mesh | None:
    """The mesh that a model's parameters are on, if its devices divide rows."""
    sharding = decoder.arrays[0].sharding
    is_on_mesh = isinstance(sharding, NamedSharding) and set(BATCH_AXES) <= set(sharding.mesh.axis_names)
    return mesh_of_rows(sharding.mesh) if is_on_mesh and sharding.mesh.size > 1 else None


def _chunk_sizes(lengths: Sequence[int]) -> tuple[int, ...]:
    """One size for a few prompts, which are read sooner than a second program is compiled."""
    if len(lengths) > _FEW_PROMPTS:
        return sizes_for(lengths, CHUNK_SIZES)
    return (min(CHUNK_SIZES[-1], max(CHUNK_SIZES[0], 1 << (max(lengths) - 1).bit_length())),)
