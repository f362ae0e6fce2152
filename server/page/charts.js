// Drawing: charts by uPlot, bars and tables as HTML. Nothing here knows a metric.
"use strict";

const CHART_HEIGHT = 220;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") Object.assign(made.style, value);
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

// A chart that lives as long as what it draws has the same shape; `series` is [{label, colour, points, line, dash, fill}].
class Chart {
  constructor(parent) {
    this.parent = parent.appendChild(element("div"));
    this.shape = null;
  }

  size() {
    return { width: Math.max(200, this.parent.clientWidth), height: CHART_HEIGHT };
  }

  draw(options, series, data) {
    const shape = JSON.stringify([series, colour("text")]);
    if (shape !== this.shape) {
      this.plot?.destroy();
      this.plot = new uPlot(this.options(options, series), data, this.parent);
      this.shape = shape;
    } else {
      if (this.plot.width !== this.size().width) this.plot.setSize(this.size());
      this.plot.setData(data);
    }
  }

  options({ x, y }, series) {
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
    return {
      ...this.size(),
      scales: { x: x.scale, y: y.scale },
      axes: [
        { ...axis, values: x.values, splits: x.splits, filter: x.filter, size: 32 },
        { ...axis, values: (_, splits) => splits.map((v) => (v === null ? "" : y.text(v))), size: 64, filter: y.filter },
      ],
      series: [
        { label: x.label, value: (_, v) => (v === null ? "" : x.text(v)) },
        ...series.map((one) => ({
          label: one.label,
          stroke: colour(one.colour),
          width: one.line === false ? 0 : 1.5,
          dash: one.dash,
          fill: one.fill ? `${colour(one.colour)}55` : undefined,
          points: { show: Boolean(one.points), size: 7, fill: colour(one.colour) },
          spanGaps: true,
          value: (_, v) => (v === null || v === undefined ? "" : y.text(v)),
        })),
      ],
    };
  }
}

const POWERS = Array.from({ length: 13 }, (_, k) => 2 ** (k + 5));

// An axis of context lengths: powers of two.
const CONTEXT_AXIS = {
  label: "context",
  scale: { time: false, distr: 3, log: 2 },
  splits: (plot) => POWERS.filter((n) => n >= plot.scales.x.min && n <= plot.scales.x.max),
  filter: (_, splits) => splits, // uPlot's own drops some
  values: (plot, splits) => splits.map((n, i) => (plot.width < 500 && i % 2 ? "" : tokensText(n))),
  text: (n) => `${tokensText(n)} tokens`,
};

// A minute at least, and by the data themselves: around a single point uPlot would put a day.
const TIME_AXIS = {
  label: "time",
  scale: { time: true, range: ({ data: [times] }) => [Math.min(times[0], times.at(-1) - 60), times.at(-1)] },
  values: (_, splits) => splits.map((t, i) => (i % 2 ? "" : clockText(t))),
  text: (t) => clockText(t),
};

function clockText(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

// Of the marks of a logarithmic axis those that begin with 1, 2 or 5; with 1 if there are many.
function roundOnes(plot, splits) {
  const digits = plot.scales.y.max / plot.scales.y.min > 200 ? "1" : "125";
  return splits.map((v) => (digits.includes(v.toExponential()[0]) ? v : null));
}

// Draws functions of context together, both axes logarithmic: each line is {label, colour, at: [[n, y], ...], ...style}.
function drawByContext(chart, text, lines) {
  const xs = [...new Set(lines.flatMap((line) => line.at.map(([n]) => n)))].sort((a, b) => a - b);
  const columns = lines.map((line) => {
    const at = new Map(line.at);
    return xs.map((n) => at.get(n) ?? null);
  });
  const style = lines.map(({ at, ...rest }) => rest);
  const y = { scale: { distr: 3, log: 10 }, text, filter: roundOnes };
  chart.draw({ x: CONTEXT_AXIS, y }, style, [xs, ...columns]);
}

function drawOverTime(chart, text, series, data) {
  const scale = { range: (_, low, high) => [0, high > 0 ? high * 1.1 : 1] };
  chart.draw({ x: TIME_AXIS, y: { scale, text } }, series, data);
}

// A bar of parts that share one width: [{value, colour, title}] of `whole`.
function bar(parts, whole) {
  return element(
    "div",
    { class: "bar" },
    ...parts.map(({ value, colour: name, title }) =>
      element("div", {
        title: title ?? "",
        style: { width: `${whole > 0 ? (100 * value) / whole : 0}%`, background: `var(--${name})` },
      }),
    ),
  );
}

function legend(entries) {
  const keys = Object.entries(entries).map(([name, text]) =>
    element("span", { class: "key" }, element("i", { style: { background: `var(--${name})` } }), text),
  );
  return element("p", {}, ...keys);
}

// Rows of cells that are text or elements; a row may be {cells, class}.
function table(heads, rows) {
  const cells = (tag, list) => list.map((cell) => (cell instanceof HTMLTableCellElement ? cell : element(tag, {}, cell)));
  const body = rows.map((row) => element("tr", {}, ...cells("td", row)));
  return element("table", {}, element("thead", {}, element("tr", {}, ...cells("th", heads))), element("tbody", {}, ...body));
}

function barCell(parts, whole) {
  return element("td", { class: "bars" }, bar(parts, whole));
}
