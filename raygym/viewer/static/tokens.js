// The tokens of a trajectory, each coloured by one thing that is known of it; all of them where the pointer is.

import { ask } from "./api.js";
import { h, segmented } from "./dom.js";
import * as format from "./format.js";

const COLOURS = [["logprob", "Logprob"], ["mask", "Mask"], ["version", "Version"], ["difference", "Engine − learner"]];
const LIMITS = [-0.05, -0.2, -0.5, -1, -2, -3, -5, -8]; // nats; a bin below each
const DIFFERENCES = [1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1]; // nats, absolute
const WHO = { prompt: "Prompt", policy: "Turn", environment: "Environment" };

export function tokenView(told) {
  let colour = "logprob";
  const parts = []; // of the server, by their start
  const spans = []; // by token
  let loaded = 0;
  let at = -1;
  let loading = false;

  const controls = h("div", { class: "token-controls" });
  const legend = h("div", { class: "legend" });
  const flow = h("div", { class: "tokens by-logprob", tabindex: "0", role: "application", "aria-label": "Tokens; arrow keys go from one to the next", "aria-describedby": "token-facts" });
  const end = h("div", { class: "more" });
  const card = h("div", { class: "token-card", id: "token-facts", role: "status", hidden: true });
  const element = h("div", { class: "token-view" }, controls, legend, notes(told), flow, end, card);
  const drifted = new Map(); // token -> the span that it is in
  for (const span of told.retokenized ?? []) for (let index = span.start; index < Math.max(span.end, span.start + 1); index++) drifted.set(index, span);

  function choose(next) {
    colour = next;
    flow.className = `tokens by-${colour}`;
    controls.replaceChildren(segmented("Colour by", colour, COLOURS.map(([value, text]) => [value, text, value === "difference" && !told.has_learner, value === "difference" && !told.has_learner ? notComputed(told) : undefined]), choose),
      told.has_learner ? "" : h("span", { class: "quiet" }, notComputed(told)));
    showLegend();
  }

  function showLegend() {
    const swatch = (name, text) => h("span", null, h("i", { class: `swatch tone ${name}` }), text);
    const scale = (prefix, limits, words) => h("span", { class: "ramp" }, words[0], [...limits, 0].map((_, index) => h("i", { class: `swatch tone ${prefix}${index}` })), words[1]);
    const versions = [...new Set(parts.flatMap((part) => part.versions.filter((version) => version >= 0)))].sort((a, b) => a - b);
    const kinds = {
      logprob: [scale("p", LIMITS, ["likely", "unlikely"])],
      mask: [swatch("m1", "trained"), swatch("m0", "not trained")],
      version: versions.map((version) => swatch(`v${version % 8}`, `version ${version}`)),
      difference: [scale("d", DIFFERENCES, ["equal", "1 nat or more"])],
    };
    legend.replaceChildren(...kinds[colour], drifted.size ? swatch("drifted", "tokenized again, it would be other tokens") : "");
  }

  async function load() {
    if (loading || loaded >= told.tokens) return;
    loading = true;
    const more = (text) => h("button", { type: "button", onclick: load }, text);
    try {
      const part = await ask("tokens", { file: told.row.file, number: told.row.number, start: loaded });
      parts.push(part);
      add(part);
      loaded = part.end;
      end.replaceChildren(...(loaded < told.tokens ? [more(`Show more (${format.number(told.tokens - loaded)} left)`)] : []));
    } catch (error) {
      end.replaceChildren(h("span", { class: "badge bad", role: "alert" }, error.message), " ", more("Try again"));
    } finally {
      loading = false;
    }
    showLegend();
  }

  function add(part) {
    for (const segment of told.segments) {
      const from = Math.max(segment.start, part.start);
      const to = Math.min(segment.end, part.end);
      if (to <= from) continue;
      const text = segment.kind === "policy" ? `Turn ${segment.turn + 1}` : WHO[segment.kind];
      const made = [];
      for (let index = from; index < to; index++) made.push((spans[index] = token(part, index)));
      flow.append(h("section", { class: `segment ${segment.kind}`, "data-turn": segment.kind === "policy" ? segment.turn : null }, h("h3", null, text, h("span", { class: "quiet" }, ` ${format.number(segment.end - segment.start)}`)), h("p", null, made)));
    }
  }

  function token(part, index) {
    const place = index - part.start;
    const known = part.versions[place] >= 0;
    const classes = ["token", `m${part.mask[place]}`];
    if (known) classes.push(`p${bin(part.logprobs[place], LIMITS)}`, `v${part.versions[place] % 8}`);
    const other = part.learner?.[place];
    if (other !== null && other !== undefined && part.logprobs[place] !== null) classes.push(`d${differenceBin(part.logprobs[place] - other)}`);
    if (drifted.has(index)) classes.push("drifted");
    if (part.special?.[place]) classes.push("special");
    return h("span", { class: classes.join(" "), "data-index": index }, visible(part.texts ? part.texts[place] : String(part.ids[place])), part.texts ? "" : " ");
  }

  function show(index, span) {
    spans[at]?.classList.remove("at");
    at = index;
    const part = parts.find(({ start, end: past }) => index >= start && index < past);
    if (!part || !span) return (card.hidden = true);
    span.classList.add("at");
    card.replaceChildren(...facts(part, index));
    card.hidden = false;
    place(span);
  }

  function place(span) {
    if (matchMedia("(max-width: 640px)").matches) return; // it is at the bottom of the screen
    const box = span.getBoundingClientRect();
    const below = box.bottom + card.offsetHeight + 12 < innerHeight;
    card.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - card.offsetWidth - 8))}px`;
    card.style.top = `${below ? box.bottom + 6 : box.top - card.offsetHeight - 6}px`;
  }

  function facts(part, index) {
    const of = index - part.start;
    const logprob = part.logprobs[of];
    const known = part.versions[of] >= 0;
    const other = part.learner?.[of];
    const span = drifted.get(index);
    const fact = (name, value, kind = "") => h("div", { class: kind }, h("dt", null, name), h("dd", null, value));
    return [
      h("code", { class: "says" }, part.texts ? JSON.stringify(part.texts[of]) : `ID ${part.ids[of]}`),
      h("dl", null,
        fact("ID", String(part.ids[of])),
        fact("Place", String(index)),
        fact("Engine", known && logprob !== null ? `${signed(logprob)}  (p ${format.number(Math.exp(logprob))})` : "none: not generated"),
        fact("Learner", part.learner === null ? (told.asked_learner ? "not computed" : "not recorded") : other === null || other === undefined ? "not computed" : signed(other)),
        part.learner && other !== null && other !== undefined && logprob !== null ? fact("Engine − learner", (logprob - other).toExponential(2)) : "",
        known ? fact("Version", String(part.versions[of])) : "",
        fact("Trained", part.mask[of] ? "yes" : "no"),
        span ? fact("Tokenized again", span.instead.length ? span.instead.map((each) => JSON.stringify(each)).join(" ") : "other tokens", "drift-fact") : "",
      ),
    ];
  }

  flow.addEventListener("pointerover", ({ target }) => {
    const span = target.closest?.(".token");
    if (span) show(Number(span.dataset.index), span);
  });
  flow.addEventListener("pointerleave", () => show(-1, null));
  flow.addEventListener("blur", () => show(-1, null));
  flow.addEventListener("click", ({ target }) => {
    const span = target.closest?.(".token");
    if (span) show(Number(span.dataset.index), span);
  });
  flow.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 }[event.key];
    if (!by) return;
    event.preventDefault();
    const next = Math.min(Math.max(at < 0 ? firstGenerated(told) : at + by, 0), loaded - 1);
    spans[next]?.scrollIntoView({ block: "nearest" });
    show(next, spans[next]);
  });
  const sees = new IntersectionObserver((entries) => entries.some(({ isIntersecting }) => isIntersecting) && load(), { rootMargin: "600px" });
  sees.observe(end);
  const away = () => card.hidden || place(spans[at]);
  addEventListener("scroll", away, { passive: true });

  choose(colour);
  load();
  return {
    element,
    nextColour: () => {
      const usable = COLOURS.map(([value]) => value).filter((value) => value !== "difference" || told.has_learner);
      choose(usable[(usable.indexOf(colour) + 1) % usable.length]);
    },
    end: () => {
      sees.disconnect();
      removeEventListener("scroll", away);
    },
  };
}

const notComputed = (told) => (told.asked_learner ? "the learner computed nothing here: no token had an advantage" : "what the learner computed was not recorded");
const firstGenerated = (told) => told.segments.find(({ kind }) => kind === "policy")?.start ?? 0;
const signed = (value) => value.toFixed(4).replace("-", "−");
const bin = (value, limits) => (value === null ? limits.length : limits.filter((limit) => value < limit).length);
const differenceBin = (value) => DIFFERENCES.filter((limit) => Math.abs(value) >= limit).length;

/** Line ends and what else is not seen, made visible. */
const visible = (text) => text.replace(/\n/g, "↵\n").replace(/\t/g, "⇥\t").replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, (letter) => `\\x${letter.charCodeAt(0).toString(16).padStart(2, "0")}`);

function notes(told) {
  const found = [];
  if (!told.has_text) found.push("The policy's tokenizer is not on this machine: tokens are shown as IDs.");
  if (told.drifted) {
    found.push(
      told.retokenized?.length
        ? "This conversation, rendered anew, has other tokens than the policy saw; they are underlined. It was trained on the tokens that it saw."
        : "This conversation, rendered anew, has other tokens than the policy saw. No turn's own text differs: the difference is in how the template renders the history.",
    );
  }
  return found.length ? h("div", { class: "notes" }, found.map((text) => h("p", null, text))) : "";
}
