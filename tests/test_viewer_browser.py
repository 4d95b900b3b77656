"""The viewer's page in Chromium."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import pytest
from tiers import only_long
from viewer_browser import ARGUMENTS, CHROMIUM, viewing
from viewer_runs import SimulatedRun, large_lines

from raygym.report.command import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
expect = playwright.expect
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium"),
]
WAIT_MS = 90_000  # a busy machine may be slow
expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=WAIT_MS)
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """Serves a run until the test and its pages have ended."""
    with ExitStack() as servers:
        yield lambda path, **options: servers.enter_context(viewing(path, **options))


@pytest.fixture
def open_page(browser, serve):
    """Opens an address; what the console told of errors fails the test at its end."""
    told, contexts = [], []

    def opened(address, width=1280, height=900, theme="light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on(
            "request", lambda request: None if request.url.startswith("http://127.0.0.1") else told.append(request.url)
        )
        page.goto(address)
        return page

    opened.told = told
    yield opened
    for context in contexts:
        context.close()
    assert told == []


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    run = SimulatedRun(tmp_path_factory.mktemp("runs") / "simulated", steps=12)
    run.write()
    run.finish()
    with viewing(run.path) as address:
        yield run, address


def rendered(page):
    """Once the browser has drawn what is there: only then do its observers tell what is in sight."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")


def until(page, happened):
    """Wait for what the page's requests bring about in here."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not happened():
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)


def trajectory(address, number=1, **more):
    query = "".join(f"&{name}={value}" for name, value in more.items())
    return f"{address}#/trajectory?file=trajectories/step_000006&number={number}{query}"


def test_the_overview_shows_charts_and_events(simulated, open_page):
    page = open_page(simulated[1])
    expect(page.locator(".tile").first).to_contain_text("Reward")
    reward = page.get_by_role("img", name="Reward, steps 1 to 12: reward")
    expect(reward.locator("polyline")).to_have_count(1)
    by_env = page.get_by_role("img", name="Reward by environment, steps 1 to 12: raygym/NumberGuess (simulated)")
    expect(by_env.locator("polyline")).to_have_count(2)
    for title in ("Validation reward", "Time of a step", "Tokens per second", "Failed episodes", "Staleness"):
        expect(page.locator("figure", has_text=title).first).to_be_visible()
    expect(page.locator(".events")).to_contain_text("EnvRunner 2 recovered after 14.2 s")
    expect(page.locator(".events")).to_contain_text("Alarm gradient_spike at step 4")
    expect(page.locator(".pill")).to_have_text("finished")
    reward.hover()
    # One step is shown in all charts.
    expect(page.locator(".tip:visible", has_text="step ").nth(3)).to_be_visible()
    page.locator(".all-metrics summary").click()
    page.get_by_label("Filter metrics").fill("grad/")
    expect(page.locator(".charts.small figure")).to_have_count(1)
    page.get_by_label("Filter metrics").fill("no metric has this name")
    expect(page.locator(".charts.small figure")).to_have_count(0)


def test_the_table_is_filtered_ordered_and_opened(simulated, open_page):
    page = open_page(f"{simulated[1]}#/trajectories")
    count = page.locator(".count b").first
    expect(count).to_have_text("160")  # 12 steps of 12, 4 validations of 4
    expect(page.locator(".count")).to_contain_text("160 trajectories, 2 dropped tasks")
    page.get_by_label("Failure").select_option("env_timeout")
    expect(page.locator(".count")).to_contain_text("0 of 160 trajectories, 2 dropped tasks")
    expect(page.locator("tbody .badge").first).to_have_text("dropped: env_timeout")
    page.get_by_role("button", name="Reset").click()
    page.get_by_label("Environment", exact=True).select_option("raygym/NumberGuess (simulated)")
    page.get_by_role("spinbutton", name="Reward from").fill("1")
    expect(page.locator(".count")).to_contain_text("mean reward 1.00")
    assert "reward_min=1" in page.url
    page.get_by_role("button", name="Reset").click()
    expect(count).to_have_text("160")
    page.get_by_role("button", name="Tokens").click()
    expect(page.get_by_role("columnheader", name="Tokens")).to_have_attribute("aria-sort", "descending")
    tokens = [int(text) for text in page.locator("tbody td:nth-child(8)").all_inner_texts() if text]
    assert tokens == sorted(tokens, reverse=True)
    assert page.locator("tbody tr").count() == 100
    page.keyboard.press("n")
    expect(page.locator(".pages")).to_contain_text("101 to 162")
    # By keys alone: the third row, opened.
    page.keyboard.press("p")
    expect(page.locator(".pages")).to_contain_text("1 to 100")
    for _ in range(3):
        page.keyboard.press("j")
    third = page.locator("tbody tr.at td").nth(2).inner_text()
    page.keyboard.press("Enter")
    expect(page.locator(".crumbs")).to_contain_text(third)
    page.keyboard.press("Escape")
    expect(count).to_have_text("160")


def test_what_another_program_has_left_out_is_no_number(tmp_path, serve, open_page):
    run = SimulatedRun(tmp_path / "run", steps=1)
    [record, *_] = run.step(1)
    del record["sampling"], record["turns"][0]["env_s"], record["turns"][1]["env_s"]
    (run.path / "trajectories/step_000001.jsonl").write_text(json.dumps(record) + "\n")
    page = open_page(f"{serve(run.path)}#/trajectory?file=trajectories/step_000001&number=0")
    expect(page.locator(".timeline .legend")).to_contain_text("environment \N{EN DASH}")
    assert "NaN" not in page.locator("main").inner_text()


def test_a_trajectory_is_a_conversation(simulated, open_page):
    run, address = simulated
    page = open_page(trajectory(address))
    record = json.loads((run.path / "trajectories/step_000006.jsonl").read_text().splitlines()[1])
    expect(page.locator(".message")).to_have_count(len(record["messages"]))
    expect(page.locator(".turn.prompt .message")).to_have_count(2)
    expect(page.locator(".call code")).to_have_text("find_order")
    expect(page.locator(".message.tool")).to_contain_text("on its way")
    expect(page.locator(".turn[data-turn='1'] .reward-chip")).to_contain_text("reward")
    expect(page.locator(".timeline button")).to_have_count(len(record["turns"]))
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("heading", name="Episode 2")).to_be_visible()
    page.keyboard.press("t")
    expect(page.locator(".tokens .token").first).to_be_visible()


def test_each_token_tells_what_is_known_of_it(simulated, open_page):
    run, address = simulated
    page = open_page(trajectory(address, view="tokens"))
    record = json.loads((run.path / "trajectories/step_000006.jsonl").read_text().splitlines()[1])
    expect(page.locator(".tokens .token")).to_have_count(len(record["token_ids"]))
    at = record["turns"][0]["start"]
    token, card = page.locator(f".token[data-index='{at}']"), page.locator(".token-card")
    token.hover()
    for text in (f"ID{record['token_ids'][at]}", f"Place{at}", "Trainedyes", f"Version{record['weight_versions'][at]}"):
        expect(card).to_contain_text(text)
    expect(card).to_contain_text(f"{record['logprobs'][at]:.4f}".replace("-", "\N{MINUS SIGN}"))
    difference = record["logprobs"][at] - record["learner_logprobs"][at]
    shown = float(card.locator("div", has_text="Engine \N{MINUS SIGN} learner").locator("dd").inner_text())
    assert shown == pytest.approx(difference, rel=0.01)
    colour = f"getComputedStyle(document.querySelector(`.token[data-index='{at}']`)).backgroundColor"
    seen = {page.evaluate(colour)}
    for button in ("Mask", "Version", "Engine \N{MINUS SIGN} learner"):
        page.get_by_role("button", name=button).click()
        seen.add(page.evaluate(colour))
    assert len(seen) == 4, seen
    # What would be tokenized in another way is marked, and said.
    expect(page.locator(".notes")).to_contain_text("rendered anew")
    drifted = page.locator(".tokens .token.drifted")
    assert drifted.count() > 1
    drifted.first.hover()
    expect(card).to_contain_text("Tokenized again")
    # Without a mouse.
    page.mouse.move(1, 1)
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(card).to_contain_text(f"Place{at}")
    page.keyboard.press("ArrowRight")
    expect(card).to_contain_text(f"Place{at + 1}")


def test_without_a_tokenizer_and_learner_that_is_said(tmp_path, serve, open_page):
    run = SimulatedRun(tmp_path / "run", steps=2, learner_logprobs=False)
    run.step(1)
    (run.path / "checkpoints/step_000001/tokenizer.json").unlink()
    address = serve(run.path)
    page = open_page(f"{address}#/trajectory?file=trajectories/step_000001&number=0&view=tokens")
    expect(page.locator(".notes")).to_contain_text("tokenizer is not on this machine")
    expect(page.locator(".token-controls")).to_contain_text("not recorded")
    expect(page.get_by_role("button", name="Engine \N{MINUS SIGN} learner")).to_be_disabled()
    expect(page.locator(".tokens .token").first).to_have_text("0 ")


def test_a_groups_episodes_stand_side_by_side(simulated, open_page):
    page = open_page(f"{simulated[1]}#/group?file=trajectories/step_000006&group_id=train-18")
    heads = page.locator(".cell.head")
    expect(heads).to_have_count(4)
    places = [heads.nth(index).bounding_box() for index in range(4)]
    assert len({place["y"] for place in places}) == 1
    assert len({place["x"] for place in places}) == 4
    expect(page.locator(".shared .message")).to_have_count(2)
    turn = page.locator(".line[data-turn='0'] .cell")
    assert len({turn.nth(index).bounding_box()["y"] for index in range(4)}) == 1
    page.get_by_role("button", name="By reward").click()
    rewards = [
        float(text.replace("\N{MINUS SIGN}", "-")) for text in page.locator(".cell.head .reward b").all_inner_texts()
    ]
    assert rewards == sorted(rewards, reverse=True)
    heads.first.get_by_role("link").click()
    expect(page.locator(".siblings a")).to_have_count(5)
    page.keyboard.press("c")
    expect(heads).to_have_count(4)


def test_a_run_that_goes_on_is_followed(tmp_path, serve, open_page):
    run = SimulatedRun(tmp_path / "run", steps=5)
    address = serve(run.path)
    page = open_page(address)
    expect(page.locator(".pill")).to_have_text("running")
    run.step(1)
    expect(page.locator(".progress-text")).to_have_text("step 1 of 5")
    expect(page.get_by_role("img", name="Reward, steps 1 to 1")).to_be_visible()
    page.keyboard.press("2")
    expect(page.locator(".count b").first).to_have_text("12")
    run.step(2)
    expect(page.locator(".count b").first).to_have_text("24")
    page.keyboard.press("f")
    # A look that had begun before is over when the next one begins.
    with page.expect_request("**/api/status"):
        pass
    run.step(3)
    expect(page.locator(".progress-text")).to_have_text("step 3 of 5")
    expect(page.locator(".count b").first).to_have_text("24")
    page.keyboard.press("f")
    expect(page.locator(".count b").first).to_have_text("36")
    run.finish()
    expect(page.locator(".pill")).to_have_text("finished")


def test_what_an_address_asks_for_is_shown_once_it_has_been_read(tmp_path, serve, open_page):
    run = SimulatedRun(tmp_path / "run", steps=5)
    run.step(1)
    page = open_page(f"{serve(run.path)}#/trajectory?file=trajectories/step_000002&number=1")
    expect(page.get_by_role("alert")).to_contain_text("no trajectory 1 in 'trajectories/step_000002' (yet)")
    run.step(2)
    expect(page.locator(".message").first).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    # The browser itself tells of each.
    assert all("404 (Not Found)" in told for told in open_page.told)
    open_page.told.clear()


def test_html_and_script_are_shown_as_text(tmp_path, serve, open_page):
    evil = (
        "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
        "</div></main><style>*{display:none}</style><svg onload=alert(1)><a href='javascript:alert(1)'>link</a>"
    )
    run = SimulatedRun(tmp_path / "run", steps=2)
    call = {"id": evil, "type": "function", "function": {"name": evil, "arguments": json.dumps({"x": evil})}}
    messages = [
        {"role": "system", "content": evil},
        {"role": "user", "content": [{"type": "text", "text": evil}]},
        {"role": "assistant", "content": evil, "tool_calls": [call], "reasoning_content": evil},
        {"role": "tool", "content": evil, "name": evil, "tool_call_id": evil},
        {"role": evil, "content": evil},
    ]
    records = [
        run.record(
            1,
            0,
            episode,
            messages=[
                dict(message, **({"content": evil} if index == 1 else {})) for index, message in enumerate(messages)
            ],
        )
        for episode in range(2)
    ]
    for record in records:
        record |= {
            "messages": messages,
            "group_id": evil,
            "env": evil,
            "failure": evil,
            "metrics": {evil: 1.0},
            "reward_components": {evil: 1.0},
        }
    run.append("trajectories/step_000001.jsonl", *records)
    run.append("metrics.jsonl", {"step": 1, "reward/mean": 1.0, evil: 2.0, f"episodes/failed/{evil}": 3})
    run.append("ledger.jsonl", {"step": 1, "task": 1, "env": evil, "group_id": evil, "trained": False, "cause": evil})
    run.event(evil, evil, evil)
    (run.path / "config.yaml").write_text(f"name: {json.dumps(evil)}\nsteps: 2\n", encoding="utf-8")
    address = serve(run.path)
    page = open_page(address)
    page.locator(".all-metrics summary").click()
    expect(page.locator("figcaption", has_text="<script>").first).to_be_visible()
    expect(page.locator(".events")).to_contain_text("<script>")
    page.goto(f"{address}#/trajectories")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.locator("tbody tr.opens a").first.click()
    expect(page.locator(".message")).to_have_count(5)
    # Five contents, in words; the call and its arguments in their own places.
    assert page.locator(".message .words").filter(has_text=evil).count() == 6
    expect(page.locator(".call code")).to_have_text(evil)
    page.keyboard.press("t")
    expect(page.locator(".tokens .token").first).to_be_visible()
    page.keyboard.press("c")
    expect(page.locator(".cell.head")).to_have_count(2)
    assert "owned" not in page.evaluate("document.title").replace(evil, "")
    foreign = "main script, main img, main style, main [onerror], main [onload], a[href^=javascript]"
    made = page.locator(foreign).count()
    assert made == 0


def test_markup_and_inline_script_are_refused_by_the_page_itself(simulated, browser):
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(simulated[1])
    refused = page.evaluate(
        "() => { try { document.body.innerHTML = '<b>x</b>'; return false; } catch { return true; } }"
    )
    assert refused
    frame = "made = document.createElement('iframe'); made.src = 'https://example.com/'; document.body.append(made)"
    page.evaluate(frame)
    assert all(frame.url in ("about:blank", "", "chrome-error://chromewebdata/") for frame in page.frames[1:])
    page.close()


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off_and_all_can_use_it(simulated, open_page, width, theme):
    """No page is wider than the screen, and axe-core finds nothing serious."""
    address = simulated[1]
    page = open_page(address, width=width, height=800, theme=theme)
    serious = []
    for view, ready in (
        ("#/overview", ".chart polyline"),
        ("#/trajectories", "tbody tr.opens"),
        # Not the rows of the view before, which are there until these have come. On a wide screen nobody sees it.
        ("#/trajectories?drifted=1", "summary:has-text('(1 chosen)')"),
        ("#/trajectory?file=trajectories/step_000006&number=1", ".message"),
        ("#/trajectory?file=trajectories/step_000006&number=1&view=tokens", ".tokens .token"),
        ("#/group?file=trajectories/step_000006&group_id=train-18", ".cell.head"),
    ):
        page.goto(f"{address}{view}")
        page.locator(ready).first.wait_for(state="attached")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, view
        for found in axe.Axe().run(page).response["violations"]:
            if found["impact"] in ("serious", "critical"):
                serious.append((view, found["id"], [node["html"][:200] for node in found["nodes"][:3]]))
    assert serious == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_report_is_for_all_too(simulated, browser, tmp_path, theme):
    """It loads nothing, no page is wider than the screen, and axe-core finds nothing serious."""
    [report, _] = write_report(simulated[0].path, tmp_path)
    page = browser.new_page(color_scheme=theme)
    page.set_default_timeout(WAIT_MS)
    told, loaded = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("request", lambda request: loaded.append(request.url))
    for width in (400, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        page.goto(report.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        violations = axe.Axe().run(page).response["violations"]
        assert [found["id"] for found in violations if found["impact"] in ("serious", "critical")] == []
    page.close()
    assert (told, set(loaded)) == ([], {report.as_uri()})


def test_an_answer_that_fails_is_told_and_asked_for_again(simulated, browser):
    address = simulated[1]
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    held = []
    # Who goes on before a slow trajectory is there stays where that was to.
    page.route("**/api/trajectory?*", lambda route: held.append(route))
    page.goto(trajectory(address))
    until(page, lambda: held)
    page.goto(f"{address}#/overview")
    page.locator(".tile").first.wait_for()
    with page.expect_response("**/api/trajectory?*"):
        held[0].continue_()
    page.unroute("**/api/trajectory?*")
    page.wait_for_timeout(100)
    assert page.url == f"{address}#/overview"
    # What is wrong with one answer does not end the viewer.
    page.route("**/api/status", lambda route: route.fulfill(status=422, json={"error": "it is broken"}))
    expect(page.locator(".reading")).to_contain_text("it is broken")
    expect(page.locator(".pill")).to_have_text("finished")
    page.unroute("**/api/status")
    expect(page.locator(".reading")).to_be_hidden()
    page.route("**/api/status", lambda route: route.abort())
    expect(page.locator(".pill")).to_have_text("viewer ended")
    page.unroute("**/api/status")
    expect(page.locator(".pill")).to_have_text("finished")
    page.route("**/api/tokens?*", lambda route: route.fulfill(status=422, json={"error": "it is broken"}))
    page.goto(trajectory(address, view="tokens"))
    expect(page.locator(".more")).to_contain_text("it is broken")
    rendered(page)  # what is in sight asks once by itself, which must have been in vain as well
    expect(page.locator(".more")).to_contain_text("it is broken")
    page.unroute("**/api/tokens?*")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".tokens .token").first).to_be_visible()
    page.close()


def test_the_keys_are_told(simulated, open_page):
    page = open_page(simulated[1])
    page.locator(".tile").first.wait_for()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("compare its group")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.keyboard.press("d")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    page.reload()
    page.locator(".tile").first.wait_for()
    assert page.evaluate("document.documentElement.dataset.theme") == "light"


def test_a_rollout_opens(simulated, tmp_path, serve, open_page):
    run = simulated[0]
    (tmp_path / "request.json").write_text('{"tasks": 3, "samples": 4, "split": "validation"}', encoding="utf-8")
    source = run.path / "trajectories/step_000006.jsonl"
    (tmp_path / "trajectories.jsonl").write_bytes(source.read_bytes())
    summary = {
        "episodes": 12,
        "tokens": 900,
        "reward": 0.5,
        "pass_at": {"1": 0.5, "4": 0.75},
        "envs": {"guess": {"episodes": 12, "reward": 0.5}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    address = serve(tmp_path)
    page = open_page(address)
    expect(page.locator(".tile", has_text="pass@4")).to_contain_text("75 %")
    page.get_by_role("link", name="Browse the trajectories").click()
    expect(page.locator("tbody tr")).to_have_count(12)
    page.locator("tbody tr a").first.click()
    expect(page.locator(".message").first).to_be_visible()


def test_a_long_trajectory_comes_in_parts(tmp_path, serve, open_page):
    run = SimulatedRun(tmp_path / "run", steps=2)
    long = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one two three four " * 3000}]
    run.append("trajectories/step_000001.jsonl", run.record(1, 0, 0, messages=long))
    address = serve(run.path)
    page = open_page(f"{address}#/trajectory?file=trajectories/step_000001&number=0")
    tokens, held = page.locator(".tokens .token"), []
    # The end is in sight until the first part is there. Were that seen only afterwards, the next part would come, too.
    page.route("**/api/tokens?*", lambda route: held.append(route))
    page.reload()  # a document that is there already may go on asking without being held
    expect(page.locator(".message").first).to_be_visible()
    page.keyboard.press("t")
    until(page, lambda: held)
    rendered(page)
    held[0].continue_()
    page.unroute("**/api/tokens?*")
    expect(tokens).to_have_count(5000)
    page.locator(".more").scroll_into_view_if_needed()
    expect(tokens).to_have_count(10_000)


def write_large(path, of_bytes):
    run = SimulatedRun(path, steps=2)
    record = run.record(1, 0, 0)
    with (run.path / "trajectories/step_000001.jsonl").open("wb") as file:
        file.writelines(large_lines(record, of_bytes))
    run.append("metrics.jsonl", *({"step": step, "reward/mean": step / 1000} for step in range(1, 1001)))
    return run


def first_view_s(browser, address):
    """Seconds from the request to the first chart."""
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    started = time.monotonic()
    page.goto(address)
    page.locator(".chart polyline").first.wait_for()
    seconds = time.monotonic() - started
    page.close()
    return seconds


@pytest.mark.timeout(900)
def test_a_file_of_a_gibibyte_opens_while_it_is_read(tmp_path, serve, open_page):
    run = write_large(tmp_path / "large", 2**30)
    address = serve(run.path, read=False)
    page = open_page(f"{address}#/trajectories")
    # The first rows are there before the file is read.
    page.locator("tbody tr.opens").first.wait_for()
    expect(page.locator(".reading")).to_contain_text("of 1 GiB")
    page.locator("tbody tr.opens a").first.click()
    expect(page.locator(".message").first).to_be_visible()
    playwright.expect(page.locator(".reading")).to_be_hidden(timeout=500_000)
    page.goto(f"{address}#/trajectories?sort=tokens&offset=100")
    expect(page.locator("tbody tr")).to_have_count(100)


@only_long
def test_the_first_view_of_a_run_of_100_mb_takes_less_than_a_second(tmp_path, serve, browser):
    run = write_large(tmp_path / "large", 100 * 10**6)
    # The best of five: what else the machine does is no property of the page.
    assert min(first_view_s(browser, serve(run.path, read=False)) for _ in range(5)) < 1
