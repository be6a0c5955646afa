"""Which part of a step a kernel is counted to."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks.step_profile import Operation, report, scopes


@pytest.mark.parametrize(
    ("kernel", "instruction", "scope", "group"),
    [
        ("rat_attention_forward", "custom-call.1", "jit(f)/mixer/x", "rat_attention_forward"),
        ("nvjet_sm90_tst_256x128", "custom-call.2", "transpose(jvp())/body/mlp/dot_general", "matrix products, mlp"),
        ("loop_add_fusion", "loop_add_fusion.3", "jit(f)/transpose(jvp())/optimizer/mul", "element-wise, optimizer"),
        ("MemcpyD2D", "loop_dynamic_update_slice_fusion", "", "copies, elsewhere"),
    ],
)
def test_groups(kernel, instruction, scope, group):
    operation = Operation(kernel, instruction, scope, 24, 12.0)
    assert operation.group == group
    assert f"100.0%  {group}" in report([operation])


def test_scopes_of_a_program():
    def function(x):
        with jax.named_scope("loss"):
            return jnp.tanh(x @ x).sum()

    found = scopes(jax.jit(function).lower(jnp.ones((8, 8))).compile().as_text())
    assert any("loss" in scope for scope in found.values())
