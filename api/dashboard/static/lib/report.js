// What was found in a file (`uora.data.DatasetReport`).

import { h, pairs } from "./dom.js";
import { count } from "./format.js";

export function reportOf(report) {
  const some = (value) => (value ? count(value) : null);
  const parts = [pairs([
    ["rows", report.rows_usable === report.rows_read ? count(report.rows_read) : `${count(report.rows_usable)} of ${count(report.rows_read)} usable`],
    ["kind", [report.container, report.row_format].filter(Boolean).join(", ")],
    ["tokens", some(report.tokens)],
    ["learned tokens", some(report.learned_tokens)],
    ["tokens of a row", report.lengths ? `half ≤ ${count(report.lengths.p50)}, most ≤ ${count(report.lengths.p95)}, longest ${count(report.lengths.max)}` : null],
    ["cut rows", some(report.rows_truncated)],
    ["rows left out", some(report.rows_dropped)],
    ["duplicates", some(report.duplicates.count)],
    ["also in the training file", some(report.leak)],
    ["classes", some(report.label_count)],
  ])];
  if (report.lengths?.counts.some((number) => number > 0)) parts.push(histogram(report.lengths));
  if (report.labels && Object.keys(report.labels).length) parts.push(labels(report.labels));
  if (report.problem_count) parts.push(problems(report));
  if (report.previews?.length) parts.push(preview(report.previews[0]));
  return parts;
}

/** Rows by their tokens, a line for each stretch, without the empty ones at both ends. */
function histogram({ edges, counts, max }) {
  const first = counts.findIndex((number) => number > 0);
  const last = counts.findLastIndex((number) => number > 0);
  const highest = Math.max(...counts);
  const lines = counts.slice(first, last + 1).map((number, i) => {
    const range = `${count(edges[first + i])}–${count((edges[first + i + 1] ?? max + 1) - 1)}`;
    const bar = h("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
      h("rect", { width: number ? Math.max(1, (number / highest) * 100) : 0, height: 10 }));
    return [h("dt", {}, range), h("dd", {}, bar, h("span", {}, count(number)))];
  });
  return h("details", {}, h("summary", {}, "Rows by their tokens"), h("dl", { class: "bars" }, lines.flat()));
}

const labels = (found) => h("details", {}, h("summary", {}, "Rows of each class"), pairs(Object.entries(found).map(([name, number]) => [name, count(number)])));

function problems({ problems: found, problem_count: all }) {
  const rows = found.slice(0, 10).map(({ location, message }) => h("li", {}, location ? h("strong", {}, `${location}: `) : null, message));
  const more = all > rows.length ? h("li", { class: "muted" }, `and ${count(all - rows.length)} more`) : null;
  return h("div", {}, h("h3", {}, `${count(all)} ${all === 1 ? "problem" : "problems"}`), h("ul", { class: "plain-list problem" }, rows, more));
}

function preview({ location, segments, hidden_tokens: hidden }) {
  const text = segments.map((segment) => (segment.learned ? h("mark", {}, segment.text) : segment.text));
  return h("details", {}, h("summary", {}, `${location}, as the model learns it`),
    h("pre", { class: "preview", tabindex: "0", "aria-label": `${location}; what is learned is marked` }, text, hidden ? ` … ${count(hidden)} tokens more` : null));
}
