// The episodes of one group side by side, turn beside turn.

import { ask, link } from "./api.js";
import { h, segmented } from "./dom.js";
import * as format from "./format.js";
import { message } from "./messages.js";
import { outcome, trajectoryLink } from "./table.js";

export async function group(params) {
  const { episodes } = await ask("group", { file: params.file, group_id: params.group_id });
  const first = episodes[0];
  const rewards = episodes.map(({ row }) => row.reward).filter((reward) => reward !== null);
  const mean = rewards.reduce((sum, reward) => sum + reward, 0) / (rewards.length || 1);
  const deviation = Math.sqrt(rewards.reduce((sum, reward) => sum + (reward - mean) ** 2, 0) / (rewards.length || 1));
  const best = Math.max(...rewards);
  let order = "episode";
  let at = -1;
  const grid = h("div", { class: "episodes", vars: { "--columns": episodes.length } });
  const controls = h("div", { class: "order" });
  const prompt = promptOf(first);
  const shared = episodes.every((each) => JSON.stringify(promptOf(each)) === JSON.stringify(prompt));

  function show(next = order) {
    order = next;
    controls.replaceChildren(segmented("Order", order, [["episode", "By episode"], ["reward", "By reward"]], show));
    const shown = [...episodes];
    if (order === "reward") shown.sort((a, b) => (b.row.reward ?? -Infinity) - (a.row.reward ?? -Infinity));
    const turns = Math.max(...shown.map((each) => each.turns.length));
    const rows = [h("div", { class: "line heads" }, shown.map((each) => head(each, best, mean, deviation)))];
    if (!shared) rows.push(h("div", { class: "line" }, shown.map((each) => h("div", { class: "cell" }, promptOf(each).map(message)))));
    for (let turn = 0; turn < turns; turn++) rows.push(h("div", { class: "line", "data-turn": turn }, shown.map((each) => cell(each, turn, shown))));
    grid.replaceChildren(...rows);
  }

  const element = h(
    "div",
    { class: "group" },
    h("p", { class: "crumbs" }, h("a", { href: link("trajectories") }, "Trajectories"), " / ", h("a", { href: link("trajectories", { file: first.row.file }) }, format.place(first.row)), ` / ${first.row.group_id}`),
    h("div", { class: "title-line" }, h("h2", null, `Group ${first.row.group_id}`), h("span", { class: "quiet" }, `${first.row.env}, task ${first.row.task}: ${episodes.length} episodes, reward ${format.reward(mean)} ± ${format.reward(deviation)}`), controls),
    shared ? h("details", { class: "panel shared", open: true }, h("summary", null, "The prompt of all of them"), prompt.map(message)) : "",
    h("div", { class: "scroll compare-scroll", role: "region", "aria-label": "Episodes side by side", tabindex: "0" }, grid),
  );
  show();

  function goto(turn) {
    at = Math.min(Math.max(turn, 0), grid.querySelectorAll("[data-turn]").length - 1);
    grid.querySelector(`[data-turn="${at}"]`)?.scrollIntoView({ block: "start" });
  }
  return {
    title: `Group ${first.row.group_id}`,
    element,
    keys: { j: () => goto(at + 1), k: () => goto(at - 1), Escape: () => history.back() },
  };
}

const promptOf = ({ messages, turn_of: of }) => messages.filter((_, index) => of[index] === null);
const turnOf = ({ messages, turn_of: of }, turn) => messages.filter((_, index) => of[index] === turn);

function head({ row }, best, mean, deviation) {
  const advantage = deviation > 0 && row.reward !== null ? (row.reward - mean) / deviation : 0;
  return h(
    "div",
    { class: `cell head ${row.reward === best && deviation > 0 ? "best" : ""}` },
    h("h3", null, h("a", { href: trajectoryLink(row) }, `Episode ${row.episode}`)),
    h("p", null, h("span", { class: "reward" }, "reward ", h("b", null, format.reward(row.reward))), h("span", { class: "quiet", title: "Deviations of the group's rewards from their mean" }, ` ${advantage >= 0 ? "+" : "−"}${Math.abs(advantage).toFixed(2)} σ`)),
    h("p", null, outcome(row)),
    h("p", { class: "quiet" }, `${row.turns} turns, ${format.number(row.generated)} tokens generated, version ${format.range(row.version_min, row.version_max)}`),
  );
}

function cell(episode, number, shown) {
  const turn = episode.turns[number];
  if (!turn) return h("div", { class: "cell ended quiet" }, number === episode.turns.length ? "ended" : "");
  const messages = turnOf(episode, number);
  const written = (each) => JSON.stringify(turnOf(each, number)[0] ?? null);
  const like = shown.find((other) => other.turns[number] && written(other) === written(episode));
  return h(
    "div",
    { class: "cell" },
    h("p", { class: "turn-line" }, h("b", null, `Turn ${number + 1}`), turn.reward ? h("span", { class: `reward-chip ${turn.reward > 0 ? "good" : "bad"}` }, format.reward(turn.reward)) : "", h("span", { class: "quiet" }, `${turn.end - turn.start} tokens, ${format.seconds(turn.generate_s)}`), like !== episode ? h("span", { class: "badge", title: `the policy wrote the same as in episode ${like.row.episode}` }, `= ${like.row.episode}`) : ""),
    messages.map(message),
  );
}
