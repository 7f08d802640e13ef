import { api, isAborted, quietly, request } from "../lib/api.js";
import { badge, byId, empty, fill, h, problem, table } from "../lib/dom.js";
import { count, duration, loss, percent } from "../lib/format.js";
import { ENDED, methodOf, secondsLeft, statusWords, suffixOf, when } from "../lib/jobs.js";
import { pageSignal, watch } from "../lib/watch.js";

const PAGE = 100;
const NEW_JOBS_EVERY_MS = 5000;
const signal = pageSignal();
const jobs = new Map(); // newest first
const chosen = new Set();
let hasMore = false;
let watched = "";
let watching = new AbortController();
let firstPage = null;

async function load(after = null) {
  const more = after ? `&after=${encodeURIComponent(after)}` : "";
  const page = await api(`/v1/fine_tuning/jobs?limit=${PAGE}${more}`, { signal });
  for (const job of page.data) jobs.set(job.id, job);
  hasMore = page.has_more;
  show();
  follow();
}

/** Jobs that were made meanwhile; a list that did not change costs an empty answer. */
async function lookForNew() {
  if (document.hidden) return;
  const headers = firstPage ? { "If-None-Match": firstPage } : {};
  const response = await request(`/v1/fine_tuning/jobs?limit=${PAGE}`, { headers, signal });
  if (response.status === 304) return;
  firstPage = response.headers.get("ETag");
  const { data } = await response.json();
  const known = [...jobs.values()].filter((job) => !data.some((each) => each.id === job.id));
  const oldest = data.at(-1)?.created_at ?? 0;
  jobs.clear();
  for (const job of [...data, ...known.filter((job) => job.created_at <= oldest)]) jobs.set(job.id, job);
  show();
  follow();
}

/** Wait for changes of those that have not ended. */
function follow() {
  const ids = [...jobs.values()].filter((job) => !ENDED.has(job.status)).slice(0, 500).map((job) => job.id).join(",");
  if (ids === watched) return;
  watched = ids;
  watching.abort();
  watching = new AbortController();
  if (!ids) return;
  const stop = watching.signal;
  watch(`/v1/fine_tuning/jobs/states?ids=${ids}`, ({ data }) => take(data), { signal: AbortSignal.any([signal, stop]) });
}

function take(states) {
  let ended = false;
  for (const state of states) {
    const job = jobs.get(state.id);
    if (!job) continue;
    ended ||= ENDED.has(state.status) && !ENDED.has(job.status);
    Object.assign(job, state);
  }
  show();
  if (ended) lookForNew().catch(cannotLook); // the name of its model
}

function matches(job) {
  const status = byId("status").value;
  if (status === "unfinished" ? ENDED.has(job.status) : status && job.status !== status) return false;
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = [job.id, job.model, job.fine_tuned_model, methodOf(job), job.task, ...Object.entries(job.metadata ?? {}).flat()]
    .join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

const COLUMNS = [
  { name: "Choose", label: "Compare", hidden: true, cell: chooser },
  { name: "Job", title: true, cell: (job) => [
    h("a", { href: `/dashboard/jobs/${job.id}` }, suffixOf(job.fine_tuned_model) ?? job.metadata?.name ?? job.id),
    h("span", { class: "sub mono" }, job.id),
  ] },
  { name: "Status", cell: (job) => badge(job.status, statusWords(job.status)) },
  { name: "Progress", cell: progress },
  { name: "Loss", right: true, cell: (job) => loss(job.progress?.train_loss) },
  { name: "Model", cell: (job) => h("span", {}, job.model, h("span", { class: "sub" }, methodOf(job))) },
  { name: "Made", right: true, cell: (job) => when(job.created_at) },
];

function chooser(job) {
  const box = h("input", { type: "checkbox", "aria-label": `Compare ${job.id}`, "data-choose": job.id, change: () => {
    if (box.checked) chosen.add(job.id);
    else chosen.delete(job.id);
    showChosen();
  } });
  box.checked = chosen.has(job.id);
  return box;
}

function progress(job) {
  if (job.status === "queued" && job.queue_position) return h("span", { class: "muted" }, `${job.queue_position} in the queue`);
  if (!job.progress) return h("span", { class: "muted" }, "–");
  const left = secondsLeft(job);
  const bar = h("progress", { max: 100, value: job.progress.percent, "aria-label": `Progress of ${job.id}`, class: job.status === "succeeded" ? "done" : null });
  const steps = `${count(job.progress.step)} of ${count(job.progress.total_steps)}`;
  const text = ENDED.has(job.status) || left === null ? steps : `${percent(job.progress.percent)}, ${duration(left)} left`;
  return h("span", {}, bar, h("span", { class: "sub" }, text));
}

function show() {
  const found = [...jobs.values()].filter(matches);
  const kept = document.activeElement?.dataset?.choose;
  const list = byId("jobs");
  if (!jobs.size) {
    const start = h("a", { class: "button primary", href: "/dashboard/jobs/new" }, "Start a job");
    fill(list, h("div", { class: "card" }, empty("No jobs yet.", "A job tunes a model on your rows. Upload a file of conversations, and the rest has defaults.", start)));
  } else if (!found.length) {
    fill(list, h("div", { class: "card" }, empty("No job matches.", "Take a word out of the search, or choose another status.")));
  } else fill(list, h("div", { class: "list card" }, table(COLUMNS, found, { caption: "Jobs", rowId: (job) => job.id })));
  if (kept) list.querySelector(`[data-choose="${kept}"]`)?.focus();
  const of = found.length < jobs.size ? `${count(found.length)} of ` : "";
  const text = `${of}${count(jobs.size)} ${jobs.size === 1 ? "job" : "jobs"}${hasMore ? ", older ones not counted" : ""}`;
  if (byId("count").textContent !== text) byId("count").textContent = jobs.size ? text : "";
  byId("more").hidden = !hasMore;
}

function showChosen() {
  const button = byId("compare");
  button.disabled = chosen.size < 2;
  button.textContent = chosen.size < 2 ? "Compare curves" : `Compare ${chosen.size} curves`;
}

function cannotLook(error) {
  if (!isAborted(error)) byId("count").textContent = error.message;
  firstPage = null; // the next answer is shown, changed or not
}

byId("filters").addEventListener("input", show);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", () => load([...jobs.keys()].at(-1)).catch(quietly));
byId("compare").addEventListener("click", () => {
  const [first, ...others] = [...jobs.keys()].filter((id) => chosen.has(id));
  location.assign(`/dashboard/jobs/${first}?with=${others.join(",")}`);
});
byId("search").value = new URLSearchParams(location.search).get("search") ?? "";
load().catch((error) => isAborted(error) || fill(byId("jobs"), problem(error)));
setInterval(() => lookForNew().catch(cannotLook), NEW_JOBS_EVERY_MS);
