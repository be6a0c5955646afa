"""Pictures as files, whole or not at all."""

import io
import pathlib
from typing import TYPE_CHECKING

from rat_jax.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_picture(figure: "Figure", path: pathlib.Path) -> None:
    """Draws a figure into a file, in the format that the name's ending says; errors as of `write_bytes`."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=120)
    write_bytes(path, picture.getvalue())
