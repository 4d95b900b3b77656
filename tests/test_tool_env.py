"""Tools in environments: schemas from functions, arguments checked, calls run, and every trouble said in words."""

from __future__ import annotations

import asyncio
import enum
import json
import re
import threading
import time
import types
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from raygym import End, ToolEnv, tool
from raygym.check_env import check_env
from raygym.env import EnvError, env_tools, parse_step
from raygym.env_host import EnvHost
from raygym.tools import Tool, ToolError, as_text
from raygym.types import EpisodeFailure, FailureKind, Task


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    sku: str
    count: int = 1


def order(
    items: list[Item],
    colour: Colour,
    speed: Literal["slow", "fast"] = "slow",
    note: str | None = None,
    copy: Annotated[int, Field(ge=0, description="How many copies.")] = 0,
) -> str:
    """Order things.

    They arrive later.

    Args:
        items: what to order.
        colour: of all of them.
        note: for the
            driver.
    """
    return f"{[(item.sku, item.count) for item in items]} {colour.value} {speed} {note} {copy}"


def call(name: str, arguments: Any = "{}", call_id: str = "call_0") -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": text}}


def calling(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


class Desk(ToolEnv):
    """Tools of every kind: plain, asynchronous, slow, failing, ending."""

    functions = (order,)

    def __init__(self) -> None:
        self.count = 0
        self.threads: set[int] = set()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return "Use the tools.", {}

    @tool
    def add(self, n: int = 1) -> dict[str, int]:
        """Count up."""
        self.threads.add(threading.get_ident())
        self.count += n
        return {"count": self.count}

    @tool
    async def later(self, seconds: float, text: str) -> str:
        """Say something after a while."""
        await asyncio.sleep(seconds)
        return text

    @tool
    def block(self, seconds: float) -> None:
        """Block a thread."""
        time.sleep(seconds)

    @tool(timeout_s=0.05)
    def block_briefly(self, seconds: float) -> None:
        """Block a thread, but not for long."""
        time.sleep(seconds)

    @tool
    def fail(self, kind: Literal["key", "exit", "stop", "deep"]) -> None:
        """Go wrong."""
        if kind == "deep":
            self.fail(kind)
        raise {"key": KeyError("lamp"), "exit": SystemExit(3), "stop": StopIteration("over")}[kind]

    @tool
    async def fail_later(self, kind: Literal["value", "exit", "cancel"]) -> None:
        """Go wrong on the event loop."""
        raise {"value": ValueError("no"), "exit": SystemExit(3), "cancel": asyncio.CancelledError()}[kind]

    @tool
    def hand_in(self, reward: float) -> End:
        """Finish."""
        return End(reward, "Thanks.", metrics={"handed_in": 1.0})

    def answer(self, text: str) -> Any:
        if text == "crash":
            raise RuntimeError("a bug of the environment")
        if text == "end":
            return End(0.25, "Bye.", truncated=True, metrics={"polite": 1})
        return float(text) if text.replace(".", "").isdigit() else "Say a number."


async def results(env: ToolEnv, *calls: dict[str, Any]) -> list[str]:
    step = parse_step(await env.step(calling(*calls)))
    assert (step.reward, step.terminated, step.truncated) == (0.0, False, False)
    for made, message in zip(calls, step.messages, strict=True):
        assert {key: message[key] for key in ("role", "tool_call_id", "name")} == {
            "role": "tool",
            "tool_call_id": made["id"],
            "name": made["function"]["name"],
        }
    return [message["content"] for message in step.messages]


class TestSchema:
    def test_of_a_function(self):
        schema = Tool.of(order).schema
        assert schema["type"] == "function"
        function = schema["function"]
        assert (function["name"], function["description"]) == ("order", "Order things.\n\nThey arrive later.")
        parameters = function["parameters"]
        assert parameters["required"] == ["items", "colour"]
        assert parameters["additionalProperties"] is False
        assert list(parameters["properties"]) == ["items", "colour", "speed", "note", "copy"]
        assert parameters["properties"]["speed"] == {"enum": ["slow", "fast"], "default": "slow", "type": "string"}
        assert parameters["properties"]["note"]["description"] == "for the\ndriver."
        assert parameters["properties"]["copy"] == {
            "default": 0,
            "description": "How many copies.",
            "minimum": 0,
            "type": "integer",
        }
        assert parameters["$defs"]["Colour"]["enum"] == ["red", "blue"]
        json.dumps(schema)

    def test_of_methods(self):
        tools = {schema["function"]["name"]: schema["function"]["parameters"] for schema in env_tools(Desk())}
        assert list(tools) == [
            "add",
            "later",
            "block",
            "block_briefly",
            "fail",
            "fail_later",
            "hand_in",
            "order",
        ]
        assert tools["add"]["properties"] == {"n": {"type": "integer", "default": 1}}

    def test_inheritance(self):
        class Wider(Desk):
            functions = ()

            @tool
            def add(self, n: int) -> int:
                """Count down."""
                return -n

            @tool
            def more(self) -> None:
                """Do nothing."""

        names = [schema["function"]["name"] for schema in Wider().tools]
        assert names[0] == "add" and names[-1] == "more" and "order" not in names
        assert Wider().tools[0]["function"]["description"] == "Count down."

    def test_refuses(self):
        def undocumented(x: int) -> int:
            return x

        def untyped(x) -> int:
            """Something."""
            return x

        def starred(*x: int) -> int:
            """Something."""
            return x[0]

        def strange(x: threading.Lock) -> None:
            """Something."""

        for function, complaint in (
            (undocumented, "no docstring"),
            (untyped, "x has no type hint"),
            (starred, "by name"),
            (strange, "no JSON schema"),
        ):
            with pytest.raises(EnvError, match=f"tool {function.__name__}: .*{complaint}"):
                Tool.of(function)

    def test_two_of_one_name(self):
        env = Desk()
        env.functions = (order, order)
        with pytest.raises(EnvError, match="two tools named 'order'"):
            _ = env.tools


class TestArguments:
    def test_converted(self):
        arguments = Tool.of(order).arguments('{"items": [{"sku": "a"}], "colour": "blue", "copy": "2"}')
        assert arguments == {"items": [Item(sku="a")], "colour": Colour.BLUE, "copy": 2}

    @pytest.mark.parametrize("text", ["", "  ", "{}", "{ }"])
    def test_none(self, text):
        assert Tool.of(Desk().add).arguments(text) == {}

    @pytest.mark.parametrize(
        ("text", "complaints"),
        [
            ('{"items": [', ["not valid JSON", "expected an object for order(items: list["]),
            ("[1, 2]", ["are [1,2]", "expected a JSON object"]),
            ("NaN", ["not valid JSON"]),
            ('{"colour": "red"}', ["items is missing"]),
            ('{"items": [], "colour": "green"}', ["colour: Input should be 'red' or 'blue'", 'got "green"']),
            ('{"items": [{"sku": "a", "count": "x"}], "colour": "red"}', ["items.0.count: ", "valid integer"]),
            ('{"items": [], "colour": "red", "color": "red"}', ["color is no argument of it", "colour: "]),
            ('{"items": [], "colour": "red", "copy": -1}', ["copy: ", "greater than or equal to 0", "got -1"]),
            ('{"items": "' + "a" * 999 + '", "colour": "red"}', ["valid list", "aaa..."]),
            ("[" * 100_000, ["not valid JSON"]),
            ('{"items": [], "colour": "\\ud800"}', ["not valid JSON"]),
            ('{"items": [], "colour": "red", "copy": ' + "9" * 5000 + "}", ["wrong arguments|not valid"]),
        ],
    )
    def test_wrong(self, text, complaints):
        with pytest.raises(ToolError) as caught:
            Tool.of(order).arguments(text)
        for complaint in complaints:
            assert any(alternative in str(caught.value) for alternative in complaint.split("|")), caught.value
        assert len(str(caught.value)) < 700


def test_results_as_text():
    assert [as_text(value) for value in ("a\nb", None, 3, True, [1, None], {"a": 1.5})] == [
        "a\nb",
        "done",
        "3",
        "true",
        "[1,null]",
        '{"a":1.5}',
    ]
    assert as_text(Item(sku="é")) == '{"sku":"é","count":1}'
    assert as_text("\ud800") == "?"
    assert as_text(float("nan")) == "NaN"
    assert "object" in as_text(object())


class TestCalls:
    async def test_results_in_the_order_of_the_calls(self):
        env, ended = Desk(), [asyncio.Event() for _ in range(4)]
        ended[3].set()

        async def in_turn(number: int) -> str:
            """End after the call that comes next."""
            await asyncio.wait_for(ended[number + 1].wait(), 20)
            ended[number].set()
            return f"t{number}"

        env.functions = (in_turn,)
        made = [call("in_turn", {"number": i}, f"call_{i}") for i in range(3)]
        assert await results(env, *made) == ["t0", "t1", "t2"]

    async def test_blocking_tools_run_beside_each_other_and_the_loop(self):
        env, goes_on = Desk(), threading.Event()
        loop = asyncio.get_running_loop()
        # Once all of them are in it, the event loop lets them go on.
        together = threading.Barrier(8, action=lambda: loop.call_soon_threadsafe(goes_on.set))

        def meet() -> bool:
            """Block a thread until the others are there as well."""
            together.wait(20)
            return goes_on.wait(20)

        env.functions = (meet,)
        assert await results(env, *(call("meet", {}, f"call_{i}") for i in range(8))) == ["true"] * 8

    async def test_one_after_the_other(self):
        env = Desk()
        env.parallel = False
        first = call("later", {"seconds": 0.05, "text": "slow"}, "a")
        started = time.monotonic()
        assert await results(env, first, call("add", "", "b"), first | {"id": "c"}) == ["slow", '{"count":1}', "slow"]
        assert time.monotonic() - started >= 0.1

    async def test_plain_tools_run_in_no_thread_of_the_loop(self):
        env = Desk()
        await results(env, call("add"), call("add", {"n": 4}, "call_1"))
        assert env.count == 5
        assert threading.get_ident() not in env.threads

    @pytest.mark.parametrize(
        ("made", "text"),
        [
            (call("subtract"), "Error: there is no tool 'subtract'; expected one of add, later, "),
            (call("add", {"n": "many"}), "Error: wrong arguments for add: n: "),
            (call("add", "{"), "Error: the arguments of add are not valid JSON"),
            (call("fail", {"kind": "key"}), "Error: fail raised KeyError: 'lamp'"),
            (call("fail", {"kind": "exit"}), "Error: fail raised RuntimeError: SystemExit: 3"),
            (call("fail", {"kind": "stop"}), "Error: fail raised RuntimeError: StopIteration: over"),
            (call("fail", {"kind": "deep"}), "Error: fail raised RecursionError"),
            (call("fail_later", {"kind": "value"}), "Error: fail_later raised ValueError: no"),
            (call("fail_later", {"kind": "exit"}), "Error: fail_later raised RuntimeError: SystemExit: 3"),
            (call("fail_later", {"kind": "cancel"}), "Error: fail_later raised RuntimeError: "),
            (call("block_briefly", {"seconds": 5}), "Error: block_briefly took longer than 0.05 s"),
            (call("step", {}), "Error: there is no tool 'step'"),
        ],
    )
    async def test_trouble_is_text_and_spares_the_other_calls(self, made, text):
        failed, counted = await results(Desk(), made, call("add", {"n": 7}, "call_1"))
        assert failed.startswith(text), failed
        assert counted == '{"count":7}'

    async def test_deadline_of_the_environment(self):
        env = Desk()
        env.tool_timeout_s = 0.03
        assert await results(env, call("later", {"seconds": 5, "text": ""})) == ["Error: later took longer than 0.03 s"]

    async def test_cancelling_the_step_cancels_its_tools(self):
        env, begun, ended = Desk(), [], []

        async def wait() -> None:
            """Wait for ever."""
            begun.append(True)
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        env.functions = (wait,)
        step = asyncio.ensure_future(env.step(calling(call("wait"), call("wait"))))
        async with asyncio.timeout(60):
            while len(begun) < 2:
                await asyncio.sleep(0)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        await asyncio.sleep(0)
        assert ended == [True, True]


class TestEnd:
    async def step(self, text: str) -> tuple[Any, ...]:
        return await Desk().step({"role": "assistant", "content": text})

    async def test_answers(self):
        assert await self.step("0.5") == (None, 0.5, True, False, {"metrics": {}})
        assert await self.step("what?") == ("Say a number.", 0.0, False, False, {})
        assert await self.step("end") == ("Bye.", 0.25, False, True, {"metrics": {"polite": 1}})

    async def test_by_a_tool(self):
        env = Desk()
        step = parse_step(await env.step(calling(call("add"), call("hand_in", {"reward": 0.75}, "call_1"))))
        assert [message["content"] for message in step.messages] == ['{"count":1}', "Thanks."]
        assert (step.reward, step.terminated, step.metrics) == (0.75, True, {"handed_in": 1.0})

    async def test_after_calls(self):
        class Impatient(Desk):
            async def after_calls(self) -> End | None:
                return End(0.1, truncated=True) if self.count >= 2 else None

        env = Impatient()
        assert await results(env, call("add")) == ['{"count":1}']
        step = parse_step(await env.step(calling(call("add"))))
        assert (step.reward, step.terminated, step.truncated) == (0.1, False, True)

    async def test_a_bug_in_answer_is_a_failure_and_no_text(self):
        host = EnvHost(Desk)
        await host.reset(Task(0, "desk", 0), 5.0)
        with pytest.raises(EpisodeFailure, match="a bug of the environment") as caught:
            await host.step({"role": "assistant", "content": "crash"}, 5.0)
        assert caught.value.kind is FailureKind.ENV_ERROR
        await host.close()

    async def test_no_answer_hook(self):
        with pytest.raises(NotImplementedError, match="ToolEnv must implement answer"):
            await ToolEnv().step({"role": "assistant", "content": ""})


async def test_the_environment_of_the_guide():
    guide = (Path(__file__).parent.parent / "docs/guides/first-environment.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```python\n# my_shop\.py\n(.*?)```", guide, flags=re.DOTALL)
    assert len(text.strip().splitlines()) <= 25
    module = types.ModuleType("my_shop")
    exec(text, vars(module))
    env = module.Shop()
    env.reset(seed=3)
    assert [schema["function"]["name"] for schema in env.tools] == ["count"]
    lamps, chairs, none = await results(
        env, *(call("count", {"item": item}, f"call_{item}") for item in ("lamp", "chair", "sofa"))
    )
    assert none == "Error: count raised KeyError: 'sofa'"
    for text, reward in ((int(lamps) + int(chairs), 1.0), (lamps, 0.0)):
        assert parse_step(await env.step({"role": "assistant", "content": f" {text}\n"})).reward == reward


def test_check_env():
    assert check_env(Desk()) == []
