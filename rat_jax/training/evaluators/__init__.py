"""Kinds of evaluation while training: each reads parameters and returns figures.

A new kind is a group of `rat_jax.evaluation_config.EvaluationConfig`, a file with a class that keeps `Evaluator`, and a
line of `make_evaluators`.
"""

from rat_jax.training.evaluators.evaluator import Evaluator, PartFailedError
from rat_jax.training.evaluators.make import make_evaluators

__all__ = ["Evaluator", "PartFailedError", "make_evaluators"]
