"""The real engine. The only file that imports vLLM, since its entry points move between releases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from vllm import SamplingParams, TokensPrompt
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.sampling_params import RequestOutputKind
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from raygym.engine import EngineError
from raygym.types import Generation, Int32Array, Sampling
from raygym.weights import model_checksum, tensor_checksum

# Engine arguments that exactness rests on; the config refuses to override them.
_FIXED_ARGS: dict[str, Any] = {
    "logprobs_mode": "processed_logprobs",
    "generation_config": "vllm",
    "worker_extension_cls": "raygym.actors.vllm_engine.WeightLoader",
}
_FINISH_REASONS = {"stop": "stop", "length": "length"}


class WeightLoader:
    """Mixed into vLLM's worker: replaces the whole model by one safetensors file."""

    def raygym_load_weights(self, path: str) -> str:
        """Reload all weights, under every name that shares a tensor. Returns the checksum of what was loaded."""
        aliases = _tied_names(self.model_runner.get_model())  # type: ignore[attr-defined]
        checksums: dict[str, int] = {}
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())

            def stream() -> Iterator[tuple[str, torch.Tensor]]:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    tensor = file.get_tensor(name)
                    checksums[name] = tensor_checksum(tensor.contiguous().view(torch.uint8).numpy())
                    yield name, tensor
                    # The output head keeps a packed copy that is rebuilt only when it receives weights itself.
                    for alias in aliases.get(name, ()):
                        if alias not in names:
                            yield alias, tensor

            self.reload_weights(weights_iterator=stream())  # type: ignore[attr-defined]
        return model_checksum(checksums)


def _tied_names(model: torch.nn.Module) -> dict[str, list[str]]:
    names_by_tensor: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_tensor[id(parameter)].append(name)
    return {
        name: [other for other in names if other != name]
        for names in names_by_tensor.values()
        if len(names) > 1
        for name in names
    }


class VLLMEngine:
    """An `Engine` over vLLM's AsyncLLM, in the event loop in which it was made."""

    def __init__(
        self, model_dir: str, served_name: str, stop_token_ids: Sequence[int], options: dict[str, Any]
    ) -> None:
        """Start vLLM; blocks for its whole start-up.

        Args:
            model_dir: the policy's files.
            served_name: what HTTP clients call the model.
            stop_token_ids: any of these ends a generation and is part of it.
            options: `policy.vllm`, passed to AsyncEngineArgs.

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
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.max_model_len = self._llm.model_config.max_model_len
        self.weight_version = 0
        self.weights_checksum = ""

    async def set_version(self, version: int) -> None:
        """Label what is generated from now on. Call it only while nothing is scheduled."""
        await self._llm.update_weight_version(str(version))
        self.weight_version = version

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
        token_ids = np.asarray(output.token_ids, np.int32)
        logprobs = np.fromiter(
            (entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)),
            np.float32,
            len(token_ids),
        )
        return Generation(token_ids, logprobs, self._versions(output), _FINISH_REASONS[output.finish_reason])

    def _versions(self, output: Any) -> Int32Array:
        versions = np.full(len(output.token_ids), self.weight_version, np.int32)
        for span in output.weight_versions or ():
            versions[span.start : span.end] = int(span.version)
        return versions

    async def pause(self) -> None:
        """Freeze requests in flight and drop cached keys and values, which belong to the old weights."""
        await self._llm.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Let frozen requests go on; they recompute their cache with the weights now loaded."""
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

    async def check_health(self) -> None:
        """Raises when the engine core has died."""
        await self._llm.check_health()

    async def asgi_app(self) -> Any:
        """vLLM's own OpenAI server over this engine."""
        parser = make_arg_parser(FlexibleArgumentParser())
        args = parser.parse_args([])
        for key, value in self._arguments.items():
            setattr(args, key, value)
        tasks = await self._llm.get_supported_tasks()
        app = build_app(args, tasks, self._llm.model_config)
        await init_app_state(self._llm, app.state, args, tasks)
        return app

    def shutdown(self) -> None:
        """End the engine core and its workers."""
        self._llm.shutdown()
