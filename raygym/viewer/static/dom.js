// Elements without markup: whatever a run holds gets into the page as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

function filled(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "open") element[name] = value;
    else if (name === "vars") for (const [key, each] of Object.entries(value)) element.style.setProperty(key, each);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An HTML element. Properties `on...` are listeners, `vars` are CSS properties; children that are text stay text. */
export const h = (tag, props, ...children) => filled(document.createElement(tag), props, children);

/** The same of SVG. */
export const s = (tag, props, ...children) => filled(document.createElementNS(SVG, tag), props, children);

/** Something to choose one of: `choices` are [value, text]. */
export function select(label, name, value, choices, onchange) {
  const options = choices.map(([each, text]) => {
    const option = h("option", { value: each }, text);
    option.selected = each === value;
    return option;
  });
  return h("label", { class: "field" }, h("span", null, label), h("select", { name, "aria-label": label, onchange }, options));
}

/** Buttons of which one is pressed: `choices` are [value, text, disabled, title]. */
export function segmented(label, value, choices, chosen) {
  return h(
    "div",
    { class: "segmented", role: "group", "aria-label": label },
    choices.map(([each, text, disabled, title]) =>
      h(
        "button",
        {
          type: "button",
          "aria-pressed": String(each === value),
          "data-value": each,
          disabled: Boolean(disabled),
          title,
          onclick: () => chosen(each),
        },
        text,
      ),
    ),
  );
}
