"""Any dataset of the package reasoning-gym (about a hundred generators of questions), by name, with its own scorer.

    envs:
      - id: raygym/ReasoningGym-v0
        kwargs: {dataset: chain_sum, params: {min_terms: 2, max_terms: 4}}

Several datasets in one run are several entries of `envs`, with their weights; the package's own `composite` works too.

Data: one question an episode, generated from the task's seed. A fifth of the questions, chosen by a hash of their text,
is held out for validation, so that no question is in both splits however few there are. That draws 5 questions for one
of validation; where a question takes seconds (knight_swap), `split_by: seed` draws one, and keeps only the seeds apart.

Answer: `answer: tags` (default) takes what is in the last `<answer>...</answer>`, as the package does, and `answer:
text` the whole reply. The instruction to do so is a system message; `instruction` replaces it by another of the
package's prompts (default, simple, direct, chain_of_draft, DeepSeekZero), by your own text, or by "" for none.

Reward: the scorer's, from 0 to 1. Its partial credit is its own: some datasets give 0.01 for any text, two-choice ones
give 1.0 to half of the guesses. The dataset's own answer scores 1.0; a few (boxnet, graph_color, propositional_logic,
rubiks_cube, rush_hour) ship no answer and only check one. A reply that makes the scorer raise scores 0.0 and is counted
in `metrics["unscorable"]`: the policy chose that text, so it is no failure of the environment.

Some scorers evaluate the answer as Python or through sympy (binary_matrix, n_queens, spiral_matrix, string_insertion;
countdown, puzzle24, integration, polynomial_multiplication): the policy's text can run code there, or compute for ever.
Give those `isolation: actor`, and train them only where such code may run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import random
from collections import OrderedDict
from collections.abc import Iterator
from threading import Lock
from typing import Any

from raygym.env import ChatEnv
from raygym.envs.generated import in_split, split_seed
from raygym.envs.own_random import drawing_from, redirect
from raygym.types import Message

try:
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS, create_dataset
    from reasoning_gym.induction.list_functions import generators
    from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
except ImportError as error:
    raise ImportError(
        f"raygym/ReasoningGym-v0 needs the package reasoning-gym: pip install 'raygym[envs]' ({error})"
    ) from error

logger = logging.getLogger(__name__)
Entry = dict[str, Any]
INSTRUCTIONS = {"tags": SYSTEM_PROMPTS["simple"], "text": "Answer with the final answer only."}
_TRIES = 1000
_RECENT = 16
# Generators seed one shared generator of numpy's, or fill in their state at the first question.
_generating = Lock()
redirect(generators.__name__)


class ReasoningGym(ChatEnv):
    """One question, one answer, the dataset's own score."""

    def __init__(
        self,
        dataset: str,
        params: dict[str, Any] | None = None,
        answer: str = "tags",
        instruction: str | None = None,
        split_by: str = "question",
    ) -> None:
        """Cheap after the first with the same dataset and params: the generator is shared.

        Args:
            dataset: a name from reasoning-gym's gallery.
            params: the fields of its config, without `seed` and `size`.
            answer: `tags` or `text`: where in the reply the answer is.
            instruction: a prompt's name of the package, or text; None is the one that fits `answer`.
            split_by: `question` or `seed`: what validation holds out.

        Raises:
            ValueError: the dataset is unknown or refuses its params, or another argument is none of those above.
        """
        _one_of("answer", answer, ["tags", "text"])
        _one_of("split_by", split_by, ["question", "seed"])
        self._questions = _questions(dataset, params or {})
        self._tags, self._by_question = answer == "tags", split_by == "question"
        text = INSTRUCTIONS[answer] if instruction is None else SYSTEM_PROMPTS.get(instruction, instruction)
        self._system: list[Message] = [{"role": "system", "content": text.strip()}] if text.strip() else []
        self._entry: Entry = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[list[Message], dict[str, Any]]:
        """Ask one question of the split; `info` has the package's answer and metadata."""
        super().reset(seed=seed)
        first = self._number(options)
        for _ in range(_TRIES):
            entry = self._questions.entry(first, self._number(options))
            if entry is not None and (not self._by_question or in_split(options, entry["question"])):
                break
        else:
            raise ValueError(
                f"dataset: none of {_TRIES} questions of {self._questions.name!r} with these params is in "
                f"{options or 'the split train'}; use params with more questions, or split_by: seed"
            )
        self._entry = entry
        question: Message = {"role": "user", "content": entry["question"]}
        return [*self._system, question], {"answer": entry["answer"], "metadata": entry.get("metadata", {})}

    def _number(self, options: dict[str, Any] | None) -> int:
        number = int(self.np_random.integers(2**30))
        return number if self._by_question else split_seed(number, options)

    def step(self, action: Message) -> tuple[None, float, bool, bool, dict[str, Any]]:
        """Score the answer."""
        reply = action["content"] or ""
        answer = extract_answer(reply) if self._tags else reply.strip()
        score, unscorable = 0.0, False
        try:
            score = float(self._questions.dataset.score_answer(answer, self._entry))
        except Exception as error:
            logger.debug("%s cannot score %r", self._questions.name, answer, exc_info=error)
            unscorable = True
        metrics = {"right": score >= 1.0, "format": answer is not None, "unscorable": unscorable}
        return None, score, True, False, {"metrics": {name: float(value) for name, value in metrics.items()}}


class _Questions:
    """One dataset of the package, and its questions by number."""

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        self.name, self._params = name, params
        self.dataset = self._create(0)
        self._unbounded = True
        self._recent: OrderedDict[int, ProceduralDataset] = OrderedDict()

    def entry(self, first: int, second: int) -> Entry | None:
        """The question of two numbers below 2^31, or None where the generator found none."""
        with _generating, drawing_from(random.Random(second)):
            if self._unbounded:
                try:
                    return self.dataset[second]  # type: ignore[no-any-return]
                except IndexError:
                    self._unbounded = False
            dataset = self._bounded(first)
            try:
                return dataset[second % len(dataset)]  # type: ignore[no-any-return]
            except IndexError:
                return None

    def _bounded(self, seed: int) -> ProceduralDataset:
        # A few datasets hold `size` questions and no more: each task makes its own, which its group's episodes share.
        if seed not in self._recent:
            self._recent[seed] = self._create(seed)
            if len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return self._recent[seed]

    def _create(self, seed: int) -> ProceduralDataset:
        params = self._params
        if self.name == "composite" and isinstance(params.get("datasets"), list):
            params = {**params, "datasets": [DatasetSpec(**{"config": {}, **part}) for part in params["datasets"]]}
        dataset = create_dataset(self.name, **params, seed=seed)
        for part in [dataset, *getattr(dataset, "datasets", {}).values()]:
            _order(part)
        return dataset


_known: dict[str, _Questions] = {}
_creating = Lock()


def _questions(name: str, params: dict[str, Any]) -> _Questions:
    _one_of("dataset", name, sorted(DATASETS))
    if reserved := sorted({"seed", "size"} & set(params)):
        raise ValueError(f"params.{reserved[0]}: is chosen by raygym from the task; remove it")
    fields = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key in params:
        _one_of(f"params of {name}", key, fields)
    key = json.dumps([name, params], sort_keys=True, default=repr)
    with _creating:
        if key not in _known:
            try:
                _known[key] = _Questions(name, params)
            except Exception as error:  # asserts and all kinds of errors are how the package's configs refuse
                raise ValueError(f"params: {name} refused {params}: {error or type(error).__name__}") from error
        return _known[key]


class _Sorted(set[Any]):
    """A set that is gone through in the same order in every process."""

    def __iter__(self) -> Iterator[Any]:
        return iter(sorted(super().__iter__()))

    def __sub__(self, other: Any) -> _Sorted:
        return _Sorted(super().__sub__(other))


def _order(dataset: Any) -> None:
    # isomorphic_strings, ransom_note and polynomial_multiplication draw from the order of a set, which is another in
    # each process: two runners would ask two questions for one seed.
    if isinstance(getattr(dataset, "letters", None), set):
        dataset.letters = _Sorted(dataset.letters)
    monomials = getattr(dataset, "_get_monomials", None)
    if monomials is not None:
        dataset._get_monomials = lambda rng: sorted(monomials(rng), key=str)


def _one_of(key: str, value: Any, known: list[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
    raise ValueError(f"{key}: {value!r} is unknown; {hint}")
