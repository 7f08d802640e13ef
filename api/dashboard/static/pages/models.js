import { all, api, isAborted, path, request } from "../lib/api.js";
import { attempt, byId, confirm, copyButton, empty, fill, h, pairs, problem, table, toast } from "../lib/dom.js";
import { bytes, count } from "../lib/format.js";
import { suffixOf, when } from "../lib/jobs.js";
import { pageSignal } from "../lib/watch.js";

const EXPORTS = [
  ["uora", "Adapter", "As it is stored: safetensors with its manifest"],
  ["lora", "LoRA for PEFT", "A zip of the equal LoRA, for PEFT and servers that read LoRA"],
];
const signal = pageSignal();
const project = byId("main").dataset.project;
let models = [];
let jobs = new Map();

/** Names have colons and slashes; the routes take them as they are. */
const address = (name) => `/v1/models/${name.split("/").map(encodeURIComponent).join("/")}`;

async function save(name, form) {
  const response = await request(`${address(name)}/adapter?format=${form}`, { signal });
  const filename = response.headers.get("Content-Disposition")?.match(/filename="(.+)"/)?.[1] ?? "adapter";
  const url = URL.createObjectURL(await response.blob());
  h("a", { href: url, download: filename }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
  toast(`${filename} is saved.`);
}

const python = (name) => `from openai import OpenAI

client = OpenAI(base_url="${location.origin}/v1", api_key="sk-uora-...")
answer = client.chat.completions.create(
    model="${name}",
    messages=[{"role": "user", "content": "Hello"}],
)
print(answer.choices[0].message.content)`;

const curl = (name) => `curl ${location.origin}/v1/chat/completions \\
  -H "Authorization: Bearer sk-uora-..." \\
  -H "Content-Type: application/json" \\
  -d '{"model": "${name}", "messages": [{"role": "user", "content": "Hello"}]}'`;

function snippet(title, text) {
  return h("div", {}, h("div", { class: "snippet" }, h("h3", {}, title), copyButton(text, `Copy ${title}`)),
    h("pre", { class: "code", tabindex: "0", "aria-label": title }, text));
}

const use = (name) => h("details", {}, h("summary", {}, "Use it in a program"), snippet("Python", python(name)), snippet("curl", curl(name)));

function card(model) {
  const own = model.owned_by === project;
  const job = jobs.get(model.id);
  const exports = EXPORTS.map(([form, name, title]) => {
    const button = h("button", { type: "button", class: "compact", title, "aria-label": `Export ${model.id}: ${name}`, click: () => attempt(button, () => save(model.id, form)) }, `↓ ${name}`);
    return button;
  });
  // A whole model may have gigabytes: the browser saves it as it comes, and shows the error if there is one.
  exports.push(h("a", { class: "button compact", href: `${address(model.id)}/adapter?format=merged`, title: "A zip of the base model with the adapter in its weights, for any server", "aria-label": `Export ${model.id}: whole model` }, "↓ Whole model"));
  const drop = h("button", { type: "button", class: "compact danger", "aria-label": `Delete ${model.id}`, click: () => remove(model, drop) }, "Delete");
  return h("section", { class: "card model", "aria-label": model.id },
    h("div", { class: "heading" },
      h("div", {}, h("h2", {}, model.id), h("p", { class: "muted" }, suffixOf(model.id) ? `${suffixOf(model.id)}, ` : "", "tuned from ", model.parent ?? model.root)),
      h("div", { class: "actions" },
        h("a", { class: "button compact primary", href: `/dashboard/playground?model=${encodeURIComponent(model.id)}` }, "Ask it"),
        own ? exports : null, own ? drop : null)),
    pairs([
      ["Size", h("span", { title: `${count(model.bytes)} bytes` }, bytes(model.bytes))],
      ["Made", when(model.created)],
      ["Base model", model.root],
      ["Job", job ? h("a", { href: `/dashboard/jobs/${job.id}`, class: "mono" }, `…${job.id.slice(-8)}`) : null],
      ["Shared by", own ? null : model.owned_by],
      ["Digest (SHA-256)", h("span", { class: "mono" }, model.digest)],
    ], "facts"),
    use(model.id));
}

async function remove(model, button) {
  const yes = await confirm({
    title: "Delete this model?",
    text: `${model.id} and its checkpoints answer no more, and cannot be had back. Its job stays.`,
    action: "Delete",
  });
  if (!yes) return;
  const done = await attempt(button, () => api(address(model.id), { method: "DELETE" }));
  if (!done) return;
  models = models.filter((each) => each.id !== model.id);
  show();
  toast("The model is deleted.");
  byId("search").focus();
}

function show() {
  const tuned = models.filter((model) => model.digest);
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = tuned.filter((model) => words.every((word) => `${model.id} ${model.root} ${model.digest}`.toLowerCase().includes(word)));
  const of = found.length < tuned.length ? `${count(found.length)} of ` : "";
  byId("count").textContent = tuned.length ? `${of}${count(tuned.length)} fine-tuned ${tuned.length === 1 ? "model" : "models"}` : "";
  const start = h("a", { class: "button primary", href: "/dashboard/jobs/new" }, "Start a job");
  const nothing = tuned.length
    ? empty("No model matches.", "Take a word out of the search.")
    : empty("No fine-tuned models yet.", "A job that has succeeded leaves one here, which answers at once.", start);
  fill(byId("models"), found.length ? found.map(card) : h("div", { class: "card" }, nothing));
  const base = models.filter((model) => !model.digest);
  fill(byId("base"), table([
    { name: "Name", title: true, cell: (model) => h("span", { class: "mono" }, model.id) },
    { name: "", label: "", hidden: true, right: true, cell: (model) => h("a", { href: `/dashboard/playground?model=${encodeURIComponent(model.id)}`, "aria-label": `Ask ${model.id}` }, "Ask it") },
  ], base, { caption: "Base models" }));
}

byId("search").addEventListener("input", show);
byId("search").value = new URLSearchParams(location.search).get("search") ?? "";
try {
  models = (await api("/v1/models", { signal })).data;
  show();
  const made = (await all(path`/v1/fine_tuning/jobs?limit=${1000}`, { signal })).filter((job) => job.fine_tuned_model);
  jobs = new Map(made.map((job) => [job.fine_tuned_model, job]));
  if (jobs.size) show();
} catch (error) {
  if (!isAborted(error)) fill(byId("models"), problem(error));
}
