// The first page of a rollout, or of one file of trajectories: what it amounts to.

import { ask, link } from "./api.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { histogram } from "./histogram.js";

export async function rolloutSummary(state) {
  const element = h("div", { class: "overview" });

  async function refresh() {
    const [run, rows] = await Promise.all([ask("run"), ask("trajectories", { limit: 1 })]);
    state.run = run;
    const summary = run.summary ?? {};
    const tile = (title, value, more = "") => h("div", { class: "tile" }, h("dt", null, title), h("dd", null, h("b", null, value), h("span", { class: "quiet" }, more)));
    const passes = Object.entries(summary.pass_at ?? {}).map(([k, share]) => tile(`pass@${k}`, format.percent(share), "of the tasks"));
    element.replaceChildren(
      h("dl", { class: "tiles" },
        tile("Trajectories", format.number(rows.trajectories), summary.tokens ? `${format.number(summary.tokens)} tokens` : ""),
        tile("Reward", format.reward(rows.reward_mean), summary.reward_stderr ? `± ${format.number(summary.reward_stderr)}` : "mean"),
        passes,
        summary.tokens_per_s ? tile("Generated", `${format.number(summary.tokens_per_s)}/s`, "tokens") : null,
        summary.dropped_tasks !== undefined ? tile("Dropped tasks", format.number(summary.dropped_tasks)) : null,
      ),
      h("section", { class: "panel" }, h("h2", null, "Rewards"), histogram(rows.rewards, (low, high) => (location.hash = link("trajectories", { reward_min: low, reward_max: high })))),
      summary.envs ? environments(summary.envs) : "",
      h("p", null, h("a", { href: link("trajectories"), class: "primary" }, "Browse the trajectories")),
      run.config ? h("details", { class: "panel" }, h("summary", null, "Config"), h("pre", { tabindex: "0" }, run.config)) : "",
    );
  }
  await refresh();
  return { title: "Summary", element, refresh };
}

function environments(envs) {
  const head = ["Environment", "Episodes", "Reward", "Turns", "Drift", "Dropped"];
  return h("section", { class: "panel" }, h("h2", null, "Environments"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Environments" }, h("table", null, h("thead", null, h("tr", null, head.map((each) => h("th", { scope: "col" }, each)))),
      h("tbody", null, Object.entries(envs).map(([env, told]) => h("tr", null, h("td", null, h("a", { href: link("trajectories", { env }) }, env)), [format.number(told.episodes), format.reward(told.reward), format.number(told.turns_mean), format.percent(told.drift_rate), format.number(told.dropped_tasks)].map((each) => h("td", { class: "number" }, each))))))));
}
