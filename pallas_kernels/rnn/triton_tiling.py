"""Which calls the Triton kernels take, and how rows and channels are divided among programs."""

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, missing_dependency
from pallas_kernels.rnn.shape import RnnShape

CHANNELS = 128  # of a program, one of each thread
PIECE = 16  # tokens that are read before the first of them is used, and whose states the backward pass has in registers
_PROGRAMS = 2048  # that fill a card: rows are cut where there are fewer
_MOST_SPANS = 32  # whose states are joined one after the other
_LEAST_SPAN = 256  # tokens: what is read twice must pay


def unsupported_reason(shape: RnnShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    return missing_dependency()


def span_of(shape: RnnShape) -> int:
    """Tokens of a program, a multiple of `PIECE`."""
    wanted = _PROGRAMS // (shape.batch * cdiv(shape.width, CHANNELS))
    spans = max(1, min(wanted, _MOST_SPANS, shape.tokens // _LEAST_SPAN))
    return cdiv(cdiv(shape.tokens, spans), PIECE) * PIECE
