"""Which calls the Mosaic GPU kernel takes, and how it divides their products among programs."""

from pallas_kernels.between_mixers.shape import BetweenMixersShape

DTYPES = ("bfloat16", "float16")
MAX_ROWS = 2  # each has sums of its own in registers and partial sums that all programs read
COLUMNS = 64  # of a matrix, that a program multiplies
DEPTH = 128  # rows of a matrix in a tile
STAGES = 8  # tiles of a program on their way or waiting; more are no faster
MULTIPROCESSORS = 132  # of the largest Hopper cards
SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor
RESERVED = 6 * 1024  # of them for barriers, sums across warps, alignment and what the system takes
_HOPPER = 9  # compute capability 9.x, for which it is made


def unsupported_reason(shape: BetweenMixersShape) -> str | None:
    """Why the kernel cannot run and what comes nearest; None where it can."""
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.x, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.rows > MAX_ROWS:
        return f"{shape.rows} rows are more than {MAX_ROWS}; implementation 'xla' takes them"
    for name, size, multiple in (
        ("inputs", shape.inputs, DEPTH),
        ("width", shape.width, DEPTH),
        ("hidden", shape.hidden, DEPTH),
        ("outputs", shape.outputs, COLUMNS),
    ):
        if size % multiple:
            return f"{name} {size} is no multiple of {multiple}; implementation 'xla' takes it"
    if programs(shape) > (count := shape.multiprocessors or MULTIPROCESSORS):
        return (
            f"{programs(shape)} programs, one for {COLUMNS} columns of a matrix, wait for each other and cannot all be "
            f"on {count} multiprocessors; implementation 'xla' takes the call"
        )
    if vector_bytes(shape) + STAGES * 2 * DEPTH * COLUMNS > SHARED_MEMORY - RESERVED:
        return f"{shape.rows} rows of {max(shape.width, shape.hidden)} channels leave no room for {STAGES} tiles"
    return None


def fills_card(shape: BetweenMixersShape) -> bool:
    """Whether each product occupies two thirds of the multiprocessors or more; fewer bring too little at a time."""
    strips = [shape.width // COLUMNS * splits(shape), shape.hidden // COLUMNS]
    strips += [shape.outputs // COLUMNS] if shape.outputs else []
    return 3 * min(strips) >= 2 * MULTIPROCESSORS


def splits(shape: BetweenMixersShape) -> int:
    """Parts of the sums of the products that give D channels, each by a program of its own."""
    strips = max(shape.width // COLUMNS, 1)
    fitting = (
        count
        for count in range(1, max(MULTIPROCESSORS // strips, 1) + 1)
        if shape.inputs % (count * DEPTH) == 0 and shape.hidden % (count * DEPTH) == 0
    )
    return max(fitting, default=1)


def programs(shape: BetweenMixersShape) -> int:
    """As many as the product with the most strips has; the others leave some of them idle."""
    return max(shape.width // COLUMNS * splits(shape), shape.hidden // COLUMNS, shape.outputs // COLUMNS)


def vector_size(shape: BetweenMixersShape) -> int:
    """Channels of a row that a program holds at a time, at most."""
    return max(shape.width, shape.inputs // splits(shape), shape.hidden // splits(shape))


def vector_bytes(shape: BetweenMixersShape) -> int:
    """Of shared memory, for the rows and the norm's scale."""
    return 4 * (shape.rows * vector_size(shape) + shape.width)
