"""What a trained model is worth: loss and perplexity by position, and what it says of given tokens."""

from rat_jax.evaluation.perplexity import Evaluation, EvaluationError, evaluate
from rat_jax.evaluation.scoring import Score, Scorer

__all__ = ["Evaluation", "EvaluationError", "Score", "Scorer", "evaluate"]
