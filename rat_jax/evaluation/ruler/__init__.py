"""RULER (arXiv 2404.06654) without downloads: its generated tasks for any tokenizer at any length, and their scores.

  python -m rat_jax.evaluation.ruler --tokenizer=bytes --task=niah_single_1 --length=1024 --num=1000 \\
      --split=train --out=train.jsonl

The two tasks that ask about documents (qa_1, qa_2) need data sets and are not here.
"""

from rat_jax.evaluation.ruler.checkpoint import are_ruler_tasks, evaluate_checkpoint
from rat_jax.evaluation.ruler.evaluation import RulerResults, check_ruler, run_ruler
from rat_jax.evaluation.ruler.examples import TASKS, Example, Settings, make_example
from rat_jax.evaluation.ruler.heat_map import draw_heat_map
from rat_jax.evaluation.ruler.table import table

__all__ = [
    "TASKS",
    "Example",
    "RulerResults",
    "Settings",
    "are_ruler_tasks",
    "check_ruler",
    "draw_heat_map",
    "evaluate_checkpoint",
    "make_example",
    "run_ruler",
    "table",
]
