"""reasoning-gym's datasets from YAML: the dataset's own answer scores 1.0, seeds give tasks, errors name the key."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from tiers import only_long

from raygym.config import EnvConfig
from raygym.config_file import load_config
from raygym.env import EnvError, make_env, parse_step
from raygym.envs.reasoning_gym import ReasoningGym

# Arithmetic, algebra, algorithms, logic, games, geometry, graphs, induction, time, text: easy enough to be quick.
MIXTURE = """
- {dataset: chain_sum, params: {min_terms: 2, max_terms: 4, allow_negation: true}}
- {dataset: basic_arithmetic, params: {min_terms: 2, max_terms: 3}}
- {dataset: simple_equations}
- {dataset: prime_factorization, params: {max_value: 200}}
- {dataset: gsm_symbolic}
- {dataset: spell_backward, params: {min_word_len: 3, max_word_len: 6}}
- {dataset: word_ladder, params: {min_word_length: 3, max_word_length: 3}}
- {dataset: caesar_cipher}
- {dataset: binary_matrix, params: {min_n: 3, max_n: 4}}
- {dataset: knights_knaves}
- {dataset: syllogism}
- {dataset: mini_sudoku}
- {dataset: countdown, params: {min_numbers: 3, max_numbers: 4}}
- {dataset: simple_geometry}
- {dataset: shortest_path, params: {min_rows: 3, max_rows: 4, min_cols: 3, max_cols: 4}}
- {dataset: list_functions}
- {dataset: acre}
- {dataset: calendar_arithmetic}
- {dataset: family_relationships}
- dataset: composite
  params: {datasets: [{name: gcd, weight: 2}, {name: lcm, weight: 1, config: {max_value: 20}}]}
"""
ENVS = [EnvConfig(id="raygym/ReasoningGym-v0", kwargs=kwargs) for kwargs in yaml.safe_load(MIXTURE)]
TASKS = [("train", 0), ("train", 2**31 - 1), ("validation", 5)]


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def question(env, seed: int, split: str = "train") -> str:
    return env.reset(seed=seed, options={"split": split})[0][-1]["content"]


@pytest.mark.parametrize("config", ENVS, ids=lambda config: config.kwargs["dataset"])
def test_the_datasets_own_answer_scores_one_and_a_wrong_one_less(config):
    env, again = make_env(config.id, config.kwargs), make_env(config.id, config.kwargs)
    for split, seed in TASKS:
        observation, info = env.reset(seed=seed, options={"split": split})
        assert [message["role"] for message in observation] == ["system", "user"]
        assert question(again, seed, split) == observation[-1]["content"]
        _, reward, terminated, truncated, last = env.step(say(f"I think... <answer>{info['answer']}</answer>"))
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert last["metrics"] == {"right": 1.0, "format": 1.0, "unscorable": 0.0}
        for wrong in ("<answer>no idea at all</answer>", f"{info['answer']}", ""):
            env.reset(seed=seed, options={"split": split})
            _, reward, terminated, _, _ = env.step(say(wrong))
            assert 0.0 <= reward < 1.0 and terminated


def test_params_change_the_questions():
    short, long = (
        ReasoningGym("chain_sum", {"min_terms": n, "max_terms": n, "min_digits": 1, "max_digits": 1}) for n in (2, 9)
    )
    assert question(short, 1).count("+") + question(short, 1).count("-") < 3
    assert question(long, 1).count("+") + question(long, 1).count("-") >= 8


def test_the_whole_reply_can_be_the_answer_and_the_instruction_can_be_changed():
    env = ReasoningGym("gcd", answer="text")
    observation, info = env.reset(seed=1)
    assert "<answer>" not in observation[0]["content"]
    assert env.step(say(f" {info['answer']}\n"))[1] == 1.0
    assert len(ReasoningGym("gcd", instruction="").reset(seed=1)[0]) == 1
    assert ReasoningGym("gcd", instruction="Be brief.").reset(seed=1)[0][0] == {
        "role": "system",
        "content": "Be brief.",
    }


def test_the_last_tags_count():
    env = ReasoningGym("gcd")
    _, info = env.reset(seed=4)
    assert env.step(say(f"<answer>0</answer> no: <answer>{info['answer']}</answer>"))[1] == 1.0


def test_no_question_is_in_both_splits_even_where_there_are_few():
    env = ReasoningGym("gcd", {"min_value": 1, "max_value": 8, "max_numbers": 2})
    train, validation = ({question(env, seed, split) for seed in range(250)} for split in ("train", "validation"))
    assert not train & validation
    assert len(train) > 3 * len(validation) / 2 and len(validation) > 5


def test_splitting_by_seed_draws_one_question():
    env = ReasoningGym("chain_sum", split_by="seed")
    assert question(env, 3) == question(ReasoningGym("chain_sum", split_by="seed"), 3)
    assert question(env, 3) != question(env, 3, "validation")


def test_a_dataset_with_one_question_is_told():
    env = ReasoningGym("count_bits", {"min_n": 6, "max_n": 6})
    with pytest.raises(ValueError, match=r"dataset: none of 1000 questions of 'count_bits'.*split_by: seed"):
        for split in ("train", "validation"):
            env.reset(seed=0, options={"split": split})


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"dataset": "chain_sums"}, "dataset: 'chain_sums' is unknown; did you mean chain_sum"),
        (
            {"dataset": "chain_sum", "params": {"min_term": 2}},
            "params of chain_sum: 'min_term' .* did you mean min_term",
        ),
        ({"dataset": "chain_sum", "params": {"min_terms": 9, "max_terms": 2}}, "params: chain_sum refused"),
        ({"dataset": "chain_sum", "params": {"min_terms": "two"}}, "params: chain_sum refused"),
        ({"dataset": "chain_sum", "params": {"seed": 1}}, r"params\.seed: .* remove it"),
        ({"dataset": "chain_sum", "answer": "xml"}, "answer: 'xml' is unknown"),
        ({"dataset": "chain_sum", "split_by": "size"}, "split_by: 'size'"),
        (
            {"dataset": "composite", "params": {"datasets": [{"name": "nope", "weight": 1}]}},
            "params: composite refused",
        ),
        ({"datasets": "chain_sum"}, r"envs\[\]\.kwargs"),
    ],
)
def test_wrong_arguments_are_named(kwargs, complaint):
    with pytest.raises(EnvError, match=complaint):
        make_env("raygym/ReasoningGym-v0", kwargs)


def test_a_reply_that_the_scorer_cannot_read_is_worth_nothing():
    env = ReasoningGym("prime_factorization")
    env.reset(seed=0)
    _, reward, _, _, info = env.step(say("<answer>two times two</answer>"))
    assert (reward, info["metrics"]["unscorable"]) == (0.0, 1.0)


def test_threads_do_not_disturb_each_other():
    """pool_matrix seeds numpy's shared generator; list_functions draws from Python's."""
    kwargs = [{"dataset": name} for name in ("pool_matrix", "list_functions", "gsm_symbolic")]

    def ask(number: int) -> str:
        random.random()
        return question(ReasoningGym(**kwargs[number % 3]), number // 3 % 20)

    alone = [ask(number) for number in range(60)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, range(120))) == alone * 2


def test_questions_do_not_come_from_pythons_own_generator():
    """One of list_functions' generators draws from it."""
    env = ReasoningGym("list_functions")
    assert [question(env, seed) for seed in range(150)] == [question(env, seed) for seed in range(150)]


_OF_SETS = ("isomorphic_strings", "polynomial_multiplication", "ransom_note")
_ASK = """
import json
from raygym.envs.reasoning_gym import ReasoningGym
print(json.dumps([ReasoningGym(name).reset(seed=seed)[0][-1]["content"] for name in {names} for seed in range(3)]))
"""


@only_long
def test_every_process_asks_the_same():
    """Python orders sets of text differently in each process, and these datasets draw from sets."""
    here = [question(ReasoningGym(name), seed) for name in _OF_SETS for seed in range(3)]
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", _ASK.format(names=_OF_SETS)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": other, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert json.loads(done.stdout) == here


def test_the_shipped_mixture_can_be_made_and_played():
    envs = load_config(Path(__file__).parent.parent / "configs" / "reasoning.yaml").envs
    datasets = {env.kwargs["dataset"] for env in envs if env.id == "raygym/ReasoningGym-v0"}
    assert len(datasets) >= 10
    for config in envs:
        env = make_env(config.id, config.kwargs)
        for split in ("train", "validation"):
            env.reset(seed=0, options={"split": split})
            parse_step(env.step(say("<answer>[1]</answer>")))
