"""RULER's own sentences, read from the lm-evaluation-harness that is installed.

The package's files are parsed, not imported: importing them needs further packages and downloads data.
"""

import ast
import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.templates import Template, Templates

_FOLDER = ("tasks", "ruler")
_CONFIG = "CONFIG"


def harness_templates() -> Templates:
    """The sentences of `lm_eval/tasks/ruler`, word for word; Apache-2.0, there after github.com/NVIDIA/RULER.

    Raises:
      EvaluationError: if the harness is not installed, or lays its files out in a way that is not known here.
    """
    spec = importlib.util.find_spec("lm_eval")
    if spec is None:
        raise EvaluationError(
            "RULER's own prompts come from the lm-evaluation-harness, which is not installed: pip install -r "
            "requirements-eval.txt, or choose the short templates of this package (own), whose figures are not RULER's"
        )
    folder = pathlib.Path(*spec.submodule_search_locations, *_FOLDER)
    version = importlib.metadata.version("lm_eval")
    try:
        return _read(folder, f"lm_eval {version}, lm_eval/tasks/ruler, after NVIDIA/RULER (Apache-2.0)")
    except (OSError, LookupError, SyntaxError, ValueError, StopIteration, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EvaluationError(
            f"lm_eval {version} lays out {folder} in a way that is not known here ({reason}): install the version that "
            f"requirements-eval.txt names, or choose the templates own"
        ) from None


def _read(folder: pathlib.Path, source: str) -> Templates:
    needles = _parse(folder / "prepare_niah.py")
    question = _constant(_parse(folder / "niah_utils.py"), "TEMPLATE")
    one, several = _needle_prefixes(needles)
    variables = _constant(_parse(folder / "vt_utils.py"), _CONFIG)["variable_tracking"]
    return Templates(
        name="harness",
        source=source,
        worked_examples=True,
        noise=_noise(needles),
        needle=_constant(needles, "NEEDLE").replace("{type_needle_v}", "{kinds}"),
        one_needle=Template(_singular(question), one),
        several_needles=Template(question.replace("{type_needle_v}", "{kinds}"), several),
        variables=_of_config(variables, lambda text: text.replace("{num_v}", "{count}")),
        common_words=_of_config(_constant(_parse(folder / "cwe_utils.py"), _CONFIG)),
        coded_words=_of_config(_constant(_parse(folder / "fwe_utils.py"), _CONFIG)),
    )


def _of_config(config: dict[str, str], rename: Callable[[str], str] = str) -> Template:
    return Template(rename(config["template"]), rename(config["answer_prefix"]).strip())


def _singular(question: str) -> str:
    """The question for one value of one key, as the harness changes it."""
    for old, new in (("Some", "A"), ("are all", "is"), ("are", "is"), ("{type_needle_v}", "{kind}")):
        question = question.replace(old, new)
    return question


def _parse(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _assigned(tree: ast.AST, name: str) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            yield node.value


def _constant(tree: ast.AST, name: str) -> Any:
    """What a file sets `name` to, which must be written out."""
    value = next(_assigned(tree, name), None)
    if value is None:
        raise LookupError(f"nothing is called {name}")
    return ast.literal_eval(value)


def _noise(tree: ast.Module) -> str:
    """The line of the haystack that `get_haystack` calls repeat: the only one written out there."""
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "get_haystack")
    (noise,) = (
        value.value
        for value in _assigned(function, "haystack")
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    )
    return noise


def _needle_prefixes(tree: ast.Module) -> tuple[str, str]:
    """How the answer about one needle, and about several, begins: both arms of what is called gen_prefix."""
    (choice,) = (
        value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "gen_prefix"
    )
    return _format_string(choice.body), _format_string(choice.orelse)


def _format_string(text: ast.JoinedStr) -> str:
    fields = {"query": "{query}", "type_needle_v": "{kinds}", "type_needle_v[:-1]": "{kind}"}
    return "".join(
        part.value if isinstance(part, ast.Constant) else fields[ast.unparse(part.value)] for part in text.values
    )
