"""`raygym report`: one page without a script or an address, right for runs that ended, go on, or were killed."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from raygym import cli
from raygym.report import episodes
from raygym.report.columns import Columns
from raygym.report.command import cell, fence, html, markdown, write_report
from raygym.report.contents import read_contents
from raygym.report.curves import charts, thinned
from raygym.report.drawing import labels, number, ticks
from raygym.report.environments import environments
from raygym.report.episodes import clipped, extremes
from raygym.run_reading import UnreadableRun

ENV = "a <script>alert(1)</script>"
EVIL = "</pre><script>alert(1)</script> ```` \x1b[31m \ud800 \u202e <img src=http://x onerror=alert(2)>"


def trajectory(task: int, reward: float, **changes: Any) -> dict[str, Any]:
    turn = {"start": 4, "end": 9, "reward": reward, "finish_reason": "length", "generate_s": 0.5, "env_s": 0.1}
    messages = [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"answer {task}"}]
    return {"env": ENV, "task": task, "seed": 0, "split": "train", "group_id": "g", "episode": 0, "attempt": 0,
            "status": "terminated", "failure": None, "reward": reward, "drifted": False, "messages": messages,
            "turns": [turn], "sampling": {"temperature": 1.0, "max_tokens": 5}, "metrics": {}, "reward_components": {},
            "token_ids": [1] * 9, "loss_mask": [0] * 4 + [1] * 5, "logprobs": [0.0] * 9,
            "weight_versions": [0] * 9, **changes}  # fmt: skip


def lines(path: Path, records: list[dict[str, Any]], end: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + end)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 20 steps that was killed while it wrote."""
    path = tmp_path / "runs" / "mine"
    path.mkdir(parents=True)
    config = {"name": "mine <b>", "steps": 40, "policy": {"model": "tiny"}, "envs": [{"id": "x", "name": ENV}],
              "rollout": {"groups_per_step": 4, "group_size": 2}, "learner": {"lr": 1e-6}}  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": s, "reward/mean": s / 20, "episodes/completed": 8, "tokens/generated": 80, "time/step_s": 2.0,
             "time/learn_s": 1.0, "time/generate_s": 0.5, "policy/entropy": None if s == 3 else 1.0,
             f"env/{ENV}/solved": s / 40} for s in range(1, 21)]  # fmt: skip
    rows[4]["episodes/failed/env_error"] = 3
    lines(path / "metrics.jsonl", [{"step": 0, "val/reward": 0.1}, *rows], '{"step": 21, "rew')
    for step in (1, 18, 19, 20):
        lines(path / f"trajectories/step_{step:06d}.jsonl", [trajectory(step * 10 + i, i / 8) for i in range(8)])
    lines(path / "events.jsonl", [{"kind": "replica", "name": "replica ab", "what": "lost", "cause": "kill | -9"}])
    (path / "alarms" / "step_000007_gradient_spike").mkdir(parents=True)
    alarm = {"step": 7, "alarm": "gradient_spike", "reason": f"grad/norm is high {EVIL}"}
    (path / "alarms" / "step_000007_gradient_spike" / "alarm.json").write_text(json.dumps(alarm))
    return path


class _Page(HTMLParser):
    """What tags a page has, what it refers to, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "action", "data")]
        self.addresses += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_contains_all_and_refers_to_nothing(run: Path) -> None:
    page = html(read_contents(run))
    parsed = _Page(page)
    assert not {"script", "link", "img", "iframe", "object"} & set(parsed.tags)
    assert parsed.addresses == []
    assert not re.search(r"url\(|@import", page)
    assert len(page) < 200_000
    for word in ("mine <b>", "not finished: step 20", "Reward", "gradient_spike", "replica ab lost", "answer 207"):
        assert word in parsed.text, word


def test_what_a_policy_wrote_is_text(run: Path) -> None:
    parsed = _Page(html(read_contents(run)))
    assert "</pre><script>alert(1)</script>" in parsed.text
    assert "\x1b" not in parsed.text and "\u241b[31m" in parsed.text
    assert "\u202e" not in parsed.text


def test_the_command_writes_both_files_and_says_where(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "report.md")]
    (run / "report.html").read_text(encoding="utf-8")
    (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["runs/none", ""])
def test_no_run_is_one_line(missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / missing)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "config.yaml" in error and "raygym train" in error


def test_a_folder_that_cannot_be_made_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(run), "--out", str(run / "config.yaml" / "x")]) == 2
    assert "--out" in capsys.readouterr().err


def test_markdown_is_text_of_a_policy_in_fences_that_it_cannot_close(run: Path) -> None:
    page = markdown(read_contents(run))
    assert "`````text\n</pre><script>" in page
    outside = re.sub(r"(`{3,}).*?\n\1", "", page, flags=re.DOTALL)
    assert "<script>" not in outside
    assert "| " + cell(ENV) + " | 160 |" in page
    assert "kill \\| -9" in page
    assert "▁" in page and "█" in page


def test_a_run_that_has_only_begun(run: Path) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (run / name).unlink()
    for path in (run / "trajectories").iterdir():
        path.unlink()
    contents = read_contents(run)
    assert contents.state == "nothing was written yet" and contents.charts == () and contents.time_split == ()
    assert "<h2>Curves" not in html(contents)
    assert "## Curves" not in markdown(contents)


def test_a_finished_run_and_a_given_up_one_say_so(run: Path) -> None:
    given_up = {"kind": "learner", "name": "learner gang", "what": "given_up", "cause": "lost 4 times"}
    lines(run / "events.jsonl", [given_up])
    assert read_contents(run).state == "stopped after step 20: learner gang given up: lost 4 times"
    (run / "summary.json").write_text('{"steps": 20, "seconds": 75.0, "checkpoint": "/c", "weights_checksum": "ab"}')
    contents = read_contents(run)
    assert contents.finished and contents.state == "finished in 1m15s"
    assert ("checkpoint", "/c") in contents.facts


def test_damaged_files_are_told_and_the_rest_is_shown(run: Path) -> None:
    with (run / "trajectories/step_000020.jsonl").open("a") as file:
        file.write('half a line}\n{"env": 3}\n')
    (run / "summary.json").write_text("{")
    contents = read_contents(run)
    assert len(contents.notes) == 3
    assert len(contents.episodes.best) == 3
    assert not contents.finished


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward_components": {"a": None}}, "a line is no trajectory"),
        ({"reward_components": [1]}, "a line is no trajectory"),
        ({"reward": 10**400}, "a line is no trajectory"),
        ({"reward": float("nan")}, "a line is no trajectory"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, None),
        ({"messages": [{"role": "assistant", "tool_calls": ["f", 5, {"function": {"name": ["g"]}}]}]}, None),
    ],
)
def test_an_odd_episode_is_shown_as_it_is_or_noted(run: Path, changes: dict[str, Any], said: str | None) -> None:
    lines(run / "trajectories/step_000020.jsonl", [trajectory(7, 50.0), {**trajectory(8, 99.0), **changes}])
    contents = read_contents(run)
    assert html(contents) and markdown(contents)
    shown = [episode.task for episode in contents.episodes.best]
    assert 7 in shown
    assert (8 in shown) == (said is None)
    assert [note for note in contents.notes if said is None or said not in note] == []
    assert bool(contents.notes) == (said is not None)


def test_an_episode_that_cannot_be_shown_is_noted(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(run / "trajectories/step_000020.jsonl", [trajectory(8, 99.0, messages=[{"role": "user", "content": "odd"}])])
    before = episodes._text

    def text(message: dict[str, Any]) -> str:
        return before(message) if message["content"] != "odd" else message["no such key"]

    monkeypatch.setattr(episodes, "_text", text)
    contents = read_contents(run)
    assert len(contents.episodes.best) == 2
    assert any("step 20" in note and "task 8" in note and "KeyError" in note for note in contents.notes)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", "{policy: foo, learner: [1], envs: 3}", ["policy", "mapping"]),
        ("config.yaml", "{steps: 2024-99-99}", ["config.yaml", "YAML"]),
        ("summary.json", '{"seconds": null}', ["summary.json", "how it ended"]),
        ("summary.json", '{"seconds": Infinity}', ["summary.json", "how it ended"]),
        ("summary.json", '{"samples": 2}', ["summary.json", "how it ended"]),
        ("summary.json", '{"samples": 2, "pass_at": 3}', ["summary.json", "headline"]),
        ("summary.json", '{"samples": 2, "episodes": null}', ["summary.json", "headline"]),
        ("summary.json", '{"samples": 2, "failures": {"a": null}}', ["summary.json", "failures"]),
        ("summary.json", '{"samples": 2, "temperature": "hot"}', ["summary.json", "facts"]),
        ("summary.json", '{"samples": 2, "envs": {"a": {"episodes": "x"}}}', ["summary.json", "environments"]),
        ("alarms/step_000007_gradient_spike/alarm.json", '{"step": null}', ["alarm.json", "step"]),
        ("alarms/step_000007_gradient_spike/alarm.json", '{"step": 1e999}', ["alarm.json", "step"]),
    ],
)
def test_an_odd_value_is_noted_and_the_rest_is_shown(run: Path, name: str, text: str, said: list[str]) -> None:
    (run / name).write_text(text)
    contents = read_contents(run)
    assert "answer 20" in html(contents) and markdown(contents)
    assert any(all(word in note for word in said) for note in contents.notes), contents.notes


def test_odd_rows_and_events_are_shown_as_far_as_they_go(run: Path) -> None:
    odd = [{"step": 1, "reward/mean": 10**400}, {"step": 10**400, "reward/mean": 1.0}, {"step": True}, {"step": -1}]
    far = [{"step": step, "grad/norm": sign * 1.7e308, "policy/entropy": step * 5e-324, "time/step_s": 5e-324,
            "tokens/generated": 1.7e308, "episodes/failed/x": 1.7e308, "env/a/failed": 1.7e308}
           for step, sign in ((0, 1), (1, -1), (2, 1))]  # fmt: skip
    lines(run / "metrics.jsonl", [*odd, *far])
    lines(run / "events.jsonl", [{"name": "a", "what": None, "recovery_s": 10**400}, {"recovery_s": float("nan")}])
    contents = read_contents(run)
    page = html(contents)
    drawn = re.findall(r'd="([^"]*)"', page)
    assert drawn and not any(word in path for path in drawn for word in ("nan", "inf"))
    assert "Gradient" in markdown(contents) and contents.state.startswith("not finished: step 2 ")
    assert contents.events[0] == "a "


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "summary.json", "trajectories/step_000020.jsonl",
                                  "alarms/step_000007_gradient_spike/alarm.json"])  # fmt: skip
def test_a_link_out_of_the_run_is_told_and_not_read(run: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    row = {"step": 77, "reward/mean": 77.5, "seconds": 77.0, "alarm": "secret", "what": "secret"}
    record = {**trajectory(77, 50.0), **row}
    secret.write_text(json.dumps(record) + "\n")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(secret)
    contents = read_contents(run)
    assert any("link out of it" in note for note in contents.notes)
    assert "secret" not in str((contents.alarms, contents.events)) and "77" not in contents.state
    assert all(series.last != 77.5 for chart in contents.charts for series in chart.series)
    assert contents.episodes.best[0].task != 77


def test_a_config_that_is_a_link_out_of_the_run_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a: secret")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to(tmp_path / "secret")
    with pytest.raises(UnreadableRun, match="link out of it"):
        read_contents(run)


def test_numbers_without_end_and_nests_without_bottom_are_left_out(run: Path) -> None:
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "reward/mean": 1' + "0" * 400 + ', "loss": 1e999}\n' + "[" * 100_000 + "\n")
        file.write('{"step": 2, "reward/mean": 0.5}\n')
    contents = read_contents(run)
    assert contents.charts[0].series[0].points == [(2, 0.5)]
    assert len(contents.notes) == 1


def test_the_numbers_are_those_of_the_rows(run: Path) -> None:
    contents = read_contents(run)
    (env,) = contents.environments
    assert (env.name, env.episodes, env.tokens) == (ENV, 160, 10.0)
    assert (env.reward_first, env.reward_last) == (pytest.approx(1.5 / 20), pytest.approx(19.5 / 20))
    assert env.own[0][0] == "solved"
    assert contents.failures == (("env_error", 3),)
    assert dict((part, seconds) for part, seconds, _ in contents.time_split) == {
        "generate": 0.5, "learn": 1.0, "other": 0.5}  # fmt: skip
    assert sum(share for *_, share in contents.time_split) == pytest.approx(1)
    reward = contents.charts[0]
    assert [series.label for series in reward.series] == ["training", "validation"]
    assert reward.series[0].points == [(s, s / 20) for s in range(1, 21)]


def test_each_environment_of_a_mixture_has_its_own_numbers() -> None:
    rows = [{"step": 1, "reward/mean": 0.5, "reward/mean/a": 1.0, "reward/mean/b": 0.0, "episodes/completed/a": 2}]
    found = charts(Columns(rows))
    by_env = next(chart for chart in found if chart.title == "Reward by environment")
    assert [series.label for series in by_env.series] == ["a"], "a curve that is 0 all along says nothing"


def test_of_more_environments_than_a_chart_has_lines_it_says_so() -> None:
    rows = [{"step": 1, **{f"reward/mean/env{n}": 1.0 for n in range(9)}}]
    [by_env] = charts(Columns(rows))
    assert (len(by_env.series), by_env.unit) == (6, "6 of 9")


def test_what_is_wrong_with_many_lines_is_told_once_with_their_number(run: Path) -> None:
    lines(run / "trajectories/step_000020.jsonl", [{"env": "x"}] * 30)
    contents = read_contents(run)
    assert contents.notes == (
        f"{run}/trajectories/step_000020.jsonl: a line is no trajectory as raygym writes it (30 times)",
    )
    assert "1 attempt failed: env_error" in html(replace(contents, failures=(("env_error", 1),)))


def test_a_run_without_environments_has_no_table_of_them(run: Path) -> None:
    contents = replace(read_contents(run), environments=())
    assert "Environments" not in html(contents) + markdown(contents)


def test_no_name_shows_text_in_another_order(run: Path) -> None:
    contents = replace(read_contents(run), name="mine \u202e", environments=environments(Columns([]), ["env \u202e"]))
    assert "\u202e" not in html(contents) + markdown(contents)


def test_best_and_worst_are_of_the_last_tenth_and_of_different_tasks(tmp_path: Path) -> None:
    for step in range(1, 31):
        same_task = [trajectory(7, 0.9, episode=i) for i in range(8)]
        lines(tmp_path / f"trajectories/step_{step:06d}.jsonl", [*same_task, trajectory(step + 100, 0.1 * (step % 4))])
    lines(tmp_path / "trajectories/step_000001.jsonl", [trajectory(1, 99.0), trajectory(2, -99.0)])
    found = extremes(tmp_path, pytest.fail)
    assert found.where == "steps 28 to 30"
    assert [(e.task, e.reward) for e in found.best] == [(7, 0.9), (130, 0.2), (129, pytest.approx(0.1))]
    assert [e.task for e in found.worst] == [128, 129, 130]
    assert found.best[0].step == 30, "the latest among equals"


def test_without_trained_trajectories_the_last_validation_is_shown(tmp_path: Path) -> None:
    for step in (0, 5):
        lines(tmp_path / f"trajectories/validation_{step:06d}.jsonl", [trajectory(step, 0.5)])
    found = extremes(tmp_path, pytest.fail)
    assert found.where == "the validation after step 5" and found.best[0].task == 5
    assert extremes(tmp_path / "none", pytest.fail).best == ()


def test_of_many_trajectories_only_the_newest_are_read(tmp_path: Path) -> None:
    for step in range(91, 101):
        lines(tmp_path / f"trajectories/step_{step:06d}.jsonl", [trajectory(step, 1000.0 - step)])
    size = (tmp_path / "trajectories/step_000100.jsonl").stat().st_size
    whole = extremes(tmp_path, pytest.fail, 10 * size)
    assert whole.where == "steps 91 to 100" and whole.best[0].task == 91
    cut = extremes(tmp_path, pytest.fail, 5 * size // 2)
    assert cut.where.startswith("steps 98 to 100, the last 0.00") and cut.where.endswith(" MiB of trajectories")
    assert [e.task for e in cut.best] == [99, 100], "of step 98 only half a line was read"
    lines(tmp_path / "rollout/trajectories.jsonl", [trajectory(task, float(task)) for task in range(1, 10)])
    found = extremes(tmp_path / "rollout", pytest.fail, 3 * size + 9)
    assert found.where.startswith("the rollout, the last ")
    assert [e.task for e in found.worst] == [7, 8, 9]
    with (tmp_path / "rollout/trajectories.jsonl").open("a") as file:
        file.write('3\n{"half')
    said: list[str] = []
    assert extremes(tmp_path / "rollout", said.append, 2 * size).best[0].task == 9
    assert len(said) == 1 and "no JSON object" in said[0]


def test_a_rollout_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{name: played, policy: {model: tiny}}")
    env = {"episodes": 4, "turns_mean": 1.5, "tokens": 40, "failures": {"env_error": 2}, "reward": 0.5,
           "pass_at": {"1": 0.25, "2": 0.75}}  # fmt: skip
    summary = {"tasks": 3, "missing_tasks": 1, "samples": 2, "split": "train", "seconds": 70.0, "tokens_per_s": 9.5,
               "temperature": 1.0, "episodes": 4, "reward": 0.5, "reward_stderr": 0.1, "pass_at": env["pass_at"],
               "failures": {"env_error": 2}, "envs": {ENV: env}}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines(tmp_path / "trajectories.jsonl", [trajectory(i // 2, i / 4) for i in range(4)])
    contents = read_contents(tmp_path)
    assert contents.state == "not finished: 3 tasks of train x 2, played in 1m10s; 1 task is missing"
    assert not contents.finished
    assert dict(contents.headline) == {"reward": "0.5 ± 0.1", "pass@1": "0.25", "pass@2": "0.75", "episodes": "4",
                                       "tokens a second": "9.5"}  # fmt: skip
    assert contents.environments[0].tokens == 10 and contents.environments[0].failed == 2
    assert contents.episodes.where == "the rollout" and [e.reward for e in contents.episodes.best] == [0.75, 0.25]
    assert "answer 1" in html(contents) and "pass@2" in markdown(contents)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "request.json").write_text('{"tasks": 3, "samples": 2, "split": "train"}')
    contents = read_contents(tmp_path)
    assert contents.state == "not finished: 3 tasks of train x 2" and not contents.finished
    assert len(contents.episodes.best) == 2 and "answer 1" in html(contents)


def test_messages_of_every_form_are_shown(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "search", "arguments": '{"q": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": "x"}]},
        {"role": "assistant", "content": "an example of the prompt"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": {"found": 2}},
    ]
    lines(tmp_path / "trajectories/step_000001.jsonl", [trajectory(1, 0.25, messages=messages)])
    (episode,) = extremes(tmp_path, pytest.fail).best
    texts = [said.text for said in episode.messages]
    assert texts[0].startswith("look\n") and "image_url" in texts[0]
    assert texts[2] == 'hm\n→ search({"q": 1})'
    assert texts[3] == '{"found": 2}'
    assert [bool(said.note) for said in episode.messages] == [False, False, True, False]
    assert episode.messages[2].note == "reward 0.25, 5 tokens, 0.5 s, cut off by the token limit"


def test_the_last_reply_is_the_last_turns(tmp_path: Path) -> None:
    turns = [{**trajectory(1, 0.0)["turns"][0], "reward": reward} for reward in (0.0, 1.0, 2.0)]
    messages = [{"role": "user", "content": "go on"}, {"role": "assistant", "content": "the end of a long history"}]
    lines(tmp_path / "trajectories/step_000001.jsonl", [trajectory(1, 0.25, messages=messages, turns=turns)])
    (episode,) = extremes(tmp_path, pytest.fail).best
    assert [said.note[:8] for said in episode.messages] == ["", "reward 2"]


def test_long_texts_and_long_episodes_are_shortened(tmp_path: Path) -> None:
    assert clipped("x" * 2400) == "x" * 2400
    text = clipped("a" * 5000 + "z" * 5000)
    assert text.startswith("aaa") and text.endswith("zzz") and "7,900 characters are left out" in text
    many = [{"role": "user", "content": str(i)} for i in range(100)]
    lines(tmp_path / "trajectories/step_000001.jsonl", [trajectory(1, 1.0, messages=many)])
    (episode,) = extremes(tmp_path, pytest.fail).best
    assert len(episode.messages) == 31
    assert "70 messages" in episode.messages[6].text and episode.messages[-1].text == "99"


def test_a_large_run_has_small_pictures() -> None:
    points = [(step, float(step)) for step in range(10_000)]
    few = thinned(points)
    assert len(few) == 240 and few[-1][0] == 9999
    assert sum(value for _, value in few) / 240 == pytest.approx(4999.5, rel=1e-3)
    assert thinned(points[:5]) == points[:5]


@pytest.mark.parametrize("span", [(0, 1), (0.02, 0.97), (-3e-6, 8e-6), (5, 5), (0, 0), (-2, -2), (1e7, 1.1e7), (0, 10)])
def test_ticks_are_round_and_cover_the_values(span: tuple[float, float]) -> None:
    found = ticks(*span)
    assert found[0] <= span[0] and found[-1] >= span[1]
    assert 2 <= len(found) <= 7
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps))


def test_labels_of_ticks_are_as_far_apart_as_they_are() -> None:
    assert labels(ticks(1.26, 1.36)) == ["1.25", "1.275", "1.3", "1.325", "1.35", "1.375"]
    assert labels(ticks(0, 1)) == ["0", "0.25", "0.5", "0.75", "1"]
    assert labels(ticks(3210, 3800)) == ["3,200", "3,400", "3,600", "3,800"]


@given(st.floats(allow_nan=False), st.floats(allow_nan=False))
@example(-1.7e308, 1.7e308)
@example(0.0, 5e-324)
@example(1.0, 1.0000000000000002)
def test_ticks_of_any_values_are_few_and_rise(one: float, other: float) -> None:
    found = ticks(min(one, other), max(one, other))
    assert 2 <= len(found) <= 8 and all(map(math.isfinite, found))
    assert found[0] < found[-1] and found == sorted(found)


def test_numbers_as_people_write_them() -> None:
    told = [number(value) for value in (None, 0.0, 0.12345, 1234.5, 4.3e-6, 2.5e9, -0.5)]
    assert told == ["-", "0", "0.123", "1,234", "4.3e-6", "2.5e9", "-0.5"]
    assert fence("a ```` b") == "`````" and fence("plain") == "```"


def test_the_same_run_gives_the_same_page_but_for_its_time(run: Path) -> None:
    os.utime(run / "metrics.jsonl", (0, 0))
    os.utime(run / "events.jsonl", (0, 0))
    (run / "summary.json").write_text('{"seconds": 1}')
    first, second = (write_report(run)[0].read_text() for _ in range(2))
    assert re.sub("Made by.*", "", first) == re.sub("Made by.*", "", second)


def test_no_folder_is_an_error_of_the_family(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRun, match=r"config\.yaml"):
        read_contents(tmp_path)
