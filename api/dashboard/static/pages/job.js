import { all, api, isAborted, path, quietly } from "../lib/api.js";
import { LossChart } from "../lib/chart.js";
import { attempt, badge, byId, confirm, fill, h, pairs, table, toast } from "../lib/dom.js";
import { count, date, duration, loss, percent, setting, time, words } from "../lib/format.js";
import { curves, ENDED, methodOf, METHODS, secondsLeft, shortName, statusWords, when } from "../lib/jobs.js";
import { reportOf } from "../lib/report.js";
import { pageSignal, watch } from "../lib/watch.js";

const id = byId("main").dataset.job;
const address = `/v1/fine_tuning/jobs/${id}`;
const signal = pageSignal();
const others = new Map(); // id -> {job, events} of the jobs in the same plot
const chart = new LossChart(byId("chart"), byId("legend"), { onRemove: takeOut });
let job = null;
let events = []; // oldest first
let shownSettings = "";

// --- what is shown of the job itself -------------------------------------------------------------------------------

function showJob() {
  const name = shortName(job);
  byId("name").textContent = name.startsWith("…") ? job.id : name;
  document.title = `${name} · ${job.status} · UORA`;
  const old = byId("status").firstElementChild;
  if (old?.textContent !== statusWords(job.status)) fill(byId("status"), badge(job.status, statusWords(job.status)));
  const model = job.fine_tuned_model;
  fill(byId("summary"), h("span", { class: "mono" }, job.id), ` · ${methodOf(job)} on ${job.model} · made `, when(job.created_at),
    job.origin_job ? [" · made from ", h("a", { href: `/dashboard/jobs/${job.origin_job}` }, "another job")] : null,
    model ? [h("br"), "Answers as ", h("a", { class: "mono", href: `/dashboard/models?search=${encodeURIComponent(model)}` }, model)] : null);
  showProblem(null);
  showActions();
  showProgress();
  const settings = JSON.stringify([job.hyperparameters, job.adapter, job.options, job.dataset_report, job.seed]);
  if (settings !== shownSettings) {
    shownSettings = settings;
    showParameters();
    fill(byId("report"), job.dataset_report
      ? Object.entries(job.dataset_report).map(([which, report]) => [h("h3", {}, `${which === "training" ? "Training" : "Validation"} file`), reportOf(report)])
      : h("p", { class: "small-empty" }, "The files are being looked into."));
  }
}

/** What keeps the page from its job, else what ended the job; said once. */
function showProblem(error) {
  const found = error ? { message: error.message } : job?.error;
  const told = byId("problem");
  if (told.dataset.told === (found?.message ?? "")) return;
  told.dataset.told = found?.message ?? "";
  fill(told, found && h("p", { class: "problem", role: "alert" }, found.code && h("strong", {}, words(found.code)), found.message));
}

function showProgress() {
  const bar = byId("bar");
  const { progress } = job;
  if (progress) bar.value = progress.percent;
  else if (ENDED.has(job.status)) bar.value = 0;
  else bar.removeAttribute("value"); // nobody knows yet
  bar.className = job.status === "succeeded" ? "done" : "";
  byId("percent").textContent = progress ? percent(progress.percent) : "";
  const left = secondsLeft(job);
  const of = (text) => h("small", {}, text);
  const tile = (name, ...value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
  const { valid } = curves(events);
  const last = job.status === "queued" && job.queue_position ? tile("Place in the queue", count(job.queue_position))
    : ENDED.has(job.status) ? tile("Ended", of(job.finished_at ? date(job.finished_at) : "–"))
    : tile("Time left", left === null ? "–" : duration(left));
  fill(byId("numbers"),
    tile("Step", progress ? [count(progress.step), of(` of ${count(progress.total_steps)}`)] : "–"),
    last,
    tile("Train loss", loss(progress?.train_loss)),
    tile("Validation loss", loss(valid.at(-1)?.[1]), valid.length ? of(` at step ${valid.at(-1)[0]}`) : null),
    tile("Tokens per second", count(progress?.tokens_per_second)),
    tile("Learning rate", progress?.learning_rate === undefined ? "–" : setting(+progress.learning_rate.toPrecision(3))),
    tile("Gradient norm", loss(progress?.gradient_norm)));
}

function showParameters() {
  const { method, r, ...adapter } = job.adapter;
  const entries = (found) => Object.entries(found).map(([name, value]) => [words(name), setting(value)]);
  fill(byId("parameters"),
    pairs([["model", job.model], ["task", words(job.task)], ["method", METHODS[method]], ["rank", setting(r)], ...entries(job.hyperparameters), ["seed", setting(job.seed)],
      ["learning rate", adapter.learning_rate === null ? "the method's" : setting(adapter.learning_rate)], ["layers", setting(adapter.targets)],
      ["training file", h("span", { class: "mono" }, job.training_file)], ["validation file", job.validation_file && h("span", { class: "mono" }, job.validation_file)],
      ...Object.entries(job.metadata ?? {})]),
    h("details", {}, h("summary", {}, "All settings"),
      h("h3", {}, "Adapter"), pairs(entries(adapter)), h("h3", {}, "Training"), pairs(entries(job.options))));
}

// --- what can be done with it --------------------------------------------------------------------------------------

const ACTIONS = [
  { name: "Pause", on: ["validating_files", "queued", "running"], done: "The job stops at the end of its step." },
  { name: "Resume", on: ["paused", "failed"], done: "The job goes on." },
  { name: "Cancel", on: ["validating_files", "queued", "running", "paused"], danger: true, done: "The job is being cancelled.",
    ask: { title: "Cancel this job?", text: "It cannot go on afterwards. To go on later, pause it instead.", action: "Cancel the job" } },
  { name: "Retry", on: ["failed", "cancelled"], ask: { title: "Retry this job?", text: "A new job is made of the same request. This one stays as it is.", action: "Start it again", danger: false } },
];

function showActions() {
  const shown = ACTIONS.filter(({ on }) => on.includes(job.status));
  const key = [job.status, ...shown.map(({ name }) => name)].join();
  if (byId("actions").dataset.shown === key) return;
  byId("actions").dataset.shown = key;
  const buttons = shown.map((action) => {
    const button = h("button", { type: "button", class: action.danger ? "danger" : null, click: () => act(action, button) }, action.name);
    return button;
  });
  fill(byId("actions"), buttons,
    job.fine_tuned_model ? h("a", { class: "button", href: `/dashboard/playground?model=${encodeURIComponent(job.fine_tuned_model)}` }, "Ask it") : null,
    h("a", { class: "button", href: `/dashboard/jobs/new?from=${id}` }, "Clone…"),
    ENDED.has(job.status) ? deletion() : null);
}

async function act(action, button) {
  if (action.ask && !(await confirm(action.ask))) return;
  await attempt(button, async () => {
    const answer = await api(`${address}/${action.name.toLowerCase()}`, { method: "POST" });
    if (answer.id !== id) location.assign(`/dashboard/jobs/${answer.id}`);
    else {
      job = answer;
      showJob();
      toast(action.done);
      if (!button.isConnected) byId("main").focus();
    }
  });
}

function deletion() {
  const button = h("button", { type: "button", class: "danger", click: async () => {
    const options = job.fine_tuned_model ? [["models", "Delete its model too"]] : [];
    const answer = await confirm({ title: "Delete this job?", text: "Its events and checkpoints go with it. Files stay.", action: "Delete", options });
    if (!answer) return;
    await attempt(button, async () => {
      await api(`${address}?models=${Boolean(answer.models)}`, { method: "DELETE" });
      location.assign("/dashboard/jobs");
    });
  } }, "Delete");
  return button;
}

// --- curves --------------------------------------------------------------------------------------------------------

function showCurves() {
  const run = (of, found) => ({ id: of.id, name: shortName(of), ...curves(found) });
  chart.show([run(job, events), ...[...others.values()].map((other) => run(other.job, other.events))]);
}

async function putIn(otherId) {
  if (!otherId || otherId === id || others.has(otherId)) return;
  const [other, found] = await Promise.all([
    api(path`/v1/fine_tuning/jobs/${otherId}`, { signal }), all(path`/v1/fine_tuning/jobs/${otherId}/events?order=asc&limit=${1000}`, { signal })]);
  others.set(otherId, { job: other, events: found });
  keepOthers();
}

function takeOut(otherId) {
  others.delete(otherId);
  keepOthers();
  byId("overlay").focus();
}

function keepOthers() {
  const url = new URL(location);
  if (others.size) url.searchParams.set("with", [...others.keys()].join(","));
  else url.searchParams.delete("with");
  history.replaceState(null, "", url);
  for (const option of byId("overlay").options) option.disabled = others.has(option.value);
  showCurves();
}

async function offerOthers() {
  const { data } = await api("/v1/fine_tuning/jobs?limit=100", { signal });
  const offered = data.filter((each) => each.id !== id && each.progress);
  byId("overlay").append(...offered.map((each) =>
    h("option", { value: each.id, disabled: others.has(each.id) }, `${shortName(each)} · ${methodOf(each)} · ${each.status}`)));
}

/** Those in the plot that are still trained get their newer events. */
async function followOthers() {
  if (document.hidden) return;
  for (const [otherId, other] of others) {
    if (ENDED.has(other.job.status)) continue;
    other.job = await api(path`/v1/fine_tuning/jobs/${otherId}`, { signal });
    other.events.push(...(await newer(`/v1/fine_tuning/jobs/${otherId}`, other.events)));
    showCurves();
  }
}

// --- events and checkpoints ----------------------------------------------------------------------------------------

const newer = (of, known) =>
  all(`${of}/events?order=asc&limit=1000${known.length ? `&after=${known.at(-1).id}` : ""}`, { signal });

const LEVELS = {
  messages: (event) => event.type !== "metrics",
  all: () => true,
  warn: (event) => event.level !== "info",
  error: (event) => event.level === "error",
};

function eventRow(event) {
  return h("li", {}, h("time", { datetime: new Date(event.created_at * 1000).toISOString(), title: date(event.created_at) }, time(event.created_at)),
    h("span", { class: "message" }, event.level === "info" ? null : badge(event.level === "warn" ? "warn" : "error", event.level), event.message));
}

function showEvents() {
  const found = events.filter(LEVELS[byId("level").value]);
  fill(byId("events"), found.length ? found.toReversed().map(eventRow) : h("li", { class: "small-empty" }, h("span", {}, "None of this level.")));
}

async function showCheckpoints() {
  const [checkpoints, models] = await Promise.all([all(`${address}/checkpoints?limit=100`, { signal }), api("/v1/models", { signal })]);
  const model = models.data.find((each) => each.id === job.fine_tuned_model);
  const digests = model && checkpoints.length <= 20
    ? await Promise.all(checkpoints.map((each) => api(path`/v1/models/${each.fine_tuned_model_checkpoint}`, { signal }).then(({ digest }) => digest, () => null)))
    : [];
  const rows = checkpoints.map((checkpoint, number) => ({ ...checkpoint, used: Boolean(model) && digests[number] === model.digest }));
  if (rows.filter((row) => row.used).length > 1) for (const row of rows.slice(1)) row.used = false;
  fill(byId("checkpoints"), rows.length ? table(checkpointColumns(Boolean(model)), rows, { caption: "Checkpoints", rowId: (row) => row.id })
    : h("p", { class: "small-empty" }, ENDED.has(job.status) ? "The job made none." : "Each evaluation makes one, which answers under its own name."));
}

function checkpointColumns(hasModel) {
  const accuracy = ({ metrics }) => metrics.full_valid_mean_token_accuracy ?? metrics.valid_mean_token_accuracy;
  return [
    { name: "Step", title: true, cell: (row) => [h("strong", {}, count(row.step_number)), " ",
      row.step_number === job.best_step ? badge("succeeded plain", "best") : null, " ", row.used ? badge("info plain", "in use") : null] },
    { name: "Train", label: "Train loss", right: true, cell: ({ metrics }) => loss(metrics.train_loss) },
    { name: "Validation", label: "Validation loss", right: true, cell: ({ metrics }) => loss(metrics.full_valid_loss ?? metrics.valid_loss) },
    { name: "Accuracy", right: true, cell: (row) => (accuracy(row) === undefined ? "–" : percent(100 * accuracy(row))) },
    { name: "Actions", label: "", hidden: true, right: true, cell: (row) => h("div", { class: "actions" },
      h("a", { class: "button compact", "aria-label": `Ask the checkpoint of step ${row.step_number}`, href: `/dashboard/playground?model=${encodeURIComponent(row.fine_tuned_model_checkpoint)}` }, "Ask"),
      hasModel && !row.used ? promotion(row) : null) },
  ];
}

function promotion(row) {
  const button = h("button", { type: "button", class: "compact", "aria-label": `Use this one: step ${row.step_number}`, click: async () => {
    const yes = await confirm({ title: `Use the checkpoint of step ${row.step_number}?`, text: `${job.fine_tuned_model} answers as this checkpoint from then on. It can be changed again.`, action: "Use this one", danger: false });
    if (!yes) return;
    const done = await attempt(button, () => api(path`/v1/fine_tuning/jobs/${id}/checkpoints/${row.id}/promote`, { method: "POST" }));
    if (!done) return;
    toast(`The model answers as step ${row.step_number} now.`);
    await showCheckpoints();
    byId("checkpoints").querySelector(`[data-id="${row.id}"] a`)?.focus();
  } }, "Use this one");
  return button;
}

// --- following it --------------------------------------------------------------------------------------------------

async function follow(found) {
  const before = job?.status;
  job = found;
  const more = await newer(address, events);
  events.push(...more);
  showJob();
  if (more.length || before === undefined) {
    showEvents();
    showCurves();
  }
  const evaluated = more.some((event) => event.type === "metrics" && event.data?.trained_tokens === undefined);
  if (evaluated || before !== job.status) await showCheckpoints();
}

byId("level").addEventListener("change", showEvents);
byId("log").addEventListener("change", () => {
  chart.log = byId("log").checked;
  chart.draw();
});
byId("smoothing").addEventListener("input", () => {
  chart.smoothing = Number(byId("smoothing").value);
  byId("smoothing-value").textContent = String(chart.smoothing);
  chart.draw();
});
byId("overlay").addEventListener("change", async () => {
  const chosen = byId("overlay").value;
  byId("overlay").value = "";
  await putIn(chosen).catch((error) => isAborted(error) || toast(error.message, { error: true }));
});

watch(address, follow, { signal, onError: showProblem });
setInterval(() => job && showProgress(), 1000);
setInterval(() => followOthers().catch(quietly), 2000);
const wanted = (new URLSearchParams(location.search).get("with") ?? "").split(",").filter(Boolean);
Promise.all(wanted.map((each) => putIn(each).catch(quietly))).then(offerOthers).catch(quietly);
