"""Traffic as an engine meets it: many prompts of random tokens and different lengths, and what they take."""

import dataclasses
import time
from typing import NamedTuple

import jax
import numpy as np

from benchmarks import decode_steps
from rat_jax.decoder import Decoder
from rat_jax.errors import RunStopped
from rat_jax.memory import tree_bytes
from rat_jax.program_store import ProgramStore
from rat_jax.sampling import Engine, Request, SamplingParams
from rat_jax.sampling.caches import cache_capacity
from rat_jax.sampling.device_rows import DeviceRows
from rat_jax.sampling.prefill import CHUNK_SIZES, read_chunk, sizes_for
from rat_jax.sampling.slots import Entries

_RULE = SamplingParams.of()
_PROMPT_ROWS = 8  # beside the slots, that an engine reads at a time


@dataclasses.dataclass(frozen=True)
class Job:
    """Prompts whose lengths, and new tokens whose numbers, are drawn uniformly from ranges that include both ends."""

    num_prompts: int
    prompt_tokens: tuple[int, int]
    new_tokens: tuple[int, int]

    def requests(self, vocab_size: int) -> list[Request]:
        """The same at each call, and the first ones of a longer job."""
        rng = np.random.default_rng(0)
        requests = []
        for _ in range(self.num_prompts):
            length, num_new = (
                int(rng.integers(*ends, endpoint=True)) for ends in (self.prompt_tokens, self.new_tokens)
            )
            requests.append(Request(rng.integers(0, vocab_size, length, dtype=np.int32), num_new))
        return requests


JOBS = {
    "mixed": Job(512, (20, 1000), (256, 256)),
    "ragged": Job(4096, (20, 3000), (32, 512)),
}


class TrafficRow(NamedTuple):
    """One job; seconds of `cold`, `warm` and `prefill` include making an engine."""

    num_slots: int
    capacity: int
    prompt_tokens: int
    new_tokens: int
    padding: float  # tokens that were read over those of the prompts
    cold_s: float  # the first time
    compile_s: float  # of it
    warm_s: float  # the second time, when all programs are there
    prefill_s: float  # the same prompts with a single new token each
    steps_per_s: float  # tokens/s of steps alone, of as many rows in such caches at the job's mean position
    peak_gb: float | None  # of the device; None where it does not tell, or had needed more before
    planned_gb: float  # weights, caches and the most that one program allocates for a while

    @property
    def new_per_s(self) -> float:
        """New tokens a second of the second time, prompts included."""
        return self.new_tokens / self.warm_s

    @property
    def all_per_s(self) -> float:
        """The same of new tokens and those of prompts, without padding."""
        return (self.new_tokens + self.prompt_tokens) / self.warm_s

    @property
    def decode_s(self) -> float:
        """What remains without the prompts."""
        return self.warm_s - self.prefill_s

    @property
    def rates(self) -> dict[str, float]:
        """New tokens, all tokens, and new tokens in the time without prompts; each also over those of steps alone."""
        rates = {"new": self.new_per_s, "all": self.all_per_s, "decode": self.new_tokens / self.decode_s}
        return {f"{name}_per_s": rate for name, rate in rates.items()} | {
            f"{name}_share": rate / self.steps_per_s for name, rate in rates.items()
        }


class _Served(NamedTuple):
    compile_s: float
    seconds: float  # all that follows
    num_read: int  # tokens of prompts, padding included


def num_slots(decoder: Decoder, requests: list[Request], most: int) -> int:
    """Slots for a job: `most` of them, or as many as there are prompts, or as fit the device; at least one."""
    fitting = decode_steps.most_rows(decoder, capacity_of(requests))
    most = min(most, len(requests))
    return most if fitting is None else min(most, max(1, fitting - _PROMPT_ROWS))


def capacity_of(requests: list[Request]) -> int:
    """Of an engine that serves them; the last new token of a row is never read."""
    return cache_capacity(max(len(request.prompt) + request.max_new_tokens - 1 for request in requests))


def mean_position(requests: list[Request]) -> float:
    """Tokens that a row has read before a step, in the mean over all steps; the first token needs none."""
    steps = [(len(request.prompt), request.max_new_tokens - 1) for request in requests]
    return sum(count * (length + (count - 1) / 2) for length, count in steps) / max(1, sum(n for _, n in steps))


def measure(
    decoder: Decoder, requests: list[Request], slots: int, steps: int, store: ProgramStore | None
) -> TrafficRow:
    """Serves requests three times, the last time for a single token each; times `steps` steps alone for comparison.

    Programs are looked for in the store, if there is one, each time.

    Raises:
      RunStopped: if rows end early.
    """
    capacity = capacity_of(requests)
    peak_before = _peak_bytes()
    cold, warm = (_serve(decoder, requests, slots, capacity, store) for _ in range(2))
    prompts = [dataclasses.replace(request, max_new_tokens=1) for request in requests]
    read = _serve(decoder, prompts, slots, capacity, store)
    peak = _peak_bytes()
    planned = _planned_bytes(decoder, slots, capacity)
    compiled = decode_steps.lower(decoder, slots, capacity).compile()
    width = max(decode_steps.STEPS_PER_CALL, capacity // 4)
    first = int(min(max(0, mean_position(requests) - width / 2), capacity - width))
    alone = decode_steps.measure(decoder, compiled, slots, capacity, first, first + width, steps)
    num_tokens = sum(len(request.prompt) for request in requests)
    return TrafficRow(
        slots,
        capacity,
        num_tokens,
        sum(request.max_new_tokens for request in requests),
        padding=warm.num_read / num_tokens,
        cold_s=cold.compile_s + cold.seconds,
        compile_s=cold.compile_s,
        warm_s=warm.seconds,
        prefill_s=read.seconds,
        steps_per_s=alone.tokens_per_s,
        peak_gb=None if peak is None or peak == peak_before else peak / 1e9,
        planned_gb=planned / 1e9,
    )


def _serve(decoder: Decoder, requests: list[Request], slots: int, capacity: int, store: ProgramStore | None) -> _Served:
    start = time.perf_counter()
    lengths = [len(request.prompt) for request in requests]
    sizes = sizes_for(lengths, CHUNK_SIZES)
    engine = Engine(decoder, num_slots=slots, capacity=capacity, rule=_RULE, eos_id=None, chunk_sizes=sizes)
    engine.compile(lengths, store)
    compiled = time.perf_counter()
    got = sum(len(event.tokens) for event in engine.serve(requests))
    end = time.perf_counter()
    wanted = sum(request.max_new_tokens for request in requests)
    if got != wanted:
        raise RunStopped(f"{got:,} new tokens came, not {wanted:,}: logits of random weights were not finite")
    return _Served(compiled - start, end - compiled, engine.num_prompt_tokens[1])


def _planned_bytes(decoder: Decoder, slots: int, capacity: int) -> int:
    """Weights, an engine's caches, and the most that one of its programs allocates for a while."""
    rows = DeviceRows(decoder, None, _RULE, None, 0, slots, capacity, CHUNK_SIZES)
    num_rows = rows.begin_prompts(rows.row_counts[-1])
    tokens = np.zeros((num_rows, rows.chunk_sizes[-1]), np.int32)
    programs = [
        rows.lower_block(),
        rows.lower_insert(rows.prompts, Entries.none(num_rows, slots)),
        read_chunk.lower(decoder.layout, decoder.arrays, rows.prompts, tokens, np.zeros((num_rows,), np.int32)),
    ]
    held = max(program.compile().memory_analysis().temp_size_in_bytes for program in programs)
    return tree_bytes(decoder.arrays) + rows.cache_bytes + held


def _peak_bytes() -> int | None:
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


TITLES = (
    f"{'job':>7} {'slots':>6} {'cold s':>7} {'compile':>8} {'warm s':>7} {'prefill':>8} {'decode':>7} {'padding':>8} "
    f"{'new/s':>8} {'all/s':>8} {'steps/s':>8} {'new':>7} {'all':>7} {'decode':>7} {'peak GB':>8} {'planned':>8}"
)


def line(job: str, row: TrafficRow) -> str:
    """As `TITLES` says."""
    rates = row.rates
    shares = " ".join(f"{rates[f'{name}_share']:>7.1%}" for name in ("new", "all", "decode"))
    peak = f"{'':>8}" if row.peak_gb is None else f"{row.peak_gb:>8.2f}"
    return (
        f"{job:>7} {row.num_slots:>6} {row.cold_s:>7.1f} {row.compile_s:>8.1f} {row.warm_s:>7.1f} "
        f"{row.prefill_s:>8.1f} {row.decode_s:>7.1f} {row.padding:>8.3f} {row.new_per_s:>8.0f} {row.all_per_s:>8.0f} "
        f"{row.steps_per_s:>8.0f} {shares} {peak} {row.planned_gb:>8.2f}"
    )
