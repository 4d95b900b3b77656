"""Where a policy's files come from: every accepted form, every refusal, and builds that are whole or absent."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from raygym import models
from raygym.models import ModelError, cache_dir, resolve_policy
from raygym.stop_tokens import stop_token_ids


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_policy("tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny_dir):
    return AutoTokenizer.from_pretrained(tiny_dir)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_cache_dir_prefers_its_own_variable(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.delenv("RAYGYM_CACHE", raising=False)
    assert cache_dir() == Path("/xdg/raygym")
    monkeypatch.setenv("RAYGYM_CACHE", "/own")
    assert cache_dir() == Path("/own")


class TestTiny:
    @pytest.mark.parametrize(("name", "tied"), [("tiny", False), ("tiny-tied", True)])
    def test_loads_and_is_the_same_every_time(self, name, tied, tmp_path, monkeypatch):
        built = []
        for cache in ("a", "b"):
            monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / cache))
            built.append(resolve_policy(name))
        assert built[0] != built[1]
        assert files_of(built[0]) == files_of(built[1])
        policy = AutoModelForCausalLM.from_pretrained(built[0])
        assert (policy.lm_head.weight is policy.model.embed_tokens.weight) is tied
        assert policy.lm_head.weight.shape == (259, 128)
        assert policy.dtype.is_floating_point and policy.dtype.itemsize == 4
        assert stop_token_ids(built[0]) == (2,)

    @given(
        st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text)
    )
    @settings(max_examples=100, deadline=None)
    def test_a_token_is_a_byte(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text

    def test_chat_template_is_chatml_without_a_system_message(self, tokenizer):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        assert ids[0] == 1 and ids.count(2) == 2

    def test_chat_template_writes_tool_calls(self, tokenizer):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        messages = [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        inside = text.split("<tool_call>\n")[1].split("\n</tool_call>")[0]
        assert json.loads(inside) == call["function"]
        assert text.endswith("<|im_start|>tool\n2<|im_end|>\n")


class TestBuildOnce:
    def test_two_callers_build_once(self, empty_cache, monkeypatch):
        builds = []

        def slow_build(model, directory):
            builds.append(model)
            time.sleep(0.2)
            (directory / "config.json").write_text("{}")

        monkeypatch.setitem(models._BUILDERS, "tiny", (slow_build, 7))
        found = []
        threads = [threading.Thread(target=lambda: found.append(resolve_policy("tiny"))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert builds == ["tiny"]
        assert found == [empty_cache / "models" / "tiny-v7"] * 3

    def test_a_failed_build_publishes_nothing_and_the_next_one_starts_clean(self, empty_cache, monkeypatch):
        def half_build(model, directory):
            (directory / "half").write_text("")
            raise RuntimeError("killed")

        def whole_build(model, directory):
            (directory / "config.json").write_text("{}")

        monkeypatch.setitem(models._BUILDERS, "tiny", (half_build, 1))
        with pytest.raises(RuntimeError, match="killed"):
            resolve_policy("tiny")
        assert not (empty_cache / "models" / "tiny-v1").exists()
        monkeypatch.setitem(models._BUILDERS, "tiny", (whole_build, 1))
        assert set(files_of(resolve_policy("tiny"))) == {"config.json"}

    def test_an_unusable_cache_is_named(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / "file"))
        with pytest.raises(ModelError, match=r"policy\.model 'tiny'.*RAYGYM_CACHE"):
            resolve_policy("tiny")


class TestLocalDirectory:
    def test_is_taken_as_it_is(self, tiny_dir):
        assert resolve_policy(str(tiny_dir)) == tiny_dir

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer"])
    def test_names_the_missing_file(self, missing, tiny_dir, tmp_path):
        copy = shutil.copytree(tiny_dir, tmp_path / "copy")
        for path in copy.glob(f"{missing}*"):
            path.unlink()
        with pytest.raises(ModelError, match=rf"policy\.model .*{Path(missing).suffix or missing}"):
            resolve_policy(str(copy))

    def test_a_file_is_refused(self, tiny_dir):
        with pytest.raises(ModelError, match="is a file"):
            resolve_policy(str(tiny_dir / "config.json"))


@pytest.mark.parametrize("model", ["", "smollm", "/no/such/dir", "a/b/c", "../x"])
def test_anything_else_lists_what_is_accepted(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ModelError) as error:
        resolve_policy(model)
    for form in ("local directory", "Hugging Face id", "smollm2-135m-instruct", "tiny-tied"):
        assert form in str(error.value)


class TestHub:
    def test_offline_says_what_to_do(self, monkeypatch):
        from huggingface_hub import errors

        def offline(*_, **__):
            raise errors.LocalEntryNotFoundError("nothing cached")

        monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
        with pytest.raises(ModelError, match=r"policy\.model 'org/name'.*hub cannot be reached.*smollm2-135m-instruct"):
            resolve_policy("org/name")

    def test_a_connection_lost_half_way_is_no_traceback(self, monkeypatch):
        import httpx

        def lost(*_, **__):
            raise httpx.ReadError("reset by peer")

        monkeypatch.setattr("huggingface_hub.snapshot_download", lost)
        with pytest.raises(ModelError, match="broke off"):
            resolve_policy("org/name")

    def test_what_was_downloaded_is_checked(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
        with pytest.raises(ModelError, match=r"config\.json"):
            resolve_policy("org/name")


def test_stop_tokens_are_the_union(tiny_dir, tmp_path):
    copy = shutil.copytree(tiny_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))
    assert stop_token_ids(copy) == (0, 2, 5)


def test_importing_is_cheap():
    heavy = "{'torch', 'transformers', 'ray', 'vllm', 'deepspeed'}"
    code = f"import sys, raygym.models; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line_prints_the_path_or_one_line(tiny_dir, capsys):
    assert models.main([str(tiny_dir)]) == 0
    assert capsys.readouterr().out.strip() == str(tiny_dir)
    assert models.main(["nope"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_smollm2_answers_a_sum():
    directory = resolve_policy("smollm2-135m-instruct")
    assert stop_token_ids(directory) == (2,)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    policy = AutoModelForCausalLM.from_pretrained(directory)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    assert not hasattr(policy.config, "quantization_config")
    question = [{"role": "user", "content": "What is 7 + 5?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = policy.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "12" in tokenizer.decode(answer)
