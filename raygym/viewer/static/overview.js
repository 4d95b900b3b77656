// What the run is and how it goes: its newest numbers, charts, what happened to its parts, its config.

import { ask, link } from "./api.js";
import { chart } from "./charts.js";
import { h } from "./dom.js";
import * as format from "./format.js";
import { rolloutSummary } from "./rollout.js";

const TIMES = ["generate", "learn", "validate_wait", "sync", "checkpoint"];
const OF_ENV = "reward/mean/";
const MOST_ENVS = 8; // there are as many colours

// Each chart: which metrics, and how. `make` computes series from columns.
const CHARTS = [
  { title: "Reward", note: "mean of a step ± deviation", metrics: ["reward/mean", "reward/std"], make: (c) => [{ name: "reward", values: c["reward/mean"], band: c["reward/std"] }] },
  { title: "Validation reward", metrics: ["val/reward"], known: true, make: (c) => [{ name: "validation", values: c["val/reward"] }] },
  { title: "Reward by environment", note: `mean of a step, ${MOST_ENVS} of them at most`, prefix: OF_ENV, metrics: [], make: byEnvironment },
  { title: "Time of a step", form: "area", format: format.seconds, metrics: TIMES.map((name) => `time/${name}_s`), make: (c) => TIMES.map((name) => ({ name: name.replace("_", " "), values: c[`time/${name}_s`] })) },
  { title: "Tokens per second", note: "over the whole step, and while learning", metrics: ["tokens/generated", "time/step_s", "learn/tokens_per_s"], make: throughput },
  { title: "Failed episodes", note: "attempts by kind; tasks dropped", form: "bar", whole: true, prefix: "episodes/failed/", metrics: ["groups/dropped", "episodes/completed"], make: failures },
  { title: "Staleness", note: "versions between sampling and training", form: "bar", whole: true, metrics: ["policy/staleness_max"], make: (c) => [{ name: "largest", values: c["policy/staleness_max"] }] },
  { title: "Episode length", note: "turns", metrics: ["episodes/turns_mean"], make: (c) => [{ name: "turns", values: c["episodes/turns_mean"] }] },
  { title: "Engine and learner", note: "|difference of logprobs|, nats", metrics: ["policy/logprob_abs_diff"], make: (c) => [{ name: "difference", values: c["policy/logprob_abs_diff"] }] },
  { title: "Entropy", note: "nats a token", metrics: ["policy/entropy"], make: (c) => [{ name: "entropy", values: c["policy/entropy"] }] },
];

function throughput(c) {
  const generated = c["tokens/generated"]?.map((tokens, at) => (tokens === null || !c["time/step_s"]?.[at] ? null : tokens / c["time/step_s"][at]));
  return [{ name: "generated", values: generated }, { name: "learned", values: c["learn/tokens_per_s"] }];
}

function byEnvironment(c) {
  return Object.keys(c).filter((name) => name.startsWith(OF_ENV)).slice(0, MOST_ENVS).map((name) => ({ name: name.slice(OF_ENV.length), values: c[name] }));
}

function failures(c) {
  const kinds = Object.keys(c).filter((name) => name.startsWith("episodes/failed/"));
  const found = kinds.map((name) => ({ name: name.slice("episodes/failed/".length), values: c[name] }));
  return [...found, { name: "dropped tasks", values: c["groups/dropped"] }].filter(({ values }, at, all) => at < all.length - 1 || values?.some((count) => count) || all.length === 1);
}

export async function overview(params, state) {
  if (state.run.kind !== "run") return rolloutSummary(state);
  const tiles = h("dl", { class: "tiles" });
  const charts = CHARTS.map((spec) => ({ spec, chart: chart(spec.title, spec) }));
  const more = allMetrics();
  const events = h("section", { class: "panel", "aria-label": "Events" });
  const config = h("details", { class: "panel" }, h("summary", null, "Config"), h("pre", { tabindex: "0" }, state.run.config));
  const summary = h("div", null);
  const element = h("div", { class: "overview" }, tiles, h("div", { class: "charts" }, charts.map((each) => each.chart.element)), events, more.element, config, summary);

  let first = state.fresh;
  state.fresh = false;
  async function refresh() {
    // The page has just asked for it when it is shown first.
    const run = first ? state.run : (state.run = await ask("run"));
    first = false;
    const wanted = CHARTS.flatMap(({ metrics, prefix }) => [...metrics, ...(prefix ? run.metrics.filter((name) => name.startsWith(prefix)) : [])]);
    const [columns, told] = await Promise.all([ask("metrics", { name: [...new Set(wanted)] }), ask("events")]);
    for (const { spec, chart: each } of charts) {
      const mine = Object.fromEntries(Object.entries(columns.series).filter(([name]) => spec.metrics.includes(name) || (spec.prefix && name.startsWith(spec.prefix))));
      const series = spec.make(mine).filter(({ values }) => values);
      // Where a validation is the only thing that a row has, the steps between have none.
      each.draw(spec.known ? onlyKnown(columns, series) : trained(columns, series));
      each.element.hidden = series.length === 0 && spec.title !== "Reward";
    }
    tiles.replaceChildren(...newest(columns));
    showEvents(events, told.events, run.alarms);
    summary.replaceChildren(...(run.summary ? [h("details", { class: "panel" }, h("summary", null, "Summary"), h("pre", { tabindex: "0" }, JSON.stringify(run.summary, null, 2)))] : []));
    await more.refresh(run.metrics);
  }

  await refresh();
  return {
    title: "Overview",
    element,
    refresh,
    attached: () => charts.forEach((each) => each.chart.draw()),
    end: () => {
      charts.forEach((each) => each.chart.end());
      more.end();
    },
  };
}

function onlyKnown({ steps, bucket }, series) {
  const kept = steps.map((_, at) => at).filter((at) => series.some(({ values }) => values[at] !== null));
  return { bucket, steps: kept.map((at) => steps[at]), series: series.map((each) => ({ ...each, values: kept.map((at) => each.values[at]) })) };
}

/** Without the row of step 0, where nothing was trained. */
function trained(columns, series) {
  const skip = columns.steps[0] === 0 ? 1 : 0;
  return {
    bucket: columns.bucket,
    steps: columns.steps.slice(skip),
    series: series.map((each) => ({ ...each, values: each.values.slice(skip), band: each.band?.slice(skip) })),
  };
}

/** The numbers of the run, of single steps and all of them, however many steps a point of a chart stands for. */
function newest({ exact }) {
  const last = (name) => exact[name]?.last;
  const failed = Object.keys(exact).filter((name) => name.startsWith("episodes/failed/")).reduce((sum, name) => sum + exact[name].sum, 0);
  const completed = exact["episodes/completed"]?.sum ?? 0;
  const speed = last("tokens/generated") / last("time/step_s");
  const change = (name) => (exact[name]?.count > 1 ? `${format.reward(exact[name].first)} at first` : "");
  const tile = (title, value, more = "", kind = "") => h("div", { class: `tile ${kind}` }, h("dt", null, title), h("dd", null, h("b", null, value), h("span", { class: "quiet" }, more)));
  return [
    tile("Reward", format.reward(last("reward/mean")), change("reward/mean")),
    tile("Validation", format.reward(last("val/reward")), change("val/reward")),
    tile("Step", format.seconds(last("time/step_s")), "newest"),
    tile("Generated", Number.isFinite(speed) ? `${format.number(speed)}/s` : "–", "tokens"),
    tile("Failed attempts", format.number(failed), completed ? `${format.percent(failed / (failed + completed))} of all` : "", failed ? "warns" : ""),
    tile("Staleness", format.number(last("policy/staleness_max")), "newest step, largest"),
  ];
}

function showEvents(element, events, alarms) {
  const rows = [
    ...alarms.map((alarm) => h("li", { class: alarm.action === "stop" ? "bad" : "warns" }, h("b", null, `Alarm ${alarm.alarm} at step ${alarm.step}`), ` ${alarm.reason ?? ""} `, h("a", { href: link("trajectories", { step_min: alarm.step, step_max: alarm.step }) }, "its trajectories"))),
    ...events.slice(-200).reverse().map((event) => h("li", { class: { lost: "bad", given_up: "bad", recovered: "good" }[event.what] ?? "" }, h("time", { datetime: event.time }, String(event.time ?? "").replace("T", " ").slice(0, 19)), h("b", null, `${event.name} ${String(event.what).replace("_", " ")}`), event.recovery_s ? ` after ${format.seconds(event.recovery_s)}` : "", event.cause ? `: ${event.cause}` : "")),
  ];
  element.replaceChildren(
    h("h2", null, "Events"),
    rows.length ? h("ul", { class: "events" }, rows) : h("p", { class: "quiet" }, "No alarm, and no part of the run was lost."),
  );
}

/** Every metric by itself, drawn once it is asked for. */
function allMetrics() {
  const grid = h("div", { class: "charts small" });
  const filter = h("input", { type: "search", placeholder: "Filter, such as policy/", "aria-label": "Filter metrics", oninput: () => draw() });
  const element = h("details", { class: "panel all-metrics", ontoggle: () => draw() }, h("summary", null, "All metrics"), filter, grid);
  let names = [];
  let asking = 0;
  let kept = new Map();

  async function draw() {
    if (!element.open) return;
    const wanted = names.filter((name) => name.includes(filter.value.trim())).slice(0, 60);
    const mine = ++asking;
    // A question without names is one for all.
    const columns = wanted.length ? await ask("metrics", { name: wanted }) : { steps: [], series: {} };
    if (mine !== asking) return;
    for (const [name, each] of kept) if (!wanted.includes(name)) (each.end(), kept.delete(name));
    for (const name of wanted) if (!kept.has(name)) kept.set(name, chart(name, { format: name.endsWith("_s") ? format.seconds : format.number }));
    grid.replaceChildren(...wanted.map((name) => kept.get(name).element));
    for (const name of wanted) kept.get(name).draw(onlyKnown(columns, [{ name, values: columns.series[name] ?? [] }]));
  }

  async function refresh(found) {
    names = found;
    await draw();
  }
  return { element, refresh, end: () => kept.forEach((each) => each.end()) };
}
