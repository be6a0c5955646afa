"""Differentiable functions of arrays: the equation, its XLA body, and the choice between bodies."""
