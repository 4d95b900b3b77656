// The table of trajectories: filters, an order, pages; all of it in the address, so that it can be kept and sent.

import { ask, asked, link } from "./api.js";
import { h, select } from "./dom.js";
import * as format from "./format.js";
import { histogram } from "./histogram.js";

const PAGE = 100;
const KINDS = { step: "training", validation: "validation", alarm: "alarm", rollout: "rollout", dropped: "dropped task" };
const COLUMNS = [
  { title: "From", sort: "step", cell: (row) => [from(row), h("span", { class: "under quiet" }, row.env)] },
  { title: "Environment", sort: "env", cell: (row) => row.env, kind: "wide" },
  { title: "Group", sort: "group_id", cell: (row) => (row.status === "dropped" ? row.group_id : h("a", { href: groupLink(row), tabindex: "-1" }, row.group_id)), kind: "wide" },
  { title: "Episode", sort: "episode", cell: (row) => row.episode ?? "", kind: "wide number" },
  { title: "Outcome", sort: "status", cell: outcome },
  { title: "Reward", sort: "reward", cell: (row) => format.reward(row.reward), kind: "number" },
  { title: "Turns", sort: "turns", cell: (row) => row.turns || "", kind: "wide number" },
  { title: "Tokens", sort: "tokens", cell: (row) => (row.tokens ? format.number(row.tokens) : ""), kind: "number" },
  { title: "Generated", sort: "generated", cell: (row) => (row.generated ? format.number(row.generated) : ""), kind: "wide number" },
  { title: "Version", sort: "version_min", cell: (row) => (row.status === "dropped" ? "" : format.range(row.version_min, row.version_max)), kind: "wide number" },
  { title: "Gen. time", sort: "generate_s", cell: (row) => (row.status === "dropped" ? "" : format.seconds(row.generate_s)), kind: "wide number" },
  { title: "Env. time", sort: "env_s", cell: (row) => (row.status === "dropped" ? "" : format.seconds(row.env_s)), kind: "wide widest number" },
];

function from(row) {
  if (row.status === "dropped") return format.place({ ...row, kind: row.step === null ? "dropped" : "step" });
  return h("a", { href: trajectoryLink(row), tabindex: "-1" }, format.place(row));
}

export const trajectoryLink = (row, more = {}) => link("trajectory", { file: row.file, number: row.number, ...more });
export const groupLink = (row) => link("group", { file: row.file, group_id: row.group_id });

/** How an episode ended, as a badge; of a dropped task its cause. */
export function outcome(row) {
  const kind = { terminated: "good", truncated: "warns", failed: "bad", dropped: "bad" }[row.status] ?? "";
  const text = row.failure ? `${row.status}: ${row.failure}` : row.status;
  return [h("span", { class: `badge ${kind}`, title: row.cause || undefined }, text), row.drifted ? h("span", { class: "badge drift", title: "The history, rendered anew, has other tokens than the policy saw" }, "drift") : ""];
}

export async function table(params) {
  const query = { sort: "-step", ...params };
  let answer = null;
  let at = -1;
  const count = h("p", { class: "count", role: "status" });
  const spread = h("div", { class: "spread" });
  const filters = h("form", { class: "filters", "aria-label": "Filters", onsubmit: (event) => event.preventDefault() });
  const chosenFilters = h("span", { class: "quiet" });
  const folded = h("details", { class: "panel folded", open: matchMedia("(min-width: 721px)").matches }, h("summary", null, "Filters ", chosenFilters), filters);
  const body = h("tbody");
  const head = h("tr");
  const pages = h("nav", { class: "pages", "aria-label": "Pages" });
  const element = h(
    "div",
    { class: "trajectories" },
    folded,
    h("div", { class: "above" }, count, spread),
    h("div", { class: "scroll panel", role: "region", "aria-label": "Trajectories", tabindex: "0" }, h("table", { class: "rows" }, h("thead", null, head), body)),
    pages,
  );

  /** Ask for something else, which gets into the address. The page stays, so that a field keeps the focus. */
  function change(next, page = false) {
    for (const [name, value] of Object.entries(next)) {
      if (value === "" || value === null) delete query[name];
      else query[name] = value;
    }
    if (!page) delete query.offset;
    history.replaceState(null, "", link("trajectories", query));
    at = -1;
    return refresh();
  }

  let asking = 0;
  async function refresh() {
    const mine = ++asking;
    try {
      const found = await ask("trajectories", { ...query, limit: PAGE });
      if (mine !== asking) return;
      answer = found;
    } catch (error) {
      if (mine !== asking) return;
      count.replaceChildren(h("span", { class: "badge bad" }, error.message));
      return;
    }
    show();
  }

  function show() {
    const { rows, total, of, offset } = answer;
    const dropped = total - answer.trajectories;
    const active = Object.keys(query).filter((name) => !["sort", "offset"].includes(name)).length;
    chosenFilters.textContent = active ? `(${active} chosen)` : "";
    count.replaceChildren(
      h("b", null, format.number(answer.trajectories)),
      total === of ? " trajectories" : ` of ${format.number(answer.of_trajectories)} trajectories`,
      dropped ? `, ${format.number(dropped)} dropped ${dropped === 1 ? "task" : "tasks"}` : "",
      ...(answer.reward_mean === null ? [] : [", mean reward ", h("b", null, format.reward(answer.reward_mean))]),
    );
    spread.replaceChildren(histogram(answer.rewards, (low, high) => (fill(), change({ reward_min: low, reward_max: high }).then(fill))));
    body.replaceChildren(
      ...rows.map((row, index) =>
        h("tr", { "data-index": index, class: row.status === "dropped" ? "dropped" : "opens", onclick: (event) => event.target.closest("a") || getSelection().toString() || open(row) },
          COLUMNS.map(({ cell, kind }) => h("td", { class: kind }, cell(row)))),
      ),
    );
    if (!rows.length) body.append(h("tr", null, h("td", { colspan: COLUMNS.length, class: "quiet none" }, of ? "Nothing fits these filters." : "No trajectories yet.")));
    // Without a mouse, rows are reached by j and k, and the first link by Tab.
    body.querySelector("a")?.removeAttribute("tabindex");
    head.replaceChildren(
      ...COLUMNS.map(({ title, sort, kind }) => {
        const now = query.sort === sort ? "ascending" : query.sort === `-${sort}` ? "descending" : null;
        return h("th", { scope: "col", class: kind, "aria-sort": now ?? "none" }, h("button", { type: "button", onclick: () => change({ sort: now === "descending" ? sort : `-${sort}` }) }, title, h("span", { "aria-hidden": "true", class: "arrow" }, { ascending: "↑", descending: "↓" }[now] ?? "")));
      }),
    );
    const last = Math.min(offset + PAGE, total);
    pages.hidden = total <= PAGE;
    pages.replaceChildren(
      h("button", { type: "button", disabled: offset === 0, onclick: () => page(-1) }, "← Previous"),
      h("span", null, `${format.number(total ? offset + 1 : 0)} to ${format.number(last)}`),
      h("button", { type: "button", disabled: last >= total, onclick: () => page(1) }, "Next →"),
    );
    if (filters.childElementCount === 0) fill();
    mark();
  }

  function page(by) {
    const offset = answer.offset + by * PAGE;
    if (offset >= 0 && offset < answer.total) change({ offset }, true).then(() => element.scrollIntoView());
  }

  function fill() {
    const choices = (name, words = {}) => [["", "all"], ...answer.choices[name].map(({ value, count: many }) => [value, `${words[value] ?? value} (${format.number(many)})`])];
    const chosen = (name) => ({ target }) => change({ [name]: target.value });
    const range = (title, name, step = "any") =>
      h("div", { class: "field", role: "group", "aria-label": title }, h("span", null, title), h("div", { class: "range" },
        h("input", { type: "number", step, name: `${name}_min`, placeholder: "from", "aria-label": `${title} from`, value: query[`${name}_min`] ?? "", oninput: chosen(`${name}_min`) }),
        h("input", { type: "number", step, name: `${name}_max`, placeholder: "to", "aria-label": `${title} to`, value: query[`${name}_max`] ?? "", oninput: chosen(`${name}_max`) })));
    filters.replaceChildren(
      select("From", "kind", query.kind ?? "", choices("kind", KINDS), chosen("kind")),
      select("Environment", "env", query.env ?? "", choices("env"), chosen("env")),
      select("Outcome", "status", query.status ?? "", choices("status"), chosen("status")),
      select("Failure", "failure", query.failure ?? "", choices("failure"), chosen("failure")),
      range("Reward", "reward"),
      range("Tokens", "tokens", 1),
      range("Step", "step", 1),
      h("label", { class: "field" }, h("span", null, "Version"), h("input", { type: "number", min: 0, step: 1, name: "version", value: query.version ?? "", oninput: chosen("version") })),
      h("label", { class: "field" }, h("span", null, "Group"), h("input", { type: "search", name: "group_id", value: query.group_id ?? "", oninput: chosen("group_id") })),
      h("label", { class: "field check" }, h("input", { type: "checkbox", name: "drifted", checked: query.drifted === "1", onchange: ({ target }) => change({ drifted: target.checked ? "1" : "" }) }), h("span", null, "drifted only")),
      h("button", { type: "button", class: "ghost", onclick: () => (change(Object.fromEntries(Object.keys(query).filter((name) => name !== "sort").map((name) => [name, ""]))), setTimeout(fill)) }, "Reset"),
    );
  }

  function mark() {
    for (const row of body.children) row.classList.toggle("at", Number(row.dataset.index) === at);
    body.children[at]?.scrollIntoView({ block: "nearest" });
  }

  function move(by) {
    if (!answer.rows.length) return;
    at = Math.min(Math.max(at + by, 0), answer.rows.length - 1);
    mark();
    body.children[at].querySelector("a")?.focus({ preventScroll: true });
  }

  const current = () => answer.rows[at] ?? answer.rows[0];
  function open(row) {
    if (row && row.status !== "dropped") location.hash = trajectoryLink(row);
  }

  if (asked().params.sort === undefined && Object.keys(params).length === 0) query.sort = "-step";
  await refresh();
  return {
    title: "Trajectories",
    element,
    refresh,
    keys: {
      j: () => move(1),
      k: () => move(-1),
      ArrowDown: () => move(1),
      ArrowUp: () => move(-1),
      Enter: () => open(current()),
      c: () => current() && current().status !== "dropped" && (location.hash = groupLink(current())),
      n: () => page(1),
      p: () => page(-1),
      "/": () => {
        folded.open = true;
        filters.querySelector("select")?.focus();
      },
    },
  };
}
