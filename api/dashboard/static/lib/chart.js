// Loss curves of several jobs in one plot, drawn by uPlot.

import { fill, h } from "./dom.js";
import { loss } from "./format.js";
import { axis, colourOf, sizeOf } from "./plot.js";

const COLOURS = 6;

export class LossChart {
  #plot = null;
  #runs = [];
  #hidden = new Set();
  #values = new Map();
  #structure = "";

  constructor(container, legend, { onRemove }) {
    this.container = container;
    this.legend = legend;
    this.onRemove = onRemove;
    this.log = false;
    this.smoothing = 0;
    new ResizeObserver(() => this.#plot?.setSize(sizeOf(this.container))).observe(container);
    addEventListener("themechange", () => this.draw({ anew: true }));
  }

  /** Runs: [{id, name, train: [[step, loss], ...], valid: [...]}]; the first one is the page's. */
  show(runs) {
    this.#runs = runs;
    this.draw();
  }

  /** Draw the newest numbers; a new plot only where there are other curves or another scale. */
  draw({ anew = false } = {}) {
    const curves = this.#curves();
    const structure = JSON.stringify([this.log, curves.map(({ key, name }) => [key, name])]);
    if (!curves.some((curve) => curve.points.length)) {
      this.#plot?.destroy();
      [this.#plot, this.#structure] = [null, ""];
      fill(this.container, h("p", { class: "empty" }, "Curves begin with the first step of the training."));
      fill(this.legend);
      return;
    }
    const data = uPlot.join(curves.map(({ points }) => [points.map((p) => p[0]), points.map((p) => this.#shown(p[1]))]));
    if (anew || structure !== this.#structure) {
      this.#plot?.destroy();
      fill(this.container);
      this.#plot = new uPlot(this.#options(curves), data, this.container);
      this.#structure = structure;
      this.#drawLegend(curves);
    } else this.#plot.setData(data);
    this.#tellValues(curves);
    this.container.setAttribute("role", "img");
    this.container.setAttribute("aria-label", this.#summary(curves));
  }

  #shown(value) {
    return this.log && value <= 0 ? null : value;
  }

  #curves() {
    return this.#runs.flatMap((run, number) => {
      const colour = number % COLOURS;
      const of = (kind, points, more = {}) => ({ key: `${run.id} ${kind}`, run, kind, name: run.name, points, colour, ...more });
      const found = [of("train", smooth(run.train, this.smoothing))];
      if (this.smoothing) found.unshift(of("raw", run.train, { faint: true }));
      if (run.valid.length) found.push(of("validation", run.valid));
      return found;
    });
  }

  #options(curves) {
    const y = { ...axis(), label: this.log ? "Loss (log)" : "Loss", size: 56, values: (_, splits) => splits.map((v) => (v === null ? "" : tick(v))) };
    if (this.log) Object.assign(y, { splits: (_plot, _axis, low, high) => logTicks(low, high), filter: (_, splits) => splits });
    return {
      ...sizeOf(this.container),
      padding: [10, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false } },
      scales: {
        x: { time: false, range: (_, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { distr: this.log ? 3 : 1, range: (_, low, high) => this.#range(low, high) },
      },
      axes: [{ ...axis(), label: "Step", size: 34, values: (_, splits) => splits.map((v) => (Number.isInteger(v) ? String(v) : "")) }, y],
      series: [{}, ...curves.map((curve) => this.#series(curve))],
      hooks: { setCursor: [(plot) => this.#tellValues(this.#curves(), plot.cursor.idx)] },
    };
  }

  #series({ key, kind, colour, faint }) {
    const stroke = colourOf(`--series-${colour}`);
    const isValid = kind === "validation";
    return {
      stroke: faint ? `color-mix(in srgb, ${stroke} 30%, transparent)` : stroke,
      width: faint ? 1 : 2,
      dash: isValid ? [6, 4] : undefined,
      points: { show: isValid, size: 7, fill: colourOf("--surface"), stroke, width: 2 },
      spanGaps: true,
      show: !this.#hidden.has(key.replace(/ raw$/, " train")),
    };
  }

  #range(low, high) {
    if (low === null || high === null) return this.log ? [0.1, 1] : [0, 1];
    if (this.log) return low === high ? [low / 1.2, high * 1.2] : [low / 1.05, high * 1.05];
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
  }

  #drawLegend(curves) {
    this.#values.clear();
    const several = this.#runs.length > 1;
    const items = curves.filter((curve) => !curve.faint).map((curve) => {
      const value = h("span", { class: "value" });
      this.#values.set(curve.key, value);
      const dash = curve.kind === "validation" ? "6 4" : null;
      const line = h("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" },
        h("line", { class: `series-${curve.colour}`, x1: 0, x2: 22, y1: 5, y2: 5, "stroke-width": 3, "stroke-dasharray": dash }));
      const name = `${several ? `${curve.name}: ` : ""}${curve.kind === "validation" ? "validation" : "train"}`;
      const toggle = h("button", { type: "button", "aria-pressed": String(!this.#hidden.has(curve.key)), click: () => this.#toggle(curve) }, line, name, value);
      return h("li", {}, toggle);
    });
    const removals = this.#runs.slice(1).map((run) => h("li", {},
      h("button", { type: "button", class: "remove", "aria-label": `Take ${run.name} out of the plot`, click: () => this.onRemove(run.id) }, `✕ ${run.name}`)));
    fill(this.legend, items, removals);
  }

  #toggle({ key }) {
    if (!this.#hidden.delete(key)) this.#hidden.add(key);
    this.draw({ anew: true });
    [...this.legend.querySelectorAll("button")].find((b) => b.contains(this.#values.get(key)))?.focus();
  }

  /** Values at the cursor, or the latest ones. */
  #tellValues(curves, index = null) {
    const step = index === null || index === undefined ? null : this.#plot?.data[0][index];
    for (const { key, points } of curves) {
      const value = this.#values.get(key);
      if (!value) continue;
      const point = step === null ? points.at(-1) : points.findLast((p) => p[0] <= step);
      value.textContent = point ? loss(point[1]) : "–";
    }
  }

  #summary(curves) {
    const last = curves.filter(({ faint, points }) => !faint && points.length)
      .map(({ name, kind, points }) => `${kind} loss of ${name} is ${loss(points.at(-1)[1])} at step ${points.at(-1)[0]}`);
    return `Loss over steps: ${last.join("; ")}`;
  }
}

/** The exponential mean, without the pull of its start. */
function smooth(points, weight) {
  if (!weight) return points;
  let mean = 0;
  return points.map(([step, value], number) => {
    mean = weight * mean + (1 - weight) * value;
    return [step, mean / (1 - weight ** (number + 1))];
  });
}

/** 1, 2 and 5 of each magnitude; in a range with fewer than three of them, about five round numbers. */
export function logTicks(low, high) {
  const found = [];
  for (let magnitude = Math.floor(Math.log10(low)); magnitude <= Math.log10(high); magnitude++)
    for (const digit of [1, 2, 5]) found.push(Number(`${digit}e${magnitude}`));
  const inside = found.filter((value) => value >= low && value <= high);
  if (inside.length > 2) return inside;
  const rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((digit) => digit * unit >= rough) * unit;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}

const tick = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(0) : String(+value.toPrecision(3)));
