"""Write a Python function; it is run against hidden tests in a sandbox.

Data: eight families of tasks (`raygym.envs.code_tasks`) with parameters and tests drawn by the task's seed. A fifth of
the tasks, chosen by a hash of family and parameters, is held out for validation. The question shows two examples.

Tool: `run_python(code)` runs a whole program and shows what it prints, to try things out (up to `max_runs` times).

Reward, given with the answer (a message without calls): the share of `tests` hidden tests that the function passes, 0
to 1. The answer is the last fenced code block of the message, or all of it where there is none. Only results are taken
out of the process that runs the policy's code: what is expected never enters it. What a limit cuts off has failed.

Limits of a run: `cpu_s` of processor time, `wall_s` of wall time, `memory_mib` of memory, 64 KiB of output, 1 MiB of
files, no network, no other process; `raygym.sandbox` says how they are held and what is not defended. At most two runs
for each processor go on at once, others wait: `rollout.step_timeout_s` must leave time for that.

Scores, averaged over 400 seeds of each split, the first over 100 (train / validation): a right program 1.0 / 1.0; one
that returns its argument 0.055 / 0.045; one that returns a constant that suits the family (0, "", [], "0" or 12)
0.071 / 0.076; a program that does not end, text that is no program, and silence 0 / 0. (`tests/test_envs_tools.py`
checks them on fewer seeds.)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from raygym.envs.code_tasks import FAMILIES, CodeTask, agrees, draw_task, drawing
from raygym.envs.generated import chosen, in_split
from raygym.sandbox.run import Limits, run_program
from raygym.tool_env import End, ToolEnv, tool

_EXAMPLES = 2
_SHOWN = 2000
"""Characters of a program's output that the policy sees."""
_FENCED = re.compile(r"```[ \t]*(?:[\w+.-]*)[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


class PythonCode(ToolEnv):
    """One function, any number of tries with the tool, one answer."""

    def __init__(
        self,
        families: Sequence[str] = tuple(FAMILIES),
        tests: int = 10,
        max_runs: int = 4,
        cpu_s: int = 1,
        wall_s: float = 5.0,
        memory_mib: int = 256,
    ) -> None:
        """Draw tasks from `families`; `rollout.max_turns` should be larger than `max_runs` by one.

        Raises:
            ValueError: a family is unknown, or a number is out of range.
        """
        for name, value, low, high in (("tests", tests, 1, 100), ("max_runs", max_runs, 0, 1000)):
            if not low <= value <= high:
                raise ValueError(f"{name}: {value}; expected {low} to {high}")
        self._families, self._tests, self._max_runs = chosen("families", families, FAMILIES), tests, max_runs
        self._limits = Limits(wall_s=wall_s, cpu_s=cpu_s, memory_mib=memory_mib)
        self._task: CodeTask | None = None
        self._runs = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Ask for one function of the split."""
        super().reset(seed=seed)
        family = self._families[int(self.np_random.integers(len(self._families)))]
        task = None
        while task is None:
            parameters = FAMILIES[family].parameters(drawing(self.np_random))
            if in_split(options, family, *parameters.values()):
                task = draw_task(family, parameters, self.np_random, _EXAMPLES + self._tests)
        self._task = task
        self._runs = 0
        examples = "\n".join(
            f"{task.function}({', '.join(map(repr, arguments))}) == {result!r}"
            for arguments, result in task.tests[:_EXAMPLES]
        )
        question = (
            f"{task.text} For example:\n{examples}\nUse the standard library only. Answer with the whole function in "
            "one code block."
        )
        return question, {"family": family, "parameters": dict(parameters)}

    @tool
    async def run_python(self, code: str) -> str:
        """Run a Python program in an empty directory, without network, and show what it prints.

        Args:
            code: The whole program. Nothing is kept from one run to the next.
        """
        if self._runs >= self._max_runs:
            return f"Error: all {self._max_runs} runs are used up; answer now"
        self._runs += 1
        outcome = await run_program(code, limits=self._limits)
        cut = outcome.output if len(outcome.output) <= _SHOWN else outcome.output[:_SHOWN] + "..."
        ended = outcome.describe()
        return "\n".join(part for part in (cut.rstrip("\n"), f"[{ended}]" if ended else "") if part) or "[no output]"

    async def answer(self, text: str) -> End:
        """Grade the program."""
        assert self._task is not None, "reset comes first"
        hidden = self._task.tests[_EXAMPLES:]
        calls = [(self._task.function, arguments) for arguments, _ in hidden]
        outcome = await run_program(program_of(text), calls, self._limits, name="answer")
        passed = sum(
            "value" in result and agrees(result["value"], expected)
            for result, (_, expected) in zip(outcome.results, hidden, strict=False)
        )
        return End(
            passed / len(hidden),
            metrics={
                "solved": float(passed == len(hidden)),
                "ran": float(bool(outcome.results)),
                "cut_off": float(outcome.ended != "exit"),
                "runs": float(self._runs),
            },
        )


def program_of(text: str) -> str:
    """The last fenced code block of a message, closed or cut off; all of the message where there is none."""
    blocks = _FENCED.findall(text)
    return str(blocks[-1]) if blocks else text
