"""Which part of a step a kernel is counted to."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from benchmarks.step_profile import OWN_KERNELS, Operation, report, scopes


@pytest.mark.parametrize(
    ("kernel", "instruction", "scope", "group"),
    [
        ("rat_attention_forward", "custom-call.1", "jit(f)/mixer/x", "rat_attention_forward"),
        ("normed_product_mosaic_mosaic_gpu_kernel", "custom-call.4", "mlp", "normed_product_mosaic_mosaic_gpu_kernel"),
        ("nvjet_sm90_tst_256x128", "custom-call.2", "transpose(jvp())/body/mlp/dot_general", "matrix products, mlp"),
        ("loop_add_fusion", "loop_add_fusion.3", "jit(f)/transpose(jvp())/optimizer/mul", "element-wise, optimizer"),
        ("MemcpyD2D", "loop_dynamic_update_slice_fusion", "", "copies, elsewhere"),
    ],
)
def test_groups(kernel, instruction, scope, group):
    operation = Operation(kernel, instruction, scope, 24, 12.0)
    assert operation.group == group
    assert f"100.0%  {group}" in report([operation])


def test_kernels_of_this_project_go_by_their_names():
    sources = "".join(path.read_text() for path in Path(pallas_kernels.__file__).parent.glob("*/*.py"))
    names = set(re.findall(r"^ +kernel=(\w+_\w+),$|^ +name=(\w+)\.__name__,$", sources, re.MULTILINE))
    assert len(names) >= 18 and all("".join(pair).startswith(OWN_KERNELS) for pair in names), names


def test_scopes_of_a_program():
    def function(x):
        with jax.named_scope("loss"):
            return jnp.tanh(x @ x).sum()

    found = scopes(jax.jit(function).lower(jnp.ones((8, 8))).compile().as_text())
    assert any("loss" in scope for scope in found.values())
