// Reads /live.json every two seconds while the page is in view, keeps the history, and has the panels drawn.
"use strict";

const POLL_MS = 2000;
const ANSWER_MS = 5000;
const KEPT_POINTS = 300; // of the charts over time: ten minutes
const FULL_EVERY = 5; // polls; whole readings, from which spans begin

class History {
  constructor() {
    this.points = [];
    this.readings = [];
  }

  add(now) {
    const stalls = {};
    for (const [cause, row] of now.series("stall_seconds_total")) stalls[cause] = row[1];
    this.points.push({
      seconds: now.seconds,
      output: now.value("output_tokens_total") ?? 0,
      active: now.value("kv_blocks", "active") ?? 0,
      cached: now.value("kv_blocks", "cached") ?? 0,
      stalls,
    });
    if (this.polls++ % FULL_EVERY === 0) this.readings.push(now);
    if (this.points.length > KEPT_POINTS) this.points.shift();
    if (this.readings.length > KEPT_POINTS / FULL_EVERY) this.readings.shift();
  }

  polls = 0;

  times() {
    return this.points.map((point) => point.seconds);
  }

  // Change per second between each point and the one before.
  rate(pick) {
    return this.points.map((point, index) => {
      const before = this.points[index - 1];
      return before ? (pick(point) - pick(before)) / (point.seconds - before.seconds) : null;
    });
  }

  // The oldest reading that is no older than the window; null for everything.
  start(now, window) {
    return window ? this.readings.find((reading) => now.seconds - reading.seconds <= window) : null;
  }
}

let history_ = new History();
let drawn = null; // the last reading

const updates = PANELS.map((panel) => {
  const body = element("div", { class: "body" });
  const empty = element("div", { class: "empty" }, "Waiting for the first reading.");
  const card = element("section", { "data-panel": panel.id, "data-state": "empty", class: panel.wide ? "wide" : "" });
  card.append(element("h2", {}, panel.title), body, empty, element("p", { class: "caveat" }, panel.caveat));
  document.getElementById("panels").append(card);
  const update = panel.make(body);
  return (view) => {
    const missing = panel.families.filter((name) => !view.now.has(name));
    body.hidden = false; // so that charts know their width
    const hasData = !missing.length && update(view);
    card.dataset.state = hasData ? "data" : "empty";
    body.hidden = !hasData;
    empty.hidden = hasData;
    if (missing.length) empty.textContent = `This server does not measure pagestream_${missing[0]}.`;
    else empty.textContent = view.span.before ? "No samples in this time." : "No samples yet.";
  };
});

function show(now) {
  document.title = `pagestream: ${now.state}`;
  const state = document.getElementById("state");
  state.textContent = now.state;
  state.className = `state ${now.state}`;
  const info = [...now.series("model_info").keys()].map((labels) => labels.split("|"))[0];
  const described = info ? ` · ${info[0]}, ${info[1]}, ${info[2]}, up to ${numberText(Number(info[3]))} tokens` : "";
  document.getElementById("model").textContent = now.model ? now.model + described : "The model is not loaded yet.";
  const rates = history_.rate((point) => point.output).slice(-5).filter((rate) => rate !== null);
  const mean = rates.length ? rates.reduce((sum, rate) => sum + rate, 0) / rates.length : undefined;
  const figures = {
    running: numberText(now.sum("running_requests")),
    waiting: numberText(now.sum("waiting_requests")),
    "output tokens/s": numberText(mean),
    "KV pool in use": `${Math.round(100 * (now.value("kv_cache_usage_ratio") ?? 0))} %`,
    "first token of a short prompt": secondsText(now.value("predicted_ttft_seconds")),
  };
  const entries = Object.entries(figures).map(([name, text]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, text)),
  );
  document.getElementById("figures").replaceChildren(...entries);
  const window = Number(document.getElementById("window").value);
  const before = history_.start(now, window) ?? null;
  const covered = before ? now.seconds - before.seconds : 0;
  const range = document.getElementById("range");
  range.textContent = before && covered < window - 15 ? `This page has watched for ${secondsText(covered)} so far.` : "";
  if (!before && now.state === "ready" && !now.series("time_to_first_token_seconds").size)
    range.textContent = "Nothing was asked of this server yet: panels fill as requests come.";
  const view = { now, span: new Span(before, now), history: history_ };
  for (const update of updates) update(view);
}

async function poll() {
  try {
    const now = new Reading(await read(), Date.now() / 1000);
    const last = history_.points.at(-1);
    if (last && (now.value("output_tokens_total") ?? 0) < last.output) history_ = new History(); // another process
    history_.add(now);
    drawn = now;
    show(now);
    document.body.dataset.polls = Number(document.body.dataset.polls ?? 0) + 1;
  } catch (error) {
    if (!(error instanceof Unreachable)) throw error;
    document.title = "pagestream: unreachable";
    const state = document.getElementById("state");
    state.textContent = "unreachable";
    state.className = "state unreachable";
    document.getElementById("range").textContent =
      `${error.message} ${drawn ? `What is shown is of ${clockText(drawn.seconds)}.` : ""} Asked again every 2 s.`;
  }
}

class Unreachable extends Error {}

async function read() {
  const response = await fetch("/live.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) }).catch(() => {
    throw new Unreachable("The server does not answer.");
  });
  if (!response.ok) throw new Unreachable(`The server answers ${response.status} ${response.statusText}.`);
  return response.json().catch(() => {
    throw new Unreachable("The server's answer was cut off.");
  });
}

async function follow() {
  if (!document.hidden) await poll().catch((error) => console.error(error));
  setTimeout(follow, POLL_MS);
}

const redraw = () => drawn && show(drawn);
document.getElementById("window").addEventListener("change", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("resize", redraw);
follow();
