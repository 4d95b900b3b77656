// Numbers, for people.

const DASH = "–";

/** Four digits at most, with k and M. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return DASH;
  if (typeof value !== "number") return String(value); // what another program has written
  const size = Math.abs(value);
  if (size >= 1e9) return `${trimmed(value / 1e9, 2)}G`;
  if (size >= 1e6) return `${trimmed(value / 1e6, 2)}M`;
  if (size >= 1e4) return `${trimmed(value / 1e3, 1)}k`;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size >= 100) return trimmed(value, 1);
  if (size >= 1) return trimmed(value, 2);
  if (size >= 0.001) return trimmed(value, 4);
  return value.toExponential(1);
}

const trimmed = (value, digits) => String(Number(value.toFixed(digits)));

/** A reward: two digits, so that columns line up. */
export function reward(value) {
  if (typeof value !== "number") return number(value);
  return Math.abs(value) >= 1e4 ? number(value) : value.toFixed(2).replace("-", "−");
}

/** Seconds as what fits. */
export function seconds(value) {
  if (value === null || value === undefined) return DASH;
  if (value < 0.001) return value === 0 ? "0 s" : `${trimmed(value * 1e6, 0)} µs`;
  if (value < 1) return `${trimmed(value * 1e3, value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${trimmed(value, value < 10 ? 2 : 1)} s`;
  if (value < 7200) return `${trimmed(value / 60, 1)} min`;
  return `${trimmed(value / 3600, 1)} h`;
}

export function bytes(value) {
  if (value < 2 ** 20) return `${trimmed(value / 2 ** 10, 0)} KiB`;
  return value < 2 ** 30 ? `${trimmed(value / 2 ** 20, 0)} MiB` : `${trimmed(value / 2 ** 30, 2)} GiB`;
}

export function percent(value) {
  return value === null || value === undefined ? DASH : `${trimmed(100 * value, value < 0.1 ? 1 : 0)} %`;
}

/** "3" or "3–5". */
export function range(low, high) {
  if (low === null || low === undefined) return DASH;
  return low === high ? String(low) : `${low}–${high}`;
}

/** Where a trajectory is, in words. */
export function place(row) {
  if (row.kind === "validation") return `validation ${row.step}`;
  if (row.kind === "alarm") return `alarm at ${row.step}`;
  return row.step === null ? row.kind : `step ${row.step}`;
}
