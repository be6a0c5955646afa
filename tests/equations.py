"""What a traced program computes."""

from collections.abc import Iterator

from jax.extend.core import JaxprEqn, jaxprs_in_params


def equations(jaxpr) -> Iterator[JaxprEqn]:
    """Of a jaxpr, and of those that its equations hold."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)
