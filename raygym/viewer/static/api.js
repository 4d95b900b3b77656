// Questions to the server. Each is a GET of this origin.

/** Nobody answers: the viewer was ended, or is out of reach. */
export class NoAnswer extends Error {}

/** Answers of `/api/<name>`; raises with the server's own words, or `NoAnswer`. A list is a parameter given again and again. */
export async function ask(name, params = {}) {
  const each = Object.entries(params).flatMap(([key, value]) => (Array.isArray(value) ? value.map((one) => [key, one]) : [[key, value]]));
  const given = each.filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  const response = await fetch(`/api/${name}${query ? `?${query}` : ""}`).catch((error) => {
    throw new NoAnswer(`the viewer does not answer: ${error.message}`);
  });
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error ?? `the server answered ${response.status}`);
  return answer;
}

/** A link within the page, such as `link("trajectory", {file, number})`. */
export function link(view, params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(given).toString();
  return `#/${view}${query ? `?${query}` : ""}`;
}

/** What the address asks for. */
export function asked() {
  const [view, query] = location.hash.replace(/^#\/?/, "").split("?", 2);
  return { view: view || "overview", params: Object.fromEntries(new URLSearchParams(query ?? "")) };
}
