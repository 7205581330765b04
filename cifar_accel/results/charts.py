"""The charts of the page, as Vega-Lite specifications made with Altair.

Each function takes plain figures and returns a chart. Colours are those of Okabe and Ito, which
people of any colour vision tell apart; lines differ in their dashes too.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import altair as alt
import numpy as np
from numpy.typing import NDArray

from cifar_accel.results.calibration import Bin
from cifar_accel.results.plots import points
from cifar_accel.results.runs import RunFiles

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A00", "#666666"]

# Points of a curve.
BINS = 200
# The height of a row of a chart with a row a setting, in pixels.
ROW = 26

Rows = list[dict[str, Any]]
Chart = TypeVar("Chart", alt.Chart, alt.LayerChart)


def intervals(rows: Rows) -> alt.LayerChart:
    """A dot for each seed, and the mean with its interval, a row a setting.

    `rows` have name, mean, low, high (the mean where there is no interval) and values, in percent.
    """
    y = _names(rows)
    means = [{key: row[key] for key in ("name", "mean", "low", "high")} for row in rows]
    dots = [{"name": row["name"], "accuracy": value} for row in rows for value in row["values"]]
    seeds = (
        alt.Chart(_data(dots))
        .mark_circle(size=30, opacity=0.7, color=COLOURS[1])
        .encode(
            y=y,
            x=alt.X(
                "accuracy:Q",
                title="accuracy, %",
                scale=alt.Scale(zero=False),
                axis=alt.Axis(tickCount=8),
            ),
            tooltip=_tooltips("name", "accuracy"),
        )
    )
    bar, middle = _means_with_intervals(means, y, alt.X("mean:Q"))
    return _chart(bar + seeds + middle, len(rows) * ROW)


def differences(rows: Rows, margin: float) -> alt.LayerChart:
    """The difference of each setting to the best with its interval, in points.

    `rows` have name, difference, low and high. Differences within `margin` are too small to matter.
    """
    y = _names(rows)
    band = (
        alt.Chart(_data([{"low": -margin, "high": margin}]))
        .mark_rect(opacity=0.12, color="#888")
        .encode(x="low:Q", x2="high:Q")
    )
    zero = alt.Chart(_data([{"at": 0}])).mark_rule(strokeDash=[4, 4]).encode(x="at:Q")
    x = alt.X("difference:Q", title="difference to the best, points")
    bar, middle = _means_with_intervals(rows, y, x)
    return _chart(band + zero + bar + middle, len(rows) * ROW)


def binned(runs: Sequence[RunFiles], key: str, scale: float = 1.0) -> Rows:
    """The metric `key` of runs of one setting by epoch: mean, and least and largest where several.

    In at most `BINS` steps of equal length, in each of which a run's values are averaged first.
    """
    read = [points(run, key, scale) for run in runs]
    curves = [np.array(of_run).T for of_run in read if of_run[0]]
    if not curves:
        return []
    last = max(float(curve[:, 0].max()) for curve in curves)
    epochs = np.linspace(0, last, BINS + 1)
    # [runs, BINS], with gaps where a run has no point.
    values = np.array([_means(curve, epochs) for curve in curves])
    rows = []
    for place in np.flatnonzero(~np.isnan(values).all(0)):
        seen = values[:, place][~np.isnan(values[:, place])]
        row = {"x": _short(epochs[place + 1]), "m": _short(seen.mean())}
        if len(curves) > 1:
            row |= {"l": _short(seen.min()), "h": _short(seen.max())}
        rows.append(row)
    return rows


def _means(curve: NDArray[np.float64], epochs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of a curve's points [n, 2] between each two of `epochs`; NaN where there is none."""
    bins = np.clip(np.searchsorted(epochs, curve[:, 0], "left") - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = np.bincount(bins, curve[:, 1], BINS)
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = sums / counts
    return means


def _short(value: float) -> float:
    """A number with as many digits as a chart shows."""
    return float(f"{value:.5g}")


def curves(by_setting: dict[str, Rows], title: str) -> alt.LayerChart:
    """Curves of `binned`, one a setting; a click on the legend brings one to the front."""
    names = list(by_setting)
    rows = [{"s": name, **row} for name, of_one in by_setting.items() for row in of_one]
    pick = alt.selection_point(fields=["s"], bind="legend")
    base = alt.Chart(_data(rows)).encode(
        x=alt.X("x:Q", title="epoch", scale=alt.Scale(domainMin=0), axis=alt.Axis(tickCount=10)),
        color=_colours("s:N", names),
        opacity=alt.when(pick).then(alt.value(1.0)).otherwise(alt.value(0.08)),
    )
    line = base.mark_line(strokeWidth=1.8, point=len(rows) < 60).encode(
        y=alt.Y("m:Q", title=title, scale=alt.Scale(zero=False)),
        strokeDash=alt.StrokeDash("s:N", sort=names, legend=None),
        tooltip=[
            alt.Tooltip("s:N", title="setting"),
            alt.Tooltip("x:Q", title="epoch"),
            alt.Tooltip("m:Q", title=title),
        ],
    )
    # The band lies behind, and must not be what a click picks.
    band = base.mark_area(fillOpacity=0.18, strokeOpacity=0).encode(y="l:Q", y2="h:Q")
    return _chart((band + line).add_params(pick), 300)


def superclass_map(shares: NDArray[np.float64], names: list[str]) -> alt.Chart:
    """Of each super-class's images (row), the share taken for each super-class (column)."""
    rows = [
        {"true": true, "taken for": taken, "share": _short(100 * shares[i, j])}
        for i, true in enumerate(names)
        for j, taken in enumerate(names)
    ]
    chart = (
        alt.Chart(_data(rows))
        .mark_rect()
        .encode(
            x=alt.X("taken for:N", sort=names, axis=alt.Axis(labelAngle=-60, labelLimit=160)),
            y=alt.Y("true:N", sort=names, axis=alt.Axis(labelLimit=160)),
            color=alt.Color(
                "share:Q",
                # Most are right; the rest would be one colour on a straight scale.
                scale=alt.Scale(scheme="viridis", type="sqrt"),
                legend=alt.Legend(title="%"),
            ),
            tooltip=_tooltips("true", "taken for", "share"),
        )
    )
    return _chart(chart, 18 * len(names))


def reliability_chart(by_setting: dict[str, list[Bin]]) -> alt.LayerChart:
    """Accuracy over confidence; on the diagonal a model is right as often as it says."""
    names = list(by_setting)
    rows = [
        {"s": name} | {key: _short(value) for key, value in asdict(of_bin).items()}
        for name, bins in by_setting.items()
        for of_bin in bins
    ]
    diagonal = (
        alt.Chart(_data([{"a": 0}, {"a": 1}]))
        .mark_line(strokeDash=[4, 4], color="#888")
        .encode(x="a:Q", y="a:Q")
    )
    line = (
        alt.Chart(_data(rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("confidence:Q", title="confidence", scale=alt.Scale(domain=[0, 1])),
            y=alt.Y("accuracy:Q", title="accuracy", scale=alt.Scale(domain=[0, 1])),
            color=_colours("s:N", names),
            strokeDash=alt.StrokeDash("s:N", sort=names, legend=None),
            tooltip=_tooltips("s", "confidence", "accuracy", "images"),
        )
    )
    return _chart(diagonal + line, 300)


def cost(rows: Rows) -> alt.Chart:
    """Accuracy over the time that it took, a point a run; `rows` have name, minutes, accuracy."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    dots = (
        alt.Chart(_data(rows))
        .mark_point(size=60, filled=True, opacity=0.8)
        .encode(
            x=alt.X("minutes:Q", title="minutes, evaluations included"),
            y=alt.Y("accuracy:Q", title="accuracy, %", scale=alt.Scale(zero=False)),
            color=_colours("name:N", names),
            shape=alt.Shape("name:N", sort=names, legend=None),
            tooltip=_tooltips("name", "minutes", "accuracy", "seed"),
        )
    )
    return _chart(dots, 300)


# ---- what the charts share


def _data(rows: Iterable[dict[str, Any]]) -> alt.Data:
    """Rows as a chart's own data."""
    return alt.Data(values=list(rows))


def _names(rows: Rows) -> alt.Y:
    """A row of the chart for each of `rows`, in their order."""
    order = [row["name"] for row in rows]
    return alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelLimit=320))


def _colours(field: str, names: list[str]) -> alt.Color:
    """A colour for each of `names`, and the legend that tells them."""
    return alt.Color(
        field,
        sort=names,
        scale=alt.Scale(domain=names, range=COLOURS),
        legend=alt.Legend(orient="bottom", columns=1, labelLimit=600, title=None),
    )


def _means_with_intervals(rows: Rows, y: alt.Y, x: alt.X) -> tuple[alt.Chart, alt.Chart]:
    """The bars from low to high, to be seen on light and dark, and the diamonds at `x`."""
    base = alt.Chart(_data(rows)).encode(y=y)
    bar = base.mark_rule(strokeWidth=3, color="#888888").encode(x="low:Q", x2="high:Q")
    middle = base.mark_point(shape="diamond", size=90, filled=True, opacity=1)
    return bar, middle.encode(x=x, tooltip=_tooltips(*rows[0]))


def _tooltips(*fields: str) -> list[alt.Tooltip]:
    """What is shown of a mark below the mouse."""
    return [alt.Tooltip(field=field, title=field) for field in fields]


def _chart(chart: Chart, height: int) -> Chart:
    """The chart, as wide as its place on the page and `height` pixels high."""
    sized = chart.properties(width="container", height=height)
    axis = alt.AxisConfig(gridOpacity=0.3)
    return sized.configure(background="transparent", font="system-ui, sans-serif", axis=axis)
