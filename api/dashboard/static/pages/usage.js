import { all, api, isAborted } from "../lib/api.js";
import { byId, empty, fill, h, problem, table } from "../lib/dom.js";
import { bytes, count, duration, words } from "../lib/format.js";
import { axis, colourOf, sizeOf } from "../lib/plot.js";
import { pageSignal } from "../lib/watch.js";

const PERIODS = { day: { hours: 24, width: "1h" }, week: { hours: 7 * 24, width: "1d" }, month: { hours: 30 * 24, width: "1d" } };
const HOUR = 3600;
const form = byId("period");
const main = byId("main").dataset;
const signal = pageSignal();
let plot = null;
let keyNames = new Map();

/** What is asked for: whole buckets, the present one included. */
function query() {
  const { hours, width } = PERIODS[form.elements.period.value];
  const bucket = width === "1d" ? 24 * HOUR : HOUR;
  const until = Math.floor(Date.now() / 1000);
  const since = Math.ceil((until - hours * HOUR) / bucket) * bucket;
  return new URLSearchParams({ start_time: since, bucket_width: width, limit: width === "1d" ? 31 : 168, "group_by[]": form.elements.group.value });
}

function amountOf(result) {
  const wanted = form.elements.amount.value;
  return wanted === "tokens" ? result.input_tokens + result.output_tokens : result[wanted];
}

function draw(buckets) {
  plot?.destroy();
  plot = null;
  const container = byId("chart");
  const values = buckets.map(({ results }) => results.reduce((sum, each) => sum + amountOf(each), 0));
  const label = form.elements.amount.selectedOptions[0].textContent;
  const sum = values.reduce((a, b) => a + b, 0);
  container.setAttribute("role", "img");
  container.setAttribute("aria-label", `${label}: ${count(sum)} in the period, at most ${count(Math.max(0, ...values))} at once`);
  if (!sum) {
    fill(container, h("p", { class: "empty" }, "Nothing of this kind in the period."));
    return;
  }
  fill(container);
  const bar = { stroke: colourOf("--accent-fill"), fill: colourOf("--accent-fill"), width: 0, points: { show: false } };
  const bars = uPlot.paths.bars({ size: [0.7, 48], align: 0 });
  const half = (buckets[0].end_time - buckets[0].start_time) / 2;
  const options = {
    ...sizeOf(container),
    padding: [10, 12, 0, 0],
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { range: (_, low, high) => [low - half, high + half] }, y: { range: (_, low, high) => [0, high * 1.06 || 1] } },
    axes: [{ ...axis(), size: 44 }, { ...axis(), label, size: 72, values: (_, splits) => splits.map(count) }],
    series: [{}, { ...bar, paths: bars }],
  };
  plot = new uPlot(options, [buckets.map(({ start_time }) => start_time), values], container);
}

function tell(buckets) {
  const by = form.elements.group.value;
  const sums = new Map();
  for (const result of buckets.flatMap(({ results }) => results)) {
    const sum = sums.get(result[by]) ?? { name: result[by], requests: 0, input_tokens: 0, output_tokens: 0, items: 0, trained_tokens: 0, seconds: 0 };
    for (const name of Object.keys(sum)) if (name !== "name") sum[name] += result[name];
    sums.set(result[by], sum);
  }
  const rows = [...sums.values()].sort((a, b) => amountOf(b) - amountOf(a));
  const shown = (row) => (by === "api_key_id" ? keyNames.get(row.name) ?? row.name : words(row.name));
  const columns = [
    { name: form.elements.group.selectedOptions[0].textContent, title: true, cell: (row) => h("span", { class: by === "model" ? "mono" : null }, shown(row)) },
    ...[["requests", "Requests"], ["input_tokens", "Prompt tokens"], ["output_tokens", "Answer tokens"], ["items", "Classified"], ["trained_tokens", "Trained tokens"]]
      .map(([key, name]) => ({ name, right: true, cell: (row) => count(row[key]) })),
    { name: "Training time", right: true, cell: (row) => duration(row.seconds) },
  ];
  fill(byId("totals"), rows.length ? table(columns, rows, { caption: "Totals of the period", rowId: (row) => row.name })
    : empty("Nothing was used in this period.", "Ask a model in the playground, or start a job."));
}

function tellQuotas({ data }, stored) {
  const shown = (quota, value) => (quota.name === "bytes_stored" ? bytes(value) : count(value));
  const used = (quota) => (quota.name === "bytes_stored" ? quota.used ?? stored : quota.used);
  const columns = [
    { name: "Quota", title: true, cell: (quota) => words(quota.name) },
    { name: "Used", right: true, cell: (quota) => shown(quota, used(quota)) },
    { name: "Limit", right: true, cell: (quota) => (quota.limit ? shown(quota, quota.limit) : "none") },
    { name: "Share", label: "", hidden: true, cell: (quota) => (quota.limit
      ? h("progress", { max: quota.limit, value: Math.min(quota.limit, used(quota) ?? 0), "aria-label": `Used of ${words(quota.name)}` }) : "") },
  ];
  fill(byId("quotas"), table(columns, data, { caption: "Quotas", rowId: (quota) => quota.name }));
}

async function show() {
  try {
    const asked = query();
    byId("csv").href = `/v1/usage.csv?${asked}`;
    const page = await api(`/v1/usage?${asked}`, { signal });
    fill(byId("problem"));
    draw(page.data);
    tell(page.data);
    tellQuotas(await api("/v1/usage/quotas", { signal }), page.bytes_stored.total);
  } catch (error) {
    if (!isAborted(error)) fill(byId("problem"), problem(error));
  }
}

form.addEventListener("change", show);
form.addEventListener("submit", (event) => event.preventDefault());
addEventListener("themechange", show);
new ResizeObserver(() => plot?.setSize(sizeOf(byId("chart")))).observe(byId("chart"));

if ("admin" in main) {
  const keys = await all(`/v1/organization/projects/${main.project}/api_keys?limit=100`, { signal }).catch(() => []);
  keyNames = new Map(keys.map(({ id, name }) => [id, name]));
}
await show();
