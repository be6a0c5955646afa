"""Which calls of the gated delta rule the Triton kernels take, and the blocks of one."""

import dataclasses

from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM, missing_dependency

_DTYPES = ("bfloat16", "float16")  # products of float32 do not fit the registers
_HOPPER = 9  # compute capability 9.x, whose matrix instructions read shared memory; those of others fill the registers
_CHUNK_SIZES = (16, 32, 64)
_PROGRAMS = 256  # that go through rows in order: wider blocks of values read the keys less often, fewer idle a card


def unsupported_reason(shape: GatedDeltaRuleShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.key_dim > MAX_HEAD_DIM:
        return f"it takes keys of at most {MAX_HEAD_DIM} channels, got {shape.key_dim}; nearest: {MAX_HEAD_DIM}"
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    if not shape.is_step and (reason := _unsupported_reason_of_chunks(shape)):
        return reason
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}; nearest: float32"
    return missing_dependency()


def _unsupported_reason_of_chunks(shape: GatedDeltaRuleShape) -> str | None:
    """Why tokens cannot be taken in chunks; None where they can."""
    if shape.dtype not in _DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(_DTYPES)}; nearest: bfloat16"
    if shape.chunk_size not in _CHUNK_SIZES:
        return f"chunk_size {shape.chunk_size} is none of {', '.join(map(str, _CHUNK_SIZES))}"
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.x, this one has {shape.capability[0]}.{shape.capability[1]}"
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What a program of one kernel takes at a time, and how it is compiled."""

    columns: int  # channels: of keys where chunks are prepared, of values elsewhere
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut; the blocks of each kernel are chosen where None is given."""

    shape: GatedDeltaRuleShape
    of_chunks: Blocks | None = None
    of_states: Blocks | None = None
    of_outputs: Blocks | None = None
    of_d_states: Blocks | None = None
    of_gradients: Blocks | None = None
    most_key_columns: int = 128  # of a program that computes gradients
    solve_precision: str = "bf16x3"  # of the products of float32 that join inverses, whose result has 16 bits

    @property
    def keys(self) -> int:
        """Key channels of a tile."""
        return max(16, next_power_of_2(self.shape.key_dim))

    @property
    def key_columns(self) -> int:
        """Key channels of a program that computes gradients, a divisor of `keys`."""
        return min(self.keys, self.most_key_columns)

    @property
    def chunks(self) -> int:
        """C, of a row."""
        return cdiv(self.shape.tokens, self.shape.chunk_size)

    @property
    def chunk_blocks(self) -> Blocks:
        return self.of_chunks or Blocks(min(self.keys, 128), 4, 2)

    @property
    def state_blocks(self) -> Blocks:
        few = self._few_in_order
        return self.of_states or Blocks(self._of_values(32 if few or self.keys > 128 else 64), 4, 3 if few else 2)

    @property
    def output_blocks(self) -> Blocks:
        return self.of_outputs or Blocks(self._of_values(64), 4, 2)

    @property
    def d_state_blocks(self) -> Blocks:
        stages = 1 if self.keys > 128 else 3 if self._few_in_order else 2
        return self.of_d_states or Blocks(self._of_values(32), 4, stages)

    @property
    def gradient_blocks(self) -> Blocks:
        return self.of_gradients or Blocks(self._of_values(64), 8, 2)

    @property
    def _few_in_order(self) -> bool:
        """Whether rows and heads are so few that a kernel that goes through them in order waits for memory."""
        programs = self.shape.batch * self.shape.num_heads * cdiv(self.shape.value_dim, 64)
        return self.keys <= 128 and programs < _PROGRAMS

    def _of_values(self, most: int) -> int:
        return min(max(16, next_power_of_2(self.shape.value_dim)), most)

    def constants(self) -> tuple[tuple[str, int], ...]:
        """The constants that all kernels share."""
        return (
            ("N", self.shape.num_heads),
            ("HK", self.shape.key_dim),
            ("HV", self.shape.value_dim),
            ("CHUNK", self.shape.chunk_size),
            ("KEYS", self.keys),
        )
