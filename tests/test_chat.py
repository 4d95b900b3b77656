"""Chat rendering: history's tokens are never touched, and only what is new is rendered.

The cases of the token-ID contract are played with two real tokenizers: SmolLM2's and the byte-level one of `tiny`.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import loaded
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygym.chat import ChatRenderer, TemplateError
from raygym.types import Int32Array, Message

END = 2
"""<|im_end|> of both tokenizers."""
END_OF_TEXT = 0
"""<|endoftext|> of both: a stop token that is not the template's end of turn."""
USER: Message = {"role": "user", "content": "Guess my number from 3 to 17."}
NEXT: Message = {"role": "user", "content": "12 is too low. Answer with one number from 13 to 17."}
TOOL_SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}

# Like the templates of reasoning models: what an earlier turn thought is not shown again.
STRIPS_REASONING = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{{- (m.content.split('</think>')[-1]) if not loop.last else m.content }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.fixture(scope="module", params=["tiny", "smollm2-135m-instruct"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return loaded.tokenizer(request.param)


@pytest.fixture(scope="module")
def renderer(tokenizer: Any) -> ChatRenderer:
    return ChatRenderer(tokenizer)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return loaded.tokenizer("tiny")


def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def after(prompt: Int32Array, generated: list[int]) -> Int32Array:
    return np.concatenate([prompt, np.asarray(generated, np.int32)])


def suffix_text(*messages: Message) -> str:
    """ChatML's text between an assistant's content and the next one's."""
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return f"<|im_end|>\n{turns}<|im_start|>assistant\n"


class TestContractCases:
    def check(self, tokenizer: Any, renderer: ChatRenderer, generated: list[int], *, closed: bool) -> Int32Array:
        """The next prompt is history, the end of turn exactly once, the newline once, the new message."""
        history = after(renderer.render_initial([USER]), generated)
        extended = renderer.extend(history, [NEXT])
        assert extended.dtype == np.int32
        assert extended[: len(history)].tolist() == history.tolist()
        suffix = ids(tokenizer, suffix_text(NEXT))
        assert extended[len(history) :].tolist() == (suffix[1:] if closed else suffix)
        return history

    def test_tokens_that_retokenizing_would_merge(self, tokenizer, renderer):
        split = [*ids(tokenizer, "num"), *ids(tokenizer, "ber"), END]
        history = self.check(tokenizer, renderer, split, closed=True)
        assert renderer.decode(np.asarray(split)) == "number"
        # A byte-level vocabulary merges nothing; SmolLM2's has `number` as one token.
        merges = ids(tokenizer, "number") != split[:-1]
        assert renderer.drifted([USER, {"role": "assistant", "content": "number"}], history) == merges

    def test_the_merge_case_does_merge_with_smollm2(self):
        tokenizer = loaded.tokenizer("smollm2-135m-instruct")
        assert len(ids(tokenizer, "number")) < len(ids(tokenizer, "num")) + len(ids(tokenizer, "ber"))

    def test_generation_cut_before_the_end_token(self, tokenizer, renderer):
        cut = self.check(tokenizer, renderer, ids(tokenizer, "12"), closed=False)
        whole = self.check(tokenizer, renderer, [*ids(tokenizer, "12"), END], closed=True)
        assert renderer.extend(cut, [NEXT]).tolist() == renderer.extend(whole, [NEXT]).tolist()

    def test_newline_after_the_end_token_once(self, tokenizer, renderer):
        history = self.check(tokenizer, renderer, [*ids(tokenizer, "12"), END], closed=True)
        tail = tokenizer.decode(renderer.extend(history, [NEXT])[len(history) - 1 :])
        assert tail.startswith("<|im_end|>\n<|im_start|>user")

    def test_stop_token_that_is_not_the_end_of_turn(self, tokenizer, renderer):
        history = self.check(tokenizer, renderer, [*ids(tokenizer, "12"), END_OF_TEXT], closed=False)
        extended = renderer.extend(history, [NEXT])
        assert extended[len(history) - 1 : len(history) + 1].tolist() == [END_OF_TEXT, END]

    def test_end_token_inside_a_generation(self, tokenizer, renderer):
        inside = [*ids(tokenizer, "1"), END, *ids(tokenizer, "2"), END]
        history = self.check(tokenizer, renderer, inside, closed=True)
        assert renderer.drifted([USER, {"role": "assistant", "content": renderer.decode(np.asarray(inside))}], history)

    def test_template_that_strips_reasoning(self, tiny):
        renderer = ChatRenderer(with_template(tiny, STRIPS_REASONING))
        history = self.check(tiny, renderer, [*ids(tiny, "hm</think>12"), END], closed=True)
        reply: Message = {"role": "assistant", "content": "hm</think>12"}
        assert not renderer.drifted([USER, reply], history)
        longer = after(renderer.extend(history, [NEXT]), [*ids(tiny, "15"), END])
        assert renderer.drifted([USER, reply, NEXT, {"role": "assistant", "content": "15"}], longer)

    def test_several_new_messages(self, tokenizer, renderer):
        history = after(renderer.render_initial([USER]), [*ids(tokenizer, "12"), END])
        extended = renderer.extend(history, [NEXT, USER])
        assert extended[len(history) :].tolist() == ids(tokenizer, suffix_text(NEXT, USER))[1:]


def test_default_system_message_only_at_the_beginning(tokenizer, renderer):
    prompt = renderer.render_initial([USER])
    has_default = "SmolLM" in tokenizer.chat_template
    assert ("named SmolLM" in tokenizer.decode(prompt)) == has_default
    extended = renderer.extend(after(prompt, [*ids(tokenizer, "12"), END]), [NEXT])
    assert tokenizer.decode(extended).count("named SmolLM") == int(has_default)
    assert tokenizer.decode(extended[len(prompt) :]).count("system") == 0


def test_number_guess_prompt_is_short():
    renderer = ChatRenderer(loaded.tokenizer("smollm2-135m-instruct"))
    assert len(renderer.render_initial([{"role": "system", "content": "Reply with one number only."}, USER])) <= 40


def test_extending_equals_rendering_the_whole_without_drift(tokenizer, renderer):
    history = after(renderer.render_initial([USER]), [*ids(tokenizer, "12"), END])
    messages = [USER, {"role": "assistant", "content": "12"}]
    assert renderer.extend(history, [NEXT]).tolist() == renderer.render_initial([*messages, NEXT]).tolist()
    assert not renderer.drifted(messages, history)
    assert not renderer.drifted(messages, history[:-1]), "a cut last turn is no drift"
    assert not renderer.drifted([*messages, NEXT], history), "messages that the policy never saw do not count"
    assert renderer.drifted([USER, {"role": "assistant", "content": "13"}], history)


@settings(max_examples=20, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.lists(st.integers(0, 258), min_size=1, max_size=12), st.text(max_size=20)), min_size=1, max_size=4
    )
)
def test_history_is_always_a_prefix(tokenizer, renderer, turns):
    """Invariant 1, for any tokens that a policy may produce and any text that an environment may answer."""
    prompt = renderer.render_initial([USER])
    for generated, reply in turns:
        history = after(prompt, generated)
        prompt = renderer.extend(history, [{"role": "user", "content": reply}])
        assert prompt[: len(history)].tolist() == history.tolist()
        suffix = ids(tokenizer, suffix_text({"role": "user", "content": reply}))
        assert prompt[len(history) :].tolist() == suffix[generated[-1] == END :]


def test_tools_reach_the_first_prompt_and_tool_messages_the_next(tiny):
    template = "{%- if tools %}{{- '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}"
    renderer = ChatRenderer(with_template(tiny, template + tiny.chat_template), tools=[TOOL_SCHEMA])
    prompt = renderer.render_initial([USER])
    assert '"look"' in tiny.decode(prompt)
    result: Message = {"role": "tool", "content": "a hill", "tool_call_id": "call00001"}
    extended = renderer.extend(after(prompt, [END]), [result])
    assert tiny.decode(extended[len(prompt) :]) == suffix_text(result)


CHATML = "'<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'"
GENERATION = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"


class TestTemplatesThatBreakTheRule:
    @pytest.mark.parametrize(
        ("template", "complaint"),
        [
            # Shows only the last message.
            ("{%- set m = messages[-1] %}{{- " + CHATML + " }}" + GENERATION, "0 times, expected once"),
            # Repeats assistant messages.
            ("{%- for m in messages %}{{- " + CHATML + " + m.content }}{%- endfor %}" + GENERATION, "2 times"),
            # Ends a turn with plain text.
            (
                "{%- for m in messages %}{{- m.role + ': ' + m.content + '\n' }}{%- endfor %}",
                "special end-of-turn token",
            ),
            # Closes the assistant's turn only while it is the last.
            (
                "{%- for m in messages %}{{- '<|im_start|>' + m.content }}"
                "{%- if loop.last %}{{- '<|im_end|>' }}{%- endif %}{%- endfor %}" + GENERATION,
                "changes how the assistant's turn ends",
            ),
            # Numbers the messages.
            (
                "{%- for m in messages %}{{- '<|im_start|>' + m.role + loop.index|string + m.content + '<|im_end|>' }}"
                "{%- endfor %}" + GENERATION,
                "depends on the messages before it",
            ),
            # Refuses system messages.
            (
                "{%- for m in messages %}"
                "{%- if m.role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}"
                "{{- " + CHATML + " }}{%- endfor %}" + GENERATION,
                "roles system, user: .*no system role",
            ),
        ],
        ids=["forgets", "repeats", "no end of turn", "moving end", "numbers", "refuses"],
    )
    def test_is_told(self, tiny, template, complaint):
        with pytest.raises(TemplateError, match=complaint):
            ChatRenderer(with_template(tiny, template))

    def test_role_that_the_run_does_not_use_is_not_asked_for(self, tiny):
        refuses = "{%- if messages[0].role == 'system' %}{{- raise_exception('no system role') }}{%- endif %}"
        template = refuses + "{%- for m in messages %}{{- " + CHATML + " }}{%- endfor %}" + GENERATION
        renderer = ChatRenderer(with_template(tiny, template), roles=("user", "assistant"))
        with pytest.raises(TemplateError, match="no system role"):
            renderer.render_initial([{"role": "system", "content": "x"}])

    def test_tool_messages_are_verified_only_with_tools(self, tiny):
        refuses = "{%- if messages[-1].role == 'tool' %}{{- raise_exception('no tools') }}{%- endif %}"
        changed = with_template(tiny, refuses + tiny.chat_template)
        ChatRenderer(changed)
        with pytest.raises(TemplateError, match="no tools"):
            ChatRenderer(changed, tools=[TOOL_SCHEMA])


TEMPLATES = sorted((Path(__file__).parent / "templates").glob("*.jinja"))
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|>"), max_size=30)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_conversation_on_any_template_extends_what_was_seen(path: Path, data: st.DataObject) -> None:
    tokenizer = smollm2_with(path)
    renderer = ChatRenderer(tokenizer)
    ids_ = st.lists(st.integers(0, 49_151).filter(lambda i: i not in tokenizer.all_special_ids), max_size=6)
    seen = renderer.render_initial([{"role": "user", "content": data.draw(TEXTS)}])
    for _ in range(data.draw(st.integers(1, 4))):
        ended = data.draw(st.booleans())
        seen = after(seen, data.draw(ids_) + [renderer.end_of_turn_id] * ended)
        said = data.draw(TEXTS)
        prompt = renderer.extend(seen, [{"role": "user", "content": said}])
        assert prompt[: len(seen)].tolist() == seen.tolist()
        added = prompt[len(seen) :].tolist()
        assert (added[0] == renderer.end_of_turn_id) != ended, "the end of the turn stands there once"
        # Through the tokenizer: its vocabulary, read from a GGUF file, lacks some control characters.
        assert tokenizer.decode(ids(tokenizer, said.strip())) in tokenizer.decode(added)
        seen = prompt


@cache
def smollm2_with(path: Path) -> Any:
    return with_template(loaded.tokenizer("smollm2-135m-instruct"), path.read_text())
