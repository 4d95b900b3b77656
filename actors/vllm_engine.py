"""The real engine. The only file that imports vLLM, since its entry points move between releases."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.exceptions import VLLMValidationError
from vllm.inputs import tokens_input
from vllm.renderers import merge_kwargs
from vllm.renderers.chat_utils import has_non_text_content
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

from raygym.api.call import Call, current_call
from raygym.chat import ChatRenderer, TemplateError
from raygym.engine import NO_LOGPROB, EngineError
from raygym.load_meter import LoadMeter
from raygym.types import EngineLoad, Generation, Int32Array, Message, Sampling

# Engine arguments that exactness rests on; the config refuses to override them.
_FIXED_ARGS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "worker_extension_cls": "raygym.actors.vllm_worker.WeightLoader",
}
_FINISH_REASONS = {"stop": "stop", "length": "length"}
_RENDERERS_KEPT = 64
_RECORDED_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")


class VLLMEngine:
    """An `Engine` over vLLM's AsyncLLM, in the event loop in which it was made."""

    def __init__(
        self,
        model_dir: str,
        served_name: str,
        stop_token_ids: Sequence[int],
        options: dict[str, Any],
        tool_parser: str = "",
    ) -> None:
        """Start vLLM; blocks for its whole start-up.

        Args:
            model_dir: the policy's files.
            served_name: what HTTP clients call the model.
            stop_token_ids: any of these ends a generation and is part of it.
            options: `policy.vllm`, passed to AsyncEngineArgs.
            tool_parser: vLLM's name of the parser that finds tool calls in chat answers; empty for none.

        Raises:
            EngineError: vLLM refused an option or could not start.
        """
        arguments = {**options, **_FIXED_ARGS, "model": model_dir, "served_model_name": [served_name]}
        known = AsyncEngineArgs.__dataclass_fields__
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise EngineError(f"policy.vllm.{unknown[0]}: vLLM has no such engine argument")
        self._arguments = arguments
        self._stop_token_ids = list(stop_token_ids)
        self._tool_parser = tool_parser
        self._meter = LoadMeter()
        reports: Any = lambda _config, _index: _StepReports(self._meter)  # noqa: E731
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments), stat_loggers=[reports])
        self.max_model_len = self._llm.model_config.max_model_len
        self.weight_version = 0
        self.weights_checksum = ""

    @property
    def first_token_at(self) -> float | None:
        """When vLLM's first step with a generated token was reported."""
        return self._meter.first_token_at

    async def set_version(self, version: int) -> None:
        """Label what is generated from now on. Call it only while nothing is scheduled."""
        await self._llm.update_weight_version(str(version))
        self.weight_version = version

    async def leave_nothing(self) -> None:
        """Whatever ends the engine's processes. Call it once they have started."""
        await self._llm.collective_rpc("raygym_unname_semaphores")

    async def generate(self, prompt_token_ids: Int32Array, sampling: Sampling, request_id: str) -> Generation:
        """One continuation with its logprobs (after temperature) and weight versions."""
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            stop_token_ids=self._stop_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=prompt_token_ids.tolist())
        final = None
        async for output in self._llm.generate(prompt, params, request_id):
            final = output
        if final is None or final.outputs[0].finish_reason not in _FINISH_REASONS:
            reason = final.outputs[0].finish_reason if final else "nothing"
            raise EngineError(f"vLLM ended request {request_id} with {reason!r}, expected one of stop, length")
        output = final.outputs[0]
        return _generation(output, self.weight_version)

    async def pause(self) -> None:
        """Freeze requests in flight and drop cached keys and values, which belong to the old weights."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)
        self._meter.paused(self._unfinished())

    async def resume(self) -> None:
        """Let frozen requests go on; they recompute their cache with the weights now loaded."""
        self._meter.resumed(self._unfinished())
        await self._llm.resume_generation()

    async def load_weights(self, path: str, version: int) -> str:
        """Apply one whole version while paused, on every vLLM worker.

        Raises:
            EngineError: vLLM's workers ended up with different weights. An error inside vLLM's reload is fatal to
                the engine, whose replica must then be replaced.
        """
        checksums: list[str] = await self._llm.collective_rpc("raygym_load_weights", args=(path,))
        if len(set(checksums)) != 1:
            raise EngineError(f"vLLM's workers loaded different weights: checksums {checksums}")
        self.weights_checksum = checksums[0]
        await self.set_version(version)
        return checksums[0]

    def load(self) -> EngineLoad:
        """As of vLLM's last step."""
        return self._meter.load(self._unfinished())

    def _unfinished(self) -> int:
        return int(self._llm.output_processor.get_num_unfinished_requests())

    async def check_health(self) -> None:
        """Raises when the engine core has died."""
        await self._llm.check_health()

    async def asgi_app(self) -> Any:
        """vLLM's own OpenAI server over this engine, exact in tokens: it looks for `raygym.api.call.current_call`."""
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args([])
        for key, value in self._arguments.items():
            setattr(args, key, value)
        # Resolved: a mapping of the user's has become an object, which the server reads.
        args.structured_outputs_config = self._llm.vllm_config.structured_outputs_config
        if self._tool_parser:
            args.enable_auto_tool_choice, args.tool_call_parser = True, self._tool_parser
        tasks = await self._llm.get_supported_tasks()
        app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(_RecordingClient(self, self._llm, self._stop_token_ids), app.state, args, tasks)
        # vLLM asks its own HTTP server to exit when the engine died; here Serve's health check replaces the replica.
        app.state.server = SimpleNamespace(should_exit=False)
        _TokenExactPrompts(app.state.online_renderer, self.max_model_len).install()
        return app

    def shutdown(self) -> None:
        """End the engine core and its workers."""
        self._llm.shutdown()


class _StepReports(StatLoggerBase):  # type: ignore[misc]
    """What vLLM tells its loggers after each step, for the meter; it is given to vLLM beside vLLM's own."""

    def __init__(self, meter: LoadMeter) -> None:
        self._meter = meter

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """One step; either of the two may be missing."""
        if iteration_stats is not None:
            self._meter.generated(iteration_stats.num_generation_tokens)
            self._meter.preempted(iteration_stats.num_preempted_reqs)
        if scheduler_stats is not None:
            self._meter.stepped(
                engine_idx,
                scheduler_stats.num_running_reqs,
                scheduler_stats.num_waiting_reqs,
                scheduler_stats.kv_cache_usage,
            )

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


class _RecordingClient:
    """vLLM's engine client as its OpenAI server uses it; what is generated for a call is noted on the call."""

    def __init__(self, engine: VLLMEngine, llm: AsyncLLM, stop_token_ids: Sequence[int]) -> None:
        self._engine = engine
        self._llm = llm
        self._stop_token_ids = list(stop_token_ids)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompt: Any, params: SamplingParams, request_id: str, **options: Any) -> AsyncIterator[Any]:
        """AsyncLLM.generate, with the end-of-turn tokens of the model's files and, for a call, with logprobs."""
        if not params.ignore_eos:
            # As on the handle path; vLLM itself knows only the tokenizer's eos when served defaults are off.
            params.update_from_generation_config({"eos_token_id": self._stop_token_ids})
        call = current_call.get()
        if call is not None and call.keeps_tokens and params.logprobs is None:
            params.logprobs = 0
        if call is not None:
            call.reached_engine = True
            call.constrained = params.structured_outputs is not None
            call.sampling = {name: getattr(params, name) for name in _RECORDED_SAMPLING}
        outputs: AsyncIterator[Any] = self._llm.generate(prompt, params, request_id, **options)
        if call is None:
            return outputs
        if call.prompt is None:
            call.text_prompt(np.asarray(prompt["prompt_token_ids"], np.int32))
        return self._recorded(call, params, outputs)

    async def _recorded(self, call: Call, params: SamplingParams, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        note = call.add if params.output_kind is RequestOutputKind.DELTA else call.replace
        async for output in outputs:
            completion = output.outputs[0]
            if completion.index == 0 and (completion.token_ids or completion.finish_reason):
                note(_generation(completion, self._engine.weight_version))
                if completion.weight_versions:
                    call.set_versions(_versions(completion.weight_versions))
            yield output


class _TokenExactPrompts:
    """Takes the place of vLLM's chat preprocessing: known tokens are spliced, and only new messages rendered."""

    def __init__(self, renderer: Any, max_model_len: int) -> None:
        self._renderer = renderer
        self._max_model_len = max_model_len
        self._original = renderer.preprocess_chat
        self._chats: OrderedDict[str, ChatRenderer] = OrderedDict()

    def install(self) -> None:
        """From now on chat, responses and tokenize calls of this renderer come here."""
        self._renderer.preprocess_chat = self.preprocess_chat

    async def preprocess_chat(
        self,
        request: Any,
        messages: list[Any],
        default_template: str | None,
        default_template_content_format: Any,
        default_template_kwargs: dict[str, Any] | None,
        tool_dicts: list[dict[str, Any]] | None = None,
        parser: Any = None,
        **options: Any,
    ) -> Any:
        """See OnlineRenderer.preprocess_chat."""
        call = current_call.get()
        arguments = (default_template, default_template_content_format, default_template_kwargs)
        unusual = (
            getattr(request, "continue_final_message", False)
            or not getattr(request, "add_generation_prompt", True)
            or getattr(request, "add_special_tokens", False)
            or getattr(request, "truncate_prompt_tokens", None) is not None
            or has_non_text_content(messages)
        )
        if call is None or unusual:
            return await self._original(request, messages, *arguments, tool_dicts, parser, **options)
        params = request.build_chat_params(default_template, default_template_content_format).with_defaults(
            merge_kwargs(default_template_kwargs, {"tools": tool_dicts, "tokenize": False})
        )
        plain = [message if isinstance(message, dict) else message.model_dump() for message in messages]
        try:
            chat = self._chat_renderer(params, plain, call)
            ids = call.chat_prompt(plain, chat, lambda: self._rendered(params, plain))
        except TemplateError as error:
            raise VLLMValidationError(str(error), parameter="messages") from error
        if len(ids) >= self._max_model_len and call.kind != "tokenize":
            raise VLLMValidationError(
                f"the maximum context length is {self._max_model_len} tokens; the messages take {len(ids)}, which "
                "leaves no room for an answer",
                parameter="messages",
            )
        if call.kind == "tokenize":
            return [], [tokens_input(ids.tolist())]
        # vLLM's own way to give it the IDs of a chat: tool choice, parsers and limits then work as for any other.
        request.kv_transfer_params = {**(request.kv_transfer_params or {}), "prompt_token_ids": ids.tolist()}
        return await self._original(request, plain, *arguments, tool_dicts, parser, **options)

    def _chat_renderer(self, params: Any, messages: Sequence[Message], call: Call) -> Any:
        def renderer() -> ChatRenderer:
            roles = {"user", "assistant"} | ({"system", "tool"} & {str(message.get("role")) for message in messages})
            kwargs = {key: value for key, value in params.chat_template_kwargs.items() if key != "tokenize"}
            key = json.dumps([params.chat_template, kwargs, sorted(roles)], sort_keys=True, default=str)
            if key not in self._chats:
                self._chats[key] = ChatRenderer(
                    self._renderer.renderer.get_tokenizer(),
                    roles=roles,
                    render=lambda conversation, generation: self._text(params, conversation, generation),
                )
            self._chats.move_to_end(key)
            while len(self._chats) > _RENDERERS_KEPT:
                self._chats.popitem(last=False)
            return self._chats[key]

        return renderer

    def _text(self, params: Any, messages: Sequence[Message], generation: bool) -> str:
        kwargs = {**params.chat_template_kwargs, "add_generation_prompt": generation, "continue_final_message": False}
        _, prompt = self._renderer.renderer.render_messages(
            list(messages), replace(params, chat_template_kwargs=kwargs)
        )
        return str(prompt["prompt"])

    def _rendered(self, params: Any, messages: Sequence[Message]) -> Int32Array:
        text = self._text(params, messages, generation=True)
        ids = self._renderer.renderer.get_tokenizer().encode(text, add_special_tokens=False)
        return np.asarray(ids, np.int32)


def _generation(output: Any, current_version: int) -> Generation:
    """Tokens, logprobs (NaN where vLLM gave none) and weight versions of one of vLLM's completion outputs."""
    token_ids = np.asarray(output.token_ids, np.int32)
    logprobs = np.full(len(token_ids), np.nan, np.float32)
    for index, (entry, token) in enumerate(zip(output.logprobs or (), output.token_ids, strict=False)):
        if entry[token].logprob > NO_LOGPROB:
            logprobs[index] = entry[token].logprob
    versions = np.full(len(token_ids), current_version, np.int32)
    if output.weight_versions:
        # The spans are of the whole answer, of which a streamed output is the end.
        all_versions = _versions(output.weight_versions)
        versions = all_versions[len(all_versions) - len(token_ids) :]
    return Generation(
        token_ids, logprobs, versions, _FINISH_REASONS.get(output.finish_reason, str(output.finish_reason))
    )


def _versions(spans: Sequence[Any]) -> Int32Array:
    """vLLM's spans of weight versions, token by token."""
    return np.repeat(
        np.asarray([int(span.version) for span in spans], np.int32), [span.end - span.start for span in spans]
    )
