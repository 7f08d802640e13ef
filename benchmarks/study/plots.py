"""The plots, as SVG: the same bytes for the same lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display
from matplotlib.ticker import EngFormatter, NullFormatter

from benchmarks.study import hits
from benchmarks.study.plan import NONE, Config, Part, Task
from benchmarks.study.results import Results
from benchmarks.study.scoring import TITLES
from benchmarks.study.tables import PART_TITLES

_PARTS: tuple[Part, ...] = ("glue", "e2e", "chat", "images")
#: Okabe and Ito's colours, which the colour-blind can tell apart.
_COLOURS = {
    "uora": "#d55e00", "vera": "#0072b2", "lora": "#009e73", "olora": "#56b4e9", "osora": "#cc79a7",
    "full": "#000000", "head": "#999999", "none": "#999999",
}  # fmt: skip
_SVG: Any = {"svg.hashsalt": "uora", "svg.fonttype": "none", "font.size": 9.0}


def draw(results: Results, folder: Path) -> list[Path]:
    """All plots; one for which nothing was measured says so."""
    drawn = [_save(folder / "playground.svg", len(_PARTS), partial(_playground, results))]
    for part in _PARTS:
        tasks = [task for task in results.study.in_part(part) if task.rates_of is None]
        drawn.append(_save(folder / f"rates-{part}.svg", len(tasks), partial(_rates, results, tasks)))
    drawn.append(_save(folder / "reinitialisation.svg", len(hits.tasks(results)), partial(_hits, results)))
    return drawn


def _save(path: Path, panels: int, fill: Callable[[Sequence[Any]], None]) -> Path:
    with plt.rc_context(_SVG):
        figure, axes = plt.subplots(1, panels, figsize=(3.2 * panels + 0.8, 3.4), squeeze=False, layout="constrained")
        fill(axes[0])
        for panel in axes[0]:
            panel.grid(alpha=0.3)
            if not panel.has_data():
                panel.text(0.5, 0.5, "not measured yet", ha="center", va="center", transform=panel.transAxes)
        labelled = dict(
            pair for panel in axes[0] for pair in zip(*panel.get_legend_handles_labels()[::-1], strict=True)
        )
        if labelled:
            columns = min(3 * panels, 8)  # as many as are surely not wider than the panels
            figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=columns)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return path


def _playground(results: Results, axes: Sequence[Any]) -> None:
    """Every method's score against its stored bytes."""
    for part, panel in zip(_PARTS, axes, strict=True):
        tasks = results.study.in_part(part)
        metric = TITLES[tasks[0].metric] if len(tasks) == 1 else f"average of {len(tasks)} tasks"
        panel.set(title=PART_TITLES[part], xlabel="stored bytes", ylabel=metric, xscale="log")
        panel.xaxis.set_major_formatter(EngFormatter("B", sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        for config in results.study.configs(tasks[0]):
            mean = results.average(tasks, config)
            if mean is None or config == NONE:
                continue
            found = [results.complete(task, config) for task in tasks]
            size = max(each.stored_bytes for each in found if each is not None)
            colour, spread = _COLOURS[config.method], mean.spread or 0.0
            panel.errorbar(size, mean.value, yerr=spread, fmt="o", color=colour, label=config.method)
            panel.annotate(f" {config.r or config.method}", (size, mean.value), fontsize=7)


def _rates(results: Results, tasks: Sequence[Task], axes: Sequence[Any]) -> None:
    """The tuning: held-out score by learning rate."""
    for task, panel in zip(tasks, axes, strict=True):
        panel.set(
            title=task.title,
            xlabel="learning rate",
            ylabel=f"{TITLES[task.tuning_metric or task.metric]}, held-out train",
            xscale="log",
        )
        for config in results.study.configs(task):
            lines = results.tuning(task, config)
            if lines:
                xs, ys = [line.learning_rate for line in lines], [line.score for line in lines]
                panel.plot(xs, ys, color=_COLOURS[config.method], label=config.label, **_style(config))


def _style(config: Config) -> dict[str, Any]:
    """Ranks of one method are told apart by their lines."""
    return {"marker": ".", "linestyle": {8: "-", 64: "--", 256: ":"}.get(config.r or 0, "-")}


def _hits(results: Results, axes: Sequence[Any]) -> None:
    """Each setting's hits, and its score beside the control's."""
    for task, panel in zip(hits.tasks(results), axes, strict=True):
        panel.set(title=task.title, xlabel="hits of a job", ylabel="points over the control", xscale="symlog")
        control = hits.find(results, task, hits.CONTROL)
        if control is not None and control.complete:
            spread = control.mean.spread or 0.0
            panel.axhspan(-spread, spread, color="#999999", alpha=0.2)
        for place, settings in enumerate((hits.DEFAULT, *hits.OTHERS)):
            found = hits.trial(results, task, settings)
            if found is not None:
                mean, number = found.result.mean, found.result.hits.value
                label = hits.setting(settings).replace("`", "")
                panel.errorbar(number, found.gain, yerr=mean.spread or 0.0, fmt="o", color=f"C{place}", label=label)
