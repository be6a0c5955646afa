"""Scoring of requests beside the training forward pass, in tokens a second, with padding counted against scoring.

  python benchmarks/scoring.py --config configs/rat_1b.py --dtype bfloat16
  python benchmarks/scoring.py --config configs/default.py --batch_tokens 2048 --num_questions 64

`forward` is the loss of full sequences of one length, without gradients, in batches of `--batch_tokens`: what scoring
would reach without padding, sorting and the way there and back. Each row below is one kind of request with the lengths
of a real task, drawn at random:

  windows    long texts in rolling windows of the context length, four contexts long in the median
  pairs      a context and a continuation each, such as the last word of a passage
  options    questions with four options each, whose context is read once

`tokens/s` counts tokens that requests have, without padding and without those that a text's last window reads again:
of a question with options each option with its context, as a scorer without sharing reads them; `computed` those that
the device reads, over the former. `share` is the first over `forward`. `ms a request` is the time of all over their
number, and `host` what of it remains when the model is replaced by one that does nothing: tokenised requests to arrays,
and results to scores. `first` is what scoring them took the first time, compilation included, in seconds.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import card
from benchmarks.timing import time_calls
from rat_jax import program
from rat_jax.config import ModelConfig, config_from_dict
from rat_jax.config_file import load_config_file
from rat_jax.evaluation import scoring
from rat_jax.evaluation.scoring import Score, Scorer
from rat_jax.evaluation.shared_contexts import OptionScores
from rat_jax.loss import TokenScores, next_token_loss
from rat_jax.model import LanguageModel

Requests = list[tuple[np.ndarray, np.ndarray]] | list[np.ndarray]


def forward_rate(model: LanguageModel, config: ModelConfig, seq_len: int, batch_tokens: int, repeats: int) -> float:
    """Tokens a second of the loss of full sequences."""
    graphdef, params = nnx.split(model)
    shape = (max(1, batch_tokens // seq_len), seq_len)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size, dtype=jnp.int32)
    targets, weights = jnp.roll(tokens, -1, axis=1), jnp.ones(shape, jnp.float32)

    @jax.jit
    def loss(params):
        model = nnx.merge(graphdef, params)
        return next_token_loss(model.hidden(tokens), model.embedding[...], targets, weights)

    return 1e3 * tokens.size / time_calls(lambda: loss(params), jax.block_until_ready, repeats).ms


def draw_requests(kind: str, num_questions: int, context_length: int, vocab_size: int) -> Requests:
    """Requests of one kind, lengths and ids drawn from a fixed seed."""
    rng = np.random.default_rng(0)

    def ids(mean: float) -> np.ndarray:
        count = int(np.clip(rng.lognormal(np.log(mean), 0.5), 1, context_length // 2))
        return rng.integers(0, vocab_size, count)

    match kind:
        case "windows":
            counts = context_length * rng.lognormal(np.log(4), 0.5, max(1, num_questions // 160))
            return [rng.integers(0, vocab_size, int(count)) for count in counts]
        case "pairs":
            return [(ids(90), ids(1.5)) for _ in range(num_questions)]
        case _:
            contexts = [ids(90) for _ in range(num_questions)]
            return [(context, ids(25)) for context in contexts for _ in range(4)]


def measure(scorer: Scorer, requests: Requests) -> tuple[float, float, int]:
    """Seconds to score all requests, the first time and once they are compiled, and the tokens computed for it."""

    def score() -> list[Score]:
        if isinstance(requests[0], tuple):
            return scorer.score(requests)
        return scorer.score_rolling(requests, start_id=0)

    times = [time.perf_counter()]
    for _ in range(2):
        before = scorer.num_tokens
        score()
        times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], scorer.num_tokens - before


def num_tokens(requests: Requests) -> int:
    """Tokens that are read of requests by themselves, without padding."""
    if isinstance(requests[0], tuple):
        return sum(len(context) + len(continuation) - 1 for context, continuation in requests)
    return sum(map(len, requests))


def host_seconds(make_scorer: Callable[[], Scorer], requests: Requests) -> float:
    """Seconds of the same without a model."""
    computing = scoring.batch_scores, scoring.context_scores

    def nothing(graphdef, params, batch):
        shape = batch.targets.shape
        scores = OptionScores if len(shape) == 3 else TokenScores
        return scores(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))

    scoring.batch_scores = scoring.context_scores = nothing
    try:
        return measure(make_scorer(), requests)[1]
    finally:
        scoring.batch_scores, scoring.context_scores = computing


def main() -> None:
    """Prints the table."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--dtype", default=None, help="float32 or bfloat16; left out: the config's")
    parser.add_argument("--context_length", type=int, default=None, help="left out: the config's data.seq_len")
    parser.add_argument("--batch_tokens", type=int, default=16_384, help="tokens computed at a time")
    parser.add_argument("--num_questions", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=5, help="of the forward pass")
    flags = parser.parse_args()
    config = config_from_dict(load_config_file(flags.config, "--config"))
    context_length = flags.context_length or config.data.seq_len
    model_config = config.model if flags.dtype is None else dataclasses.replace(config.model, dtype=flags.dtype)
    model = LanguageModel(model_config, rngs=nnx.Rngs(0))
    print(card.describe())
    forward = forward_rate(model, model_config, context_length, flags.batch_tokens, flags.repeats)
    print(f"\nforward: {forward:,.0f} tokens/s at {context_length} tokens, {flags.batch_tokens:,} at a time")
    titles = f"{'requests':>10} {'number':>7} {'tokens/s':>10} {'share':>7} {'computed':>9} {'ms a request':>13}"
    print(f"{titles} {'host':>7} {'first':>7}")
    for kind in ("windows", "pairs", "options"):
        requests = draw_requests(kind, flags.num_questions, context_length, model_config.vocab_size)

        def make_scorer() -> Scorer:
            return Scorer(model, None, context_length=context_length, batch_tokens=flags.batch_tokens)

        first, seconds, computed = measure(make_scorer(), requests)
        rate, count = num_tokens(requests) / seconds, len(requests)
        print(
            f"{kind:>10} {count:>7,} {rate:>10,.0f} {rate / forward:>7.1%} {computed / num_tokens(requests):>9.1%} "
            f"{1e3 * seconds / count:>13.3f} {1e3 * host_seconds(make_scorer, requests) / count:>7.3f} {first:>7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
