"""The OpenAI API of the simulated engine: enough to try agents, sessions and load against it. No model is behind it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from raygym.api.call import Call, current_call
from raygym.api.errors import ApiError
from raygym.chat import ChatRenderer, TemplateError
from raygym.engine import EngineError
from raygym.simulated_faults import SimulatedFault
from raygym.types import Generation, Int32Array, Sampling

Generate = Callable[[Int32Array, Sampling, str], Awaitable[Generation]]


class SimulatedApi:
    """Chat, completions, tokenize, models and health over a simulated `generate`."""

    def __init__(self, generate: Generate, tokenizer: Any, model: str, max_model_len: int) -> None:
        self._generate = generate
        self._tokenizer = tokenizer
        self._model = model
        self._max_model_len = max_model_len
        self._renderers: dict[str, ChatRenderer] = {}

    def app(self) -> Starlette:
        """The ASGI application; it stands behind an `ApiFront`."""
        return Starlette(
            routes=[
                Route("/health", self._health),
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._completion, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/detokenize", self._detokenize, methods=["POST"]),
            ],
            exception_handlers={ApiError: _api_error},
        )

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok", "engine": "simulated"})

    async def _models(self, _: Request) -> Response:
        model = {"id": self._model, "object": "model", "owned_by": "raygym (simulated)", "created": 0}
        return JSONResponse({"object": "list", "data": [model | {"max_model_len": self._max_model_len}]})

    async def _chat(self, request: Request) -> Response:
        body, call = await self._body(request)
        prompt = self._prompt(body, call)
        generation, text = await self._answer(body, call, prompt)
        base = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self._model}
        if body.get("stream") is True:
            return _stream(base | {"object": "chat.completion.chunk"}, text, generation.finish_reason)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": generation.finish_reason}
        choice["logprobs"] = {"content": self._logprobs(body, generation)} if body.get("logprobs") else None
        usage = _usage(len(prompt), len(generation.token_ids))
        return JSONResponse(base | {"object": "chat.completion", "choices": [choice], "usage": usage})

    async def _completion(self, request: Request) -> Response:
        body, call = await self._body(request)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            prompt = self._tokenizer.encode(prompt, add_special_tokens=False)
        if not _token_ids(prompt) or not prompt:
            raise ApiError(400, "prompt: expected text or a list of token IDs", "prompt")
        ids = np.asarray(prompt, np.int32)
        call.text_prompt(ids)
        generation, text = await self._answer(body, call, ids)
        choice = {"index": 0, "text": text, "finish_reason": generation.finish_reason, "logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = generation.token_ids.tolist()
        answer = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        answer |= {"model": self._model, "choices": [choice], "usage": _usage(len(ids), len(generation.token_ids))}
        return JSONResponse(answer)

    async def _tokenize(self, request: Request) -> Response:
        body, call = await self._body(request)
        if "messages" in body:
            ids = self._prompt(body, call).tolist()
        elif isinstance(body.get("prompt"), str):
            ids = self._tokenizer.encode(body["prompt"], add_special_tokens=False)
        else:
            raise ApiError(400, "prompt: expected text, or messages", "prompt")
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self._max_model_len})

    async def _detokenize(self, request: Request) -> Response:
        tokens = (await request.json()).get("tokens")
        if not _token_ids(tokens):
            raise ApiError(400, "tokens: expected a list of token IDs", "tokens")
        return JSONResponse({"prompt": self._tokenizer.decode(tokens)})

    async def _body(self, request: Request) -> tuple[dict[str, Any], Call]:
        call = current_call.get()
        assert call is not None, "the simulated API stands behind an ApiFront"
        body: dict[str, Any] = await request.json()
        if body.get("model") not in (None, self._model):
            problem = f"model: {body['model']!r} is not served here, {self._model!r} is"
            raise ApiError(404, problem, "model", "model_not_found")
        return body, call

    def _prompt(self, body: dict[str, Any], call: Call) -> Int32Array:
        messages, tools = body["messages"], body.get("tools") or []
        roles = {"user", "assistant"} | ({"system", "tool"} & {message["role"] for message in messages})

        def renderer() -> ChatRenderer:
            key = json.dumps([tools, sorted(roles)], sort_keys=True)
            if key not in self._renderers:
                self._renderers[key] = ChatRenderer(self._tokenizer, tools, roles)
            return self._renderers[key]

        try:
            prompt = call.chat_prompt(messages, renderer, lambda: renderer().render_initial(messages))
        except TemplateError as error:
            raise ApiError(400, f"messages: {error}", "messages") from error
        if len(prompt) >= self._max_model_len and call.kind != "tokenize":
            problem = f"the maximum context length is {self._max_model_len} tokens; the messages take {len(prompt)}"
            raise ApiError(400, f"messages: {problem}", "messages", "context_length_exceeded")
        return prompt

    async def _answer(self, body: dict[str, Any], call: Call, prompt: Int32Array) -> tuple[Generation, str]:
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or 16
        temperature, seed = body.get("temperature", 1.0), body.get("seed")
        if type(asked) is not int or asked < 1:
            raise ApiError(400, f"max_tokens: expected an integer of at least 1, found {asked!r}", "max_tokens")
        if not isinstance(temperature, int | float) or temperature < 0:
            raise ApiError(400, f"temperature: expected a number of at least 0, found {temperature!r}", "temperature")
        if seed is not None and type(seed) is not int:
            raise ApiError(400, f"seed: expected an integer, found {seed!r}", "seed")
        room = max(1, min(asked, self._max_model_len - len(prompt)))
        call.reached_engine = True
        try:
            generation = await self._generate(prompt, Sampling(float(temperature), room, seed), uuid.uuid4().hex)
        except SimulatedFault as error:
            raise ApiError(500, str(error), code="engine_error") from error
        except EngineError as error:
            raise ApiError(503, str(error), code="engine_lost") from error
        call.replace(generation)
        return generation, str(self._tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True))

    def _logprobs(self, body: dict[str, Any], generation: Generation) -> list[dict[str, Any]]:
        as_ids = bool(body.get("return_tokens_as_token_ids"))
        found: list[dict[str, Any]] = []
        for token, logprob in zip(generation.token_ids.tolist(), generation.logprobs.tolist(), strict=True):
            name = f"token_id:{token}" if as_ids else self._tokenizer.decode([token])
            found.append({"token": name, "logprob": logprob, "bytes": list(name.encode()), "top_logprobs": []})
        return found


def _token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**31 for item in value)


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _stream(base: dict[str, Any], text: str, finish_reason: str) -> Response:
    async def events() -> AsyncIterator[str]:
        for delta, reason in (({"role": "assistant", "content": text}, None), ({}, finish_reason)):
            yield f"data: {json.dumps(base | {'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.body(), error.status, media_type="application/json")
