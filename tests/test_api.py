"""The HTTP front over the simulated engine's API: keys, limits, sessions, IDs on messages. No Ray, no engine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import loaded
import numpy as np
import pytest

from raygym.admission import Admission
from raygym.api.front import ApiFront, FrontOptions
from raygym.api.gated import Gated
from raygym.api.sampling import SamplingProfile
from raygym.api.sessions import SessionStore
from raygym.api.simulated import SimulatedApi
from raygym.engine import EngineError
from raygym.in_flight import InFlight
from raygym.lease import Lease
from raygym.simulated_faults import SimulatedFault
from raygym.types import Generation, Int32Array, Sampling

TEMPLATES = sorted(path.stem for path in (Path(__file__).parent / "templates").glob("*.jinja"))
END = 2
ASK = {"role": "user", "content": "Guess my number."}
NEXT = {"role": "user", "content": "Higher."}


class Script:
    """A policy that says what it is told, in odd tokens: every text is split into single bytes."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self.tokenizer = tokenizer
        self.texts = list(texts)
        self.prompts: list[list[int]] = []
        self.samplings: list[Sampling] = []

    async def __call__(self, prompt: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        self.prompts.append(prompt.tolist())
        self.samplings.append(sampling)
        text = self.texts[(len(self.prompts) - 1) % len(self.texts)]
        ids = [token for letter in text for token in self.tokenizer.encode(letter, add_special_tokens=False)] + [END]
        count = len(ids)
        versions = np.full(count, len(self.prompts), np.int32)
        return Generation(np.asarray(ids, np.int32), -np.arange(1, count + 1, dtype=np.float32), versions, "stop")


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return loaded.tokenizer("smollm2-135m-instruct")


class Server:
    def __init__(self, tokenizer: Any, *texts: str, store: SessionStore | None = None, **options: Any) -> None:
        self.script = Script(tokenizer, *(texts or ("twelve", "thirteen")))
        self.store = SessionStore("here") if store is None else store
        self.api = SimulatedApi(self.script, tokenizer, "policy", 2048)
        self.in_flight = InFlight()
        gated = Gated(self.api.app(), self.in_flight, Admission("r", Lease(needed=False)))
        self.front = ApiFront(gated, self.store, FrontOptions(**options))
        transport = httpx.ASGITransport(app=self.front, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://policy")

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)

    async def chat(self, messages: list[Any], base: str = "", **body: Any) -> dict[str, Any]:
        answer = await self.post(f"{base}/v1/chat/completions", {"messages": messages, **body})
        assert answer.status_code == 200, answer.text
        return {**answer.json(), "history": answer.headers["x-raygym-history"]}


@pytest.fixture
def server(smollm2: Any) -> Server:
    return Server(smollm2)


class TestCarriedIds:
    async def test_the_next_prompt_begins_with_what_was_seen_and_said(self, server: Server, smollm2: Any) -> None:
        first = await server.chat([ASK], logprobs=True)
        reply = first["choices"][0]["message"]
        assert reply["content"] == "twelve"
        assert len(reply["generation_token_ids"]) == len(reply["generation_log_probs"]) == 7
        second = await server.chat([ASK, reply, NEXT], logprobs=True)
        seen = reply["prompt_token_ids"] + reply["generation_token_ids"]
        assert server.script.prompts[1][: len(seen)] == seen
        assert second["choices"][0]["message"]["prompt_token_ids"] == server.script.prompts[1]
        assert (first["history"], second["history"]) == ("fresh", "extended")
        plain = await server.chat([ASK, {"role": "assistant", "content": "twelve"}, NEXT])
        assert plain["history"] == "fresh"
        assert server.script.prompts[2] != server.script.prompts[1], "re-rendered history drifts"

    async def test_a_message_without_ids_after_one_with_them_survives(self, server: Server, smollm2: Any) -> None:
        reply = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        own = {"role": "assistant", "content": "fourteen"}
        await server.chat([ASK, reply, NEXT, own, {"role": "user", "content": "Lower."}])
        tail = smollm2.decode(server.script.prompts[1][len(reply["prompt_token_ids"]) :])
        for piece in ("twelve<|im_end|>", "Higher.<|im_end|>", "fourteen<|im_end|>", "Lower.<|im_end|>"):
            assert piece in tail

    @pytest.mark.parametrize("known", [True, False])
    async def test_edited_history_is_told_and_not_overridden(self, server: Server, smollm2: Any, known: bool) -> None:
        reply = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        if not known:
            server = Server(smollm2)
        edited = {"role": "user", "content": "Guess my name."}
        answer = await server.chat([edited, reply, NEXT])
        assert answer["history"] == "forked"
        assert "Guess my name." in smollm2.decode(server.script.prompts[-1])
        same = await server.chat([ASK, reply, NEXT])
        assert same["history"] == "extended"

    async def test_shapes_that_say_the_same_are_not_edits(self, server: Server) -> None:
        reply = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        ask = {"role": "user", "content": [{"type": "text", "text": "Guess my number."}], "metadata": {"a": 1}}
        reply = {**reply, "content": [{"type": "text", "text": "twelve"}], "reasoning": "hm", "tool_calls": None}
        assert (await server.chat([ask, reply, NEXT]))["history"] == "extended"

    async def test_streams_carry_the_same_ids(self, server: Server) -> None:
        whole = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        server.script.prompts.clear()
        body = {"messages": [ASK], "logprobs": True, "stream": True}
        text = (await server.post("/v1/chat/completions", body)).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        merged: dict[str, Any] = {}
        for event in events:
            merged |= event["choices"][0]["delta"]
        for key in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"):
            assert merged[key] == whole[key]
        assert text.rstrip().endswith("data: [DONE]")
        follow = await server.chat([ASK, {**merged, "content": "twelve"}, NEXT])
        assert follow["history"] == "extended"

    async def test_tokenize_gives_the_ids_of_the_matching_chat(self, server: Server) -> None:
        reply = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        for messages in ([ASK], [ASK, reply, NEXT]):
            tokens = (await server.post("/tokenize", {"messages": messages})).json()["tokens"]
            await server.chat(messages)
            assert tokens == server.script.prompts[-1]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"generation_token_ids": None}, "messages[1].generation_token_ids"),
            ({"prompt_token_ids": [1, -1]}, "messages[1].prompt_token_ids"),
            ({"prompt_token_ids": "12"}, "messages[1].prompt_token_ids"),
            ({"prompt_token_ids": [1.5]}, "messages[1].prompt_token_ids"),
            ({"generation_token_ids": [2**40]}, "messages[1].generation_token_ids"),
            ({"role": "user"}, "messages[1].prompt_token_ids"),
        ],
    )
    async def test_bad_ids_are_a_400_with_their_name(self, server: Server, change: dict[str, Any], param: str) -> None:
        reply = (await server.chat([ASK], logprobs=True))["choices"][0]["message"]
        answer = await server.post("/v1/chat/completions", {"messages": [ASK, {**reply, **change}, NEXT]})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"n": 2, "logprobs": True}, "n"),
            ({"logprobs": True, "top_logprobs": None}, "top_logprobs"),
            ({"messages": []}, "messages"),
            ({"messages": ["hi"]}, "messages"),
            ({"messages": [{"role": 3, "content": ""}]}, "messages[0].role"),
            ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
            ({"seed": []}, "seed"),
            ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
        ],
    )
    async def test_client_mistakes_name_their_field(self, server: Server, body: dict[str, Any], param: str) -> None:
        answer = await server.post("/v1/chat/completions", {"messages": [ASK], **body})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == param
        assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize("name", TEMPLATES)
async def test_every_template_keeps_tokens_through_tools_and_text(name: str, smollm2: Any) -> None:
    tokenizer = loaded.tokenizer("smollm2-135m-instruct")
    tokenizer.chat_template = (Path(__file__).parent / "templates" / f"{name}.jinja").read_text()
    server = Server(tokenizer, " <think>hm</think> call", "  twelve ")
    messages: list[dict[str, Any]] = [{"role": "user", "content": " Look first. "}]
    seen: list[int] = []
    for turn in range(6):
        reply = (await server.chat(messages, logprobs=True))["choices"][0]["message"]
        prompt = server.script.prompts[-1]
        assert prompt[: len(seen)] == seen
        seen = reply["prompt_token_ids"] + reply["generation_token_ids"]
        assert reply["prompt_token_ids"] == prompt
        if name in ("groups_tool_results", "other_stop") and turn % 2 == 0:
            calls = [
                {"id": f"c{i}", "type": "function", "function": {"name": "look", "arguments": "{}"}} for i in (1, 2)
            ]
            results = [{"role": "tool", "tool_call_id": f"c{i}", "content": f"result {turn}.{i}"} for i in (1, 2)]
            # The client's own parser found calls in the text: its message is not what the server answered.
            messages += [{**reply, "tool_calls": calls}, *results]
        else:
            messages += [reply, {"role": "user", "content": f" Turn {turn}. "}]
    text = tokenizer.decode(seen)
    assert all(text.count(f"Turn {turn}.") == 1 for turn in range(5) if f" Turn {turn}. " in str(messages))


class TestSessions:
    async def open(self, server: Server, **body: Any) -> str:
        answer = await server.post("/sessions", body)
        assert answer.status_code == 201
        assert answer.json()["base_url"] == f"/sessions/{answer.json()['id']}/v1"
        return str(answer.json()["id"])

    async def test_an_agent_without_tokens_makes_one_segment(self, server: Server) -> None:
        session = await self.open(server, metadata={"task": 7})
        base = f"/sessions/{session}"
        first = await server.chat([ASK], base)
        assert "prompt_token_ids" not in first["choices"][0]["message"]
        second = await server.chat([ASK, {"role": "assistant", "content": "twelve"}, NEXT], base)
        assert second["history"] == "extended"
        closed = (await server.client.delete(base)).json()
        (segment,) = closed["segments"]
        assert closed["metadata"] == {"task": 7}
        assert segment["token_ids"][: len(server.script.prompts[1])] == server.script.prompts[1]
        assert len({len(segment[key]) for key in ("token_ids", "loss_mask", "logprobs", "weight_versions")}) == 1
        for number, call in enumerate(segment["calls"], start=1):
            inside = range(call["start"], call["end"])
            assert all(segment["loss_mask"][i] and segment["weight_versions"][i] == number for i in inside)
        assert sum(segment["loss_mask"]) == sum(call["end"] - call["start"] for call in segment["calls"])
        gone = await server.client.get(base)
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "session_ended")

    async def test_the_header_does_what_the_path_does(self, server: Server) -> None:
        session = await self.open(server)
        await server.post("/v1/chat/completions", {"messages": [ASK]}, headers={"x-raygym-session": session})
        assert (await server.client.get(f"/sessions/{session}")).json()["calls"] == 1

    async def test_branches_are_segments_and_shared_tokens_train_once(self, server: Server) -> None:
        base = f"/sessions/{await self.open(server)}"
        await server.chat([ASK], base)
        said = {"role": "assistant", "content": "twelve"}
        one = await server.chat([ASK, said, NEXT], base)
        other = await server.chat([ASK, said, {"role": "user", "content": "Lower."}], base)
        edited = await server.chat([{"role": "user", "content": "Start again."}], base)
        assert [one["history"], other["history"], edited["history"]] == ["extended", "forked", "forked"]
        read = (await server.client.get(base)).json()
        assert (read["status"], read["forks"], len(read["segments"])) == ("open", 2, 3)
        trained = [sum(segment["loss_mask"]) for segment in read["segments"]]
        assert trained == [7 + 9, 7, 9]
        assert all(len(segment["calls"]) == count for segment, count in zip(read["segments"], [2, 2, 1], strict=True))

    async def test_parallel_calls_each_find_their_history(self, server: Server) -> None:
        base = f"/sessions/{await self.open(server)}"
        asks = [[{"role": "user", "content": f"Branch {i}."}] for i in range(8)]
        await asyncio.gather(*(server.chat(ask, base) for ask in asks))
        read = (await server.client.get(base)).json()
        assert len(read["segments"]) == 8

    async def test_completions_continue_by_their_tokens(self, server: Server) -> None:
        base = f"/sessions/{await self.open(server)}"
        body = {"prompt": [40, 41, 42], "return_token_ids": True}
        first = (await server.post(f"{base}/v1/completions", body)).json()["choices"][0]["token_ids"]
        await server.post(f"{base}/v1/completions", {"prompt": [40, 41, 42, *first, 50]})
        await server.post(f"{base}/v1/completions", {"prompt": [40, 41]})
        read = (await server.client.get(base)).json()
        assert [len(segment["calls"]) for segment in read["segments"]] == [2, 1]

    async def test_one_prompt_a_call(self, server: Server) -> None:
        base = f"/sessions/{await self.open(server)}"
        answer = await server.post(f"{base}/v1/completions", {"prompt": ["a", "b"]})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")

    @pytest.mark.parametrize(
        ("session", "status", "code"),
        [("nonsense", 404, "session_not_found"), ("here.x", 404, "session_not_found"), ("gone.x", 410, "session_lost")],
    )
    async def test_sessions_that_are_not_here(self, server: Server, session: str, status: int, code: str) -> None:
        answer = await server.post(f"/sessions/{session}/v1/chat/completions", {"messages": [ASK]})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)

    async def test_they_expire_and_are_bounded(self, smollm2: Any) -> None:
        now = [0.0]
        store = SessionStore("here", ttl_s=10, max_sessions=2, max_bytes=300, clock=lambda: now[0])
        server = Server(smollm2, store=store)
        first, second = await self.open(server), await self.open(server)
        assert first != second
        full = await server.post("/sessions", {})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "too_many_sessions")
        await server.chat([ASK], f"/sessions/{second}")
        while store.nbytes < 300:
            await server.chat([ASK], f"/sessions/{second}")
        refused = await server.post(f"/sessions/{second}/v1/chat/completions", {"messages": [ASK]})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "sessions_full")
        now[0] = 11
        expired = await server.client.get(f"/sessions/{second}")
        assert (expired.status_code, expired.json()["error"]["code"]) == (410, "session_ended")
        assert (len(store), store.nbytes) == (0, 0)
        await self.open(server)


class TestSampling:
    async def test_the_runs_sampling_fills_what_is_open(self, smollm2: Any) -> None:
        server = Server(smollm2, profiles={"train": SamplingProfile(0.7), "validation": SamplingProfile(0.0)})
        await server.chat([ASK])
        await server.chat([ASK], temperature=0.3)
        await server.post("/v1/chat/completions", {"messages": [ASK]}, headers={"x-raygym-profile": "validation"})
        session = (await server.post("/sessions", {"profile": "validation"})).json()["id"]
        await server.chat([ASK], f"/sessions/{session}")
        assert [sampling.temperature for sampling in server.script.samplings] == [0.7, 0.3, 0.0, 0.0]
        wrong = await server.post("/sessions", {"profile": "test"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "profile")

    @pytest.mark.parametrize("change", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}, {"presence_penalty": 1}])
    async def test_strict_sampling_refuses_what_differs(self, smollm2: Any, change: dict[str, Any]) -> None:
        server = Server(smollm2, profiles={"train": SamplingProfile(0.7, strict=True)})
        assert (
            await server.post("/v1/chat/completions", {"messages": [ASK], "temperature": 0.7, "top_p": 1})
        ).is_success
        answer = await server.post("/v1/chat/completions", {"messages": [ASK], **change})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(change))


class TestDoor:
    async def test_a_key_is_asked_for_everywhere_but_at_health(self, smollm2: Any) -> None:
        server = Server(smollm2, api_key="secret")
        assert (await server.client.get("/health")).is_success
        for path in ("/v1/models", "/sessions/x", "/metrics"):
            answer = await server.client.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        wrong = await server.client.get("/v1/models", headers={"authorization": "Bearer secre"})
        assert wrong.status_code == 401
        assert (await server.client.get("/v1/models", headers={"authorization": "Bearer secret"})).is_success

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_large_bodies_are_refused(self, smollm2: Any, chunked: bool) -> None:
        server = Server(smollm2, max_body_bytes=1000)
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()

        async def pieces() -> Any:
            for start in range(0, len(body), 100):
                yield body[start : start + 100]

        answer = await server.client.post("/v1/chat/completions", content=pieces() if chunked else body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"{",
            b"[]",
            b"\xff",
            b'"a"',
            b"[" * 100_000,
            b'{"n": NaN}',
            b'{"stop": "\\ud800", "messages": [{"role": "user"}]}',
        ],
    )
    async def test_bodies_that_are_no_object(self, server: Server, content: bytes) -> None:
        answer = await server.client.post("/v1/chat/completions", content=content)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"

    async def test_unknown_paths_and_methods_have_error_objects(self, server: Server) -> None:
        answers = [await server.client.put("/sessions/x"), await server.post("/scale_elastic_ep", {})]
        for answer in answers:
            assert answer.status_code in (404, 405)
            assert isinstance(answer.json()["error"]["message"], str)
        assert (await server.post("/v1/chat/nothing", {})).status_code == 404


class TestAWeightUpdate:
    async def test_calls_that_generate_wait_for_the_weights_and_others_do_not(self, server: Server) -> None:
        async with server.in_flight.updating("restart_turn", 5):
            waiting = asyncio.ensure_future(server.chat([ASK]))
            assert (await server.client.get("/health")).status_code == 200
            assert (await server.post("/tokenize", {"prompt": "abc"})).status_code == 200
            assert not waiting.done() and server.script.prompts == []
        assert (await waiting)["choices"][0]["message"]["content"] == "twelve"

    async def test_an_answer_that_has_begun_is_waited_for_and_never_begun_again(self, server: Server) -> None:
        begun, goes_on = asyncio.Event(), asyncio.Event()

        async def slow(*arguments: Any) -> Generation:
            begun.set()
            await goes_on.wait()
            return await server.script(*arguments)

        server.api._generate = slow
        asked = asyncio.ensure_future(server.chat([ASK]))
        await begun.wait()
        async with server.in_flight.updating("restart_turn", 5) as update:
            assert update.late == update.restarted == 0, "it is left to the engine"
        async with server.in_flight.updating("finish_turn", 0.01) as update:
            assert update.late == 1
        goes_on.set()
        assert (await asked)["choices"][0]["message"]["content"] == "twelve"
        assert len(server.script.prompts) == 1

    async def test_after_a_failed_update_calls_are_told_so(self, server: Server) -> None:
        with pytest.raises(OSError, match="disk"):
            async with server.in_flight.updating("keep", 5):
                raise OSError("disk")
        answer = await server.post("/v1/chat/completions", {"messages": [ASK]})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_lost" and "disk" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("error", "status"), [(SimulatedFault("injected"), 500), (EngineError("died"), 503)])
async def test_a_fault_of_the_engine_is_no_fault_of_the_client(smollm2: Any, error: Exception, status: int) -> None:
    server = Server(smollm2)

    async def fails(*_: Any) -> Any:
        raise error

    server.api._generate = fails
    answer = await server.post("/v1/chat/completions", {"messages": [ASK]})
    assert answer.status_code == status
    assert str(error) in answer.json()["error"]["message"]
