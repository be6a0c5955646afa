"""An engine that continues prompts: rows in slots, which other prompts take as soon as a row ends."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from rat_jax.decoder import Decoder
from rat_jax.program_store import ProgramStore
from rat_jax.sampling.device_rows import DeviceRows
from rat_jax.sampling.errors import require
from rat_jax.sampling.prefill import CHUNK_SIZES
from rat_jax.sampling.reader import LOOK_AHEAD, PromptReader, like_prompts
from rat_jax.sampling.request import End, Event, Request
from rat_jax.sampling.sampling_params import SamplingParams
from rat_jax.sampling.slots import NOT_FINITE, STEPS_PER_CALL, Block
from rat_jax.sampling.submitted import Row, Submitted, prompt_digest

PREFILL_TOKENS = 1 << 15  # of prompts, read while all running rows wait
_LARGEST_SHARE = 4  # times as many tokens of prompts are read while few rows wait


@dataclasses.dataclass(frozen=True)
class _Started:
    """A block of steps that the device computes."""

    block: Block
    rows: list[Row | None]  # of each slot
    new: set[int]  # slots whose first token is in the block's first column
    num_steps: int


class Engine:
    """Continues prompts in a fixed number of slots, with few compiled programs and caches of a stated size.

    `submit` takes requests, each call of `step` reads prompts into free slots and continues all running rows by a
    block of tokens, and requests are told of their tokens as they come. A row's tokens follow from its own request and
    the seed alone: not from its slot, its neighbours or when it came, up to rounding of the logits.

    Prompts of like length are read together, in chunks of few sizes, into a small cache, from which the rows are copied
    into slots; a long prompt is read over several steps. While all slots are taken one more group of prompts is read.

    After an error of `step` the engine cannot go on. Several hosts give their engines the same requests in the same
    order; each is told of all tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_slots: int,
        capacity: int,
        rule: SamplingParams,
        eos_id: int | None,
        seed: int = 0,
        mesh: jax.sharding.Mesh | None = None,
        chunk_sizes: tuple[int, ...] = CHUNK_SIZES,
        prefill_tokens: int = PREFILL_TOKENS,
    ):
        """Makes the caches.

        Args:
          decoder: of the model, `LanguageModel.decoder`.
          num_slots: rows that are continued at a time; a multiple of the mesh's devices.
          capacity: tokens of a row: of its prompt and new ones, all but the last of these.
          rule: how tokens are chosen, `SamplingParams.of`.
          eos_id: the token that ends a row; None: rows end at their `max_new_tokens`.
          seed: of the random numbers.
          mesh: whose devices divide the rows, of the axes of `rat_jax.mesh`; the decoder's parameters are on it, cut or
            not. None: the decoder's own device.
          chunk_sizes: tokens of a row that are read in one call, ascending. Each is a program; the largest bounds the
            memory that reading takes.
          prefill_tokens: of prompts, padding included, that a step reads before it continues the rows that run, a chunk
            at least; up to four times as many while few run.

        Raises:
          SamplingError: if a setting is out of range, or if the caches are larger than what the device has free.
        """
        vocab_size = decoder.config.vocab_size
        for name, value in (("num_slots", num_slots), ("capacity", capacity), ("prefill_tokens", prefill_tokens)):
            require(value >= 1, f"{name} must be 1 or more, got {value}")
        require(capacity < 2**31, f"capacity must be below 2**31, up to which positions are counted, got {capacity}")
        require(0 <= seed < 2**32, f"seed must lie between 0 and 2**32 - 1, got {seed}")
        require(
            eos_id is None or 0 <= eos_id < vocab_size, f"eos_id {eos_id} is outside the vocabulary of {vocab_size}"
        )
        require(
            len(chunk_sizes) > 0 and list(chunk_sizes) == sorted(set(chunk_sizes)) and chunk_sizes[0] >= 1,
            f"chunk_sizes must be numbers of 1 or more, ascending, got {chunk_sizes}",
        )
        num_devices = 1 if mesh is None else mesh.size
        require(
            num_slots % num_devices == 0,
            f"num_slots must be a multiple of the {num_devices} devices of the mesh, got {num_slots}",
        )
        self.num_slots, self.capacity = num_slots, capacity
        self._prefill_tokens, self._vocab_size = prefill_tokens, vocab_size
        self._device = DeviceRows(decoder, mesh, rule, eos_id, seed, num_slots, capacity, chunk_sizes)
        self._reader = PromptReader(self._device.chunk_sizes)
        self._submitted: dict[int, Submitted] = {}  # all that have not ended
        self._waiting: dict[int, Submitted] = {}  # those of them whose prompts are still to be read, in their order
        self._num_submitted = 0
        self._copies: collections.Counter[int] = collections.Counter()
        self._free = list(range(num_slots))[::-1]
        self._rows: list[Row | None] = [None] * num_slots  # which the next block continues
        self._left = np.zeros((num_slots,), np.int64)  # tokens that they may still get after the blocks that started
        self._new: set[int] = set()  # slots that were filled after the last block started
        self._stopped = np.zeros((num_slots,), bool)  # slots whose rows the next block is to end
        self._started: _Started | None = None

    @property
    def cache_bytes(self) -> int:
        """What the caches take, of slots and of prompts that are read, on all devices together."""
        return self._device.cache_bytes

    @property
    def num_programs(self) -> int:
        """The most programs that are compiled for the engine, whatever it is asked for."""
        return self._device.num_programs

    @property
    def num_running(self) -> int:
        """Rows in slots."""
        return self.num_slots - len(self._free)

    @property
    def num_prompt_tokens(self) -> tuple[int, int]:
        """Tokens of prompts that were read or are being read, without and with padding."""
        return self._reader.num_tokens, self._reader.num_padded_tokens

    @property
    def is_busy(self) -> bool:
        """Whether any request has not ended."""
        return len(self._submitted) > 0

    def compile(self, prompt_lengths: Sequence[int] | None = None, store: ProgramStore | None = None) -> None:
        """Compiles programs now, side by side, that are compiled as they are needed otherwise.

        Args:
          prompt_lengths: in tokens, of all prompts that are to come: the programs that they need. None: all programs.
          store: where programs are looked for before they are traced, and kept.

        Raises:
          SamplingStopped: if a device runs out of memory.
        """
        with self._device.naming_settings():
            self._device.compile(prompt_lengths, store)

    def check(self, request: Request) -> np.ndarray:
        """The ids of a request's prompt, if the engine can serve it.

        Raises:
          SamplingError: naming the field that is out of range, or the capacity and the memory of a row.
        """
        return request.check(self._vocab_size, self.capacity, self._device.row_bytes)

    def submit(self, request: Request) -> int:
        """Takes a request, which waits for a free slot; returns its number, counted from 0.

        Raises:
          SamplingError: as `check`.
        """
        prompt = self.check(request)
        digest = prompt_digest(prompt)
        copy = self._copies[digest] if request.copies_before is None else request.copies_before
        self._copies[digest] += request.num_samples
        number, self._num_submitted = self._num_submitted, self._num_submitted + 1
        self._submitted[number] = self._waiting[number] = Submitted(number, request, prompt, digest, copy)
        return number

    def cancel(self, number: int) -> bool:
        """Ends all rows of a request, which are told so; returns whether any had not ended. Others are as before."""
        submitted = self._submitted.pop(number, None)
        if submitted is None:
            return False
        self._waiting.pop(number, None)
        self._reader.drop(submitted)
        samples = [*submitted.rows, *range(submitted.num_started, submitted.request.num_samples)]
        for row in list(submitted.rows.values()):
            self._close(row)
        for sample in samples:
            _tell(submitted, sample, [], [], "cancelled")
        return True

    def step(self) -> bool:
        """Reads prompts into free slots, continues all rows by a block, tells of the block before it.

        The device computes a block ahead of what is told. A block has 8 tokens of each row, or the first tokens alone
        where all rows are new.

        Returns:
          Whether any request has not ended.

        Raises:
          SamplingStopped: if a device runs out of memory.
        """
        with self._device.naming_settings():
            self._read_prompts()
            before, self._started = self._started, self._start_block()
            if before is not None:
                self._collect(before)
        return self.is_busy

    def run(self) -> None:
        """Steps until all requests have ended; errors as of `step`."""
        while self.step():
            pass

    def serve(self, requests: Iterable[Request | None]) -> Iterator[Event]:
        """Takes requests as there is room for them and gives all their events; few requests are held at a time.

        Args:
          requests: asked for more before each step; None: none for now, as long as others run.

        Raises:
          SamplingError: as `submit` and `step`.
        """
        events: collections.deque[Event] = collections.deque()
        source = iter(requests)

        def listening(request: Request) -> Request:
            def on_event(event: Event) -> bool | None:
                events.append(event)
                return request.on_event and request.on_event(event)

            return dataclasses.replace(request, on_event=on_event)

        end = object()
        is_exhausted = False
        while self.is_busy or not is_exhausted:
            while not is_exhausted and len(self._waiting) < LOOK_AHEAD:
                request = next(source, end)
                is_exhausted = request is end
                if not isinstance(request, Request):
                    break
                self.submit(listening(request))
            self.step()
            while events:
                yield events.popleft()

    def _read_prompts(self) -> None:
        """Reads prompts and fills free slots; see `step` for how much."""
        budget = self._prefill_tokens * min(_LARGEST_SHARE, self.num_slots / max(1, self.num_running))
        while True:
            while self._reader.is_ready and self._free:
                self._fill_slots()
            if self._reader.is_ready or budget <= 0:
                return
            if self._reader.is_empty:
                if not self._waiting:
                    return
                self._begin_group()
            tokens, num_left = self._reader.next_chunk()
            self._device.read(tokens, num_left)
            budget -= tokens.size

    def _begin_group(self) -> None:
        group = like_prompts(self._waiting.values(), self._device.row_counts[-1])
        for submitted in group:
            del self._waiting[submitted.number]
        self._reader.begin(group, self._device.begin_prompts(len(group)))

    def _fill_slots(self) -> None:
        entries, rows = self._reader.take(self._free, self.num_slots)
        self._device.put(entries)
        for row in rows:
            self._rows[row.slot] = row
            self._left[row.slot] = row.submitted.request.max_new_tokens - 1  # the first is chosen
            self._stopped[row.slot] = False
            self._new.add(row.slot)

    def _start_block(self) -> _Started | None:
        """Starts a block of steps, if any row runs; slots whose rows are sure to end in it are free then."""
        if self.num_running == 0:
            return None
        if len(self._new) == self.num_running:
            block, num_steps = self._device.first_tokens(), 0  # they are there: they are told at once
        else:
            block, num_steps = self._device.step(self._stopped), STEPS_PER_CALL
            self._stopped = np.zeros_like(self._stopped)  # a new one: the program may still read the old
        started = _Started(block, list(self._rows), self._new, num_steps)
        self._new = set()
        self._left -= num_steps
        for slot in np.flatnonzero(self._left <= 0).tolist():
            if self._rows[slot] is not None:
                self._release(slot)
        return started

    def _collect(self, started: _Started) -> None:
        """Tells of the tokens of a block."""
        tokens, log_probs = map(np.asarray, started.block)
        counts = (tokens[:, 1:] >= 0).sum(axis=1).tolist()
        token_lists = tokens.tolist()
        for slot, row in enumerate(started.rows):
            if row is None or not row.is_open:
                continue
            is_new = slot in started.new
            first = 0 if is_new else 1
            count = counts[slot] + (is_new and token_lists[slot][0] >= 0)
            row.num_tokens += count
            end: End | None = None
            if row.num_tokens == row.submitted.request.max_new_tokens:
                end = "length"
            elif count < started.num_steps + is_new:
                end = "not_finite" if token_lists[slot][first + count] == NOT_FINITE else "eos"
            if end is not None:
                self._close(row)
            if count == 0 and end is None:
                continue
            chosen = slice(first, first + count)
            of_tokens = log_probs[slot, chosen].tolist() if row.submitted.request.log_probs else []
            has_enough = _tell(row.submitted, row.sample, token_lists[slot][chosen], of_tokens, end)
            if has_enough and row.is_open:
                self._close(row)
                _tell(row.submitted, row.sample, [], [], "stopped")

    def _close(self, row: Row) -> None:
        """Ends a row on the host's side; if it still has its slot, the device ends it with the next block."""
        row.is_open = False
        if self._rows[row.slot] is row:
            self._release(row.slot)
            self._stopped[row.slot] = True
        submitted = row.submitted
        del submitted.rows[row.sample]
        if not submitted.rows and submitted.num_started == submitted.request.num_samples:
            self._submitted.pop(submitted.number, None)

    def _release(self, slot: int) -> None:
        self._rows[slot] = None
        self._new.discard(slot)
        self._free.append(slot)


def _tell(submitted: Submitted, sample: int, tokens: list[int], log_probs: list[float], end: End | None) -> bool:
    """Tells a request of a row; returns whether it wants no more of it."""
    request = submitted.request
    if request.on_event is None:
        return False
    event = Event(submitted.number, sample, tokens, log_probs if request.log_probs else None, end)
    return bool(request.on_event(event))
