"""The table of letters has every axis that annotations name, and annotations are checked when functions are called."""

import ast
import pathlib
import re

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from rat_jax import shapes
from rat_jax.data.pipeline import Batch
from rat_jax.layers import RmsNorm
from rat_jax.mesh import rows_per_device
from rat_jax.ops import attention
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.ops.linear_attention_xla import lagged
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo, whole_rows
from rat_jax.training.step import batch_loss

PACKAGE = pathlib.Path(shapes.__file__).parent
TYPES = {name for name in dir(jaxtyping) if name.startswith(("Bool", "Float", "Int", "Num", "Shaped", "UInt"))}


def axes_of(file: pathlib.Path) -> set[str]:
    """Names in the annotations of arrays in a file, "#" (broadcast) left out; numbers and expressions have none."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in TYPES:
            axes = node.slice.elts[1].value.replace("#", "").split()
            found |= {axis for axis in axes if re.fullmatch(r"\*?[A-Za-z_]\w*", axis)}
    return found


def table() -> set[str]:
    rows = re.findall(r"^\| (.+?) +\| ", shapes.__doc__, re.MULTILINE)
    return {name for row in rows[1:] for name in row.split(", ")}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_axis_is_in_the_table(file):
    assert axes_of(file) <= table()


def test_axes_and_table_are_found():
    assert {"B", "T", "*c"} <= axes_of(PACKAGE / "ops" / "recurrence.py")
    assert {"B", "Hk", "Hv", "*axes", "_"} <= table()


X = jnp.zeros((2, 5, 3, 4))
IDS = jnp.ones((2, 5), jnp.int32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: attention(X, X[:, :, :, :3], X), "'key'"),
        (lambda: rotate(X, IDS[:, :4], 1e4), "'positions'"),
        (lambda: rotate(X, IDS.astype(jnp.float32), 1e4), "'positions'"),
        (lambda: attention(X, X, X, query_info=KeyInfo(IDS[:1], IDS), key_info=KeyInfo(IDS, IDS)), "'query_info'"),
        (lambda: attention(X, X, X, segment_ids=SegmentInfo(IDS, IDS, IDS[:, :4], True)), "'segment_ids'"),
        (lambda: batch_loss(None, None, Batch(IDS * 1.0, IDS, IDS * 1.0, None)), "'batch'"),
        (lambda: rotate(np.zeros((2, 5, 3, 4), np.float32), IDS, 1e4), "'x'"),
    ],
    ids=[
        "size",
        "other_size",
        "dtype",
        "field_of_a_dataclass",
        "field_beside_a_signature",
        "namedtuple",
        "not_an_array",
    ],
)
def test_what_does_not_fit_an_annotation_is_refused(call, named):
    with pytest.raises(jaxtyping.TypeCheckError, match=f"parameter {named}"):
        call()


def test_results_are_checked():
    of_one_row = SegmentInfo(IDS[0], IDS[0], IDS[0], contiguous=False)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        of_one_row.starts()


def test_what_fits_is_taken():
    assert attention(X, X, X, segment_ids=whole_rows(2, 5)).out.shape == X.shape
    assert lagged(IDS, 2).tolist() == [[0, 0, 1, 1, 1]] * 2
    assert RmsNorm(4)(X).shape == X.shape
    assert rows_per_device(4) == 4
