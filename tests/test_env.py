"""The environment contract: what observations may be, and how environments are found."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from raygym.env import ChatEnv, ChatSpace, EnvError, env_tools, make_env, normalize_observation, parse_reset, parse_step


class Echo(ChatEnv):
    def __init__(self, length: int = 1) -> None:
        self.length = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return f"Say {self.np_random.integers(10**9)}.", {}

    def step(self, action):
        self.steps += 1
        return "Again.", 1.0, self.steps >= self.length, False, {}


class AsyncEcho(Echo):
    async def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)

    async def step(self, action):
        return super().step(action)


def installed(directory: Path, package: str, entry_points: dict[str, str]) -> None:
    """Leave in `directory` what an installer would of a package with these entry points."""
    info = directory / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[raygym.envs]", *lines, ""]))


class TestObservations:
    def test_text_is_one_user_message(self):
        assert normalize_observation("hi") == [{"role": "user", "content": "hi"}]

    def test_message_and_list(self):
        message = {"role": "tool", "content": "42", "tool_call_id": "a"}
        assert normalize_observation(message) == [message]
        assert normalize_observation([message, message]) == [message, message]

    def test_text_parts_are_joined(self):
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert normalize_observation({"role": "user", "content": parts})[0]["content"] == "ab"

    def test_is_a_copy(self):
        message = {"role": "user", "content": "x", "meta": [1]}
        copied = normalize_observation(message)
        message["meta"].append(2)
        assert copied[0]["meta"] == [1]

    @pytest.mark.parametrize(
        ("observation", "complaint"),
        [
            (3, "int 3"),
            (None, "NoneType"),
            ([], "empty list"),
            ({"content": "x"}, "role None"),
            ({"role": "wizard", "content": "x"}, "'wizard'"),
            ({"role": "user"}, "as content"),
            ([{"role": "user", "content": "x"}, "y"], r"observation\[1\]"),
            ({"role": "user", "content": [{"type": "image_url"}]}, "image_url"),
            (np.zeros(3), "ndarray"),
        ],
    )
    def test_garbage_is_named(self, observation, complaint):
        with pytest.raises(EnvError, match=complaint):
            normalize_observation(observation)
        assert not ChatSpace().contains(observation)

    def test_space(self):
        space = ChatSpace()
        assert space.contains("x") and space.contains(space.sample()) and space == ChatSpace()


class TestResults:
    def test_numpy_scalars_are_numbers(self):
        step = parse_step(("x", np.float32(0.5), np.bool_(True), False, {"metrics": {"m": np.int64(2)}}))
        assert (step.reward, step.terminated, step.metrics) == (0.5, True, {"m": 2.0})
        assert step.reward_components == {}

    def test_a_reward_may_tell_what_it_consists_of(self) -> None:
        step = parse_step(("x", 0.3, True, False, {"rewards": {"right": np.float64(0.1), "short": 0.2}}))
        assert step.reward_components == {"right": 0.1, "short": 0.2}

    def test_last_observation_may_be_missing(self):
        assert parse_step((None, 1, True, False, {})).messages == []
        with pytest.raises(EnvError, match="observation"):
            parse_step((None, 1, False, False, {}))

    @pytest.mark.parametrize(
        ("result", "complaint"),
        [
            (None, "expected a tuple"),
            (("x", 1.0, True, {}), "expected a tuple"),
            (("x", math.nan, True, False, {}), "finite"),
            (("x", "1", True, False, {}), "as reward"),
            (("x", 1.0, 1, False, {}), "as terminated"),
            (("x", 1.0, True, None, {}), "as truncated"),
            (("x", 1.0, True, False, None), "as info"),
            (("x", 1.0, True, False, {"metrics": {"m": "high"}}), "metrics"),
            (("x", 1.0, True, False, {"rewards": {"m": "high"}}), "rewards"),
            (("x", 1.0, True, False, {"rewards": [1.0]}), "rewards"),
            (("x", 1.0, True, False, {"rewards": {"right": 0.5, "short": 0.25}}), "sum is 0.75, with a reward of 1"),
        ],
    )
    def test_bad_steps_are_named(self, result, complaint):
        with pytest.raises(EnvError, match=complaint):
            parse_step(result)

    @pytest.mark.parametrize("result", ["x", ("x",), ("x", None), (None, {})])
    def test_bad_resets_are_named(self, result):
        with pytest.raises(EnvError):
            parse_reset(result)


class TestMakeEnv:
    def test_registered(self):
        env = make_env("raygym/NumberGuess-v0", {"low": 1, "high": 12})
        assert type(env).__name__ == "NumberGuess"

    def test_module_and_class(self):
        assert make_env(f"{__name__}:Echo", {"length": 3}).length == 3

    def test_module_of_the_current_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "guess_of_a_user.py").write_text(f"from {__name__} import Echo\nclass Mine(Echo): pass\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert type(make_env("guess_of_a_user:Mine", {})).__name__ == "Mine"

    def test_module_that_registers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "registering_user.py").write_text(
            f"import gymnasium\nfrom {__name__} import Echo\ngymnasium.register('user/Echo-v0', Echo)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        assert isinstance(make_env("registering_user:user/Echo-v0", {}), Echo)
        del gymnasium.registry["user/Echo-v0"]

    @pytest.mark.parametrize(
        ("env_id", "complaint"),
        [
            ("raygym/NumberGues-v0", r"envs\[\]\.id.*did you mean raygym/NumberGuess-v0"),
            ("nothing_like_it", r"envs\[\]\.id.*raygym/Arithmetic-v0"),
            ("no_such_module_here:Guess", r"envs\[\]\.id.*cannot be imported"),
            (f"{__name__}:Ecko", r"envs\[\]\.id.*did you mean Echo"),
            ("json:dumps", r"envs\[\]\."),
            ("builtins:dict", r"envs\[\]\.id.*gymnasium\.Env"),
        ],
    )
    def test_unknown_ids_say_what_to_do(self, env_id, complaint):
        with pytest.raises(EnvError, match=complaint):
            make_env(env_id, {})

    @pytest.mark.parametrize(
        ("env_id", "kwargs"),
        [
            ("raygym/NumberGuess-v0", {"hihg": 3}),
            ("raygym/NumberGuess-v0", {"high": 2}),
            (f"{__name__}:Echo", {"x": 1}),
        ],
    )
    def test_refused_kwargs_are_named(self, env_id, kwargs):
        with pytest.raises(EnvError, match=r"envs\[\]\.kwargs"):
            make_env(env_id, kwargs)

    def test_wrappers_asked_for_are_kept_unless_asynchronous(self):
        gymnasium.register("user/Short-v0", Echo, max_episode_steps=1)
        gymnasium.register("user/AsyncShort-v0", AsyncEcho, max_episode_steps=1)
        try:
            env = make_env("user/Short-v0", {"length": 9})
            env.reset(seed=0)
            assert env.step({"role": "assistant", "content": ""})[3] is True
            with pytest.raises(EnvError, match="asynchronous"):
                make_env("user/AsyncShort-v0", {})
        finally:
            del gymnasium.registry["user/Short-v0"], gymnasium.registry["user/AsyncShort-v0"]

    def test_entry_points_of_installed_packages(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        installed(tmp_path, "acme-mazes", {"acme/Maze-v0": "acme_mazes:Maze", "acme/Gone-v0": "acme_mazes:Gone"})
        installed(tmp_path, "other-mazes", {"acme/Twice-v0": "acme_mazes:Maze"})
        installed(tmp_path, "third-mazes", {"acme/Twice-v0": "third_mazes:Maze"})
        (tmp_path / "acme_mazes.py").write_text(f"from {__name__} import Echo\nclass Maze(Echo): pass\n")
        monkeypatch.syspath_prepend(tmp_path)
        env = make_env("acme/Maze-v0", {"length": 4})
        assert (type(env).__module__, type(env).__name__, env.length) == ("acme_mazes", "Maze", 4)
        for env_id, kwargs, complaint in (
            ("acme/Maze-v1", {}, "did you mean acme/Maze-v0.*expected one of .*acme/Gone-v0"),
            ("acme/Gone-v0", {}, "acme-mazes offers it as acme_mazes:Gone, which cannot be loaded"),
            ("acme/Twice-v0", {}, "more than once.*other-mazes.*third-mazes.*module:Class"),
            ("acme/Maze-v0", {"depth": 4}, r"envs\[\]\.kwargs"),
        ):
            with pytest.raises(EnvError, match=complaint):
                make_env(env_id, kwargs)

    def test_a_missing_package_is_told_with_its_extra(self, monkeypatch: pytest.MonkeyPatch):
        for package, env_id in (("textarena", "raygym/TextArena-v0"), ("reasoning_gym", "raygym/ReasoningGym-v0")):
            for name in [name for name in sys.modules if name.split(".")[0] == package]:
                monkeypatch.delitem(sys.modules, name)
            monkeypatch.setitem(sys.modules, package, None)
            module = gymnasium.registry[env_id].entry_point.split(":")[0]
            monkeypatch.delitem(sys.modules, module, raising=False)
            with pytest.raises(EnvError, match=r"envs\[\]\.id.*pip install 'raygym\[envs\]'"):
                make_env(env_id, {})

    def test_tools_are_seen_through_wrappers(self):
        class Tooled(Echo):
            tools = ({"type": "function", "function": {"name": "f", "parameters": {}}},)

        assert env_tools(gymnasium.wrappers.TimeLimit(Tooled(), 2))[0]["function"]["name"] == "f"
        assert env_tools(Echo()) == []
