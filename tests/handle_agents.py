"""Random conversations over the Serve handle, as an EnvRunner has them. Run by test_openai_server; prints JSON records.

python handle_agents.py APP MODEL_DIR CONVERSATIONS
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

import numpy as np
import ray
from fuzz_bodies import FREE_LOOK
from ray import serve
from transformers import AutoTokenizer

from raygym.chat import ChatRenderer
from raygym.types import Message, Sampling


async def play(handle: Any, renderer: ChatRenderer, seed: int) -> dict[str, Any]:
    """One conversation of several turns, in which answers are followed by tool results or by the user."""
    pick = random.Random(seed)
    mask: list[bool] = []
    logprobs: list[float] = []
    prompt = renderer.render_initial([{"role": "user", "content": f"Question {seed}, please?"}])
    for turn in range(pick.randint(2, 5)):
        sampling = Sampling(temperature=1.0, max_tokens=pick.choice([1, 6, 12]), seed=pick.randrange(2**31))
        answer = await handle.options(session_id=f"s{seed}").generate.remote(prompt, sampling, f"s{seed}")
        new = len(prompt) - len(mask)
        mask += [False] * new + [True] * len(answer.token_ids)
        logprobs += [0.0] * new + answer.logprobs.tolist()
        seen = np.concatenate([prompt, answer.token_ids])
        tool: Message = {"role": "tool", "tool_call_id": "call00000", "content": f"result  {turn} "}
        user: Message = {"role": "user", "content": f"Go on,\n\nplease {turn}"}
        prompt = renderer.extend(seen, pick.choice([[tool], [tool, tool], [user]]))
        assert prompt[: len(seen)].tolist() == seen.tolist()
    return {"ids": seen.tolist(), "mask": mask, "logprobs": logprobs}


async def main() -> None:
    """Play them all, sixteen at once."""
    app, model_dir, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    ray.init(log_to_driver=False, logging_level="ERROR")
    handle = serve.get_deployment_handle("PolicyServer", app)
    renderer = ChatRenderer(AutoTokenizer.from_pretrained(model_dir), [FREE_LOOK])
    limit = asyncio.Semaphore(16)

    async def one(seed: int) -> dict[str, Any]:
        async with limit:
            return await play(handle, renderer, seed)

    fixed = await handle.generate.remote(np.arange(50, 80, dtype=np.int32), Sampling(1.0, 8, seed=11), "fixed")
    played = await asyncio.gather(*(one(seed) for seed in range(count)))
    print(json.dumps({"fixed": fixed.token_ids.tolist(), "played": played}))


if __name__ == "__main__":
    asyncio.run(main())
