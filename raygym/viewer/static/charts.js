// Charts of a run over its steps, as SVG. The pointer, or the arrow keys, show one step in all of them.

import { h, s } from "./dom.js";
import { number } from "./format.js";

const LEFT = 46;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;
const HEIGHT = 190;
const shownStep = new EventTarget();

/**
 * A chart.
 * @param {string} title
 * @param {{form?: "line" | "area" | "bar", format?: (value: number) => string, note?: string, whole?: boolean}} options
 * @returns an element with `draw({steps, series})`; a series is {name, values, band?: values above and below}.
 */
export function chart(title, { form = "line", format = number, note = "", whole = false } = {}) {
  const legend = h("div", { class: "legend" });
  const plot = s("svg", { role: "img", tabindex: "0", height: HEIGHT });
  const tip = h("div", { class: "tip", hidden: true });
  const element = h(
    "figure",
    { class: "chart" },
    h("figcaption", null, h("span", { class: "title" }, title), note && h("span", { class: "quiet" }, note)),
    legend,
    h("div", { class: "plot" }, plot, tip),
  );
  let data = { steps: [], series: [] };
  let at = null;
  let scale = null;

  function draw(next = data) {
    // A series without a value has no colour, neither in the legend nor beside the pointer.
    data = { ...next, series: next.series.filter(({ values }) => values.some((value) => value !== null)) };
    const { series } = data;
    const width = Math.max(220, Math.floor(element.clientWidth || 360) - 26);
    plot.setAttribute("width", width);
    plot.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    plot.setAttribute("aria-label", spoken(title, data.steps, series, format));
    legend.replaceChildren(
      ...(series.length > 1
        ? series.map(({ name }, index) => h("span", null, h("i", { class: `swatch c${index % 8}` }), name))
        : []),
    );
    if (!series.length) {
      scale = null;
      plot.replaceChildren(s("text", { x: width / 2, y: HEIGHT / 2, class: "none" }, "nothing recorded yet"));
      return;
    }
    const stacked = form === "line" ? series.map(lineEdges) : stack(series, data.steps.length);
    scale = scales(data.steps, stacked, width, form, whole);
    plot.replaceChildren(axes(scale, width, format), ...stacked.map((each, index) => marks(each, index, scale, form)), s("g", { class: "cursor" }));
    cursor();
  }

  function cursor() {
    const layer = plot.querySelector(".cursor");
    if (!layer || at === null || !scale || data.steps[at] === undefined) {
      layer?.replaceChildren();
      tip.hidden = true;
      return;
    }
    const x = scale.x(data.steps[at]);
    layer.replaceChildren(s("line", { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    const rows = data.series.map(({ name, values }, index) => [name, values[at], index]).filter(([, value]) => value !== null && value !== undefined);
    tip.replaceChildren(
      h("b", null, `step ${data.steps[at]}`),
      ...rows.map(([name, value, index]) => h("div", null, h("i", { class: `swatch c${index % 8}` }), data.series.length > 1 ? `${name} ` : "", h("b", null, format(value)))),
      data.bucket > 1 ? h("div", { class: "quiet" }, `mean of ${data.bucket} steps`) : "",
    );
    tip.hidden = rows.length === 0;
    const half = plot.getBoundingClientRect().width / 2;
    tip.classList.toggle("at-left", x > half);
    tip.style.left = `${x}px`;
  }

  function tell(index) {
    const step = index === null ? null : data.steps[index];
    shownStep.dispatchEvent(new CustomEvent("step", { detail: step }));
  }

  const heard = ({ detail }) => {
    if (!element.isConnected) return;
    const index = detail === null || detail === undefined ? -1 : data.steps.indexOf(detail);
    at = index < 0 ? null : index;
    cursor();
  };
  shownStep.addEventListener("step", heard);
  plot.addEventListener("pointermove", (event) => scale && tell(scale.nearest(event.offsetX)));
  plot.addEventListener("pointerleave", () => tell(null));
  plot.addEventListener("blur", () => tell(null));
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || !data.steps.length) return;
    event.preventDefault();
    tell(Math.min(Math.max((at ?? data.steps.length) + by, 0), data.steps.length - 1));
  });
  const resized = new ResizeObserver(() => draw());
  resized.observe(element);
  const end = () => {
    resized.disconnect();
    shownStep.removeEventListener("step", heard);
  };
  return { element, draw, end };
}

function spoken(title, steps, series, format) {
  if (!series.length) return `${title}: nothing recorded yet`;
  const last = series.map(({ name, values }) => {
    const known = values.filter((value) => value !== null);
    return `${name} ${format(known.at(-1))} (from ${format(Math.min(...known))} to ${format(Math.max(...known))})`;
  });
  return `${title}, steps ${steps[0]} to ${steps.at(-1)}: ${last.join(", ")}`;
}

const lineEdges = ({ values, band }) => ({
  top: values,
  low: values.map((value, index) => (value === null ? null : value - (band?.[index] ?? 0))),
  high: values.map((value, index) => (value === null ? null : value + (band?.[index] ?? 0))),
  band: Boolean(band),
});

function stack(series, length) {
  const sums = new Array(length).fill(0);
  return series.map(({ values }) => {
    const low = [...sums];
    values.forEach((value, index) => (sums[index] += value ?? 0));
    return { low, high: [...sums], top: [...sums] };
  });
}

function scales(steps, edges, width, form, whole) {
  const all = edges.flatMap(({ low, high }) => [...low, ...high]).filter((value) => value !== null);
  let least = Math.min(...all);
  let most = Math.max(...all);
  if (form !== "line" || (least > 0 && least < most / 3)) least = 0;
  if (most === least) [least, most] = most === 0 ? [0, 1] : [Math.min(0, most), Math.max(0, most)];
  const ticks = nice(least, most, whole ? Math.min(4, Math.max(1, most - least)) : 4);
  least = Math.min(least, ticks[0]);
  most = Math.max(most, ticks.at(-1));
  const inner = width - LEFT - RIGHT;
  const [first, last] = [steps[0], steps.at(-1)];
  const gap = form === "bar" ? inner / (steps.length || 1) / 2 : 0;
  const x = (step) => LEFT + gap + (last === first ? inner / 2 - gap : ((step - first) / (last - first)) * (inner - 2 * gap));
  const y = (value) => TOP + (1 - (value - least) / (most - least)) * (HEIGHT - TOP - BOTTOM);
  const nearest = (px) => steps.reduce((best, step, index) => (Math.abs(x(step) - px) < Math.abs(x(steps[best]) - px) ? index : best), 0);
  return { x, y, ticks, steps, nearest, bar: Math.max(1, Math.min(26, (inner / (steps.length || 1)) * 0.72)), base: y(Math.max(least, 0)) };
}

function axes(scale, width, format) {
  const { steps } = scale;
  const count = Math.max(2, Math.floor(width / 64));
  const wanted = nice(steps[0], steps.at(-1), count).filter((step) => Number.isInteger(step) && step >= steps[0] && step <= steps.at(-1));
  return s(
    "g",
    { class: "axes" },
    scale.ticks.map((value) => [
      s("line", { x1: LEFT, x2: width - RIGHT, y1: scale.y(value), y2: scale.y(value) }),
      s("text", { x: LEFT - 6, y: scale.y(value) + 3.5, class: "y" }, format(value)),
    ]),
    (steps.length === 1 ? [steps[0]] : wanted).map((step) => s("text", { x: scale.x(step), y: HEIGHT - 6, class: "x" }, String(step))),
  );
}

function marks({ top, low, high, band }, index, scale, form) {
  const color = `c${index % 8}`;
  const { steps, x, y } = scale;
  if (form === "bar") {
    return s(
      "g",
      { class: `bars ${color}` },
      steps.map((step, at) => high[at] > low[at] && s("rect", { x: x(step) - scale.bar / 2, width: scale.bar, y: y(high[at]), height: Math.max(1, y(low[at]) - y(high[at])) })),
    );
  }
  const known = steps.map((step, at) => [x(step), top[at], low[at], high[at]]).filter(([, value]) => value !== null);
  const line = known.map(([px, value]) => `${px.toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  const area = [...known.map(([px, , , value]) => `${px.toFixed(1)},${y(value).toFixed(1)}`), ...known.reverse().map(([px, , value]) => `${px.toFixed(1)},${y(value).toFixed(1)}`)].join(" ");
  return s(
    "g",
    { class: color },
    (form === "area" || band) && s("polygon", { points: area, class: form === "area" ? "area" : "band" }),
    s("polyline", { points: line }),
    form === "line" && known.length <= 24 && known.map(([px, value]) => s("circle", { cx: px, cy: y(value), r: 2.4 })),
  );
}

/** Round numbers between two, about so many. */
function nice(low, high, count) {
  if (high === low) return [low];
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((each) => each * power >= raw) * power;
  const found = [];
  for (let tick = Math.ceil(low / size - 1e-9); tick * size <= high + size * 1e-9; tick++) found.push(Number((tick * size).toPrecision(12)));
  return found.length ? found : [low, high];
}
