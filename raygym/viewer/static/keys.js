// Keys: single letters, where nobody is typing.

import { h } from "./dom.js";

const KEYS = [
  ["Everywhere", [["1", "overview"], ["2", "trajectories"], ["f", "follow the run, or stop"], ["d", "auto, light, dark"], ["?", "these keys"], ["Esc", "close, or back"]]],
  ["Trajectories", [["j k", "next row, previous row"], ["Enter", "open it"], ["c", "compare its group"], ["/", "filters"], ["n p", "next page, previous page"]]],
  ["One trajectory", [["t", "conversation or tokens"], ["j k", "next turn, previous turn"], ["← →", "previous, next episode of the group"], ["c", "compare the group"], ["l", "colour tokens by the next thing"]]],
  ["Among tokens", [["← →", "previous, next token"], ["↑ ↓", "ten at a time"]]],
];

/** Calls `pressed(key)` for keys that are pressed while no field has the focus; what returns false was not used. */
export function onKey(pressed) {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    const target = event.target;
    const types = target instanceof HTMLElement && target.matches("input, select, textarea");
    if (types) {
      if (event.key === "Escape") target.blur();
      return;
    }
    // Links and buttons do what Enter and Space mean there.
    if ((event.key === "Enter" || event.key === " ") && target instanceof HTMLElement && target.matches("a, button, summary")) return;
    if (pressed(event.key) !== false) event.preventDefault();
  });
}

/** Show which keys there are. */
export function help() {
  const dialog = document.getElementById("help");
  if (!dialog.firstChild) {
    dialog.append(
      h("h2", { id: "help-title" }, "Keys"),
      h(
        "div",
        { class: "key-lists" },
        KEYS.map(([title, keys]) =>
          h("section", null, h("h3", null, title), h("dl", null, keys.map(([key, text]) => h("div", null, h("dt", null, key.split(" ").map((each) => h("kbd", null, each))), h("dd", null, text))))),
        ),
      ),
      h("form", { method: "dialog" }, h("button", { class: "primary" }, "Close")),
    );
  }
  dialog.showModal();
}
