// Messages of a conversation. Text is shown as it is, tool calls with their arguments.

import { h } from "./dom.js";

const LONG = 3000;

/** One message. */
export function message(each) {
  const parts = [...reasoning(each), ...content(each.content), ...(each.tool_calls ?? []).map(call)];
  return h(
    "article",
    { class: `message ${known(each.role)}` },
    h("header", null, h("b", null, each.role === "assistant" ? "policy" : String(each.role)), each.name ? h("code", null, each.name) : "", each.tool_call_id ? h("span", { class: "quiet" }, `answers ${each.tool_call_id}`) : ""),
    parts.length ? parts : h("p", { class: "quiet" }, "(nothing)"),
  );
}

const known = (role) => (["system", "user", "assistant", "tool"].includes(role) ? role : "other");

function reasoning(each) {
  const text = each.reasoning_content ?? each.reasoning;
  return typeof text === "string" && text ? [h("details", { class: "reasoning" }, h("summary", null, "Reasoning"), words(text))] : [];
}

function content(value) {
  if (value === null || value === undefined || value === "") return [];
  if (typeof value === "string") return [words(value)];
  if (!Array.isArray(value)) return [words(JSON.stringify(value, null, 2))];
  return value.map((part) => (typeof part?.text === "string" ? words(part.text) : h("p", { class: "quiet" }, `[${part?.type ?? "part"}: not shown]`)));
}

function words(text) {
  if (text.length <= LONG) return h("div", { class: "words" }, text);
  const shown = h("div", { class: "words" }, `${text.slice(0, LONG)} …`);
  const more = h("button", { type: "button", class: "ghost", onclick: () => (shown.replaceChildren(text), more.remove()) }, `Show all ${text.length.toLocaleString("en")} characters`);
  return h("div", null, shown, more);
}

function call(each) {
  const { name, arguments: given } = each.function ?? each;
  return h("div", { class: "call" }, h("header", null, h("span", { class: "quiet" }, "calls"), h("code", null, String(name)), each.id ? h("span", { class: "quiet" }, each.id) : ""), h("pre", null, pretty(given)));
}

function pretty(given) {
  if (typeof given !== "string") return JSON.stringify(given ?? {}, null, 2);
  try {
    return JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    return given; // as the policy wrote it
  }
}
