"""The viewer without a browser: what it reads of a run, and what its server answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient
from tokenizers import normalizers
from viewer_runs import SimulatedRun, tokenizer

from raygym.cli import BAD_USAGE, main
from raygym.config import ConfigError
from raygym.viewer.app import viewer_app
from raygym.viewer.command import listening_socket, view
from raygym.viewer.growing_lines import GrowingLines
from raygym.viewer.metric_series import MetricSeries
from raygym.viewer.run_folder import NotARun, RunFolder
from raygym.viewer.table_query import QueryError, TableQuery
from raygym.viewer.token_text import TokenText
from raygym.viewer.trajectory_index import TrajectoryIndex
from raygym.viewer.trajectory_row import trajectory_row
from raygym.viewer.trajectory_view import segments, token_part, turn_of

NAMED = {"file": "trajectories/step_000003", "number": 0, "kind": "step", "step": 3, "offset": 0}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    run = SimulatedRun(tmp_path_factory.mktemp("runs") / "simulated", steps=6)
    run.write()
    return run


@pytest.fixture(scope="module")
def client(simulated):
    folder = RunFolder(simulated.path)
    folder.refresh()
    # Without `with`, its lifespan does not begin: no thread reads beside the tests.
    return TestClient(viewer_app(folder), base_url="http://127.0.0.1:8642")


@pytest.fixture(scope="module")
def rows(simulated):
    index = TrajectoryIndex(simulated.path)
    index.refresh()
    return index.rows


def get(client, name, /, status=200, **params):
    answer = client.get(f"/api/{name}", params=params)
    assert answer.status_code == status, answer.text
    return answer.json()


def written_ago(path, seconds):
    """Everything in a folder was written so long ago."""
    for each in path.rglob("*"):
        os.utime(each, (time.time() - seconds,) * 2)


def write_record(path, record, group_id):
    """A file of one trajectory, as long whatever the rest of it says."""
    record = {**record, "group_id": group_id, "reward": 1.0, "logprobs": [0.0] * len(record["token_ids"]), "turns": []}
    path.write_text(json.dumps(record | {"learner_logprobs": None}) + "\n", encoding="utf-8")
    return path


class TestRow:
    def test_is_cut_out_of_a_line_as_it_would_be_parsed(self, simulated):
        lines = [line for path in sorted(simulated.path.glob("trajectories/*")) for line in path.open("rb")]
        for line in lines:
            # Another order of keys has to be parsed whole.
            turned = json.dumps(dict(reversed(json.loads(line).items()))).encode() + b"\n"
            row, whole = trajectory_row(line, **NAMED), trajectory_row(turned, **NAMED)
            row.length = whole.length = 0
            assert row == whole
            assert row.tokens == len(json.loads(line)["token_ids"])
        assert len(lines) > 50

    @pytest.mark.parametrize(
        "text",
        [
            ', "token_ids": [1, 2], "loss_mask": [1], "weight_versions": [7]',
            '"messages": [", "turns": [{"start": 0',
            "\\",
            "\ud800",
        ],
    )
    def test_is_not_misled_by_what_a_policy_writes(self, simulated, text):
        record = simulated.record(3, 0, 0)
        record["messages"].append(
            {"role": "assistant", "content": text, "tool_calls": [{"turns": [1], "token_ids": [9]}]}
        )
        row = trajectory_row(json.dumps(record).encode(), **NAMED)
        assert (row.turns, row.tokens) == (len(record["turns"]), len(record["token_ids"]))
        assert row.generated == sum(record["loss_mask"])
        assert (row.version_min, row.version_max) == (1, 2)

    @pytest.mark.parametrize("line", [b"{}", b"[]", b"null", b"1", b"{", b"", b'{"env": 1, "turns": 3}', b"\xff\xfe"])
    def test_refuses_what_is_no_trajectory(self, line):
        with pytest.raises(ValueError):
            trajectory_row(line, **NAMED)


class TestGrowingLines:
    def test_reads_each_whole_line_once(self, tmp_path):
        path = tmp_path / "lines"
        lines = GrowingLines(path, tmp_path)
        assert not lines.restarted()
        assert list(lines.new()) == []
        path.write_bytes(b"one\ntw")
        assert not lines.restarted()
        assert list(lines.new()) == [(0, b"one\n")]
        with path.open("ab") as file:
            file.write(b"o\nthree\n")
        assert not lines.restarted()
        assert list(lines.new()) == [(4, b"two\n"), (8, b"three\n")]

    @pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "cut"])
    def test_begins_anew_where_a_resumed_run_has_cut_the_file(self, tmp_path, replaced):
        path = tmp_path / "lines"
        path.write_bytes(b"one\ntwo\n")
        lines = GrowingLines(path, tmp_path)
        lines.restarted()
        assert len(list(lines.new())) == 2
        if replaced:
            (tmp_path / "new").write_bytes(b"one\n222\n3\n")
            (tmp_path / "new").replace(path)
        else:
            os.truncate(path, 4)
        assert lines.restarted()
        assert next(iter(lines.new())) == (0, b"one\n")

    def test_looks_at_a_line_without_an_end_once(self, tmp_path, monkeypatch):
        path = tmp_path / "lines"
        path.write_bytes(b"one\n" + b"t" * 2**21)
        lines = GrowingLines(path, tmp_path)
        lines.restarted()
        assert len(list(lines.new())) == 1
        assert lines.looked_at == lines.size
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", None)
            lines.restarted()
            assert list(lines.new()) == []
        with path.open("ab") as file:
            file.write(b"wo\nthree\n")
        assert not lines.restarted()
        assert [start for start, _ in lines.new()] == [4, 4 + 2**21 + 3]

    def test_tells_why_a_file_cannot_be_read_and_tries_again(self, tmp_path, monkeypatch):
        path = tmp_path / "lines"
        path.write_bytes(b"one\n")
        lines = GrowingLines(path, tmp_path)
        lines.restarted()

        def stale(*_):
            raise OSError(116, "Stale file handle")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", stale)
            assert list(lines.new()) == []
        assert lines.problem == "lines cannot be read (Stale file handle)"
        assert len(list(lines.new())) == 1
        assert lines.problem == ""


class TestIndex:
    def test_follows_a_run(self, tmp_path):
        run = SimulatedRun(tmp_path / "run", steps=4)
        index = TrajectoryIndex(run.path)
        index.refresh()
        assert index.rows == []
        run.step(1)
        index.refresh()
        assert len(index.rows) == 12
        before = index.revision
        run.step(2)
        index.refresh()
        assert len(index.rows) == 24
        assert index.revision > before
        assert {row.step for row in index.rows} == {1, 2}

    def test_finds_each_trajectory_again(self, simulated):
        index = TrajectoryIndex(simulated.path)
        index.refresh()
        for row in index.rows:
            if row.kind == "dropped":
                assert index.find(row.file, row.number) is None
                assert row.failure == "env_timeout"
                continue
            assert index.find(row.file, row.number) == row
            record = json.loads(index.line(row))
            assert (record["group_id"], record["episode"]) == (row.group_id, row.episode)
        assert index.progress.read_bytes == index.progress.total_bytes
        assert [row.episode for row in index.group("trajectories/step_000003", "train-9")] == [0, 1, 2, 3]

    def test_leaves_out_lines_that_are_no_trajectories(self, tmp_path, simulated):
        good = json.dumps(simulated.record(1, 0, 0))
        path = tmp_path / "trajectories.jsonl"
        path.write_text(f"{good}\nnonsense\n[]\n{good}\n", encoding="utf-8")
        index = TrajectoryIndex(tmp_path)
        index.refresh()
        assert [row.number for row in index.rows] == [0, 3]
        assert index.progress.unreadable == 2
        assert index.find("trajectories", 3) is not None
        assert index.find("trajectories", 1) is None

    @pytest.mark.parametrize(
        "line",
        ['{"env": "e", "task": Infinity', "[" * 100_000, '{"turns": ' + "[" * 100_000],
        ids=["infinite", "deep", "deep turns"],
    )
    @pytest.mark.parametrize("name", ["trajectories", "dropped"])
    def test_no_line_ends_the_reading(self, tmp_path, simulated, name, line):
        if line.endswith("Infinity"):
            line += ', "group_id": "g", "cause": "x", "episode": 0, "status": "s", "reward": 0, "messages": [], '
            line += '"turns": [], "token_ids": [], "loss_mask": [], "weight_versions": []}'
        good = simulated.record(1, 0, 0) | {"cause": "env_timeout"}
        path = tmp_path / f"{name}.jsonl"
        path.write_text(f"{line}\n{json.dumps(good)}\n", encoding="utf-8")
        index = TrajectoryIndex(tmp_path)
        index.refresh()
        assert [row.number for row in index.rows] == [1]
        assert index.progress.unreadable == 1

    def test_a_step_of_two_alarms_is_there_once_and_not_beside_its_own_file(self, tmp_path, simulated):
        line = json.dumps(simulated.record(2, 0, 0)) + "\n"
        for name in ("high", "low"):
            folder = tmp_path / "alarms" / f"step_000002_{name}"
            folder.mkdir(parents=True)
            (folder / "trajectories.jsonl").write_text(line, encoding="utf-8")
        index = TrajectoryIndex(tmp_path)
        index.refresh()
        assert [row.file for row in index.rows] == ["alarms/step_000002_high/trajectories"]
        # The alarm may be seen before the step's own file is.
        (tmp_path / "trajectories").mkdir()
        (tmp_path / "trajectories" / "step_000002.jsonl").write_text(line, encoding="utf-8")
        index.refresh()
        assert [row.file for row in index.rows] == ["trajectories/step_000002"]

    def test_a_single_file_may_be_a_link(self, tmp_path, simulated):
        (tmp_path / "far").mkdir()
        (tmp_path / "far" / "of.jsonl").write_text(json.dumps(simulated.record(1, 0, 0)) + "\n", encoding="utf-8")
        (tmp_path / "near").mkdir()
        (tmp_path / "near" / "mine.jsonl").symlink_to(tmp_path / "far" / "of.jsonl")
        index = TrajectoryIndex(tmp_path / "near" / "mine.jsonl")
        index.refresh()
        assert len(index.rows) == 1

    def test_shows_an_alarms_trajectories_where_a_run_keeps_no_others(self, tmp_path, simulated):
        line = json.dumps(simulated.record(2, 0, 0)) + "\n"
        for step in (1, 2):
            folder = tmp_path / "alarms" / f"step_{step:06d}_not_finite"
            folder.mkdir(parents=True)
            (folder / "trajectories.jsonl").write_text(line, encoding="utf-8")
        (tmp_path / "trajectories").mkdir()
        (tmp_path / "trajectories" / "step_000001.jsonl").write_text(line, encoding="utf-8")
        index = TrajectoryIndex(tmp_path)
        index.refresh()
        assert [(row.kind, row.step) for row in index.rows] == [("step", 1), ("alarm", 2)]

    def test_shows_no_file_that_a_link_leads_to(self, tmp_path, simulated):
        (tmp_path / "secret.jsonl").write_text(json.dumps(simulated.record(1, 0, 0)) + "\n", encoding="utf-8")
        run = tmp_path / "run"
        (run / "trajectories").mkdir(parents=True)
        (run / "trajectories" / "step_000001.jsonl").symlink_to(tmp_path / "secret.jsonl")
        index = TrajectoryIndex(run)
        index.refresh()
        assert index.rows == []


class TestQuery:
    @pytest.mark.parametrize(
        ("asked", "fits"),
        [
            ({"env": "raygym/NumberGuess (simulated)"}, lambda row: "Guess" in row.env),
            ({"reward_min": "0.2", "reward_max": "0.5"}, lambda row: row.reward == 0.25),
            ({"kind": "validation", "step": "", "drifted": "0"}, lambda row: row.kind == "validation"),
            ({"drifted": "1"}, lambda row: row.drifted),
            ({"version": "2"}, lambda row: row.version_min in (1, 2) and row.version_max >= 2),
            ({"failure": "env_timeout"}, lambda row: row.status == "dropped"),
            ({"tokens_min": "150", "turns_max": "2"}, lambda row: row.tokens >= 150 and row.turns <= 2),
            ({"step_min": "6", "status": "terminated"}, lambda row: row.step == 6 and row.status == "terminated"),
        ],
    )
    def test_keeps_what_fits(self, rows, asked, fits):
        answer = TableQuery.parse({**asked, "limit": "1000"}).answer(rows)
        wanted = [row.shown() for row in rows if fits(row)]
        assert answer["rows"] == wanted
        assert answer["total"] == len(wanted) > 0
        rewards = [row["reward"] for row in wanted if row["reward"] is not None]
        assert sum((answer["rewards"] or {"counts": []})["counts"]) == len(rewards)

    def test_counts_dropped_tasks_by_themselves(self, rows):
        answer = TableQuery.parse({"env": "raygym/Orders (simulated)"}).answer(rows)
        dropped = sum(row.kind == "dropped" for row in rows)
        assert answer["total"] - answer["trajectories"] == dropped > 0
        assert answer["of"] - answer["of_trajectories"] == dropped

    @pytest.mark.parametrize("ends", [(1e308, 1.7e308), (-1.7e308, 1.7e308), (0.0, 5e-324), (2.0, 2.0)])
    def test_rewards_of_any_size_have_a_mean_and_a_spread(self, rows, ends):
        odd = [replace(row, reward=reward) for row, reward in zip(rows, ends * 6, strict=False)]
        answer = TableQuery.parse({}).answer(odd)
        assert ends[0] <= answer["reward_mean"] <= ends[1]
        assert sum(answer["rewards"]["counts"]) == 12

    def test_orders_and_pages(self, rows):
        first = TableQuery.parse({"sort": "-reward", "limit": "5"}).answer(rows)
        second = TableQuery.parse({"sort": "-reward", "limit": "5", "offset": "5"}).answer(rows)
        everything = TableQuery.parse({"sort": "-reward", "limit": "1000"}).answer(rows)["rows"]
        assert first["rows"] + second["rows"] == everything[:10]
        rewards = [row["reward"] for row in everything]
        known = [reward for reward in rewards if reward is not None]
        assert rewards == sorted(known, reverse=True) + [None] * (len(rewards) - len(known))

    @pytest.mark.parametrize(
        "asked",
        [
            {"sort": "offset"},
            {"reward_min": "much"},
            {"version": "nan"},
            {"limit": "x"},
            {"__class__": "a"},
            {"cause_min": "1"},
        ],
    )
    def test_refuses_what_makes_no_sense(self, asked):
        with pytest.raises(QueryError, match=next(iter(asked))):
            TableQuery.parse(asked)


class TestMetrics:
    def test_are_columns_with_gaps(self, simulated):
        series = MetricSeries(simulated.path / "metrics.jsonl")
        series.refresh()
        columns = series.columns(["val/reward", "reward/mean", "unknown"])
        assert columns["steps"] == list(range(7))
        assert set(columns["series"]) == {"val/reward", "reward/mean"}
        assert [value is not None for value in columns["series"]["val/reward"]] == [
            True,
            *[False] * 3,
            True,
            False,
            False,
        ]
        assert "sync/checksum" not in series.names

    def test_are_means_where_there_are_more_steps_than_a_chart_shows(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        rows = [{"step": step, "loss": None if step == 1 else step, "flag": True} for step in range(2500)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n[]\n", encoding="utf-8")
        series = MetricSeries(path)
        series.refresh()
        columns = series.columns()
        assert columns["bucket"] == 3
        assert len(columns["steps"]) == 834
        assert columns["series"]["loss"][:2] == [1.0, 4.0]
        assert series.names == ["loss"]

    def test_the_numbers_of_the_whole_run_are_exact(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        rows = [{"step": step, "episodes/completed": 8, "time/step_s": float(step)} for step in range(1, 2501)]
        for row in rows[::10]:
            row["episodes/failed/env_timeout"] = 3
        path.write_text("".join(json.dumps(row) + "\n" for row in [{"step": 0, "val/reward": 0.5}, *rows]))
        series = MetricSeries(path)
        series.refresh()
        columns = series.columns()
        assert columns["exact"]["episodes/completed"] == {"first": 8, "last": 8, "sum": 20_000, "count": 2500}
        assert columns["exact"]["episodes/failed/env_timeout"]["sum"] == 750
        assert columns["exact"]["time/step_s"]["last"] == series.last("time/step_s") == 2500
        assert columns["exact"]["val/reward"] == {"first": 0.5, "last": 0.5, "sum": 0.5, "count": 1}
        assert columns["bucket"] == 3
        # Of three steps one had three failures, or none had: a step that names none had none.
        failed = columns["series"]["episodes/failed/env_timeout"]
        assert {round(value, 9) for value in failed} == {0.0, 1.0, 1.5}

    def test_lines_without_bottom_and_numbers_without_end_are_left_out(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        huge = "1" + "0" * 400
        lines = [
            f'{{"step": {huge}}}',
            "[" * 100_000,
            f'{{"step": 1, "a": {huge}, "b": 1e308}}',
            '{"step": 2, "b": 1e308}',
        ]
        path.write_text("".join(line + "\n" for line in lines))
        series = MetricSeries(path)
        series.refresh()
        assert (series.unreadable, series.names, series.last_step) == (2, ["b"], 2)
        assert json.dumps(series.columns()["exact"]["b"], allow_nan=False)


class TestTokens:
    def test_say_what_they_are(self):
        made = tokenizer()
        text = TokenText(made)
        written = "Où est ma commande? 😀\n"
        ids = made.encode(written, add_special_tokens=False).ids
        pieces = [text.text(token_id) for token_id in ids]
        assert pieces[0] == "O"
        # Pieces of a letter are told as bytes; together they are the text.
        assert (
            b"".join(
                p.encode().decode("unicode_escape").encode("latin-1") if "\\x" in p else p.encode() for p in pieces
            )
            == written.encode()
        )
        assert text.text(made.token_to_id("<|im_end|>")) == "<|im_end|>"
        assert text.is_special(made.token_to_id("<|im_end|>"))
        assert text.text(10**6) == "[1000000]"

    def test_that_would_be_others_are_found_in_their_place(self):
        made = tokenizer()
        text = TokenText(made)
        ids = made.encode("Let me look that up. The order arrives on Tuesday.", add_special_tokens=False).ids
        assert text.retokenized([*ids, made.token_to_id("<|im_end|>")], 10) == []
        at = max(range(len(ids)), key=lambda index: len(made.id_to_token(ids[index])))
        single = [made.token_to_id(letter) for letter in made.id_to_token(ids[at])]
        (span,) = text.retokenized([*ids[:at], *single, *ids[at + 1 :]], 10)
        assert (span.start, span.end) == (10 + at, 10 + at + len(single))
        assert span.instead == (text.text(ids[at]),)

    def test_each_of_many_places_of_a_long_turn_is_found(self):
        made = tokenizer()
        text = TokenText(made)
        sentence = made.encode("Let me look that up. ", add_special_tokens=False).ids
        whole = made.encode("Let me look that up. " * 500, add_special_tokens=False).ids
        assert whole == sentence * 500 and len(whole) > 3000
        ids, wanted = [], []
        for number, token_id in enumerate(whole):
            if number % 700 == 3:
                single = [made.token_to_id(letter) for letter in made.id_to_token(token_id)]
                wanted.append((len(ids), len(ids) + len(single), (text.text(token_id),)))
                ids += single
            else:
                ids.append(token_id)
        assert len(wanted) > 3
        assert [(span.start, span.end, span.instead) for span in text.retokenized(ids, 0)] == wanted

    def test_without_places_to_compare_one_span_has_all_differences(self):
        made = tokenizer()
        made.normalizer = normalizers.Lowercase()
        ids = made.encode("me look that up.", add_special_tokens=False).ids
        upper = [made.token_to_id("L"), *ids, made.token_to_id("L"), *ids]
        (span,) = TokenText(made).retokenized(upper, 3)
        assert span.start == 3
        assert span.end <= 3 + len(ids) + 2 + 1

    def test_a_folder_without_a_tokenizer_has_no_text(self, tmp_path):
        assert TokenText.of(tmp_path) is None
        (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
        assert TokenText.of(tmp_path) is None


class TestConversation:
    def test_turns_are_counted_from_the_end(self):
        roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant", "user"]
        assert turn_of([{"role": role} for role in roles], 2) == [None, None, None, None, 0, 0, 1, 1]
        assert turn_of([{"role": "user"}], 0) == [None]

    def test_segments_cover_all_tokens(self, simulated):
        record = simulated.record(3, 0, 0)
        found = segments(record["turns"], len(record["token_ids"]))
        assert [part["start"] for part in found[1:]] == [part["end"] for part in found[:-1]]
        assert (found[0]["start"], found[-1]["end"]) == (0, len(record["token_ids"]))
        of_policy = [i for part in found if part["kind"] == "policy" for i in range(part["start"], part["end"])]
        assert of_policy == [i for i, trained in enumerate(record["loss_mask"]) if trained]

    def test_tokens_come_in_parts(self, simulated, monkeypatch):
        monkeypatch.setattr("raygym.viewer.trajectory_view.MOST_TOKENS", 50)
        record, ids, start = simulated.record(3, 0, 0), [], 0
        while start < len(record["token_ids"]):
            part = token_part(record, start, None)
            ids, start = ids + part["ids"], part["end"]
        assert ids == record["token_ids"]
        assert token_part(record, 10**9, None)["ids"] == []


class TestServer:
    def test_tells_of_the_run(self, client):
        told = get(client, "run")
        assert (told["name"], told["kind"], told["steps"]) == ("simulated", "run", 6)
        assert told["status"]["step"] == 6
        assert [alarm["alarm"] for alarm in told["alarms"]] == ["gradient_spike"]
        assert [event["what"] for event in get(client, "events")["events"]] == ["lost", "recovered"]
        assert get(client, "metrics", name="loss")["series"].keys() == {"loss"}
        assert get(client, "metrics", name=["lr", "loss", "no, such"])["series"].keys() == {"lr", "loss"}

    def test_a_metric_may_have_a_comma_in_its_name(self, tmp_path):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean/sums, easy": 0.5, "lr": 1}\n')
        with TestClient(viewer_app(RunFolder(tmp_path)), base_url="http://127.0.0.1:8642") as client:
            while not get(client, "run")["metrics"]:
                time.sleep(0.01)
            found = get(client, "metrics", name="reward/mean/sums, easy")
        assert found["series"] == {"reward/mean/sums, easy": [0.5]}

    def test_opens_a_trajectory(self, client, simulated):
        asked = {"file": "trajectories/step_000003", "number": 1}
        told = get(client, "trajectory", **asked)
        record = json.loads((simulated.path / "trajectories/step_000003.jsonl").read_text().splitlines()[1])
        assert told["messages"] == record["messages"]
        assert told["has_learner"]
        assert len(told["group"]) == 4
        assert told["drifted"]
        assert len(told["retokenized"]) == 1
        tokens = get(client, "tokens", **asked)
        assert tokens["ids"] == record["token_ids"]
        assert tokens["learner"] == record["learner_logprobs"]
        assert "".join(tokens["texts"]).startswith("<|im_start|>system\nYou help")
        episodes = get(client, "group", file=asked["file"], group_id="train-9")["episodes"]
        assert [each["row"]["episode"] for each in episodes] == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("name", "params", "status"),
        [
            ("trajectory", {"file": "../../etc/passwd", "number": "0"}, 404),
            ("trajectory", {"file": "trajectories/step_000003.jsonl", "number": "0"}, 404),
            ("trajectory", {"file": "trajectories/step_000003", "number": "99"}, 404),
            ("trajectory", {"file": "trajectories/step_000003", "number": "-1"}, 400),
            ("tokens", {"file": "trajectories/step_000003", "number": "1", "start": "x"}, 400),
            ("group", {"file": "ledger", "group_id": "train-9005"}, 404),
            ("trajectories", {"sort": "nothing"}, 400),
        ],
    )
    def test_says_what_is_wrong(self, client, name, params, status):
        assert get(client, name, status, **params)["error"]

    @pytest.mark.parametrize(
        "path", ["/../cli.py", "/%2e%2e/cli.py", "/..%2fcli.py", "/static/app.js", "/config.yaml", "/.env"]
    )
    def test_serves_its_own_files_only(self, client, path):
        assert client.get(path).status_code == 404

    @pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
    @pytest.mark.parametrize("path", ["/", "/api/run", "/api/trajectories"])
    def test_has_no_method_that_writes(self, client, method, path):
        assert client.request(method, path).status_code == 405

    @pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::1]:80"])
    def test_answers_to_its_own_name_only(self, client, host):
        answer = client.get("/api/run", headers={"host": host})
        assert answer.status_code == 400
        assert "simulated" not in answer.text

    def test_answers_to_a_forwarded_port(self, client):
        assert client.get("/api/status", headers={"host": "localhost:9999"}).status_code == 200

    @pytest.mark.parametrize("path", ["/", "/app.js", "/style.css", "/api/run", "/api/trajectory", "/nothing"])
    def test_every_answer_forbids_foreign_script(self, client, path):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers

    def test_its_page_names_nothing_outside(self, client):
        folder = Path(viewer_app.__code__.co_filename).parent / "static"
        for path in folder.iterdir():
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text
            assert "https://" not in text
            assert "innerHTML" not in text
            assert client.get(f"/{path.name}" if path.name != "index.html" else "/").text == path.read_text(
                encoding="utf-8"
            )

    def test_numbers_that_no_browser_reads_are_null(self, tmp_path, simulated):
        record = simulated.record(1, 0, 0)
        record["logprobs"][60] = float("nan")
        record["metrics"] = {"broken": float("inf")}
        record["messages"][0]["content"] = "half a pair: \ud800"
        (tmp_path / "trajectories.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        folder = RunFolder(tmp_path)
        folder.refresh()
        client = TestClient(viewer_app(folder), base_url="http://localhost")
        assert get(client, "trajectory", file="trajectories", number=0)["metrics"] == {"broken": None}
        assert get(client, "tokens", file="trajectories", number=0)["logprobs"][60] is None

    def test_a_broken_record_is_told(self, tmp_path, simulated):
        record = {**simulated.record(1, 0, 0), "messages": "none"}
        (tmp_path / "trajectories.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        folder = RunFolder(tmp_path)
        folder.refresh()
        client = TestClient(viewer_app(folder), base_url="http://localhost")
        assert "cannot be read" in get(client, "trajectory", 422, file="trajectories", number=0)["error"]

    def test_what_nobody_thought_of_is_told_as_json_under_the_same_policy(self, simulated, monkeypatch):
        folder = RunFolder(simulated.path)

        def fails():
            raise RuntimeError("nobody thought of it")

        monkeypatch.setattr(folder, "events", fails)
        client = TestClient(viewer_app(folder), base_url="http://127.0.0.1", raise_server_exceptions=False)
        assert "nobody thought of it" in get(client, "events", 500)["error"]
        headers = client.get("/api/events").headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"

    @pytest.mark.parametrize("error", [RecursionError(), OverflowError("sum"), ZeroDivisionError()])
    def test_what_a_run_may_cause_is_no_failure_of_the_viewer(self, simulated, monkeypatch, error):
        folder = RunFolder(simulated.path)

        def fails():
            raise error

        monkeypatch.setattr(folder, "events", fails)
        client = TestClient(viewer_app(folder), base_url="http://127.0.0.1")
        assert type(error).__name__ in get(client, "events", 422)["error"]

    def test_changes_nothing_in_the_run(self, client, simulated):
        before = {path: path.stat().st_mtime_ns for path in simulated.path.rglob("*")}
        for name in ("run", "status", "events", "metrics", "trajectories"):
            get(client, name)
        get(client, "tokens", file="trajectories/step_000001", number=0)
        assert {path: path.stat().st_mtime_ns for path in simulated.path.rglob("*")} == before


class TestFolder:
    def test_tells_how_a_run_stands(self, tmp_path):
        run = SimulatedRun(tmp_path / "run", steps=2)
        folder = RunFolder(run.path)
        run.step(1)
        folder.refresh()
        assert folder.status()["state"] == "running"
        written_ago(run.path, 125)
        # A step took 15 s.
        assert (folder.status()["state"], folder.status()["told"]) == ("quiet", "quiet for 2 min")
        run.append("metrics.jsonl", {"step": 2, "time/step_s": 3000.0})
        folder.refresh()
        written_ago(run.path, 8000)
        assert folder.status()["state"] == "running"
        written_ago(run.path, 9100)
        assert folder.status()["told"] == "quiet for 2 h"
        (run.path / "logs").mkdir()
        assert folder.status()["state"] == "running"
        run.event("given_up", "learner gang", "lost 4 times")
        folder.refresh()
        written_ago(run.path, 9100)
        assert folder.status()["told"] == "stopped"
        run.finish()
        assert folder.status()["told"] == "finished"

    def test_an_interrupted_rollout_is_not_finished(self, tmp_path, simulated):
        trajectories, summary = tmp_path / "trajectories.jsonl", tmp_path / "summary.json"
        trajectories.write_text(json.dumps(simulated.record(1, 0, 0)) + "\n", encoding="utf-8")
        summary.write_text('{"seconds": 9.0, "missing_tasks": 3}', encoding="utf-8")
        folder = RunFolder(tmp_path)
        assert (folder.status()["state"], folder.status()["told"]) == ("stopped", "stopped, 3 tasks missing")
        # The same command goes on with it.
        os.utime(summary, (1, 1))
        assert folder.status()["state"] == "running"
        summary.write_text('{"seconds": 9.0, "missing_tasks": 0}', encoding="utf-8")
        os.utime(summary, (1, 1))
        assert folder.status()["state"] == "finished"

    def test_goes_on_after_what_nobody_thought_of(self, tmp_path, monkeypatch):
        run = SimulatedRun(tmp_path / "run", steps=2)
        folder, looks, read = RunFolder(run.path), [], threading.Event()

        def look(*_):
            looks.append(1)
            if len(looks) < 3:
                raise RuntimeError("nobody thought of it")
            read.set()

        monkeypatch.setattr("raygym.viewer.run_folder._LOOK_EVERY_S", 0.01)
        monkeypatch.setattr(folder.trajectories, "refresh", look)
        folder.start()
        assert read.wait(60)
        folder.stop()
        assert folder.status()["problem"] == ""
        looks.clear()
        monkeypatch.setattr(folder._stopped, "wait", lambda _: True)
        folder._follow(folder._look_at_trajectories)
        assert folder.status()["problem"] == "RuntimeError: nobody thought of it"

    @pytest.mark.parametrize("link", ["config.yaml", "summary.json", "metrics.jsonl", "events.jsonl", "alarm.json"])
    def test_shows_no_file_that_a_link_leads_to(self, tmp_path, link):
        run = SimulatedRun(tmp_path / "run", steps=2)
        secret = tmp_path / "secret"
        secret.write_text('{"step": 1, "what": "secret", "alarm": "secret", "secret": 2}\n', encoding="utf-8")
        path = run.path / ("alarms/step_000001_x/alarm.json" if link == "alarm.json" else link)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(secret)
        folder = RunFolder(run.path)
        folder.refresh()
        assert "secret" not in str((folder.overview(), folder.events(), folder.metrics.columns()))

    def test_a_pipe_in_a_run_is_not_waited_for(self, tmp_path):
        run = SimulatedRun(tmp_path / "run", steps=2)
        os.mkfifo(run.path / "summary.json")
        os.mkfifo(run.path / "metrics.jsonl")
        folder = RunFolder(run.path)
        folder.refresh()
        assert folder.overview()["summary"] is None

    def test_a_file_that_was_replaced_shows_its_new_trajectory(self, tmp_path, simulated):
        path = tmp_path / "trajectories.jsonl"
        folder = RunFolder(write_record(path, simulated.record(1, 0, 0), "before").parent)
        folder.refresh()
        (before,) = folder.trajectories.rows
        assert folder.record(before)["group_id"] == "before"
        write_record(tmp_path / "new", simulated.record(1, 0, 0), "behind").replace(path)
        size = path.stat().st_size
        # Whoever asks between the replacement and the next look gets neither of them.
        with pytest.raises((OSError, LookupError)):
            folder.trajectories.line(before)
        folder.refresh()
        (after,) = folder.trajectories.rows
        assert (after.offset, after.length) == (before.offset, size)
        assert folder.record(after)["group_id"] == "behind"

    def test_a_rollout_and_a_single_file_open(self, tmp_path, simulated):
        (tmp_path / "request.json").write_text("{}", encoding="utf-8")
        path = tmp_path / "trajectories.jsonl"
        path.write_text(json.dumps(simulated.record(1, 0, 0)) + "\n", encoding="utf-8")
        for opened, kind in ((tmp_path, "rollout"), (path, "file")):
            folder = RunFolder(opened)
            folder.refresh()
            assert folder.kind == kind
            assert [row.file for row in folder.trajectories.rows] == ["trajectories"]
            assert folder.overview()["status"]["total_bytes"] == path.stat().st_size

    def test_the_policys_tokenizer_is_looked_for_without_building_it(self, tmp_path, monkeypatch):
        monkeypatch.setenv("RAYGYM_CACHE", str(tmp_path / "cache"))
        run = SimulatedRun(tmp_path / "run", steps=2)
        (run.path / "checkpoints/step_000001/tokenizer.json").unlink()
        (run.path / "config.yaml").write_text("policy: {model: tiny}\n", encoding="utf-8")
        assert RunFolder(run.path).token_text() is None
        assert not (tmp_path / "cache").exists()
        built = tmp_path / "cache" / "models" / "tiny-v1"
        built.mkdir(parents=True)
        run.tokenizer.save(str(built / "tokenizer.json"))
        assert RunFolder(run.path).token_text() is not None

    @pytest.mark.parametrize("text", ["policy: [1]", "a: [", "- 1", "policy: {model: 3}", "policy: {model: ../../x}"])
    def test_a_strange_config_stops_nothing(self, tmp_path, text):
        (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
        folder = RunFolder(tmp_path)
        folder.refresh()
        assert folder.overview()["config"] == text
        assert folder.token_text() is None

    @pytest.mark.parametrize(
        ("made", "told"),
        [
            (None, "is not there"),
            ("", "no folder of a run"),
            ("a/config.yaml", "holds several runs"),
            ("x.txt", "no folder of a run"),
        ],
    )
    def test_says_what_is_no_run(self, tmp_path, made, told):
        path = tmp_path / "runs"
        if made is not None:
            (path / made).parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(exist_ok=True)
            if made:
                (path / made).write_text("", encoding="utf-8")
        with pytest.raises(NotARun, match=told):
            RunFolder(path)


class TestCommand:
    def test_refuses_what_is_no_run(self, tmp_path, capsys):
        assert main(["view", str(tmp_path / "nothing")]) == BAD_USAGE
        assert "is not there; give a run's folder" in capsys.readouterr().err

    @pytest.mark.parametrize("port", ["-1", "65536"])
    def test_refuses_what_is_no_port(self, simulated, capsys, port):
        assert main(["view", str(simulated.path), "--port", port]) == BAD_USAGE
        assert f"--port: {port} is none" in capsys.readouterr().err

    def test_says_which_port_cannot_be_used_only_where_one_was_given(self, monkeypatch):
        class Refused(socket.socket):
            def bind(self, address):
                raise OSError(99, "Cannot assign requested address")

        monkeypatch.setattr("raygym.viewer.command.socket.socket", Refused)
        with pytest.raises(ConfigError, match=r"^no port of 127\.0\.0\.1 can be used \(Cannot assign"):
            listening_socket(None)
        with pytest.raises(ConfigError, match=r"^--port: 80 cannot be used .*leave it out"):
            listening_socket(80)

    def test_serves_while_a_browser_of_the_terminal_is_open(self, simulated, monkeypatch):
        serves, left, waited = threading.Event(), threading.Event(), []
        monkeypatch.setattr("webbrowser.open", lambda _: (waited.append(serves.wait(20)), left.set()))
        monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: (serves.set(), left.wait(20)))
        before = signal.getsignal(signal.SIGTERM)
        try:
            view(simulated.path, 0, opens=True)
        finally:
            signal.signal(signal.SIGTERM, before)
        assert waited == [True]

    def test_serves_on_the_loopback_interface_until_it_is_ended(self, simulated):
        command = [sys.executable, "-m", "raygym", "view", str(simulated.path), "--port", "0"]
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                line = process.stdout.readline()
                address = line.split(" at ")[1].split()[0]
                assert address.startswith("http://127.0.0.1:")
                with urllib.request.urlopen(f"{address}api/status", timeout=60) as answer:
                    assert json.load(answer)["state"] in ("running", "quiet")
                port = address.rstrip("/").rpartition(":")[2]
                taken = subprocess.run([*command[:-1], port], capture_output=True, text=True, check=False)
                assert taken.returncode == BAD_USAGE
                assert f"--port: {port} cannot be used" in taken.stderr
                assert httpx.get(address, timeout=60).status_code == 200
            finally:
                process.terminate()
            assert process.wait(60) == 0
            assert process.stderr.read() == ""
