"""A policy's tokenizer, as AutoTokenizer loads it, and without PyTorch once it is known which class that is.

To find the class, AutoTokenizer imports what transformers has of models, and PyTorch with it: seconds of processor time
and 300 MiB in a process that only renders chats. So what it has found is kept beside the built policies.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from raygym.models import cache_dir

logger = logging.getLogger(__name__)
_FROM = "transformers."
# What AutoTokenizer reads to find the class; of all others it asks at most whether they are there.
_READ = ("config.json", "tokenizer_config.json")


def load_tokenizer(model_dir: str | Path) -> Any:
    """The tokenizer in `model_dir`, with none of the directory's code. Raises as `AutoTokenizer.from_pretrained`."""
    found = _Found(Path(model_dir).resolve())
    if (known := found.tokenizer_class()) is not None:
        return known.from_pretrained(model_dir, trust_remote_code=False)
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
    found.keep(type(tokenizer))
    return tokenizer


class _Found:
    """Which class AutoTokenizer has chosen for a directory as it is now; by the installed version of transformers."""

    def __init__(self, model_dir: Path) -> None:
        digest = hashlib.blake2b(digest_size=16)
        names: list[str] = []
        with suppress(OSError):  # AutoTokenizer has the words for it
            names = sorted(path.name for path in model_dir.iterdir())
        digest.update(json.dumps([version("transformers"), str(model_dir), names]).encode())
        for name in _READ:
            with suppress(OSError):
                digest.update((model_dir / name).read_bytes())
        self._path: Path | None = None
        with suppress(RuntimeError):  # a user without a home, as in some containers
            self._path = cache_dir() / "tokenizers" / f"{digest.hexdigest()}.json"

    def tokenizer_class(self) -> Any | None:
        """None where it is not known."""
        if self._path is None:
            return None
        try:
            told = json.loads(self._path.read_text(encoding="utf-8"))
            if not str(told["module"]).startswith(_FROM):
                raise ImportError(f"{told['module']} is not a module of transformers")
            return getattr(importlib.import_module(told["module"]), told["name"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, ImportError, AttributeError) as error:
            logger.warning("%s cannot be used: %s; AutoTokenizer is asked", self._path, error)
            return None

    def keep(self, chosen: type) -> None:
        """For the next process. Only what can be imported from transformers by its name, and loads by itself."""
        if self._path is None or not chosen.__module__.startswith(_FROM):
            return
        if getattr(importlib.import_module(chosen.__module__), chosen.__name__, None) is not chosen:
            return
        # Not `write_whole`, which has one writer: here all processes of a run's start may have found it at once.
        partial = self._path.with_suffix(f".{os.getpid()}.partial")
        with suppress(OSError):  # a folder that cannot be written costs time, no more
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"module": chosen.__module__, "name": chosen.__name__}), encoding="utf-8")
            partial.replace(self._path)
