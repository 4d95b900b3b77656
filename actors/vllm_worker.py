"""What raygym adds to vLLM's workers, the processes that hold the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from multiprocessing import util
from multiprocessing.synchronize import SemLock

import torch
from safetensors import safe_open

from raygym.weight_checksums import model_checksum, tensor_checksum


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

    def raygym_unname_semaphores(self) -> int:
        """Take the names of this process's semaphores away, which a kill would leave in /dev/shm; how many there were.

        They work on: whoever needed the name has opened it by now. Python itself does so where processes are forked.
        """
        named = [end for end in list(util._finalizer_registry.values()) if end._callback is SemLock._cleanup]  # type: ignore[attr-defined]
        for end in named:
            end()
        return len(named)


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
