"""Rows of the data sets of every task of every group, in their own columns, and what each task makes of them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Choice:
    """Options, one of which is right: (context, continuation) of each, as the model reads them."""

    requests: list[tuple[str, str]]
    options: list[str]  # as the data set has them: what `acc_norm` counts the characters of
    right: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt, an answer that a model generates, and what it is worth."""

    prompt: str
    generated: str
    value: float


@dataclasses.dataclass(frozen=True)
class Case:
    """A task's data set, the split that is asked, rows of it, and what the task makes of each."""

    dataset: tuple[str, str | None]  # path and name on the hub
    split: str
    rows: list[dict[str, Any]]
    documents: list[Choice] | list[Answer]
    until: tuple[str, ...] = ()
    max_gen_toks: int | None = None


def _choice(context: str, options: list[str], right: int) -> Choice:
    return Choice([(context, f" {option}") for option in options], options, right)


def _four(texts: list[str], labels: str = "ABCD") -> dict[str, list[str]]:
    return {"text": texts, "label": list(labels)}


CHOICES = {
    "piqa": Case(
        ("baber/piqa", None),
        "validation",
        [
            {"goal": "dry a wet shoe", "sol1": "put it in the sun", "sol2": "put it in water", "label": 0},
            {"goal": "open a jar", "sol1": "hit it", "sol2": "turn the lid", "label": 1},
            {"goal": "boil eggs", "sol1": "use water", "sol2": "use sand", "label": 0},
        ],
        [
            _choice("Question: dry a wet shoe\nAnswer:", ["put it in the sun", "put it in water"], 0),
            _choice("Question: open a jar\nAnswer:", ["hit it", "turn the lid"], 1),
            _choice("Question: boil eggs\nAnswer:", ["use water", "use sand"], 0),
        ],
    ),
    **{
        name: Case(
            ("allenai/ai2_arc", part),
            "test",
            [
                {
                    "id": "1",
                    "question": "What is hot?",
                    "choices": _four(["ice", "fire", "snow", "rain"]),
                    "answerKey": "B",
                },
                {"id": "2", "question": "2 + 2?", "choices": _four(["1", "2", "3", "4"], "1234"), "answerKey": "4"},
                {
                    "id": "3",
                    "question": "Which flies?",
                    "choices": _four(["a bird", "a cow", "dog"], "ABC"),
                    "answerKey": "A",
                },
            ],
            [
                _choice("Question: What is hot?\nAnswer:", ["ice", "fire", "snow", "rain"], 1),
                _choice("Question: 2 + 2?\nAnswer:", ["1", "2", "3", "4"], 3),
                _choice("Question: Which flies?\nAnswer:", ["a bird", "a cow", "dog"], 0),
            ],
        )
        for name, part in (("arc_easy", "ARC-Easy"), ("arc_challenge", "ARC-Challenge"))
    },
    "winogrande": Case(
        ("allenai/winogrande", "winogrande_xl"),
        "validation",
        [
            {"sentence": "Ann called Eve, as _ was ill.", "option1": "Ann", "option2": "Eve", "answer": "2"},
            {"sentence": "The cup is on the box: _ is big.", "option1": "cup", "option2": "box", "answer": "2"},
            {"sentence": "Bob beat Tom so _ won it.", "option1": "Bob", "option2": "Tom", "answer": "1"},
        ],
        [
            Choice(
                [("Ann called Eve, as Ann", " was ill."), ("Ann called Eve, as Eve", " was ill.")], ["was ill."] * 2, 1
            ),
            Choice(
                [("The cup is on the box: cup", " is big."), ("The cup is on the box: box", " is big.")],
                ["is big."] * 2,
                1,
            ),
            Choice([("Bob beat Tom so Bob", " won it."), ("Bob beat Tom so Tom", " won it.")], ["won it."] * 2, 0),
        ],
    ),
    "hellaswag": Case(
        ("Rowan/hellaswag", None),
        "validation",
        [
            {
                "activity_label": "Baking",
                "ctx_a": "A man has dough.",
                "ctx_b": "he",
                "endings": ["eats it.", "bakes it. [title] Then", "swims.", "a [step] b"],
                "label": "1",
            },
            {"activity_label": "Run", "ctx_a": "They run.", "ctx_b": "they", "endings": list("abcd"), "label": "3"},
            {"activity_label": "Sit", "ctx_a": "One  sits.", "ctx_b": "", "endings": list("wxyz"), "label": "0"},
        ],
        [
            _choice("Baking: A man has dough. He", ["eats it.", "bakes it.. Then", "swims.", "a b"], 1),
            _choice("Run: They run. They", list("abcd"), 3),
            _choice("Sit: One sits.", list("wxyz"), 0),
        ],
    ),
    "boolq": Case(
        ("aps/super_glue", "boolq"),
        "validation",
        [
            {"question": "is water wet", "passage": "Water is wet.", "label": 1},
            {"question": "is ice hot", "passage": "Ice is cold.", "label": 0},
            {"question": "is it day", "passage": "It is day.", "label": 1},
        ],
        [
            _choice("Water is wet.\nQuestion: is water wet?\nAnswer:", ["no", "yes"], 1),
            _choice("Ice is cold.\nQuestion: is ice hot?\nAnswer:", ["no", "yes"], 0),
            _choice("It is day.\nQuestion: is it day?\nAnswer:", ["no", "yes"], 1),
        ],
    ),
    "openbookqa": Case(
        ("allenai/openbookqa", "main"),
        "test",
        [
            {"question_stem": "The sun is", "choices": _four(["a star", "a moon", "cold", "wet"]), "answerKey": "A"},
            {"question_stem": "Frogs eat", "choices": _four(["cars", "rocks", "flies", "air"]), "answerKey": "C"},
            {"question_stem": "Metal is", "choices": _four(["soft", "wet", "blue", "hard"]), "answerKey": "D"},
        ],
        [
            _choice("The sun is", ["a star", "a moon", "cold", "wet"], 0),
            _choice("Frogs eat", ["cars", "rocks", "flies", "air"], 2),
            _choice("Metal is", ["soft", "wet", "blue", "hard"], 3),
        ],
    ),
    "sciq": Case(
        ("allenai/sciq", None),
        "test",
        [
            {
                "question": question,
                "support": support,
                "distractor1": "one",
                "distractor2": "two",
                "distractor3": "three",
                "correct_answer": answer,
            }
            for question, support, answer in (
                ("What?", " Cells divide.", "four"),
                ("Who?", "", "x"),
                ("Where?", "Here.", "y"),
            )
        ],
        [
            _choice("Cells divide.\nQuestion: What?\nAnswer:", ["one", "two", "three", "four"], 3),
            _choice("\nQuestion: Who?\nAnswer:", ["one", "two", "three", "x"], 3),
            _choice("Here.\nQuestion: Where?\nAnswer:", ["one", "two", "three", "y"], 3),
        ],
    ),
    "social_iqa": Case(
        ("lighteval/siqa", None),
        "validation",
        [
            {
                "context": context,
                "question": "Why?",
                "answerA": "to eat",
                "answerB": "to sleep",
                "answerC": "to go",
                "label": label,
            }
            for context, label in (("Al got food.", "1"), ("Bo lay down.", "2"), ("Cy got up.", "3"))
        ],
        [
            _choice("Q: Al got food. Why?\nA:", ["to eat", "to sleep", "to go"], 0),
            _choice("Q: Bo lay down. Why?\nA:", ["to eat", "to sleep", "to go"], 1),
            _choice("Q: Cy got up. Why?\nA:", ["to eat", "to sleep", "to go"], 2),
        ],
    ),
}

LAMBADA = Case(
    ("EleutherAI/lambada_openai", "default"),
    "test",
    [{"text": "he said to her again"}, {"text": "a b c"}, {"text": "two words"}],
    [
        Choice([("he said to her", " again")], [], 0),
        Choice([("a b", " c")], [], 0),
        Choice([("two", " words")], [], 0),
    ],
)

_STORY = (
    "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
    "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\nStory: {}\n\nNow, "
    "answer the question based on the story asconcisely as you can, using a single phrase if possible. Do not provide "
    "any explanation.\n\nQuestion: {}\n\nAnswer:"
)
_ARTICLE_RULES = (
    "the question as concisely as you can, using a single phrase or sentence if possible. If the question cannot be "
    'answered based on the information in the article, write "unanswerable". If the question is a yes/no question, '
    'answer "yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
)
_ARTICLE = (
    "You are given a scientific article and a question. Answer "
    + _ARTICLE_RULES
    + "Article: {}\n\n Answer the question based on the above article as concisely as you can, "
    + _ARTICLE_RULES.partition("as concisely as you can, ")[2]
    + "Question: {}\n\nAnswer:"
)
_TEXT = (
    "Read the following text and answer briefly.\n\n{}\n\nNow, answer the following question based on the above text, "
    "only give me the answer and do not output any other words.\n\nQuestion: {}\nAnswer:"
)
_ONLY = "Only give me the answer and do not output any other words."
_PASSAGES = (
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given passages.\n{{}}\n\n"
    f"Answer the question based on the given passages. {_ONLY}\n\nQuestion: {{}}\nAnswer:"
)
_REPORT = (
    "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{}\n\nNow, "
    "write a one-page summary of the report.\n\nSummary:"
)
_MEETING = (
    "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
    "more sentences.\n\nTranscript:\n{}\n\nNow, answer the query based on the above meeting transcript in one or more "
    "sentences.\n\nQuery: {}\nAnswer:"
)
_NEWS = (
    "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{}\n\nNow, write a one-page "
    "summary of all the news.\n\nSummary:"
)
_TREC = "Please determine the type of the question below. Here are some examples of questions.\n\n{}\n{}"
_TRIVIA = f"Answer the question based on the given passage. {_ONLY} The following are some examples.\n\n{{}}\n\n{{}}"
_DIALOGUE = "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{}\n\n{}"


def _longbench(name: str, prompt: str, max_gen_toks: int, answers: list[tuple[list[str], str, float]]) -> Case:
    """Rows of LongBench; answers are the right ones, the generated one, and its worth."""
    rows = [
        {
            "question": f"q{index}",
            "context": f"c{index}",
            "answers": right,
            "all_classes": ["Date", "Date of birth", "City"] if name == "trec" else None,
            "length": 1,
            "dataset": name,
            "language": "en",
            "_id": str(index),
        }
        for index, (right, _, _) in enumerate(answers)
    ]
    documents = [
        Answer(prompt.format(f"c{index}", f"q{index}"), generated, value)
        for index, (_, generated, value) in enumerate(answers)
    ]
    return Case(("Xnhyacinth/LongBench", name), "test", rows, documents, max_gen_toks=max_gen_toks)


# Words that are the same, of those that are generated and those that are right: F1 and ROUGE-L without articles.
_QA = [
    (["red house"], "\n\nThe red house.\nQuestion: and now?", 1.0),  # what follows the answer does not count
    (["a cat", "big dog"], "dog", 2 / 3),
    (["seven"], "eight\nseven is a number", 0.4),  # 1 of 4 words without the article, and 1 of 1
]
_SUMMARIES = [
    (["the sky is blue"], "the sky is blue", 1.0),
    (["one two three four"], "one three", 2 / 3),
    (["one"], "two", 0.0),
]
_CODES = [
    (["x = 1"], "\nx = 1\ny = 2", 1.0),  # the first line that is not empty
    (["x = 1"], "# x = 1\nabc", 0.0),  # nor a comment
    (["abcd"], "abcf", 0.75),
]

LONGBENCH = {
    "longbench_narrativeqa": _longbench("narrativeqa", _STORY, 128, _QA),
    "longbench_qasper": _longbench("qasper", _ARTICLE, 128, _QA),
    "longbench_multifieldqa_en": _longbench("multifieldqa_en", _TEXT, 64, _QA),
    "longbench_hotpotqa": _longbench("hotpotqa", _PASSAGES, 32, _QA),
    "longbench_2wikimqa": _longbench("2wikimqa", _PASSAGES, 32, _QA),
    "longbench_musique": _longbench("musique", _PASSAGES, 32, _QA),
    "longbench_gov_report": _longbench("gov_report", _REPORT, 512, _SUMMARIES),
    "longbench_qmsum": _longbench(
        "qmsum", _MEETING, 512, [*_SUMMARIES[:2], (["one two"], "one two\nQuery: three four five\nQuestion:", 1.0)]
    ),
    "longbench_multi_news": _longbench("multi_news", _NEWS, 512, _SUMMARIES),
    "longbench_trec": _longbench(
        "trec",
        _TREC,
        64,
        [
            (["City"], "City\nQuestion: where\nType: Date", 1.0),
            (["City"], "Type: City\nType: Date", 0.5),  # answers are not cut at line ends
            (["Date of birth"], "Date of birth", 1.0),  # a class that is a part of the right one does not count
        ],
    ),
    "longbench_triviaqa": _longbench("triviaqa", _TRIVIA, 32, _QA),
    "longbench_samsum": _longbench("samsum", _DIALOGUE, 128, _SUMMARIES),
    "longbench_lcc": _longbench("lcc", "Please complete the code given below. \n{}Next line of code:\n", 64, _CODES),
    "longbench_repobench-p": _longbench(
        "repobench-p", "Please complete the code given below. \n{}{}Next line of code:\n", 64, _CODES
    ),
}

_LINE = {"until": ("\n",), "max_gen_toks": 48}
RECALL = {
    "recall_swde": Case(
        ("hazyresearch/based-swde-v2", "default"),
        "validation",
        [
            {
                "key": "director",
                "value": "Ann Lee",
                "text": "Film. By Ann Lee.\n Summary of information above... director:",
            },
            {"key": "year", "value": "1999", "text": "Made in 1999.."},
            {"key": "cast", "value": "Bo (b. 1)", "text": "With Bo (b. 1) year:cast:Cast:"},
            {"key": "runtime", "value": "9", "text": "9 min"},  # too short an answer to be asked
        ],
        [
            Answer("Film. By Ann Lee. Director:", " ANN LEE and others", 1.0),
            Answer("Made in 1999. Year:", " 199", 0.0),
            Answer("With Bo (b. 1) year:. Cast:", "Bo (b. 1)", 1.0),
        ],
        **_LINE,
    ),
    "recall_fda": Case(
        ("hazyresearch/based-fda", "default"),
        "validation",
        [
            {"key": "applicant", "value": "Acme Inc.", "text": "Sent by Acme Inc. Applicant:"},
            {"key": "purpose", "value": "a test", "text": "It is a test...\n"},
            {"key": "class II", "value": "device", "text": "A device"},
        ],
        [
            Answer("Sent by Acme Inc. . Applicant:", "acme inc.", 1.0),
            Answer("It is a test. Purpose:", "", 0.0),
            Answer("A device. Class II:", "the device is", 1.0),
        ],
        **_LINE,
    ),
    "recall_squad": Case(
        ("hazyresearch/based-squad", "default"),
        "validation",
        [
            {"context": "c", "question": "q", "value": "Paris", "text": " Paris is in France. France's capital is "},
            {"context": "c", "question": "q", "value": "1066", "text": "It was in 1066. The year was"},
            {"context": "c", "question": "q", "value": "a.b", "text": "Use a.b here. Use"},
        ],
        [
            Answer("Paris is in France. France's capital is", " paris", 1.0),
            Answer("It was in 1066. The year was", " 1067", 0.0),
            Answer("Use a.b here. Use", " axb", 0.0),  # answers are no patterns
        ],
        **_LINE,
    ),
    "recall_triviaqa": Case(
        ("hazyresearch/based_triviaqa", None),
        "validation",
        [
            {"context": "[DOC] [TLE] Rome [PAR] Old. ", "question": "Which city?", "answers": ["Rome", "Roma"]},
            {"context": "It is Oslo. which city?", "question": "Which city? ", "answers": ["Oslo"]},
            {"context": "x", "question": "y?", "answers": ["z"]},
        ],
        [
            Answer("Rome  Old. Which city?", " ROMA", 1.0),
            Answer("It is Oslo. Which city?", " Bergen", 0.0),
            Answer("x. y?", "a z", 1.0),
        ],
        **_LINE,
    ),
    "recall_nq": Case(
        ("hazyresearch/based_nq_2048", None),
        "validation",
        [
            {"context": "Mars is red. Mars is", "question": "Mars is", "answers": ["red"]},
            {"context": "The sun. the sun is", "question": "The sun is", "answers": ["sun"]},
            {"context": "Ann ran.", "question": "Who ran?", "answers": ["Ann", "Eve"]},
            {"context": "None.", "question": "Which?", "answers": []},
        ],
        [
            Answer("Mars is red. Mars is", " red", 1.0),
            Answer("The sun. the sun is. The sun is", "", 0.0),  # spelled otherwise, it stays
            Answer("Ann ran. Who ran?", "EVE", 1.0),
        ],
        **_LINE,
    ),
    "recall_drop": Case(
        ("hazyresearch/based_drop", None),
        "validation",
        [
            {"context": "Two goals. How many goals?", "question": "how many goals?", "answers": ["two", "2"]},
            {"context": "They won 3-1. ", "question": "Who won?", "answers": ["they"]},
            {"context": "It rained", "question": "What fell?", "answers": ["rain"]},
        ],
        [
            Answer("Two goals. how many goals?", " 2", 1.0),
            Answer("They won 3-1. Who won?", " nobody", 0.0),
            Answer("It rained. What fell?", " Rain fell", 1.0),
        ],
        **_LINE,
    ),
}
GENERATED = LONGBENCH | RECALL
CASES = CHOICES | {"lambada_openai": LAMBADA} | GENERATED
