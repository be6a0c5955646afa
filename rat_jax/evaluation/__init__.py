"""What a trained model is worth: loss and perplexity, by position."""

from rat_jax.evaluation.perplexity import Evaluation, EvaluationError, evaluate

__all__ = ["Evaluation", "EvaluationError", "evaluate"]
