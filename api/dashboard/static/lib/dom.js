// Elements without markup in strings: what comes from users is text, whatever is in it.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "line", "rect", "circle", "title"]);

/** An element. Properties that are functions listen; true and false set and leave out; children may be null. */
export function h(tag, properties = {}, ...children) {
  const element = SVG_TAGS.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "value") element.value = value;
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Put other children in the place of those that are there. */
export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  element.removeAttribute("aria-busy");
  return element;
}

/** Names and values beside each other; those without a value are left out. */
export function pairs(entries, kind = "pairs") {
  const shown = entries.filter(([, value]) => value !== null && value !== undefined && value !== "");
  const rows = shown.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
  return h("dl", { class: kind }, kind === "pairs" ? rows.flat() : rows.map((row) => h("div", {}, row)));
}

/**
 * A table that becomes a list of blocks on a phone, and stays a table for screen readers there.
 * Columns: {name, right, title, cell(row)}; the column of `title` heads its block.
 */
export function table(columns, rows, { caption, rowId = () => null } = {}) {
  const cell = (column, row) => {
    const kind = [column.right && "right", column.title && "title"].filter(Boolean).join(" ");
    return h("td", { role: "cell", class: kind || null, "data-label": column.label ?? column.name }, column.cell(row));
  };
  const heads = columns.map((column) =>
    h("th", { role: "columnheader", scope: "col", class: column.right ? "right" : null },
      column.hidden ? h("span", { class: "sr-only" }, column.name) : column.name));
  return h("table", { class: "stacked", role: "table", "aria-label": caption },
    h("thead", { role: "rowgroup" }, h("tr", { role: "row" }, heads)),
    h("tbody", { role: "rowgroup" },
      rows.map((row) => h("tr", { role: "row", "data-id": rowId(row) }, columns.map((column) => cell(column, row))))));
}

export const badge = (kind, text = kind) => h("span", { class: `badge ${kind}` }, text);

/** What is shown where there is nothing yet: what it is, and what to do. */
export function empty(title, text, action = null) {
  return h("div", { class: "empty" }, h("p", {}, h("strong", {}, title)), h("p", {}, text), action);
}

export const problem = (error) => h("p", { class: "problem" }, error.message);

/** A button that puts a text into the clipboard. */
export function copyButton(text, label) {
  const button = h("button", { type: "button", class: "compact", "aria-label": label, click: copy }, "Copy");
  async function copy() {
    try {
      await navigator.clipboard.writeText(typeof text === "function" ? text() : text);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Select and copy"; // browsers allow it only over https and on this machine
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  }
  return button;
}

/** Say something at the edge of the page for a while. */
export function toast(message, { error = false } = {}) {
  const note = h("p", { class: error ? "toast error" : "toast" }, message);
  byId("toasts").append(note);
  setTimeout(() => note.remove(), error ? 10000 : 5000);
}

/** Do it with the button out of order, and show what goes wrong; whether it went well. */
export async function attempt(button, action) {
  button.disabled = true;
  try {
    await action();
    return true;
  } catch (error) {
    toast(error.message, { error: true });
    return false;
  } finally {
    button.disabled = false;
  }
}

/** Ask before something that cannot be taken back; null for no, else which of `options` are ticked. */
export function confirm({ title, text, action, danger = true, options = [] }) {
  const boxes = options.map(([name, label]) => [name, h("input", { type: "checkbox" }), label]);
  const dialog = h("dialog", { "aria-labelledby": "dialog-title" },
    h("form", { method: "dialog" },
      h("h2", { id: "dialog-title" }, title),
      h("p", {}, text),
      boxes.map(([, box, label]) => h("label", { class: "check" }, box, label)),
      h("div", { class: "actions end" },
        h("button", { value: "" , autofocus: true }, "No, go back"),
        h("button", { value: "yes", class: danger ? "primary danger" : "primary" }, action))));
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      const ticked = Object.fromEntries(boxes.map(([name, box]) => [name, box.checked]));
      resolve(dialog.returnValue === "yes" ? ticked : null);
    });
  });
}
