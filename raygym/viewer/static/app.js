// The page: its header, which view is shown, and what follows a run that goes on.

import { ask, asked, link, NoAnswer } from "./api.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { group } from "./group.js";
import { help, onKey } from "./keys.js";
import { overview } from "./overview.js";
import { table } from "./table.js";
import { trajectory } from "./trajectory.js";

const VIEWS = { overview, trajectories: table, trajectory, group };
const EVERY_MS = 1000;
const THEMES = ["auto", "light", "dark"];

const main = document.getElementById("main");
const state = { run: null, status: null, follows: true, theme: "auto", lost: false, problem: "", fresh: true };
let shown = null; // of the current view: {refresh, keys}
let showing = 0;

// ---- header

const parts = {
  name: h("span", { class: "run-name" }),
  pill: h("span", { class: "pill" }),
  progress: h("span", { class: "quiet progress-text" }),
  reading: h("div", { class: "reading", role: "status" }),
  follow: h("button", { type: "button", class: "ghost", title: "Follow the run (f)", onclick: toggleFollow }, "Follow"),
  theme: h("button", { type: "button", class: "ghost", onclick: nextTheme }),
  nav: {
    overview: h("a", { href: link("overview") }, "Overview"),
    trajectories: h("a", { href: link("trajectories") }, "Trajectories"),
  },
};

function header() {
  document.getElementById("top").append(
    h("h1", { class: "brand" }, h("span", { class: "mark", "aria-hidden": "true" }), parts.name),
    h("div", { class: "state" }, parts.pill, parts.progress),
    h("nav", { "aria-label": "Views" }, Object.values(parts.nav)),
    h(
      "div",
      { class: "actions" },
      parts.follow,
      parts.theme,
      h("button", { type: "button", class: "ghost", title: "Keys (?)", "aria-label": "Keys", onclick: () => help() }, "?"),
    ),
  );
  document.getElementById("top").after(parts.reading);
}

function showStatus() {
  const { status, run } = state;
  const text = state.lost ? "viewer ended" : status.told;
  parts.pill.textContent = text;
  parts.pill.className = `pill is-${state.lost ? "lost" : status.state}`;
  parts.pill.hidden = text === "";
  const step = status.step === null ? "" : run.steps ? `step ${status.step} of ${run.steps}` : `step ${status.step}`;
  parts.progress.textContent = step;
  const left = status.total_bytes - status.read_bytes;
  const reads = status.total_bytes > 0 && left > 2 ** 20;
  const share = status.total_bytes ? status.read_bytes / status.total_bytes : 1;
  const problem = state.problem || status.problem;
  parts.reading.hidden = !problem && !reads && !status.unreadable;
  parts.reading.replaceChildren(
    ...(problem
      ? [`Not everything that is new is shown: ${problem}`]
      : reads
      ? [
          h("progress", { max: "1", value: share, "aria-label": "Trajectories read" }),
          `Reading trajectories: ${format.bytes(status.read_bytes)} of ${format.bytes(status.total_bytes)}; what is read so far is shown.`,
        ]
      : status.unreadable
        ? [`${format.number(status.unreadable)} lines of this run cannot be read and are left out.`]
        : []),
  );
}

// ---- views

async function show() {
  const { view, params } = asked();
  const name = VIEWS[view] ? view : "overview";
  const mine = ++showing;
  shown?.end?.();
  shown = null;
  for (const [each, element] of Object.entries(parts.nav)) {
    const current = each === name || (each === "trajectories" && (name === "trajectory" || name === "group"));
    if (current) element.setAttribute("aria-current", "page");
    else element.removeAttribute("aria-current");
  }
  try {
    const made = await VIEWS[name](params, state);
    if (mine !== showing) return made.end?.();
    shown = made;
    main.className = `view-${name}`;
    main.replaceChildren(made.element);
    made.attached?.();
    document.title = `${made.title} · ${state.run.name} · raygym`;
    if (!made.keepsScroll) scrollTo(0, 0);
  } catch (error) {
    if (mine !== showing) return;
    // It may not have been read yet: with more of the run it is asked for again.
    shown = { refresh: show };
    if (main.querySelector(":scope > .problem p")?.textContent === error.message) return; // and is not read out again
    main.replaceChildren(
      h("div", { class: "problem", role: "alert" }, h("p", null, error.message), h("p", null, h("a", { href: link("trajectories") }, "All trajectories"))),
    );
  }
}

// ---- following

async function look() {
  if (!document.hidden) {
    try {
      const before = state.status;
      state.status = await ask("status");
      state.lost = false;
      const changed = ["metrics_revision", "trajectories_revision", "events_revision", "state"].some(
        (key) => before[key] !== state.status[key],
      );
      showStatus();
      if ((changed || state.problem) && state.follows) await refreshShown();
    } catch (error) {
      told(error);
    }
  }
  setTimeout(look, EVERY_MS);
}

async function refreshShown() {
  try {
    await shown?.refresh?.();
    state.problem = "";
    showStatus();
  } catch (error) {
    told(error);
  }
}

/** An answer that says what is wrong is an answer: the viewer goes on. */
function told(error) {
  state.lost = error instanceof NoAnswer;
  state.problem = error.message;
  showStatus();
}

function toggleFollow() {
  state.follows = !state.follows;
  parts.follow.setAttribute("aria-pressed", String(state.follows));
  if (state.follows) refreshShown();
}

// ---- theme

function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(state.theme) + 1) % THEMES.length]);
}

function setTheme(theme) {
  state.theme = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  parts.theme.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
  parts.theme.title = `Theme: ${theme} (d)`;
  parts.theme.setAttribute("aria-label", `Theme: ${theme}`);
  try {
    localStorage.setItem("raygym-theme", theme);
  } catch {
    // Storage may be forbidden; the theme then lasts as long as the page.
  }
}

function savedTheme() {
  try {
    const saved = localStorage.getItem("raygym-theme");
    return THEMES.includes(saved) ? saved : "auto";
  } catch {
    return "auto";
  }
}

// ---- begin

header();
setTheme(savedTheme());
parts.follow.setAttribute("aria-pressed", "true");
onKey((key) => {
  if (shown?.keys?.[key]) return shown.keys[key]();
  const global = {
    1: () => (location.hash = link("overview")),
    2: () => (location.hash = link("trajectories")),
    f: toggleFollow,
    d: nextTheme,
    "?": help,
  };
  return global[key] ? global[key]() : false;
});
addEventListener("hashchange", (event) => {
  // The skip link is no view.
  if (location.hash === "#main") history.replaceState(null, "", new URL(event.oldURL).hash || "#/overview");
  else show();
});
try {
  state.run = await ask("run");
  state.status = state.run.status;
  parts.name.textContent = state.run.name;
  parts.name.title = state.run.folder;
  if (state.run.kind !== "run") parts.nav.overview.textContent = "Summary";
  showStatus();
  await show();
  state.fresh = false;
  setTimeout(look, EVERY_MS);
} catch (error) {
  main.replaceChildren(h("div", { class: "problem", role: "alert" }, error.message));
}
