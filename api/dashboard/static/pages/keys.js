import { all, api, isAborted } from "../lib/api.js";
import { attempt, badge, byId, confirm, copyButton, empty, fill, h, problem, table, toast } from "../lib/dom.js";
import { clearProblems, showProblem } from "../lib/forms.js";
import { date } from "../lib/format.js";
import { when } from "../lib/jobs.js";
import { pageSignal } from "../lib/watch.js";

const { project, key: ownKey } = byId("main").dataset;
const address = `/v1/organization/projects/${project}/api_keys`;
const signal = pageSignal();
let keys = [];

const COLUMNS = [
  { name: "Name", title: true, cell: (key) => [
    h("strong", {}, key.name), " ", key.id === ownKey ? badge("info plain", "this session") : null,
    h("span", { class: "sub mono" }, key.redacted_value),
  ] },
  { name: "May", cell: (key) => key.scopes.join(", ") },
  { name: "Made", cell: (key) => when(key.created_at) },
  { name: "Last used", cell: (key) => (key.last_used_at ? when(key.last_used_at) : "never") },
  { name: "Ends", cell: (key) => (key.expires_at ? date(key.expires_at) : "never") },
  { name: "Actions", label: "", hidden: true, right: true, cell: (key) => h("div", { class: "actions" }, rotation(key), revocation(key)) },
];

function rotation(key) {
  const button = h("button", { type: "button", class: "compact", "aria-label": `New secret for ${key.name}`, click: async () => {
    const answer = await confirm({
      title: `A new secret for ${key.name}?`,
      text: "Whoever has the old one needs the new one." + (key.id === ownKey ? " This session ends." : ""),
      action: "New secret",
      options: [["keep", "Let the old one go on for an hour"]],
    });
    if (!answer) return;
    const body = { grace_seconds: answer.keep ? 3600 : 0 };
    await attempt(button, async () => tell(await api(`${address}/${key.id}/rotate`, { method: "POST", body })));
  } }, "New secret");
  return button;
}

function revocation(key) {
  const button = h("button", { type: "button", class: "compact danger", "aria-label": `Revoke ${key.name}`, click: async () => {
    const yes = await confirm({
      title: `Revoke ${key.name}?`,
      text: "It is refused from now on, and cannot be had back." + (key.id === ownKey ? " This session ends with it." : ""),
      action: "Revoke",
    });
    if (!yes) return;
    const done = await attempt(button, () => api(`${address}/${key.id}`, { method: "DELETE" }));
    if (!done) return;
    keys = keys.filter((each) => each.id !== key.id);
    show();
    toast(`${key.name} is revoked.`);
  } }, "Revoke");
  return button;
}

/** Show a new secret: it is in this answer and in none after it. */
function tell(made) {
  keys = [made, ...keys.filter((each) => each.id !== made.id)].sort((a, b) => b.created_at - a.created_at);
  show();
  fill(byId("secret"), h("section", { class: "made", "aria-label": "New secret" },
    h("strong", {}, `The secret of ${made.name}, shown only now`),
    h("div", { class: "secret" }, h("code", { id: "new-secret" }, made.value), copyButton(made.value, "Copy the secret"))));
  byId("secret").scrollIntoView({ block: "center" });
}

function show() {
  fill(byId("keys"), keys.length
    ? table(COLUMNS, keys, { caption: "Keys", rowId: (key) => key.id })
    : empty("No keys of this project.", "Make one below for each program or person, so that each can be revoked by itself."));
}

byId("new-key").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = event.target;
  clearProblems(form);
  const fields = new FormData(form);
  const body = { name: fields.get("name").trim(), scopes: fields.getAll("scopes") };
  if (fields.get("expires_in_seconds")) body.expires_in_seconds = Number(fields.get("expires_in_seconds"));
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    tell(await api(address, { method: "POST", body }));
    form.reset();
  } catch (error) {
    showProblem(form, error);
  } finally {
    button.disabled = false;
  }
});

try {
  keys = await all(`${address}?limit=100`, { signal });
  show();
} catch (error) {
  if (!isAborted(error)) fill(byId("keys"), problem(error));
}
