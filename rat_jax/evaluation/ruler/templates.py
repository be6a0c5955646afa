"""The sentences around a RULER task: questions, the beginnings of their answers, needles and noise."""

import dataclasses
import string

from rat_jax.evaluation.errors import EvaluationError

_QUESTION_FIELDS = {"context", "query", "kind", "kinds", "count"}
_NEEDLE_FIELDS = {"kind", "kinds", "key", "value"}


@dataclasses.dataclass(frozen=True)
class Template:
    """A question about a text, and the words with which its answer begins.

    Fields in braces: `context`, the text; `query`, what is asked for; `kind` and `kinds`, what the answer is in the
    singular and plural; `count`, how many answers there are.
    """

    question: str  # with {context} once
    prefix: str  # of the answer, which the prompt ends with

    def __post_init__(self):
        """Raises an `EvaluationError` if a field is unknown or the text is missing."""
        fields = check_fields(self.question, _QUESTION_FIELDS)
        if fields.count("context") != 1:
            raise EvaluationError(f"the template {self.question[:60]!r} must hold {{context}} once")
        check_fields(self.prefix, _QUESTION_FIELDS - {"context"})

    def prompt(self, context: str, **values: str | int) -> str:
        """The prompt about `context`, without a space at its end."""
        return f"{self.question.format(context=context, **values)} {self.prefix.format(**values)}"


@dataclasses.dataclass(frozen=True)
class Templates:
    """All sentences of the tasks that this package generates."""

    name: str
    source: str  # where the sentences are from, and their licence
    worked_examples: bool  # whether prompts that trace variables or count words show a solved example first
    noise: str  # a line that is repeated
    needle: str  # what is hidden: {kind} or {kinds}, {key}, {value}
    one_needle: Template
    several_needles: Template
    variables: Template
    common_words: Template
    coded_words: Template

    def __post_init__(self):
        """Raises an `EvaluationError` if the needle does not hold its key and its value, or has unknown fields."""
        fields = check_fields(self.needle, _NEEDLE_FIELDS)
        if not {"key", "value"} <= set(fields):
            raise EvaluationError(f"the needle {self.needle[:60]!r} must hold {{key}} and {{value}}")


def check_fields(text: str, known: set[str]) -> list[str]:
    """The fields of a format string, in order.

    Raises:
      EvaluationError: if it is none, or has a field that is not known.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise EvaluationError(f"the template {text[:60]!r} is no format string: {error}") from None
    for name in fields:
        if name not in known:
            known_names = ", ".join(f"{{{field}}}" for field in sorted(known))
            raise EvaluationError(f"the template {text[:60]!r} has the field {{{name}}}; known are {known_names}")
    return fields


OWN = Templates(
    name="own",
    source="rat_jax (Apache-2.0)",
    worked_examples=False,
    noise="A river runs to the sea. The hill is steep. A bird sings at dawn. Rain falls at night. We walk on.",
    needle="The secret {kind} of {key} is {value}.",
    one_needle=Template(
        "One secret {kind} is hidden in this text.\n{context}\nFind it.", "The secret {kind} of {query} is"
    ),
    several_needles=Template(
        "Secret {kinds} are hidden in this text.\n{context}\nFind them.", "The secret {kinds} of {query} are"
    ),
    variables=Template(
        "Variables are set in this text.\n{context}\nFind those that hold {query}.",
        "The {count} variables that hold {query} are",
    ),
    common_words=Template(
        "Some words of this list come more often than others.\n{context}\nFind the {count} that come most often.",
        "The {count} words that come most often are",
    ),
    coded_words=Template(
        "Count the words of this text; dots are no words.\n{context}\nFind the {count} that come most often.",
        "The {count} words that come most often are",
    ),
)
"""Short sentences of this package's own, for models trained on them. Their figures are not those of RULER."""
