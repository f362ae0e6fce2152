// What /live.json says, and arithmetic on it. Quantiles are read from buckets as Prometheus reads them.
"use strict";

const CTX = ["256", "512", "1024", "2048", "4096", "8192", "16384", "32768", "65536", "inf"];
const LAYERS = ["early", "middle", "late"];

class Reading {
  constructor(document, seconds) {
    this.seconds = seconds; // on this page's clock
    this.state = document.state;
    this.model = document.model;
    this.recent = document.recent;
    this.families = document.families;
    this.index = {};
  }

  has(name) {
    return name in this.families;
  }

  // The series of a family by their label values, joined with "|".
  series(name) {
    if (!(name in this.index)) {
      const rows = this.has(name) ? this.families[name].series : [];
      this.index[name] = new Map(rows.map((row) => [row[0].join("|"), row]));
    }
    return this.index[name];
  }

  value(name, ...labels) {
    return this.series(name).get(labels.join("|"))?.[1];
  }

  sum(name) {
    let sum = 0;
    for (const row of this.series(name).values()) sum += row[1];
    return sum;
  }
}

// What happened between two readings; `before` null stands for the start of the server.
class Span {
  constructor(before, now) {
    this.before = before;
    this.now = now;
  }

  count(name, ...labels) {
    const value = this.now.value(name, ...labels);
    return value === undefined ? 0 : value - (this.before?.value(name, ...labels) ?? 0);
  }

  // {edges, counts (cumulative), sum} of one series; undefined if nothing was observed.
  histogram(name, ...labels) {
    const row = this.now.series(name).get(labels.join("|"));
    if (!row) return undefined;
    const old = this.before?.series(name).get(labels.join("|"));
    const counts = old ? row[1].map((count, index) => count - old[1][index]) : row[1];
    if (!counts[counts.length - 1]) return undefined;
    return { edges: this.now.families[name].edges, counts, sum: row[2] - (old ? old[2] : 0) };
  }

  // What was observed of a family by ctx: [{ctx, count, p50, p95, mean}], those with samples.
  byContext(name) {
    const rows = [];
    for (const ctx of CTX) {
      const histogram = this.histogram(name, ctx);
      if (histogram) {
        const count = histogram.counts[histogram.counts.length - 1];
        const [p50, p95] = [0.5, 0.95].map((q) => quantile(histogram, q));
        rows.push({ ctx, count, p50, p95, mean: histogram.sum / count });
      }
    }
    return rows;
  }
}

function quantile({ edges, counts }, q) {
  const rank = q * counts[counts.length - 1];
  const bucket = counts.findIndex((count) => count >= rank);
  if (bucket >= edges.length) return edges[edges.length - 1]; // beyond the last edge nothing more is known
  const low = bucket ? edges[bucket - 1] : 0;
  const below = bucket ? counts[bucket - 1] : 0;
  return low + ((edges[bucket] - low) * (rank - below)) / (counts[bucket] - below);
}

// Where a bucket's point stands: the geometric middle; of the first, which begins at 1, that of its upper half.
function middleOf(ctx) {
  return (ctx === "inf" ? 131072 : Number(ctx)) / Math.SQRT2;
}

function labelOf(ctx) {
  return ctx === "inf" ? ">\u00a064k" : `≤\u00a0${tokensText(Number(ctx))}`;
}

function tokensText(tokens) {
  return tokens >= 1024 && tokens % 1024 === 0 ? `${tokens / 1024}k` : String(Math.round(tokens));
}

function secondsText(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds === 0) return "0";
  const unit = Math.abs(seconds) < 1e-6 ? "ns" : Math.abs(seconds) < 1e-3 ? "µs" : Math.abs(seconds) < 1 ? "ms" : "s";
  const scale = { ns: 1e9, "µs": 1e6, ms: 1e3, s: 1 }[unit];
  return `${numberText(seconds * scale)}\u00a0${unit}`;
}

function numberText(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
}
