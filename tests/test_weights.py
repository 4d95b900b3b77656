"""Bucket plans, checksums, and the refusal of weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raygym.simulate import SimulatedConfig, SimulatedEngine
from raygym.weight_checksums import PIECE_BYTES, SummedCopy, model_checksum, sum_up, tensor_checksum
from raygym.weights import (
    WeightsError,
    buckets_of,
    check_shapes,
    checkpoint_shapes,
    plan_manifest,
    safetensors_header,
    tied_names,
)

shapes = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=12)


@given(shapes, st.integers(4, 400), st.sampled_from(["float32", "bfloat16"]))
def test_buckets_cover_every_byte_once_and_never_split_a_tensor(
    sizes: list[tuple[int, ...]], bucket_bytes: int, dtype: str
) -> None:
    named = [(f"t{i}", shape) for i, shape in enumerate(sizes)]
    manifest = plan_manifest(named, dtype, bucket_bytes)
    assert [(t.name, t.shape) for t in manifest.tensors] == named
    position = 0
    for bucket in manifest.buckets:
        assert bucket.start == position == bucket.tensors[0].start
        for tensor in bucket.tensors:
            assert tensor.start == position
            position = tensor.end
        assert bucket.end == position
        assert bucket.end - bucket.start <= bucket_bytes or len(bucket.tensors) == 1
    assert manifest.nbytes == position == sum(int(np.prod(s)) for s in sizes) * (4 if dtype == "float32" else 2)


def test_header_and_data_are_a_file_that_safetensors_reads(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "scalar": torch.tensor(2.0)}
    manifest = plan_manifest([(name, tuple(t.shape)) for name, t in tensors.items()], "float32", 16)
    data = b"".join(tensors[spec.name].numpy().tobytes() for spec in manifest.tensors)
    path = tmp_path / "v.safetensors"
    path.write_bytes(safetensors_header(manifest) + data)
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, tensors[name])


def test_the_model_checksum_sees_every_change_and_no_order() -> None:
    sums = {"a": 1, "b": 2}
    assert model_checksum(sums) == model_checksum({"b": 2, "a": 1})
    assert len({model_checksum(s) for s in (sums, {"a": 2, "b": 1}, {"a": 1}, {"a": 1, "c": 2})}) == 4


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ({"a": (2,), "b": (3,)}, "lack b"),
        ({}, "unknown a"),
        ({"a": (3,)}, "another shape for a"),
    ],
)
def test_weights_that_do_not_fit_the_engine_are_refused(checkpoint: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        check_shapes({"a": (2,)}, checkpoint)


def test_a_tied_head_may_be_missing_from_the_stream() -> None:
    check_shapes({"a": (2,)}, {"a": (2,), "lm_head.weight": (2,)}, ["lm_head.weight"])


def test_the_buckets_of_tensors() -> None:
    manifest = plan_manifest([("a", (8,)), ("b", (8,)), ("c", (8,)), ("d", (8,))], "float32", 64)
    assert buckets_of(manifest, {"a"}) == buckets_of(manifest, {"b", "a"}) == [0]
    assert buckets_of(manifest, {"d", "b"}) == [0, 1]
    assert buckets_of(manifest, set()) == []


def test_checkpoint_shapes_and_tied_names(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"y": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert checkpoint_shapes(tmp_path) == {"x": (2, 3), "y": (4,)}
    assert tied_names(tmp_path) == ("lm_head.weight",)


async def test_the_simulated_engine_reports_the_checksum_of_what_it_was_given(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2)}
    save_file(tensors, tmp_path / "v.safetensors")
    engine = SimulatedEngine(SimulatedConfig(), [2])
    expected = model_checksum({name: tensor_checksum(t.numpy()) for name, t in tensors.items()})
    assert await engine.load_weights(str(tmp_path / "v.safetensors"), 3) == expected
    assert (engine.weight_version, engine.weights_checksum) == (3, expected)


@pytest.mark.parametrize("nbytes", [0, 1, 7, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 12_345])
def test_a_tensor_is_copied_and_summed_up_by_several_threads_as_by_one(nbytes: int) -> None:
    rng = np.random.default_rng(nbytes)
    sources = {name: rng.integers(0, 256, nbytes, np.uint8) for name in "abc"}
    targets = {name: np.zeros(nbytes, np.uint8) for name in sources}
    copied = sum_up(SummedCopy(name, targets[name], sources[name]) for name in sources)
    assert all(np.array_equal(targets[name], sources[name]) for name in sources)
    assert copied == sum_up(SummedCopy(name, target) for name, target in targets.items())
    assert copied == {name: tensor_checksum(source.tobytes()) for name, source in sources.items()}
    for position in {0, nbytes // 2, nbytes - 1} if nbytes else ():
        targets["b"][position] ^= 1
        assert sum_up([SummedCopy("b", targets["b"])])["b"] != copied["b"]
        targets["b"][position] ^= 1
