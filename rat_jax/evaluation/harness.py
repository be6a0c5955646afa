"""A model of ours as the lm-evaluation-harness calls it; needs requirements-eval.txt, not PyTorch."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.errors import shown
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.progress import Progress
from rat_jax.evaluation.scoring import Scorer
from rat_jax.evaluation.subject import check_same_on_all_hosts
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.fields import describe, fits
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate_text

_TYPES = {"stop": list[str], "max_new_tokens": int, "top_k": int}  # of settings; the others are numbers
_NAMES = {"stop": "until", "max_new_tokens": "max_gen_toks"}  # of settings, in a task's generation_kwargs
_SAMPLING_KEYS = ("top_k", "top_p", "repetition_penalty")  # of a task's generation_kwargs, as `generate` has them


class HarnessModel(TemplateLM):
    """Scores and generates texts."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh | None,
        settings: TextSettings,
        *,
        batch_tokens: int,
        progress: Progress | None = None,
        on_text: Callable[[int, str], None] = lambda index, text: None,
    ):
        """The arguments are those of `Scorer` and `generate_text`, the model's tokenizer, and how texts are read.

        Raises:
          EvaluationError: if a number is below 1.
        """
        super().__init__()
        self.settings = settings
        self.num_truncated = 0  # requests whose context was too long, so far
        self._model = model
        self.tokens = tokenizer  # the harness's own name, `tokenizer`, is for chat templates
        self._batch_tokens = batch_tokens
        self._scorer = Scorer(model, mesh, context_length=settings.context_length, batch_tokens=batch_tokens)
        self._on_text = on_text
        self._progress = {} if progress is None else {"progress": progress}

    @property
    def eot_token_id(self) -> int:
        """The id that ends documents, which stands in for a BOS."""
        return self.tokens.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with nothing added."""
        return self.tokens.encode(string)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """log p(continuation | context) of each request, and whether greedy decoding would give it."""
        _check_same(requests)
        for request in requests:
            if not request.args[1]:
                raise EvaluationError(
                    f"task {request.task_name}, document {request.doc_id}: the continuation is empty: nothing to score"
                )
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """log p of each text, 0 of an empty one."""
        _check_same(requests)
        texts = [self.tok_encode(request.args[0]) for request in requests]
        scores = iter(self._scorer.score_rolling([ids for ids in texts if ids], self.eot_token_id, **self._progress))
        return [next(scores).total if ids else 0.0 for ids in texts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text after each context, up to one of its request's stop strings."""
        _check_same(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts = [""] * len(requests)
        for arguments, indices in alike.items():
            settings = self._generation_settings(json.loads(arguments))
            room = self.settings.context_length - settings["max_new_tokens"]
            if room < 1:
                raise EvaluationError(
                    f"task {requests[indices[0]].task_name} generates up to {settings['max_new_tokens']} tokens, which "
                    f"leave no room for a prompt in a context length of {self.settings.context_length}: choose a "
                    f"longer context, or a smaller max_gen_toks in the task"
                )
            prompts = [self._fitted(self.tok_encode(requests[index].args[0]), room) for index in indices]
            longest = max(map(len, prompts)) + settings["max_new_tokens"]
            new = generate_text(
                self._model,
                self.tokens,
                prompts,
                batch_size=max(1, self._batch_tokens // longest),
                on_text=self._on_text,
                **settings,
            )
            for index, text in zip(indices, new, strict=True):
                texts[index] = text
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.settings.joint_tokenization:
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for (_, text), context, continuation in requests:
            if not continuation:
                raise EvaluationError(f"the continuation {text[:60]!r} has no tokens after its context")
            # What reads the last token of the continuation is one place less than its tokens.
            room = max(1, self.settings.context_length + 1 - len(continuation))
            pairs.append((self._fitted(context, room), continuation))
        return [(score.total, score.is_greedy) for score in self._scorer.score(pairs, **self._progress)]

    def _fitted(self, context: list[int], room: int) -> list[int]:
        """A context of `room` tokens at most, a BOS included, which is not taken out."""
        bos = [self.eot_token_id] if self.settings.bos == "always" or not context else []
        if context[:1] == [self.eot_token_id]:  # the harness has put it there
            bos, context = context[:1], context[1:]
        bos, room = bos[:room], room - len(bos)
        if len(context) <= room:
            return bos + context
        self.num_truncated += 1
        if room <= 0:
            return bos or context[-1:]
        match self.settings.truncation:
            case "left":
                context = context[-room:]
            case "right":
                context = context[:room]
            case "middle":
                context = context[: room // 2] + context[len(context) - (room - room // 2) :]
        return bos + context

    def _generation_settings(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What a task's generation_kwargs mean to `generate_text`."""
        try:
            given = normalize_gen_kwargs(arguments, self.settings.max_new_tokens)
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"a task's generation_kwargs have a value of another type: {error}") from None
        stop = [string for string in given.pop("until") if string]  # an empty one means none
        settings = {"stop": stop, "max_new_tokens": given.pop("max_gen_toks")}
        sampled = given.pop("do_sample")
        settings["temperature"] = given.pop("temperature", 1.0) if sampled else 0.0
        given.pop("temperature", None)
        for name in _SAMPLING_KEYS:
            value = given.pop(name, None)
            if value is not None and (settings["temperature"] > 0 or name == "repetition_penalty"):
                settings[name] = value
        if given.pop("num_beams", 1) != 1 or given:
            names = ", ".join(given) or "num_beams"
            raise EvaluationError(f"a task's generation_kwargs have {names}, which is not supported: take it out")
        for name, value in settings.items():
            if not fits(_TYPES.get(name, float), value):
                raise EvaluationError(
                    f"a task's generation_kwargs have {_NAMES.get(name, name)}: {shown(value)}: it must be "
                    f"{describe(_TYPES.get(name, float))}"
                )
        return settings


def _check_same(requests: list[Instance]) -> None:
    """Refuses requests that differ from those of the first host: data, or what a task draws, may."""
    digest = hashlib.sha256(json.dumps([request.args for request in requests], default=str).encode()).hexdigest()
    task = requests[0].task_name if requests else None
    check_same_on_all_hosts({"SHA-256 of the texts": digest, "task": task})
