// How rewards are spread: a bar for each bin, which can be chosen.

import { h } from "./dom.js";
import { number } from "./format.js";

/** Bars of `{low, high, counts}`; `chosen(low, high)` gets the bounds of a bin. */
export function histogram(data, chosen) {
  if (!data) return h("p", { class: "quiet" }, "No rewards.");
  const { low, high, counts } = data;
  const most = Math.max(...counts);
  const width = (high - low) / counts.length;
  return h(
    "div",
    { class: "histogram", role: "group", "aria-label": `Rewards from ${number(low)} to ${number(high)}` },
    counts.map((count, at) => {
      const from = at === 0 ? low : low + at * width;
      const to = at === counts.length - 1 ? high : low + (at + 1) * width;
      const text = `${number(count)} with a reward from ${number(from)} to ${number(to)}`;
      return h("button", { type: "button", title: text, "aria-label": text, disabled: count === 0, onclick: () => chosen(Number(from.toPrecision(12)), Number(to.toPrecision(12))) }, h("i", { vars: { height: `${count ? Math.max(4, (100 * count) / most) : 0}%` } }));
    }),
    h("span", { class: "quiet low" }, number(low)),
    h("span", { class: "quiet high" }, number(high)),
  );
}
