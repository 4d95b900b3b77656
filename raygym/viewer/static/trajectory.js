// One trajectory: its conversation by turns with rewards and times, and its tokens.

import { ask, link } from "./api.js";
import { h, segmented } from "./dom.js";
import * as format from "./format.js";
import { message } from "./messages.js";
import { groupLink, outcome } from "./table.js";
import { tokenView } from "./tokens.js";

export async function trajectory(params) {
  const told = await ask("trajectory", { file: params.file, number: params.number });
  const { row } = told;
  let view = params.view === "tokens" ? "tokens" : "conversation";
  let turn = -1;
  let tokens = null;
  const body = h("div", { class: "trajectory-body" });
  const tabs = h("div");
  const element = h("div", { class: "trajectory" }, heading(told), timeline(told, goto), tabs, body);

  // At the beginning the address says so already, or by now is another view's, if the answer was slow.
  function choose(next) {
    view = next;
    history.replaceState(null, "", link("trajectory", { file: row.file, number: row.number, view: view === "tokens" ? view : "" }));
    show();
  }

  function show() {
    tabs.replaceChildren(segmented("View", view, [["conversation", "Conversation"], ["tokens", "Tokens"]], choose));
    if (view === "tokens") {
      tokens ??= tokenView(told);
      body.replaceChildren(tokens.element);
    } else {
      body.replaceChildren(conversation(told));
    }
  }

  function goto(number) {
    turn = Math.min(Math.max(number, 0), told.turns.length - 1);
    const place = body.querySelector(`[data-turn="${turn}"]`);
    if (!place) return;
    body.querySelectorAll(".turn.at").forEach((each) => each.classList.remove("at"));
    place.classList.add("at");
    place.scrollIntoView({ block: "start" });
  }

  function sibling(by) {
    const place = told.group.findIndex(({ number }) => number === row.number);
    const next = told.group[place + by];
    if (next) location.hash = link("trajectory", { file: row.file, number: next.number, view: view === "tokens" ? view : "" });
  }

  show();
  return {
    title: `${row.group_id} episode ${row.episode}`,
    element,
    end: () => tokens?.end(),
    keys: {
      t: () => choose(view === "tokens" ? "conversation" : "tokens"),
      j: () => goto(turn + 1),
      k: () => goto(turn - 1),
      c: () => (location.hash = groupLink(row)),
      l: () => (view === "tokens" ? tokens.nextColour() : false),
      ArrowLeft: () => sibling(-1),
      ArrowRight: () => sibling(1),
      Escape: () => history.back(),
    },
  };
}

function heading(told) {
  const { row, group } = told;
  const fact = (title, value) => h("div", null, h("dt", null, title), h("dd", null, value));
  const components = Object.entries(told.reward_components ?? {});
  const own = Object.entries(told.metrics ?? {});
  return h(
    "section",
    { class: "heading" },
    h("p", { class: "crumbs" }, h("a", { href: link("trajectories") }, "Trajectories"), " / ", h("a", { href: link("trajectories", { file: row.file }) }, format.place(row)), " / ", h("a", { href: groupLink(row) }, row.group_id)),
    h("div", { class: "title-line" }, h("h2", null, `Episode ${row.episode}`), outcome(row), h("span", { class: "reward" }, "reward ", h("b", null, format.reward(row.reward)))),
    group.length > 1
      ? h("nav", { class: "siblings", "aria-label": "Episodes of the group" }, group.map((each) => h("a", { href: link("trajectory", { file: row.file, number: each.number }), "aria-current": each.number === row.number ? "page" : null, title: `episode ${each.episode}, reward ${format.reward(each.reward)}` }, h("span", null, String(each.episode)), h("b", null, format.reward(each.reward)))), h("a", { href: groupLink(row), class: "compare" }, "Compare"))
      : "",
    h(
      "dl",
      { class: "facts" },
      fact("Environment", row.env),
      fact("Task", `${row.task} (seed ${row.seed ?? "–"})`),
      fact("Turns", String(row.turns)),
      fact("Tokens", `${format.number(row.tokens)}, ${format.number(row.generated)} generated`),
      fact("Version", format.range(row.version_min, row.version_max)),
      fact("Attempt", String(row.attempt + 1)),
      fact("Sampling", `temperature ${told.sampling?.temperature ?? "–"}, at most ${told.sampling?.max_tokens ?? "–"} tokens a turn`),
      components.map(([name, value]) => fact(`Reward: ${name}`, format.reward(value))),
      own.map(([name, value]) => fact(name, format.number(value))),
      told.failure_detail ? fact("Failure", told.failure_detail) : "",
    ),
  );
}

/** A bar as long as the episode: what generation took and what the environment took, turn by turn. */
function timeline(told, goto) {
  if (!told.turns.length) return "";
  // Another program's record may lack a time.
  const sum = (name) => told.turns.reduce((seconds, turn) => (turn[name] == null ? seconds : (seconds ?? 0) + turn[name]), null);
  const generate = sum("generate_s");
  const env = sum("env_s");
  const total = (generate ?? 0) + (env ?? 0);
  return h(
    "section",
    { class: "timeline", "aria-label": "Time" },
    h("div", { class: "bar" }, told.turns.map((turn, number) => {
      const text = `turn ${number + 1}: ${format.seconds(turn.generate_s)} generation, ${format.seconds(turn.env_s)} environment, reward ${format.reward(turn.reward)}`;
      const spent = (turn.generate_s ?? 0) + (turn.env_s ?? 0);
      return h("button", { type: "button", title: text, "aria-label": text, vars: { "flex-grow": total ? (1000 * spent) / total : 1 }, onclick: () => goto(number) }, h("i", { class: "generate", vars: { "flex-grow": 1000 * turn.generate_s || 1e-3 } }), h("i", { class: "env", vars: { "flex-grow": 1000 * turn.env_s || 1e-3 } }), h("span", { class: turn.reward ? "earned" : "" }, turn.reward ? format.reward(turn.reward) : String(number + 1)));
    })),
    h("p", { class: "legend" }, h("span", null, h("i", { class: "swatch generate" }), `generation ${format.seconds(generate)}`), h("span", null, h("i", { class: "swatch env" }), `environment ${format.seconds(env)}`)),
  );
}

function conversation(told) {
  const blocks = [h("section", { class: "turn prompt" }, h("header", null, h("h3", null, "Prompt")))];
  told.messages.forEach((each, index) => {
    const number = told.turn_of[index];
    const before = index === 0 ? null : told.turn_of[index - 1];
    if (number !== null && number !== before) blocks.push(turnBlock(told, number));
    blocks.at(-1).append(message(each));
  });
  return h("div", { class: "conversation" }, blocks);
}

function turnBlock(told, number) {
  const turn = told.turns[number];
  const facts = [
    `${turn.end - turn.start} tokens`,
    turn.finish_reason === "length" ? h("span", { class: "badge warns" }, "cut at its limit") : turn.finish_reason,
    `generation ${format.seconds(turn.generate_s)}`,
    `environment ${format.seconds(turn.env_s)}`,
    told.logprob_of_turn[number] === null ? null : `mean logprob ${told.logprob_of_turn[number].toFixed(2).replace("-", "−")}`,
  ];
  return h("section", { class: "turn", "data-turn": number }, h("header", null, h("h3", null, `Turn ${number + 1}`), h("span", { class: `reward-chip ${turn.reward > 0 ? "good" : turn.reward < 0 ? "bad" : ""}` }, `reward ${format.reward(turn.reward)}`), h("span", { class: "quiet facts-line" }, facts.filter(Boolean).map((each) => h("span", null, each)))));
}
