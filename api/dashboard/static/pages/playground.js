import { api, isAborted, request } from "../lib/api.js";
import { byId, fill, h, problem } from "../lib/dom.js";
import { count, percent, setting } from "../lib/format.js";
import { eventsOf } from "../lib/sse.js";
import { pageSignal } from "../lib/watch.js";

const MOST = 4; // a browser has six connections to a server
const signal = pageSignal();
const columns = [];
let models = [];
let running = null;

/** The name's model; checkpoints are not in the list. */
const modelOf = async (name, stop) =>
  models.find((each) => each.id === name) ?? api(`/v1/models/${name.split("/").map(encodeURIComponent).join("/")}`, { signal: stop });

/** One model and its answer. */
class Column {
  constructor(model) {
    const number = columns.length + 1;
    const id = `model-${crypto.randomUUID?.() ?? Math.random()}`;
    this.select = h("select", { id, change: () => this.clear() });
    const tuned = models.filter((each) => each.digest);
    const base = models.filter((each) => !each.digest);
    const options = (group) => group.map(({ id }) => h("option", { value: id }, id));
    fill(this.select, h("optgroup", { label: "Base models" }, options(base)),
      tuned.length ? h("optgroup", { label: "Fine-tuned models" }, options(tuned)) : null,
      models.some((each) => each.id === model) ? null : h("option", { value: model }, model)); // a checkpoint
    this.select.value = model;
    this.remove = h("button", { type: "button", class: "quiet compact", "aria-label": `Remove model ${number}`, click: () => remove(this) }, "✕");
    this.text = h("div", { class: "answer-text", role: "region", "aria-label": `Answer ${number}`, "aria-live": "polite", tabindex: "0" });
    this.foot = h("p", { class: "answer-foot" });
    this.element = h("section", { class: "card answer", "aria-label": `Model ${number}` },
      h("div", { class: "answer-head" },
        h("div", { class: "field grow" }, h("label", { for: id }, `Model ${number}`), this.select), this.remove),
      this.text, this.foot);
  }

  clear() {
    this.text.textContent = "";
    this.foot.textContent = "";
    this.text.classList.remove("failed", "waiting");
  }

  async ask(body, stop) {
    this.clear();
    this.text.classList.add("waiting");
    this.text.setAttribute("aria-busy", "true"); // it is read out once it is there, not letter by letter
    const began = performance.now();
    const name = this.select.value;
    try {
      const { task } = await modelOf(name, stop);
      if (task === null || task === "chat" || task === "completion") await this.generate(name, task, body, stop, began);
      else await this.classify(name, body, stop);
    } catch (error) {
      if (isAborted(error) || stop.aborted) this.foot.textContent += `${this.foot.textContent ? " · " : ""}stopped`;
      else {
        this.text.classList.add("failed");
        this.text.append(error.message);
      }
    } finally {
      this.text.classList.remove("waiting");
      this.text.removeAttribute("aria-busy");
    }
  }

  async generate(model, task, { messages, ...settings }, stop, began) {
    const [path, input] = task === "completion"
      ? ["/v1/completions", { prompt: messages.map(({ content }) => content).join("\n\n") }]
      : ["/v1/chat/completions", { messages }];
    const all = { model, ...input, ...settings, stream: true, stream_options: { include_usage: true } };
    const response = await request(path, { method: "POST", body: all, signal: stop });
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") break;
      this.take(JSON.parse(data), performance.now() - began);
    }
  }

  /** Classifiers answer with a class, regressions with a number. */
  async classify(model, { messages }, stop) {
    const answer = await api("/v1/classify", { method: "POST", body: { model, input: messages.at(-1).content }, signal: stop });
    const [{ label, value, probs }] = answer.data;
    this.text.textContent = label ?? setting(value);
    this.foot.textContent = answer.labels.map((each, i) => `${each} ${percent(100 * probs[i])}`).join(" · ");
  }

  take(chunk, milliseconds) {
    if (chunk.error) throw new Error(chunk.error.message);
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.text;
    if (text) this.text.append(text);
    if (choice?.finish_reason === "length") this.cut = true;
    const seconds = (milliseconds / 1000).toFixed(2);
    const cut = this.cut ? " · cut at the limit" : "";
    if (chunk.usage) {
      const { prompt_tokens: prompt, completion_tokens: answer } = chunk.usage;
      this.foot.textContent = `${count(answer)} tokens after ${count(prompt)} · ${seconds} s${cut}`;
      this.cut = false;
      if (!this.text.textContent) this.text.append(h("span", { class: "muted" }, "An empty answer."));
    } else this.foot.textContent = `${seconds} s`;
  }
}

function add(model) {
  const column = new Column(model);
  columns.push(column);
  byId("answers").append(column.element);
  showButtons();
}

function remove(column) {
  columns.splice(columns.indexOf(column), 1);
  column.element.remove();
  showButtons();
  byId("add").focus();
}

function showButtons() {
  for (const column of columns) column.remove.hidden = columns.length === 1;
  byId("add").disabled = columns.length >= MOST;
  byId("ask").disabled = running !== null;
  byId("stop").disabled = running === null;
}

/** The request that all models get; raises an Error for a field that is no number. */
function asked() {
  const system = byId("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: byId("prompt").value }];
  const body = { messages };
  for (const name of ["temperature", "max_tokens", "seed"]) {
    const field = byId(name);
    const value = field.value.trim() === "" ? null : Number(field.value);
    field.removeAttribute("aria-invalid");
    if (Number.isNaN(value)) {
      field.setAttribute("aria-invalid", "true");
      field.focus();
      return null;
    }
    if (value !== null) body[name] = value;
  }
  return body;
}

async function askAll() {
  const body = asked();
  if (!body || running) return;
  running = new AbortController();
  showButtons();
  const stop = AbortSignal.any([signal, running.signal]);
  await Promise.all(columns.map((column) => column.ask(body, stop)));
  running = null;
  showButtons();
}

byId("prompt-form").addEventListener("submit", (event) => {
  event.preventDefault();
  askAll();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("prompt-form").requestSubmit();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("add").addEventListener("click", () => add(columns.at(-1)?.select.value ?? models.at(-1).id));

try {
  models = (await api("/v1/models", { signal })).data;
  const wanted = new URLSearchParams(location.search).getAll("model");
  const tuned = wanted[0] ?? models.find((model) => model.digest)?.id;
  const base = models.find((model) => model.id === tuned)?.root ?? tuned?.split(":")[1] ?? models.find((model) => !model.digest).id;
  for (const model of wanted.length > 1 ? wanted.slice(0, MOST) : [base, tuned].filter(Boolean)) add(model);
} catch (error) {
  if (!isAborted(error)) fill(byId("answers"), problem(error));
}
