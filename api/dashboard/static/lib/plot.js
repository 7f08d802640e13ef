// What all plots have in common: colours of the style sheet, and axes in them.

import { h } from "./dom.js";

/** A colour of the style sheet, as it is in the theme that is shown. */
export function colourOf(name) {
  const probe = h("span", { hidden: true });
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const { color } = getComputedStyle(probe);
  probe.remove();
  return color;
}

/** uPlot's options of an axis. */
export function axis() {
  const line = colourOf("--line");
  return {
    stroke: colourOf("--muted"),
    grid: { stroke: line, width: 1 },
    ticks: { stroke: line, width: 1, size: 5 },
    font: "12px system-ui, sans-serif",
    labelFont: "600 12px system-ui, sans-serif",
    labelSize: 22,
  };
}

/** Of a plot in its container. */
export function sizeOf(container) {
  return { width: Math.max(200, container.clientWidth), height: container.clientWidth < 520 ? 260 : 320 };
}
