"""NeMo Gym's side of raygym against a stand-in for its servers; `test_nemo_gym_real.py` has the real ones."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gym import ROW, FakeGym, playing
from tiers import only_long

from raygym.check_env import check_env
from raygym.config import ConfigError
from raygym.config_file import parse_config
from raygym.env import EnvError
from raygym.env_host import EnvHost
from raygym.episode import EpisodeLimits
from raygym.nemo_gym.agent import run_agent_episode, with_sampling
from raygym.nemo_gym.config import NemoGymError
from raygym.nemo_gym.endpoints import Endpoint, find_endpoint, write_endpoints
from raygym.nemo_gym.interpreter import VERSION, clean_environment, find_interpreter
from raygym.nemo_gym.layout import read_layout
from raygym.nemo_gym.play import Play
from raygym.nemo_gym.resolve import Resolved, nested
from raygym.nemo_gym.resources import ResourcesEnv
from raygym.nemo_gym.responses import (
    call_output_item,
    chat_messages,
    chat_tools,
    items_to_messages,
    output_items,
    response_object,
)
from raygym.nemo_gym.rows import Row, Source, load_rows, sources
from raygym.nemo_gym.trained_tokens import read_tokens
from raygym.nemo_gym.verdict import read_verdict
from raygym.preflight import check_inputs
from raygym.types import EpisodeFailure, FailureKind, Message, Sampling, Task, Trajectory

LIMITS = EpisodeLimits(8, 16, 1000, 60.0, 60.0, 60.0)
TASK = Task(0, "counter", 7)


def call(name: str, *arguments: Any) -> Message:
    """A message that calls a tool, once for each of these arguments."""
    texts = [given if isinstance(given, str) else json.dumps(given) for given in arguments]
    calls = [
        {"id": f"c{number}", "type": "function", "function": {"name": name, "arguments": text}}
        for number, text in enumerate(texts, 1)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def say(text: str) -> Message:
    return {"role": "assistant", "content": text}


def carrying(item: dict[str, Any], prompt: Sequence[int], generated: Sequence[int], **changed: Any) -> dict[str, Any]:
    ids = {"prompt_token_ids": list(prompt), "generation_token_ids": list(generated)}
    return {**item, **ids, "generation_log_probs": [-0.5] * len(generated), **changed}


ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hi", "annotations": []}]}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "now 1"}
TWO_TURNS = [carrying(CALL, [1, 2], [3, 4]), OUTPUT, carrying(ANSWER, [1, 2, 3, 4, 5], [6])]


# The config


SECTION = {"config_paths": ["a.yaml"]}


def config(**env: Any) -> Any:
    return parse_config({"name": "t", "steps": 1, "policy": {"model": "tiny"}, "envs": [{"id": "nemo_gym", **env}]})


def test_the_section_has_defaults_that_suit_a_first_try() -> None:
    section = config(nemo_gym=SECTION).envs[0].nemo_gym
    assert (section.mode, section.dataset, section.validation_dataset) == ("resources", "example", "")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({}, ["envs.0.nemo_gym", "id"]),
        ({"nemo_gym": SECTION, "id": "raygym/NumberGuess-v0"}, ["envs.0.nemo_gym", "id: nemo_gym"]),
        ({"nemo_gym": {}}, ["envs.0.nemo_gym.config_paths", "missing"]),
        ({"nemo_gym": {"config_paths": []}}, ["envs.0.nemo_gym.config_paths", "at least 1"]),
        ({"nemo_gym": {**SECTION, "mode": "both"}}, ["envs.0.nemo_gym.mode", "resources", "both"]),
        ({"nemo_gym": {**SECTION, "modus": "agent"}}, ["envs.0.nemo_gym.modus", "unknown key", "config_paths"]),
        ({"nemo_gym": {**SECTION, "startup_timeout_s": 0}}, ["envs.0.nemo_gym.startup_timeout_s", "greater than 0"]),
        ({"nemo_gym": SECTION, "kwargs": {"a": 1}}, ["envs.0.kwargs", "nemo_gym.overrides"]),
        ({"nemo_gym": SECTION, "isolation": "actor"}, ["envs.0.isolation", "nemo_gym"]),
    ],
)  # fmt: skip
def test_bad_sections_are_told_by_key(env: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**env)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_overrides_may_be_dotted() -> None:
    found = nested({"a.b.c": 1, "a": {"d": {"e.f": 2}}, "g": [3]})
    assert found == {"a": {"b": {"c": 1}, "d": {"e": {"f": 2}}}, "g": [3]}


@pytest.mark.parametrize("overrides", [{"a": 1, "a.b": 2}, {"a.b": 2, "a.b.c": 3}, {"a": 1, "a.b.c": {"d": 1}}])
def test_overrides_that_contradict_are_refused(overrides: dict[str, Any]) -> None:
    with pytest.raises(NemoGymError, match="overrides"):
        nested(overrides)


def test_a_python_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path))
    with pytest.raises(NemoGymError, match="make nemo-gym"):
        find_interpreter("")
    with pytest.raises(NemoGymError, match=r"interpreter: .*no executable"):
        find_interpreter(str(tmp_path / "python"))


def test_the_check_before_a_run_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"envs\.0\.nemo_gym\.interpreter: .*make nemo-gym"):
        check_inputs(config(nemo_gym=SECTION))
    python = tmp_path / "nemo-gym" / VERSION / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'it is broken' >&2; exit 3")
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"envs\.0\.nemo_gym\.interpreter: .*cannot resolve .*it is broken"):
        check_inputs(config(nemo_gym=SECTION))


def test_servers_do_not_see_this_process_s_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/here")
    monkeypatch.setenv("RAY_ADDRESS", "x")
    monkeypatch.setenv("OTHER", "kept")
    assert clean_environment().keys() & {"PYTHONPATH", "RAY_ADDRESS", "OTHER"} == {"OTHER"}


# Servers and rows


def agent(resources: str, **more: Any) -> dict[str, Any]:
    references = {
        "resources_server": {"type": "resources_servers", "name": resources},
        "model_server": {"type": "responses_api_models", "name": "policy_model"},
    }
    return {"responses_api_agents": {"simple_agent": {"entrypoint": "app.py", **references, **more}}}


def resources(implementation: str, **more: Any) -> dict[str, Any]:
    return {"resources_servers": {implementation: {"entrypoint": "app.py", **more}}}


TWO = {
    "a": resources("counter"),
    "a_agent": agent("a", max_steps=6, datasets=[{"name": "train", "type": "train", "jsonl_fpath": "data/a.jsonl"}]),
    "b": resources("judged", judge={"type": "responses_api_models", "name": "judge"}),
    "b_agent": agent("b"),
    "relay": {"environment_servers": {"legacy_agent": {"entrypoint": "app.py"}}},
    "policy_model": {"responses_api_models": {"vllm_model": {"entrypoint": "app.py"}}},
    "judge": {"responses_api_models": {"openai_model": {"entrypoint": "app.py"}}},
    "head_server": {"host": "127.0.0.1", "port": 11000},
    "policy_model_name": "m",
}


def layout_of(mode: str, chosen: str = "", config: dict[str, Any] = TWO, root: Path = Path()) -> Any:
    return read_layout(Resolved(config, root, "python"), mode, chosen)


def test_only_what_rows_need_is_started() -> None:
    resources, agents = layout_of("resources"), layout_of("agent")
    assert [s.name for s in resources.needed({resources.target("a_agent")})] == ["a"]
    assert [s.name for s in resources.needed({resources.target("b_agent")})] == ["b", "judge"]
    assert [s.name for s in agents.needed({agents.target("a_agent")})] == ["a", "a_agent", "policy_model"]
    everything = agents.needed({agents.target("a_agent"), agents.target("b_agent")})
    assert "relay" not in [s.name for s in everything] and len(everything) == 6


def test_rows_are_routed_by_their_agent() -> None:
    assert layout_of("resources").target("b_agent") == "b"
    assert layout_of("agent").target("b_agent") == "b_agent"
    assert layout_of("resources", "b").target("") == "b"
    assert layout_of("resources", "a_agent").target("") == "a"
    assert layout_of("agent", "a_agent").target("") == "a_agent"
    for mode, name, word in (("resources", "", "several: a, b"), ("agent", "x", "a_agent, b"), ("agent", "a", "'a'")):
        with pytest.raises(NemoGymError, match=word):
            layout_of(mode).target(name)
    with pytest.raises(NemoGymError, match="expected one of a, b"):
        layout_of("resources", "c")
    with pytest.raises(NemoGymError, match="mode agent needs"):
        layout_of("agent", config={"a": TWO["a"]})


def test_an_agents_bound_on_steps_holds_without_the_agent_too() -> None:
    layout = layout_of("resources")
    assert layout.max_steps("a", "a_agent") == layout.max_steps("a", "") == 6
    assert layout.max_steps("b", "b_agent") is None


def test_datasets_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = Resolved(TWO, tmp_path, "python")
    layout = layout_of("agent", root=tmp_path)
    for path in ("data/a.jsonl", "resources_servers/counter/data/example.jsonl", "here/own.jsonl"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    assert sources(resolved, layout, "train") == (Source(str(tmp_path / "data/a.jsonl"), "a_agent"),)
    example = str(tmp_path / "resources_servers/counter/data/example.jsonl")
    assert sources(resolved, layout, "example") == (Source(example, "a_agent"),)
    monkeypatch.chdir(tmp_path / "here")
    assert sources(resolved, layout, "own.jsonl") == (Source(str(tmp_path / "here/own.jsonl")),)
    chosen = layout_of("agent", "b_agent", root=tmp_path)
    for dataset, word in (("test", "train"), ("none.jsonl", "is not there"), ("train", "none of the config's")):
        with pytest.raises(NemoGymError, match=word):
            sources(resolved, chosen, dataset)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("{", "is not JSON"),
        ("[]", "responses_create_params"),
        ("{}", "responses_create_params"),
        ('{"responses_create_params": {}}', "input"),
        ('{"responses_create_params": {"input": []}}', "input"),
        ('{"responses_create_params": {"input": [1]}}', "input"),
        ('{"responses_create_params": {"input": "x", "tools": [{"type": "function"}]}}', "tools"),
        ('{"responses_create_params": {"input": "x"}, "agent_ref": "a"}', "agent_ref"),
    ],
)
def test_bad_rows_are_told_by_line(tmp_path: Path, line: str, word: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{line}\n")
    with pytest.raises(NemoGymError, match=rf"rows\.jsonl, line 3: .*{word}"):
        load_rows((Source(str(path)),))


def test_rows_know_their_agent(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    own = {**ROW, "agent_ref": {"type": "responses_api_agents", "name": "own"}}
    path.write_text(f"{json.dumps(ROW)}\n{json.dumps(own)}\n")
    assert [row.agent for row in load_rows((Source(str(path), "the-file-s"),))] == ["the-file-s", "own"]
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, word in (("empty.jsonl", "has no rows"), ("none.jsonl", "cannot be read")):
        with pytest.raises(NemoGymError, match=word):
            load_rows((Source(str(tmp_path / name)),))


# Messages


def test_inputs_become_messages() -> None:
    params = {
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
            CALL,
            {**CALL, "call_id": "c2"},
            OUTPUT,
            {"role": "system", "content": "late"},
        ],
    }
    system, user, assistant, tool, late = chat_messages(params)
    assert system == {"role": "system", "content": "Be brief.\n\nBe kind."}
    assert user == {"role": "user", "content": "ab"}
    assert assistant["content"] == "<think>hm</think>ok"
    assert [c["id"] for c in assistant["tool_calls"]] == ["c1", "c2"]
    assert tool == {"role": "tool", "tool_call_id": "c1", "content": "now 1"}
    assert late == {"role": "system", "content": "late"}
    assert chat_messages({"input": "hi"}) == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize("item", [{"type": "web_search_call"}, {"role": "user", "content": [{"type": "input_image"}]}])
def test_what_has_no_chat_form_is_an_error(item: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match=item.get("type", "input_image")):
        items_to_messages([item])


def test_tools_take_the_chat_form() -> None:
    assert chat_tools(ROW["responses_create_params"]["tools"]) == [
        {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
    ]
    assert chat_tools(None) == []


@pytest.mark.parametrize(
    ("action", "kinds"),
    [
        (say("hi"), ["message"]),
        (say(""), ["message"]),
        (call("add", {"n": 1}), ["function_call"]),
        ({**call("add", {"n": 1}), "content": "Let me see"}, ["message", "function_call"]),
        (say("<think>2 and 2</think>\n\n4"), ["reasoning", "message"]),
        ({**call("add", {"n": 1}), "content": "so</think>"}, ["reasoning", "function_call"]),
        ({**say("4"), "reasoning_content": "2 and 2"}, ["reasoning", "message"]),
    ],
)
def test_actions_become_items(action: Message, kinds: list[str]) -> None:
    items = output_items(action)
    assert [item["type"] for item in items] == kinds
    back = items_to_messages(items)[0]
    assert back.get("tool_calls", []) == action.get("tool_calls", [])
    assert "4" not in str(action["content"]) or back["content"].endswith("4")


@only_long
def test_the_response_is_one_that_openais_own_types_accept() -> None:
    from openai.types.responses import Response

    items = [*output_items({**call("add", {"n": 1}), "content": "<think>a</think>b"})]
    items += [call_output_item("c1", "now 1"), *output_items(say("c"))]
    params = {**ROW["responses_create_params"], "temperature": 0.5}
    response = Response.model_validate(response_object(params, items, "policy"), strict=True)
    assert response.output_text == "bc"
    kinds = [item.type for item in response.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call_output", "message"]
    assert response.tools[0].name == "add"  # type: ignore[union-attr]


# Verdicts and tokens


def test_a_verdict_has_the_reward_and_the_verifiers_numbers() -> None:
    answer = {**ROW, "response": {}, "reward": 0.75, "accuracy": True, "overlap": 0.5, "why": "x", "mask_sample": False}
    verdict = read_verdict({**answer, "reward_components": {"a": 0.5, "b": 0.25}}, ROW)
    assert verdict.reward == 0.75
    assert verdict.metrics == {"accuracy": 1.0, "overlap": 0.5, "reward/a": 0.5, "reward/b": 0.25}
    assert verdict.reward_components == {"a": 0.5, "b": 0.25}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"reward": None},
        {"reward": "1"},
        {"reward": math.nan},
        {"reward": 1.0, "reward_components": {"a": 0.5}},
        {"reward": 1.0, "reward_components": {"a": "1"}},
        {"reward": 1.0, "reward_components": [1.0]},
    ],
)
def test_a_verdict_that_is_wrong_is_no_reward(answer: dict[str, Any]) -> None:
    with pytest.raises(EnvError, match="reward"):
        read_verdict(answer, ())


def test_a_masked_sample_is_a_failure_with_its_reason() -> None:
    with pytest.raises(EpisodeFailure) as caught:
        read_verdict({"reward": 0.0, "mask_sample": True, "failure_kind": "judge_failed"}, ())
    assert (caught.value.kind, "judge_failed" in caught.value.detail) == (FailureKind.MASKED, True)


def test_tokens_of_two_turns_are_one_sequence() -> None:
    tokens = read_tokens(TWO_TURNS)
    assert tokens.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert tokens.loss_mask.tolist() == [False, False, True, True, False, True]
    assert tokens.logprobs.tolist() == [0, 0, -0.5, -0.5, 0, -0.5]
    assert tokens.spans == ((2, 4), (5, 6))


def test_the_ids_of_an_answer_are_on_its_last_item() -> None:
    thought = {"type": "reasoning", "id": "r", "summary": []}
    assert read_tokens([thought, ANSWER, carrying(CALL, [1], [2]), OUTPUT, carrying(ANSWER, [1, 2], [3])]).spans == (
        (1, 2),
        (2, 3),
    )


@pytest.mark.parametrize(
    ("items", "kind"),
    [
        ([], "missing_token_ids"),
        ([ANSWER], "missing_token_ids"),
        ([CALL, OUTPUT, carrying(ANSWER, [1], [2])], "missing_token_ids"),
        ([*TWO_TURNS[:2], ANSWER], "missing_token_ids"),
        ([carrying(ANSWER, [1], [])], "missing_token_ids"),
        ([carrying(ANSWER, [1], [2, 3], generation_log_probs=[-1.0])], "missing_token_ids"),
        ([*TWO_TURNS[:2], carrying(ANSWER, [1, 2, 3, 9, 5], [6])], "forked"),
        ([*TWO_TURNS[:2], carrying(ANSWER, [1, 2, 3], [6])], "forked"),
        ([carrying(ANSWER, [1], [2], generation_log_probs=[math.nan])], "invalid_logprobs"),
        ([carrying(ANSWER, [1], [2], generation_log_probs=[-9999.0])], "invalid_logprobs"),
    ],
)
def test_tokens_that_cannot_be_trained_are_failures(items: list[dict[str, Any]], kind: str) -> None:
    with pytest.raises(EpisodeFailure) as caught:
        read_tokens(items)
    assert caught.value.kind == kind


# A resources server, driven by raygym


async def play_actions(play: Play, actions: Sequence[Message], seed: int = 0) -> tuple[list[Any], ResourcesEnv]:
    env = ResourcesEnv(play)
    await env.reset(seed=seed, options={"split": "train"})
    steps = [await env.step(action) for action in actions]
    await env.close()
    return steps, env


async def test_an_episode_on_a_resources_server(tmp_path: Path) -> None:
    gym = FakeGym(verdict=lambda body: {"reward": float(body["count"] == body["expected"]), "count": body["count"]})
    async with playing(gym, tmp_path) as play:
        env = ResourcesEnv(play)
        assert env.tools == ()
        messages, _ = await env.reset(seed=0)
        assert messages == [{"role": "user", "content": "Count to 3."}]
        assert [tool["function"]["name"] for tool in env.tools] == ["add"]
        observation, reward, terminated, truncated, _ = await env.step(call("add", {"n": 1}, {"n": 2}))
        assert observation == [
            {"role": "tool", "tool_call_id": "c1", "content": "now 1"},
            {"role": "tool", "tool_call_id": "c2", "content": "now 3"},
        ]
        assert (reward, terminated, truncated) == (0.0, False, False)
        observation, reward, terminated, truncated, info = await env.step(say("3"))
        assert (observation, reward, terminated, truncated) == ([], 1.0, True, False)
        assert info["metrics"] == {"count": 3.0}
        await env.close()
        await env.close()
    paths = [path for path, _ in gym.calls]
    assert paths == ["seed_session", "add", "add", "verify", "close_session"]
    assert gym.calls[0][1] == ROW
    response = gym.calls[3][1]["response"]
    assert gym.calls[3][1] == {**ROW, "response": response}
    kinds = [item["type"] for item in response["output"]]
    assert kinds == ["function_call", "function_call", "function_call_output", "function_call_output", "message"]
    assert len(gym.closed) == 1


async def test_tool_errors_are_shown_to_the_policy(tmp_path: Path) -> None:
    gym = FakeGym()
    calls = [("add", {"n": "x"}), ("add", "{n: 1"), ("nothing", {}), ("verify", ROW), ("../verify", {})]
    actions = [call(name, arguments) for name, arguments in calls]
    async with playing(gym, tmp_path) as play:
        steps, _ = await play_actions(play, actions)
    shown = [step[0][0]["content"] for step in steps]
    assert shown[0] == '{"detail": "n: expected an integer"}'
    assert "not JSON" in shown[1]
    assert "Not Found" in shown[2] and "Not Found" in shown[4]
    assert "no tool 'verify'" in shown[3]
    assert "verify" not in [path for path, _ in gym.calls]


async def test_the_last_step_is_graded_and_truncated(tmp_path: Path) -> None:
    async with playing(FakeGym(verdict=lambda _: {"reward": 0.25}), tmp_path, turns=2) as play:
        steps, _ = await play_actions(play, [call("add", {"n": 1}), call("add", {"n": 1})])
    assert [step[1:4] for step in steps] == [(0.0, False, False), (0.25, False, True)]


@pytest.mark.parametrize(
    ("verdict", "kind"),
    [
        (lambda _: (500, "no"), "env_error"),
        (lambda _: (200, "no JSON"), "env_error"),
        (lambda _: {"reward": None}, "env_error"),
        (lambda _: {"reward": 1.0, "reward_components": {"a": 0.1}}, "env_error"),
        (lambda _: {"reward": 1.0, "mask_sample": True}, "masked"),
    ],
)
async def test_a_verdict_that_fails_is_a_failure(tmp_path: Path, verdict: Callable[[Any], Any], kind: str) -> None:
    async with playing(FakeGym(verdict=verdict), tmp_path) as play:
        host = EnvHost(lambda: ResourcesEnv(play))
        await host.reset(TASK, 60)
        with pytest.raises(EpisodeFailure) as caught:
            await host.step(say("3"), 60)
        await host.close()
    assert caught.value.kind == kind


async def test_a_hundred_episodes_keep_their_state_apart(tmp_path: Path) -> None:
    gym = FakeGym(verdict=lambda body: {"reward": float(body["count"])})
    async with playing(gym, tmp_path) as play:
        limit = asyncio.Semaphore(20)

        async def one(n: int) -> float:
            async with limit:
                steps, _ = await play_actions(play, [call("add", {"n": n}), call("add", {"n": n}), say("done")])
                return float(steps[-1][1])

        rewards = await asyncio.gather(*(one(n) for n in range(100)))
    assert rewards == [2.0 * n for n in range(100)]


async def test_a_server_that_goes_away_is_a_lost_environment(tmp_path: Path) -> None:
    async with playing(FakeGym(), tmp_path) as play:
        env = ResourcesEnv(play)
        await env.reset(seed=0)
    write_endpoints(Path(play.endpoints), {})
    with pytest.raises(EpisodeFailure) as caught:
        await env.step(call("add", {"n": 1}))
    assert caught.value.kind is FailureKind.ENV_LOST
    await env.close()


@pytest.mark.parametrize("mode", ["resources", "agent"])
async def test_errors_of_a_server_that_is_being_ended_are_a_lost_environment(tmp_path: Path, mode: str) -> None:
    def ended(_: Any) -> Any:
        write_endpoints(tmp_path / "servers.json", {})
        return 500, "Request was cancelled"

    async with playing(FakeGym(verdict=ended, run=ended), tmp_path, mode=mode) as play:
        if mode == "agent":
            assert (await run(play)).failure is FailureKind.ENV_LOST
        else:
            with pytest.raises(EpisodeFailure, match="env_lost"):
                await play_actions(play, [say("3")])


async def test_episodes_wait_for_servers_that_start(tmp_path: Path) -> None:
    path, here = tmp_path / "servers.json", Endpoint("http://127.0.0.1:1", False, False)
    write_endpoints(path, {})
    waiting = asyncio.create_task(find_endpoint(path, "a"))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    write_endpoints(path, {"a": here})
    assert await waiting == here
    write_endpoints(path, {}, "it crashed")
    with pytest.raises(EpisodeFailure, match=r"env_lost.*it crashed"):
        await find_endpoint(path, "a")
    with pytest.raises(EpisodeFailure, match="env_lost"):
        await find_endpoint(tmp_path / "none.json", "a")


async def test_the_gymnasium_flavour(tmp_path: Path) -> None:
    gym = FakeGym()
    async with playing(gym, tmp_path, gymnasium=True) as play:
        env = ResourcesEnv(play)
        messages, _ = await env.reset(seed=0)
        assert [message["content"] for message in messages] == ["Count to 3.", "Begin."]
        first = await env.step(say("one"))
        assert first == ([{"role": "user", "content": "Again."}], 0.5, False, False, {"metrics": {"level": 1.0}})
        assert (await env.step(say("two")))[:4] == ([], 0.5, True, False)
        await env.close()
    assert [path for path, _ in gym.calls] == ["reset", "step", "step"]
    # A step is given the answer of this turn alone.
    assert gym.calls[2][1]["response"]["output"][0]["content"][0]["text"] == "two"
    assert len(gym.calls[2][1]["response"]["output"]) == 1


def test_it_is_an_environment_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))

    async def served() -> list[str]:
        async with playing(FakeGym(), tmp_path) as play:
            return await asyncio.to_thread(check_env, ResourcesEnv(play))

    assert asyncio.run(served()) == []


# NeMo Gym's own agent


class Renderer:
    def __init__(self, drifts: bool = False) -> None:
        self.drifts = drifts

    def drifted(self, messages: Any, token_ids: Any) -> bool:
        return self.drifts


async def run(play: Play, version: int = 3, limits: EpisodeLimits = LIMITS, temperature: float = 1.0) -> Trajectory:
    async def served() -> int:
        return version

    return await run_agent_episode(
        play, TASK, group_id="g", episode=0, attempt=0, served_version=served,
        renderer_for=lambda _: Renderer(), limits=limits, sampling=Sampling(temperature, 64),  # type: ignore[arg-type,return-value]
    )  # fmt: skip


def answering(items: list[dict[str, Any]], **more: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    incomplete = more.pop("incomplete", None)
    response = {"output": items, "incomplete_details": {"reason": incomplete} if incomplete else None}
    return lambda body: {**body, "response": response, "reward": 0.5, **more}


async def test_a_run_becomes_a_trajectory(tmp_path: Path) -> None:
    gym = FakeGym(run=answering(TWO_TURNS, accuracy=1.0))
    async with playing(gym, tmp_path, mode="agent") as play:
        trajectory = await run(play)
    assert trajectory.status == "terminated", trajectory.failure_detail
    assert trajectory.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert trajectory.weight_versions.tolist() == [-1, -1, 3, 3, -1, 3]
    assert trajectory.reward == sum(turn.reward for turn in trajectory.turns) == 0.5
    assert [(turn.start, turn.end) for turn in trajectory.turns] == [(2, 4), (5, 6)]
    assert [message["role"] for message in trajectory.messages] == ["user", "assistant", "tool", "assistant"]
    assert trajectory.metrics["accuracy"] == 1.0
    assert trajectory.sampling == Sampling(1.0, LIMITS.max_tokens_per_turn)
    path, body = gym.calls[0]
    assert path == "run"
    asked = body["responses_create_params"]
    assert (asked["temperature"], asked["top_p"], asked["max_output_tokens"]) == (1.0, 1.0, 16)


def test_the_runs_sampling_replaces_the_rows() -> None:
    params = {"input": "x", "temperature": 0.2, "top_p": 0.9, "max_output_tokens": 9}
    asked = with_sampling(Row({"responses_create_params": params}, "", ""), Sampling(0.0, 5))["responses_create_params"]
    assert asked == {"input": "x", "temperature": 0.0, "top_p": 1.0, "max_output_tokens": 5}


async def test_a_cut_run_is_truncated(tmp_path: Path) -> None:
    gym = FakeGym(run=answering(TWO_TURNS, incomplete="max_output_tokens"))
    async with playing(gym, tmp_path, mode="agent") as play:
        trajectory = await run(play)
    assert (trajectory.status, trajectory.turns[-1].finish_reason, trajectory.reward) == ("truncated", "length", 0.5)


INNER = "Hit an exception in SimpleAgent___counter_agent calling an inner server: {}"
MODEL = INNER.format("Hit an exception in VLLMModel___policy_model calling an inner server: boom")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (lambda _: (500, INNER.format("KeyError('x')")), "env_error"),
        (lambda _: (500, MODEL), "engine_error"),
        (lambda _: (500, INNER.format("This model's maximum context length is 9 tokens")), "context_overflow"),
        (answering([*TWO_TURNS[:2], ANSWER], incomplete="max_output_tokens"), "context_overflow"),
        (answering([*TWO_TURNS[:2], ANSWER]), "missing_token_ids"),
        (answering([*TWO_TURNS[:2], carrying(ANSWER, [7, 2, 3, 4, 5], [6])]), "forked"),
        (answering(TWO_TURNS, mask_sample=True), "masked"),
        (answering(TWO_TURNS, reward=None), "env_error"),
        (answering([{**TWO_TURNS[0], "type": "odd_call"}, TWO_TURNS[2]]), "env_error"),
        (lambda body: {**body, "reward": 1.0}, "env_error"),
        (lambda body: {**body, "response": {"output": [1]}, "reward": 1.0}, "env_error"),
        (lambda _: (200, "[]"), "env_error"),
    ],
)
async def test_a_run_that_fails_is_no_reward(tmp_path: Path, answer: Any, kind: str) -> None:
    async with playing(FakeGym(run=answer), tmp_path, mode="agent") as play:
        trajectory = await run(play)
    assert trajectory.failure == kind, trajectory.failure_detail
    assert (trajectory.reward, len(trajectory.token_ids), trajectory.turns) == (0.0, 0, ())
    assert trajectory.failure_detail


async def test_an_agent_that_goes_away_or_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asyncio.Event()

    async def finding(path: Path, server: str) -> Endpoint:
        endpoint = await find_endpoint(path, server)
        found.set()
        return endpoint

    monkeypatch.setattr("raygym.nemo_gym.agent.find_endpoint", finding)
    async with playing(FakeGym(), tmp_path, mode="agent") as play:
        pass
    write_endpoints(Path(play.endpoints), {"counter_agent": Endpoint("http://127.0.0.1:9", False, False)}, "")
    lost = run(play)
    waiting = asyncio.create_task(lost)
    await asyncio.wait_for(found.wait(), 60)
    await asyncio.sleep(0.1)
    write_endpoints(Path(play.endpoints), {})
    assert (await waiting).failure is FailureKind.ENV_LOST
    # Nothing is published: the episode waits until its deadline.
    short = EpisodeLimits(8, 16, 1000, 5.0, 5.0, 0.2)
    late = await run(play, limits=short)
    assert (late.failure, "episode_timeout_s" in late.failure_detail) == (FailureKind.ENV_TIMEOUT, True)


async def test_an_engine_that_does_not_tell_its_version(tmp_path: Path) -> None:
    async def broken() -> int:
        raise EpisodeFailure(FailureKind.ENGINE_LOST, "gone")

    async with playing(FakeGym(), tmp_path, mode="agent") as play:
        trajectory = await run_agent_episode(
            play, TASK, group_id="g", episode=0, attempt=0, served_version=broken,
            renderer_for=lambda _: Renderer(), limits=LIMITS, sampling=Sampling(1.0, 8),  # type: ignore[arg-type,return-value]
        )  # fmt: skip
    assert trajectory.failure is FailureKind.ENGINE_LOST
    assert trajectory.weight_versions.dtype == np.int32
