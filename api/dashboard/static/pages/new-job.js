import { api, isAborted, path, settled } from "../lib/api.js";
import { byId, fill, h, pairs, problem, toast } from "../lib/dom.js";
import { clearProblems, showProblem } from "../lib/forms.js";
import { bytes, count, date, duration, setting } from "../lib/format.js";
import { shortName } from "../lib/jobs.js";
import { reportOf } from "../lib/report.js";
import { pageSignal } from "../lib/watch.js";

const DEFAULTS = { uora: [64, 0.05], vera: [256, 0.01], lora: [8, 0.001], olora: [8, 0.0002], osora: [64, 0.01] };
const FILES = ["training_file", "validation_file"];
const form = byId("job");
const signal = pageSignal();
const origin = new URLSearchParams(location.search).get("from");
let reporting = new AbortController();

// --- choices -------------------------------------------------------------------------------------------------------

const fileOption = (file) => h("option", { value: file.id }, `${file.filename}, ${bytes(file.bytes)}, ${date(file.created_at)}${file.status === "error" ? " (has problems)" : ""}`);

async function offer() {
  const [files, models] = await Promise.all([api("/v1/files?purpose=fine-tune&limit=500", { signal }), api("/v1/models", { signal })]);
  for (const name of FILES) {
    const first = name === "validation_file" ? "None" : files.data.length ? "Choose a file" : "Upload a file first";
    fill(byId(name), h("option", { value: "" }, first), files.data.map(fileOption));
  }
  const group = (label, found) => (found.length ? h("optgroup", { label }, found.map(({ id }) => h("option", { value: id }, id))) : null);
  fill(byId("model"), group("Base models", models.data.filter((each) => !each.digest)), group("Fine-tuned models", models.data.filter((each) => each.digest)));
}

async function upload(name, input) {
  const [file] = input.files;
  if (!file || input.disabled) return;
  const content = new FormData();
  content.append("purpose", "fine-tune");
  content.append("file", file);
  input.disabled = true;
  toast(`${file.name} is being uploaded.`);
  try {
    await offered; // which fills the lists anew
    const made = await api("/v1/files", { method: "POST", body: content });
    for (const each of FILES) byId(each).append(fileOption(made));
    byId(name).value = made.id;
    if (name === "training_file") report();
  } catch (error) {
    showProblem(form, Object.assign(error, { param: name }));
  } finally {
    input.disabled = false;
    input.value = "";
  }
}

function showDefaults() {
  const [rank, rate] = DEFAULTS[byId("peft.method").value];
  byId("peft.r").placeholder = rank;
  byId("peft.learning_rate").placeholder = rate;
  const tuned = byId("model").value.startsWith("ft:");
  for (const name of ["peft.method", "peft.r", "peft.targets", "task"]) byId(name).disabled = tuned; // they are that model's
}

/** What is in the chosen file; it is asked for until a worker has read it. */
async function report() {
  reporting.abort();
  reporting = new AbortController();
  const stop = AbortSignal.any([signal, reporting.signal]);
  const file = byId("training_file").value;
  if (!file) {
    fill(byId("report"), h("p", { class: "muted" }, "Choose or upload a file: JSONL, JSON, CSV, Parquet, or a zip of images. A chat file has a conversation a line."),
      h("pre", { class: "preview", tabindex: "0", "aria-label": "A row" }, '{"messages": [\n  {"role": "user", "content": "…"},\n  {"role": "assistant", "content": "…"}\n]}'));
    return;
  }
  fill(byId("report"), h("p", { class: "muted" }, "The file is being read…"));
  const query = new URLSearchParams({ model: byId("model").value });
  if (!byId("task").disabled) query.set("task", byId("task").value);
  try {
    const found = await settled(`${path`/v1/files/${file}/report`}?${query}`, { signal: stop });
    fill(byId("report"), found.error ? problem(found.error) : reportOf(found.report));
  } catch (error) {
    if (!isAborted(error)) fill(byId("report"), problem(error));
  }
}

// --- the request ---------------------------------------------------------------------------------------------------

/** A field's value as JSON has it; what is no number goes as it is, so that the service says what it expects. */
function valueOf(field) {
  if (field.type === "checkbox") return field.checked || null;
  const text = field.value.trim();
  if (text === "") return null;
  return field.inputMode && !Number.isNaN(Number(text)) ? Number(text) : text;
}

/** The body of a new job: only what was filled in, so that the rest are the service's defaults. */
function body() {
  const made = {};
  for (const field of form.elements) {
    if (!field.name || field.disabled) continue;
    const value = valueOf(field);
    if (value === null) continue;
    const steps = field.name.split(".");
    const last = steps.pop();
    let inside = made;
    for (const step of steps) inside = inside[step] ??= {};
    inside[last] = value;
  }
  if (made.method) made.method.type = "supervised";
  return made;
}

/** Fill the form with another job's request. */
async function fillFrom(jobId) {
  const job = await api(path`/v1/fine_tuning/jobs/${jobId}`, { signal });
  byId("title").textContent = `New job like ${shortName(job)}`;
  document.title = `${byId("title").textContent} · UORA`;
  const { method, r, targets, learning_rate: rate } = job.adapter;
  const [defaultRank, defaultRate] = DEFAULTS[method];
  const multiplier = job.hyperparameters.learning_rate_multiplier;
  const base = rate === null || typeof multiplier !== "number" ? rate : +(rate / multiplier).toPrecision(12);
  const values = {
    model: job.model, training_file: job.training_file, validation_file: job.validation_file, task: job.task, seed: job.seed,
    "peft.method": method, "peft.r": r === defaultRank ? null : r, "peft.targets": targets === "all-linear" ? null : setting(targets).replaceAll(", ", ","),
    "peft.learning_rate": base === defaultRate ? null : base,
  };
  for (const [name, value] of Object.entries(job.hyperparameters)) values[`method.supervised.hyperparameters.${name}`] = value === "auto" ? null : value;
  for (const name of ["max_length", "eval_steps", "early_stopping_patience"]) values[`training.${name}`] = job.options[name];
  if (job.options.overlong !== "error") values["training.overlong"] = job.options.overlong;
  if (job.options.lr_scheduler_type !== "linear") values["training.lr_scheduler_type"] = job.options.lr_scheduler_type;
  if (job.options.warmup_ratio) values["training.warmup_ratio"] = job.options.warmup_ratio;
  for (const [name, value] of Object.entries(values)) if (value !== null && value !== undefined) form.elements[name].value = value;
  form.elements["training.load_best_model_at_end"].checked = job.options.load_best_model_at_end;
}

/** A clone's changes: what the form shows and was left empty goes back to its default. */
function changes() {
  const made = body();
  const cleared = {};
  for (const field of form.elements) if (field.name && !field.disabled && valueOf(field) === null) cleared[field.name] = null;
  for (const name of Object.keys(cleared)) {
    const steps = name.split(".");
    const last = steps.pop();
    let inside = made;
    for (const step of steps) inside = inside[step] ??= {};
    inside[last] = null;
  }
  if (made.method) made.method.type = "supervised";
  delete made.suffix;
  return Object.assign(made, byId("suffix").value.trim() ? { suffix: byId("suffix").value.trim() } : {});
}

async function send(button, action) {
  clearProblems(form);
  button.disabled = true;
  form.setAttribute("aria-busy", "true");
  try {
    await action();
  } catch (error) {
    if (!isAborted(error)) showProblem(form, error);
  } finally {
    button.disabled = false;
    form.removeAttribute("aria-busy");
  }
}

async function start() {
  const to = origin ? path`/v1/fine_tuning/jobs/${origin}/clone` : "/v1/fine_tuning/jobs";
  const made = await api(to, { method: "POST", body: origin ? changes() : body() });
  location.assign(`/dashboard/jobs/${made.id}`);
}

async function estimate() {
  const shown = byId("estimated");
  fill(shown, h("p", { class: "muted" }, "The files are being read…"));
  try {
    const found = await settled("/v1/fine_tuning/estimate", { method: "POST", body: body(), signal });
    fill(shown, found.error ? problem(found.error) : pairs([
      ["time", found.seconds === null ? "not known" : duration(found.seconds)],
      ["memory", found.memory_bytes === null ? "not known" : bytes(found.memory_bytes)],
      ["steps", count(found.steps)],
      ["tokens, all epochs", count(found.tokens)],
      ["epochs", count(found.hyperparameters?.n_epochs)],
      ["batch size", count(found.hyperparameters?.batch_size)],
      ["trained numbers", count(found.trainable_parameters)],
      ["stored", bytes(found.adapter_bytes)],
      ["cost", found.cost ? setting(+found.cost.toPrecision(3)) : null],
      ["measured on", found.machine],
    ]));
  } catch (error) {
    fill(shown, h("p", { class: "muted" }, "What the job would take, before it is started."));
    throw error;
  }
}

const offered = offer();
for (const name of FILES) byId(`upload-${name}`).addEventListener("change", (event) => upload(name, event.target));
for (const name of ["training_file", "task", "model"]) byId(name).addEventListener("change", report);
for (const name of ["peft.method", "model"]) byId(name).addEventListener("change", showDefaults);
byId("estimate").addEventListener("click", () => send(byId("estimate"), estimate));
form.addEventListener("submit", (event) => {
  event.preventDefault();
  send(byId("start"), start);
});

try {
  await offered;
  if (origin) await fillFrom(origin);
  showDefaults();
  for (const name of FILES) upload(name, byId(`upload-${name}`)); // chosen before this script was there
  await report();
} catch (error) {
  if (!isAborted(error)) fill(byId("problem"), problem(error));
}
