"""Groups of tasks that papers report, each with all that its figures depend on: `eval.py --tasks=csr`.

A task is one of the lm-evaluation-harness, or a file in `rat_jax/evaluation/tasks`. Where a paper's protocol is not
the harness's, the difference is a field of `GroupTask` and applied to the harness's own file when it is loaded.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rat_jax.evaluation.document_cut import DocumentCut


@dataclasses.dataclass(frozen=True)
class GroupTask:
    """A task, and what of it is not as its file says."""

    name: str
    metric: str  # what the mean of the group is of
    folder: str | None  # of its file among those of the harness; None: a file of ours
    prompt_change: tuple[str, str] | None = None  # a part of the file's prompt, and what stands in its place
    stop: tuple[str, ...] | None = None  # strings that end a generated answer; None: those of the file
    # Where a generated answer is cut, after line ends at its start are taken off; None: it is judged as it is.
    answer_ends: tuple[str, ...] | None = None
    cut: DocumentCut | None = None  # the part of long documents that is asked about; None: all


@dataclasses.dataclass(frozen=True)
class TaskGroup:
    """Tasks that are reported together. Flags of the command go before its settings."""

    tasks: tuple[GroupTask, ...]
    num_fewshot: int  # examples before each question
    text: Mapping[str, Any]  # fields of `TextSettings`; those that are left out as for any other task
    source: str  # whose protocol it is

    def mean(self, results: Mapping[str, Mapping[str, Any]]) -> float | None:
        """Of the tasks' metrics, each task with the same weight; None unless all have a value.

        Args:
          results: of `Tasks.run`, by the task's name.
        """
        values = []
        for task in self.tasks:
            metrics = results.get(task.name, {}).get("results", {}).get(task.name, {})
            if (value := metrics.get(f"{task.metric},none")) is None:
                return None
            values.append(value)
        return sum(values) / len(values)


_CSR = (
    GroupTask("piqa", "acc", "piqa"),
    GroupTask("arc_easy", "acc", "arc"),
    GroupTask("arc_challenge", "acc_norm", "arc"),
    GroupTask("winogrande", "acc", "winogrande"),
    GroupTask("lambada_openai", "acc", "lambada"),
    GroupTask("hellaswag", "acc_norm", "hellaswag"),
)
_CSR_HYBRID = (
    *_CSR,
    GroupTask("boolq", "acc", "super_glue"),
    GroupTask("openbookqa", "acc_norm", "openbookqa"),
    GroupTask("sciq", "acc", "sciq"),
    GroupTask("social_iqa", "acc", "siqa"),
)

_ANSWER = ("\nQuestion",)  # where a model goes on with a question of its own
_EXAMPLES = ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}")  # LongBench has an empty line between them
_CODE = ("Next line of code:", "Next line of code:\n")


def _longbench(name: str, **changes: Any) -> GroupTask:
    return GroupTask(f"longbench_{name}", "score", "longbench", stop=(), **changes)


_LONGBENCH = (
    _longbench("narrativeqa", answer_ends=_ANSWER),
    _longbench("qasper", answer_ends=_ANSWER),
    _longbench("multifieldqa_en", answer_ends=_ANSWER),
    _longbench("hotpotqa", answer_ends=_ANSWER),
    _longbench("2wikimqa", answer_ends=_ANSWER),
    _longbench("musique", answer_ends=_ANSWER),
    _longbench("gov_report"),
    _longbench("qmsum", answer_ends=("\nQuery", "\nQuestion")),
    _longbench("multi_news"),
    _longbench("trec", answer_ends=_ANSWER),
    _longbench("triviaqa", prompt_change=_EXAMPLES, answer_ends=_ANSWER),
    _longbench("samsum", prompt_change=_EXAMPLES),
    _longbench("lcc", prompt_change=_CODE),
    _longbench("repobench-p", prompt_change=_CODE),
)


def _recall(name: str, cut: DocumentCut) -> GroupTask:
    return GroupTask(f"recall_{name}", "contains", None, cut=cut)


# 50 tokens of the context are left for question and answer.
_RECALL = (
    _recall("swde", DocumentCut("text", ("key", "value"), 50, end_mark="Summary of information above...")),
    _recall("squad", DocumentCut("text", ("value",), 50)),
    _recall("fda", DocumentCut("text", ("key", "value"), 50)),
    _recall("triviaqa", DocumentCut("context", (), 50)),
    _recall("nq", DocumentCut("context", ("answers",), 98)),  # cut to 2000 - 50 tokens, the others to 2048 - 50
    _recall("drop", DocumentCut("context", (), 50)),
)

GROUPS: Mapping[str, TaskGroup] = MappingProxyType(
    {
        "csr": TaskGroup(
            _CSR,
            num_fewshot=0,
            text={},
            source="RAT (arXiv 2507.04416), table 2: the harness's tasks as they are",
        ),
        "csr_hybrid": TaskGroup(
            _CSR_HYBRID,
            num_fewshot=0,
            text={},
            source="the ten tasks that papers on hybrid models report: the harness's tasks as they are",
        ),
        "longbench": TaskGroup(
            _LONGBENCH,
            num_fewshot=0,
            # A context of 4096, of which the release never fills the last token.
            text={"context_length": 4095, "truncation": "middle"},
            source="RAT (arXiv 2507.04416), table 3, github.com/CLAIRE-Labo/RAT, eval/longbench: LongBench v1 with "
            "answers of a model that is not tuned to instructions",
        ),
        "recall": TaskGroup(
            _RECALL,
            num_fewshot=0,
            text={"context_length": 2048},
            source="Just Read Twice (arXiv 2407.05483), table 2 at 2K, "
            "github.com/HazyResearch/prefix-linear-attention: documents read once",
        ),
    }
)
