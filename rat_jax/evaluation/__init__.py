"""What a trained model is worth: loss and perplexity by position, what it says of given tokens, and tasks.

perplexity      the loss of the validation split          scoring           log p of given tokens
position_sums   sums by position, and their means         shared_contexts   of continuations of the same context
report          losses as a table and a picture           progress          how batches are seen to go by
results         files in the workdir, and their names     padding           lengths that rows are padded to

mode            what eval.py measures, by its flags       subject           what it is measured on
loss_evaluation, task_evaluation, length_evaluation       the measurements themselves
answers         greedy answers beside references          ruler/            texts that hide what they ask for

length_generalization                                     the loss beyond the training length, in chunks
length_report   it as a table and a picture

groups          tasks that papers report together         harness           a model as the harness calls it
document_cut    documents of the recall tasks             harness_tasks     tasks by name: loaded, changed, run
tasks/          task files of ours                        text_settings     how texts become what a model reads
task_files      a digest of a folder of them              task_report       results of tasks as a table
"""

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.perplexity import Evaluation, evaluate
from rat_jax.evaluation.scoring import Score, Scorer

__all__ = ["Evaluation", "EvaluationError", "Score", "Scorer", "evaluate"]
