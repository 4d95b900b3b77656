"""`raygym serve` with two real vLLM replicas, used as agents use it: through the official `openai` client.

The model is random and small, but speaks with SmolLM2's tokenizer: sampled at temperature 1 it says what no tokenizer
would, which is the hardest case for token exactness.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from fuzz_bodies import FREE_LOOK, LOOK, fuzzed
from ray_head import ray_head
from tiers import LONG
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from raygym.models import resolve_policy

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.timeout(600)]
ROOT = Path(__file__).parent.parent
MODEL_LENGTH = 1024
LOOK_NORTH = {"name": "look", "arguments": '{"place": "north"}'}
# SmolLM2's own template shows no tools and no tool calls; this one, of our own, does.
TEMPLATE = (ROOT / "tests" / "templates" / "groups_tool_results.jinja").read_text()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("policy") / "random-smollm2"
    tokenizer = AutoTokenizer.from_pretrained(resolve_policy("smollm2-135m-instruct"))
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.1, eos_token_id=2, bos_token_id=1,
        pad_token_id=2, tie_word_embeddings=True, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).float().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass
class Server:
    url: str
    model: str
    key: str
    white: list[int]
    """Tokens that are nothing but white space."""
    environment: dict[str, str]
    """For another process in the same cluster."""

    def openai(self, base: str = "/v1") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + base, api_key=self.key, max_retries=0, timeout=180)

    def async_openai(self, base: str = "/v1") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + base, api_key=self.key, max_retries=0, timeout=180)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=180, **options)


@pytest.fixture(scope="module")
def server(model_dir: Path) -> Iterator[Server]:
    command = [
        sys.executable, "-m", "raygym", "serve", "configs/tiny.yaml", f"policy.model={model_dir}", "policy.replicas=2",
        "policy.api_key_env=SERVER_KEY", f"policy.vllm.max_model_len={MODEL_LENGTH}",
        "policy.http.max_body_mib=1",
        "policy.vllm.structured_outputs_config={backend: xgrammar, disable_any_whitespace: true}",
    ]  # fmt: skip
    # In a cluster that others can join, for the handle.
    with (
        ray_head() as head,
        subprocess.Popen(
            command, cwd=ROOT, env=(environment := os.environ | on_cluster(head) | {"SERVER_KEY": "let me in"}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+(?=/v1)", line)
        if found is None:
            pytest.fail(f"no ready line: {line!r} {process.communicate(timeout=60)}")
        vocabulary = AutoTokenizer.from_pretrained(model_dir)
        white = [i for i in range(len(vocabulary)) if vocabulary.decode([i]) and not vocabulary.decode([i]).strip()]
        yield Server(found[0], str(model_dir), "let me in", white, environment)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=180)
        assert process.returncode == 130, error
        assert "Traceback" not in error


def on_cluster(head: dict[str, str]) -> dict[str, str]:
    return {"RAY_ADDRESS": head["address"]} | {key: value for key, value in head.items() if key.startswith("RAY_")}


class TestOpenAIClient:
    def test_chat(self, server: Server) -> None:
        client = server.openai()
        assert [model.id for model in client.models.list()] == [server.model]
        answer = client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "hi"}], max_tokens=8, seed=1, logprobs=True
        )
        assert answer.usage is not None and answer.usage.completion_tokens <= 8
        message = answer.choices[0].message.model_dump()
        assert (
            len(message["generation_token_ids"])
            == len(message["generation_log_probs"])
            == answer.usage.completion_tokens
        )
        again = client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "hi"}], max_tokens=8, seed=1
        )
        assert again.choices[0].message.content == message["content"]
        assert "generation_token_ids" not in again.choices[0].message.model_dump()

    def test_streams_give_what_whole_answers_give(self, server: Server) -> None:
        request: dict[str, Any] = {
            "model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 3,
            "logprobs": True,
        }  # fmt: skip
        whole = server.openai().chat.completions.create(**request).choices[0].message.model_dump()
        text, fields = "", {}
        for chunk in server.openai().chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                fields |= {k: v for k, v in choice.delta.model_dump().items() if "token_ids" in k or "log_probs" in k}
        assert text == whole["content"]
        assert fields["generation_token_ids"] == whole["generation_token_ids"]
        assert fields["prompt_token_ids"] == whole["prompt_token_ids"]
        np.testing.assert_allclose(fields["generation_log_probs"], whole["generation_log_probs"], atol=1e-4)

    async def test_async_clients_stop_strings_and_schemas(self, server: Server) -> None:
        client = server.async_openai()
        schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
        formatted, stopped = await asyncio.gather(
            client.chat.completions.create(
                model=server.model, messages=[{"role": "user", "content": "n?"}], max_tokens=60, temperature=0,
                response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
            ),
            client.completions.create(model=server.model, prompt="a b", max_tokens=20, stop=["e"], seed=5),
        )  # fmt: skip
        assert (formatted.choices[0].message.content or "").lstrip().startswith("{")
        assert "e" not in stopped.choices[0].text

    @pytest.mark.parametrize("stream", [False, True])
    def test_tools_in_a_loop_stay_exact(self, server: Server, stream: bool) -> None:
        client = server.openai()
        messages: list[Any] = [{"role": "user", "content": "Where is it?"}]
        seen: list[int] = []
        for turn in range(3):
            request: dict[str, Any] = {
                "model": server.model, "messages": messages, "tools": [LOOK], "max_tokens": 64, "temperature": 0,
                "logprobs": True, "tool_choice": {"type": "function", "function": {"name": "look"}},
                # A random model likes the white space that JSON allows everywhere.
                "logit_bias": dict.fromkeys(server.white, -100),
            }  # fmt: skip
            if stream:
                message = merged(client.chat.completions.create(**request, stream=True))
            else:
                message = client.chat.completions.create(**request).choices[0].message.model_dump(exclude_none=True)
            assert message["tool_calls"][0]["function"]["name"] == "look"
            assert json.loads(message["tool_calls"][0]["function"]["arguments"])["place"] in ("north", "south")
            assert message["prompt_token_ids"][: len(seen)] == seen
            seen = message["prompt_token_ids"] + message["generation_token_ids"]
            call_id = message["tool_calls"][0]["id"]
            messages += [message, {"role": "tool", "tool_call_id": call_id, "content": f"not in {turn}"}]

    def test_completions(self, server: Server) -> None:
        answer = server.openai().completions.create(model=server.model, prompt=[5, 6, 7], max_tokens=5, logprobs=0)
        assert answer.choices[0].logprobs is not None
        text = "".join(c.choices[0].text for c in server.openai().completions.create(
            model=server.model, prompt="one two", max_tokens=5, stream=True))  # fmt: skip
        assert text

    def test_responses(self, server: Server) -> None:
        client = server.openai()
        first = client.responses.create(model=server.model, input="Where?", max_output_tokens=16)
        assert first.output_text is not None
        items: list[Any] = [
            {"role": "user", "content": "Where?"},
            *first.output,
            {"role": "user", "content": "And now?"},
        ]
        second = client.responses.create(model=server.model, input=items, max_output_tokens=16)
        assert second.status in ("completed", "incomplete")
        kinds = [event.type for event in client.responses.create(
            model=server.model, input="Where?", max_output_tokens=8, stream=True)]  # fmt: skip
        assert kinds[0] == "response.created"
        assert kinds[-1] in ("response.completed", "response.incomplete")
        tool = {"type": "function", **LOOK["function"]}
        called = client.responses.create(
            model=server.model,
            input="Where?",
            tools=[tool],
            tool_choice="required",
            max_output_tokens=64,
            temperature=0.3,
        )
        assert called.output

    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({"model": "nobody"}, 404, "nobody"),
            ({"messages": []}, 400, "messages"),
            ({"temperature": -1}, 400, "temperature"),
            ({"max_tokens": 0}, 400, "max_tokens"),
            ({"max_tokens": "many"}, 400, "max_tokens"),
            ({"messages": [{"role": "user", "content": "word " * 2000}]}, 400, "context length"),
            ({"n": 3, "logprobs": True}, 400, "n:"),
            ({"tools": "none"}, 400, "tools"),
            (
                {"tools": [LOOK], "tool_choice": {"type": "function", "function": {"name": "absent"}}},
                400,
                "tool_choice",
            ),
            ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
            ({"stop": 5}, 400, "stop"),
            ({"seed": "x"}, 400, "seed"),
            ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, 413, "1048576"),
        ],
    )
    def test_client_mistakes(self, server: Server, change: dict[str, Any], status: int, words: str) -> None:
        body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **change}
        with pytest.raises(openai.APIStatusError) as caught:
            server.openai().chat.completions.create(**body)
        assert caught.value.status_code == status
        assert words in str(caught.value)

    @pytest.mark.parametrize(
        ("path", "change"),
        [
            ("/v1/completions", b'"structured_outputs": "none"'),
            ("/v1/chat/completions", b'"structured_outputs": [[]]'),
            ("/v1/responses", b'"include": true'),
            ("/v1/responses", b'"include": NaN'),
            ("/v1/chat/completions", b'"stop": "\\ud800"'),
        ],
    )
    def test_what_once_was_a_500(self, server: Server, path: str, change: bytes) -> None:
        model = json.dumps(server.model).encode()
        body = b'{"model": %s, "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", %s}'
        with server.http() as http:
            answer = http.post(path, content=body % (model, change))
        assert answer.status_code == 400
        assert isinstance(answer.json()["error"]["message"], str)

    def test_a_stream_asked_for_in_an_odd_way(self, server: Server) -> None:
        with server.http() as http:
            body = {"model": server.model, "input": "hi", "max_output_tokens": 4, "stream": 1}
            answer = http.post("/v1/responses", json=body)
        assert answer.status_code == 200
        assert "response.created" in answer.text

    def test_a_wrong_key(self, server: Server) -> None:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=server.url + "/v1", api_key="guess", max_retries=0).models.list()


def merged(stream: Any) -> dict[str, Any]:
    """The message that a streamed chat answer amounts to."""
    message: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": []}
    for chunk in stream:
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_none=True)
            message["content"] += delta.pop("content", None) or ""
            delta.pop("role", None)
            for piece in delta.pop("tool_calls", ()):
                while len(message["tool_calls"]) <= piece["index"]:
                    message["tool_calls"].append({"type": "function", "function": {"name": "", "arguments": ""}})
                call = message["tool_calls"][piece["index"]]
                call["id"] = piece.get("id") or call.get("id")
                for key in ("name", "arguments"):
                    call["function"][key] += piece.get("function", {}).get(key) or ""
            message |= delta
    return message


class Agent:
    """A random conversation of several turns, with tool results and user turns."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.turns = self.random.randint(2, 5)
        self.messages: list[Any] = []
        if self.random.random() < 0.3:
            self.messages.append({"role": "system", "content": "Be brief."})
        self.messages.append({"role": "user", "content": f"Question {seed}, please?"})

    def request(self, turn: int, model: str) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": model, "messages": self.messages, "max_tokens": self.random.choice([1, 6, 12]), "temperature": 1.0,
            "seed": self.random.randrange(2**31),
        }  # fmt: skip
        return request | {"tools": [FREE_LOOK], "tool_choice": "auto"}

    def answered(self, message: dict[str, Any], turn: int, *, own_parser: bool) -> None:
        """Continue: some answers are taken for tool calls, as an agent's own parser might."""
        calls = [f"call{turn}{number}" for number in range(self.random.choice([0, 1, 2]))]
        if calls and own_parser:
            parsed = [{"id": name, "type": "function", "function": LOOK_NORTH} for name in calls]
            message = {**message, "tool_calls": parsed}
        self.messages.append(message)
        for name in calls:
            self.messages.append({"role": "tool", "tool_call_id": name, "content": f"result  {turn} "})
        if not calls:
            self.messages.append({"role": "user", "content": f"Go on,\n\nplease {turn}"})


class TestExactness:
    """Random conversations (200 in the long tier) each way: no drift, and the trainer's logprobs are the engine's."""

    CONVERSATIONS = 200 if LONG else 15

    @pytest.fixture(scope="class")
    def trainer(self, model_dir: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def compare(self, trainer: Any, ids: list[int], mask: list[bool], logprobs: list[float]) -> float:
        with torch.no_grad():
            logits = trainer(torch.tensor([ids])).logits[0, :-1].float()
        own = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()
        trained = np.flatnonzero(mask)
        return float(np.abs(own[trained - 1] - np.asarray(logprobs)[trained]).max())

    async def run(self, server: Server, play: Any) -> list[Any]:
        limit = asyncio.Semaphore(16)

        async def one(seed: int) -> Any:
            async with limit:
                return await play(seed)

        return await asyncio.gather(*(one(seed) for seed in range(self.CONVERSATIONS)))

    async def test_with_ids_carried(self, server: Server, trainer: Any) -> None:
        client = server.async_openai()
        tokenizer = AutoTokenizer.from_pretrained(server.model)

        async def play(seed: int) -> tuple[bool, list[int], list[bool], list[float]]:
            agent, ids, mask, logprobs = Agent(seed), [], [], []
            for turn in range(agent.turns):
                request = agent.request(turn, server.model)
                if turn % 2:
                    message = merged(await collect(client, request | {"logprobs": True}))
                else:
                    answer = await client.chat.completions.create(**request, logprobs=True)
                    message = answer.choices[0].message.model_dump(exclude_none=True)
                prompt, made = message["prompt_token_ids"], message["generation_token_ids"]
                assert prompt[: len(ids)] == ids, "drift"
                new = len(prompt) - len(ids)
                mask += [False] * new + [True] * len(made)
                logprobs += [0.0] * new + message["generation_log_probs"]
                ids = prompt + made
                agent.answered(message, turn, own_parser=True)
            last = max(i for i, m in enumerate(agent.messages) if m["role"] == "assistant")
            plain = [
                {k: v for k, v in m.items() if "token_ids" not in k and "log_probs" not in k} for m in agent.messages
            ]
            own = [dict(m, tool_calls=None) for m in plain[: last + 1]]  # what was said, without the agent's parsing
            return render(tokenizer, own) != ids, ids, mask, logprobs

        played = await self.run(server, play)
        worst = max(self.compare(trainer, *record[1:]) for record in played)
        drift = np.mean([record[0] for record in played])
        print(f"\nre-rendering drifts in {drift:.0%} of {len(played)} conversations; logprob difference {worst:.1e}")
        assert worst < 1e-3
        assert drift > 0

    async def test_with_sessions(self, server: Server, trainer: Any) -> None:
        async with httpx.AsyncClient(
            base_url=server.url, headers={"authorization": f"Bearer {server.key}"}, timeout=300
        ) as http:

            async def play(seed: int) -> dict[str, Any]:
                opened = (await http.post("/sessions", json={})).json()
                client = server.async_openai(opened["base_url"])
                agent = Agent(seed)
                for turn in range(agent.turns):
                    request = agent.request(turn, server.model)
                    if turn % 2:
                        message = merged(await collect(client, request))
                    else:
                        answer = await client.chat.completions.create(**request)
                        message = answer.choices[0].message.model_dump(exclude_none=True)
                    assert "prompt_token_ids" not in message
                    agent.answered(message, turn, own_parser=False)
                closed = (await http.delete(f"/sessions/{opened['id']}")).json()
                assert closed["calls"] == agent.turns
                return closed

            played = await self.run(server, play)
        for record in played:
            assert record["forks"] == 0
            (segment,) = record["segments"]
            assert len(segment["calls"]) == record["calls"]
            worst = self.compare(trainer, segment["token_ids"], segment["loss_mask"], segment["logprobs"])
            assert worst < 1e-3
        owners = {record["id"].partition(".")[0] for record in played}
        assert len(owners) == 2, "sessions were opened on both replicas"

    def test_by_handle(self, server: Server, trainer: Any) -> None:
        script = Path(__file__).with_name("handle_agents.py")
        done = subprocess.run(
            [sys.executable, script, "raygym-tiny", server.model, str(self.CONVERSATIONS)],
            cwd=ROOT, env=server.environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads(done.stdout.splitlines()[-1])
        with server.http() as http:
            body = {"model": server.model, "prompt": list(range(50, 80)), "max_tokens": 8, "seed": 11}
            same = http.post("/v1/completions", json=body | {"return_token_ids": True}).json()["choices"][0]
        assert same["token_ids"] == record["fixed"], "HTTP and handle answer the same request with the same tokens"
        played = record["played"]
        assert len(played) == self.CONVERSATIONS
        assert max(self.compare(trainer, record["ids"], record["mask"], record["logprobs"]) for record in played) < 1e-3

    async def test_responses_in_a_session(self, server: Server) -> None:
        with server.http() as http:
            opened = http.post("/sessions", json={}).json()
            client = server.openai(opened["base_url"])
            items: list[Any] = [{"role": "user", "content": "Where?"}]
            for turn in range(3):
                answer = client.responses.create(model=server.model, input=items, max_output_tokens=12)
                items += [item.model_dump(exclude_none=True) for item in answer.output]
                items.append({"role": "user", "content": f"And {turn}?"})
            closed = http.delete(f"/sessions/{opened['id']}").json()
        assert (closed["calls"], closed["forks"], len(closed["segments"])) == (3, 0, 1)


async def collect(client: Any, request: dict[str, Any]) -> list[Any]:
    return [chunk async for chunk in await client.chat.completions.create(**request, stream=True)]


def render(tokenizer: Any, messages: list[Any]) -> list[int]:
    plain = json.loads(json.dumps(messages))
    for message in plain:
        for call in message.get("tool_calls") or ():
            with suppress(ValueError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
    try:
        text = tokenizer.apply_chat_template(plain, tools=[FREE_LOOK], tokenize=False)
    except Exception:
        return []
    return tokenizer.encode(text.removesuffix("<|im_end|>\n") + "<|im_end|>", add_special_tokens=False)


class TestOperations:
    def test_tokenize_matches_chat_and_detokenize_undoes_it(self, server: Server) -> None:
        with server.http() as http:
            body = {"model": server.model, "messages": [{"role": "user", "content": "hi"}], "tools": [LOOK]}
            tokens = http.post("/tokenize", json=body).json()["tokens"]
            message = http.post(
                "/v1/chat/completions", json=body | {"max_tokens": 4, "logprobs": True, "tool_choice": "none"}
            ).json()["choices"][0]["message"]
            assert message["prompt_token_ids"] == tokens
            history = [*body["messages"], message, {"role": "user", "content": "more"}]
            carried = http.post("/tokenize", json=body | {"messages": history}).json()["tokens"]
            following = http.post(
                "/v1/chat/completions",
                json=body | {"messages": history, "max_tokens": 4, "logprobs": True, "tool_choice": "none"},
            ).json()["choices"][0]["message"]
            assert following["prompt_token_ids"] == carried
            text = http.post("/detokenize", json={"model": server.model, "tokens": tokens}).json()["prompt"]
            assert "hi<|im_end|>" in text

    def test_metrics_are_of_both_replicas(self, server: Server) -> None:
        with server.http() as http:
            text = http.get("/metrics").text
        assert 'replica="0"' in text and 'replica="1"' in text
        for name in ("raygym_replica_imbalance", "raygym_prefix_cache_hit_ratio", "raygym_requests_total"):
            assert name in text
        ratio = float(re.findall(r"^raygym_prefix_cache_hit_ratio (\S+)", text, re.M)[0])
        assert 0 < ratio < 1

    def test_a_client_that_leaves_frees_the_engine(self, server: Server) -> None:
        def running(http: httpx.Client) -> float:
            return sum(
                float(v) for v in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)", http.get("/metrics").text, re.M)
            )

        with server.http() as http:
            body = {"model": server.model, "prompt": [5, 6, 7], "max_tokens": 900, "ignore_eos": True, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_bytes())
            deadline = time.monotonic() + 20
            while running(http) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert running(http) == 0


class TestFuzz:
    """Thousands of bodies, mutated from valid ones: every answer is a 2xx, or a 4xx with OpenAI's error object."""

    BODIES = 5000 if LONG else 150

    def test_no_body_is_a_5xx_and_the_engine_serves_afterwards(self, server: Server) -> None:
        bad = asyncio.run(self.send(server, [fuzzed(seed, server.model) for seed in range(self.BODIES)]))
        assert not bad, "\n".join(bad)
        answer = server.openai().chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "still there?"}], max_tokens=4
        )
        assert answer.choices[0].finish_reason in ("stop", "length")

    async def send(self, server: Server, requests: list[tuple[str, Any]]) -> list[str]:
        limit, bad = asyncio.Semaphore(24), []
        async with httpx.AsyncClient(
            base_url=server.url, headers={"authorization": f"Bearer {server.key}"}, timeout=300
        ) as http:

            async def one(path: str, body: Any) -> None:
                async with limit:
                    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
                    try:
                        answer = await http.post(path, content=raw, headers={"content-type": "application/json"})
                    except httpx.HTTPError as error:
                        bad.append(f"{path} {raw[:600]!r}: {error!r}")
                        return
                    if answer.status_code >= 500 or b'"code": 500' in answer.content or b'"code":500' in answer.content:
                        bad.append(f"{answer.status_code} {path} {raw[:600]!r}: {answer.text[:300]}")
                    elif answer.status_code >= 400 and not isinstance(answer.json()["error"]["message"], str):
                        bad.append(f"{answer.status_code} {path} {raw[:600]!r}: no error object")

            await asyncio.gather(*(one(*request) for request in requests))
        return bad
