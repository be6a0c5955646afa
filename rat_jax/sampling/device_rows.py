"""An engine's rows on the devices: their caches, and the compiled programs that change them."""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rat_jax.decoder import Decoder
from rat_jax.memory import explaining_out_of_memory, free_bytes, gib
from rat_jax.program_store import ProgramStore
from rat_jax.sampling.errors import SamplingStopped, require
from rat_jax.sampling.prefill import PromptRows, empty_prompts, plan_chunks, read_chunk, sizes_up_to
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.slots import ENDED, Block, Entries, decode_block, empty_slots, first_tokens, insert

_MOST_PROMPT_ROWS = 8  # read together, on each device
_SLOTS_PER_PROMPT_ROW = 8  # at least: the cache that prompts are read into is small beside that of the slots


class DeviceRows:
    """Rows in slots, and a group of prompts that are read.

    Attributes:
      num_slots: rows in slots.
      capacity: tokens of a row.
      chunk_sizes: tokens of a row that are read in one call, ascending.
      row_counts: that a group of prompts may have, ascending; spare rows among them.
      cache_bytes: of slots and of prompts, on all devices together.
    """

    def __init__(
        self,
        decoder: Decoder,
        mesh: jax.sharding.Mesh | None,
        rule: SamplingParams,
        eos_id: int | None,
        seed: int,
        num_slots: int,
        capacity: int,
        chunk_sizes: tuple[int, ...],
    ):
        """Makes the slots' caches; the arguments are those of `Engine`.

        Raises:
          SamplingError: if the caches are larger than what the device has free.
        """
        self.num_slots, self.capacity, self.chunk_sizes = num_slots, capacity, sizes_up_to(capacity, chunk_sizes)
        self._decoder, self._mesh, self._rule = decoder, mesh, rule
        num_devices = 1 if mesh is None else mesh.size
        rows_together = max(1, min(_MOST_PROMPT_ROWS, num_slots // (num_devices * _SLOTS_PER_PROMPT_ROW)))
        self.row_counts = sorted({num_devices, rows_together * num_devices})
        self._known_row_counts: set[int] = set()  # whose programs are there
        self._compiled: dict[tuple[Callable, int, int], Callable] = {}  # by function, rows and tokens of a prompt
        self.cache_bytes = decoder.cache_bytes(num_slots + self.row_counts[-1], capacity)
        self._check_memory(num_devices)
        self._eos_id = np.int32(ENDED if eos_id is None else eos_id)
        self._seed_key = np.asarray(jax.random.key_data(jax.random.key(seed, impl="threefry2x32")))
        self.prompts: PromptRows | None = None
        with self.naming_settings():
            self.slots = self._run(empty_slots, num_slots=num_slots, **self._sizes)

    @property
    def row_bytes(self) -> int:
        """Of one row's cache."""
        return self.cache_bytes // (self.num_slots + self.row_counts[-1])

    @property
    def num_programs(self) -> int:
        """The most: of empty slots, first tokens, steps; of an empty cache, an insertion and chunks for a row count."""
        return 3 + len(self.row_counts) * (2 + len(self.chunk_sizes))

    def compile(self, lengths: Sequence[int] | None, store: ProgramStore | None = None) -> None:
        """Makes the programs for prompts of these lengths, side by side; None: all programs.

        Those in the store are read from it; all others are compiled, and kept there.
        """
        row_counts, sizes = self.row_counts, self.chunk_sizes
        if lengths is not None:
            row_counts = [self._rows_for(min(len(lengths), self.row_counts[-1]))]
            sizes = sorted({size for length in set(lengths) for size in plan_chunks(length, self.chunk_sizes)})
        with concurrent.futures.ThreadPoolExecutor() as pool:
            if store is not None:
                keys = {
                    program.key: store.key(program.function, (self._decoder.arrays, program.arguments))
                    for program in self._programs(row_counts, sizes)
                }
                devices = list(self._decoder.arrays[0].devices() if self._mesh is None else self._mesh.devices.flat)
                found = zip(keys, pool.map(lambda key: store.get(key, devices), keys.values()), strict=True)
                self._compiled |= {key: compiled for key, compiled in found if compiled is not None}
            made = {}
            # Each program is compiled while the next is traced; those that take longest come first.
            for program in self._programs(row_counts, sizes[::-1]):
                if program.key not in self._compiled:
                    lowered = self._run(program.function.lower, *program.arguments)
                    compile_it = lowered.compile
                    if store is not None:
                        compile_it = functools.partial(store.compile, keys[program.key], lowered)
                    made[program.key] = pool.submit(compile_it)
            self._compiled |= {key: future.result() for key, future in made.items()}
        self._known_row_counts.update(row_counts)

    def lower_insert(self, prompts: PromptRows, entries: Entries) -> jax.stages.Lowered:
        """The program of `put`."""
        return self._run(insert.lower, *self._insert(prompts, entries).arguments)

    def lower_block(self) -> jax.stages.Lowered:
        """The program of `step`."""
        return self._run(decode_block.lower, *self._block(np.zeros((self.num_slots,), bool)).arguments)

    def begin_prompts(self, num_prompts: int) -> int:
        """Empty rows for so many prompts in place of those that were read before; returns how many rows."""
        num_rows = self._rows_for(num_prompts)
        self._known_row_counts.add(num_rows)
        self.prompts = None  # its memory is free for the next rows
        self.prompts = self._run(empty_prompts, num_rows=num_rows, **self._sizes)
        return num_rows

    def read(self, tokens: np.ndarray, num_left: np.ndarray) -> None:
        """Reads the next chunk of the prompts, as `prefill.read_chunk` says."""
        self.prompts = self._call(_Program.of_chunk(self.prompts, tokens, num_left))

    def put(self, entries: Entries) -> None:
        """Copies prompts that were read into slots, with a first token each."""
        self.slots = self._call(self._insert(self.prompts, entries))

    def first_tokens(self) -> Block:
        """The tokens of rows that were put into slots after the last step."""
        return _on_its_way(self._call(_Program(first_tokens, (self.slots,))))

    def step(self, stopped: np.ndarray) -> Block:
        """Continues all rows but those `stopped` (bool, a slot each; the array must not change afterwards)."""
        self.slots, block = self._call(self._block(stopped))
        return _on_its_way(block)

    def naming_settings(self) -> contextlib.AbstractContextManager[None]:
        """Names what to change where a device runs out of memory.

        Raises:
          SamplingStopped: in place of the error that says so.
        """
        return explaining_out_of_memory(
            lambda: SamplingStopped(
                f"{self.num_slots} prompts at a time are more than the device has memory for: lower batch_size "
                f"(num_slots, {self.num_slots}), max_new_tokens or the prompts' lengths (capacity, {self.capacity:,} "
                f"tokens a row), or the largest chunk of prompts (chunk_sizes, {self.chunk_sizes[-1]} tokens of "
                f"{self.row_counts[-1]} rows)"
            )
        )

    def _rows_for(self, num_prompts: int) -> int:
        num_rows = next(count for count in self.row_counts if count >= num_prompts)
        if num_rows not in self._known_row_counts and self.row_counts[-1] in self._known_row_counts:
            return self.row_counts[-1]  # to compile for a few rows takes longer than to read some padding
        return num_rows

    def _programs(self, row_counts: Sequence[int], sizes: Sequence[int]) -> Iterator["_Program"]:
        """All programs for chunks of these sizes of so many rows."""
        for num_rows in reversed(row_counts):
            prompts = self._run(empty_prompts, num_rows=num_rows, **self._sizes)
            for size in sizes:
                tokens = np.zeros((num_rows, size), np.int32)
                yield _Program.of_chunk(prompts, tokens, np.zeros((num_rows,), np.int32))
            yield self._insert(prompts, Entries.none(num_rows, self.num_slots))
        yield self._block(np.zeros((self.num_slots,), bool))
        yield _Program(first_tokens, (self.slots,))

    def _call(self, program: "_Program") -> Any:
        """What a program gives, compiled by `compile` or now."""
        compiled = self._compiled.get(program.key)
        if compiled is None:
            return self._run(program.function, *program.arguments)
        return compiled(self._decoder.arrays, *program.arguments)

    @property
    def _sizes(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "with_seen": self._rule.repetition_penalty is not None}

    def _run(self, program: Callable, *arguments: Any, **sizes: Any) -> Any:
        with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
            return program(self._decoder.layout, self._decoder.arrays, *arguments, **sizes)

    def _insert(self, prompts: PromptRows, entries: Entries) -> "_Program":
        arguments = self._rule, self.slots, prompts, entries, self._seed_key, self._eos_id
        return _Program(insert, arguments, len(entries.row))

    def _block(self, stopped: np.ndarray) -> "_Program":
        return _Program(decode_block, (self._rule, self.slots, stopped, self._eos_id))

    def _check_memory(self, num_devices: int) -> None:
        device = next(iter(self._decoder.arrays[0].sharding.addressable_devices))  # the set is jax's own
        free, needed = free_bytes(device), -(-self.cache_bytes // num_devices)
        require(
            free is None or needed <= free,
            f"the caches of {self.num_slots} prompts at a time, of {self.capacity:,} tokens each with what follows "
            f"them, take {gib(needed)}, the device has {gib(free or 0)} free: lower batch_size (num_slots), or "
            f"max_new_tokens or the prompts' lengths (capacity)",
        )


@dataclasses.dataclass(frozen=True)
class _Program:
    """A compiled function, its arguments after the decoder's, and what tells its shapes from those of others."""

    function: Callable
    arguments: tuple
    num_rows: int = 0  # of prompts
    num_tokens: int = 0  # of each

    @classmethod
    def of_chunk(cls, prompts: PromptRows, tokens: np.ndarray, num_left: np.ndarray) -> "_Program":
        return cls(read_chunk, (prompts, tokens, num_left), *tokens.shape)

    @property
    def key(self) -> tuple[Callable, int, int]:
        return self.function, self.num_rows, self.num_tokens


def _on_its_way(block: Block) -> Block:
    """The block, which is copied to the host as soon as it is there."""
    for array in block:
        array.copy_to_host_async()
    return block
