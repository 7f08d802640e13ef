// What the API says of a request stands at the field that it is about.

import { byId, fill, h } from "./dom.js";

export function clearProblems(form) {
  for (const note of form.querySelectorAll(".field-problem")) note.remove();
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    field.removeAttribute("aria-describedby");
  }
  fill(byId("problem"));
}

/** Show the error at the field whose name is its `param`, or is a part of it; else below the form. */
export function showProblem(form, error) {
  const field = error.param && fieldOf(form, error.param);
  if (!field) {
    fill(byId("problem"), h("p", { class: "problem" }, error.message));
    return;
  }
  const id = `problem-${field.name}`;
  field.closest("details")?.setAttribute("open", "");
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", id);
  field.closest(".field").append(h("p", { class: "field-problem", id, role: "alert" }, error.message));
  field.focus();
}

function fieldOf(form, param) {
  const named = [...form.elements].filter((field) => field.name);
  return named.find((field) => field.name === param) ?? named.find((field) => field.name.endsWith(`.${param}`)) ??
    named.find((field) => param.startsWith(`${field.name}.`));
}
