// How each panel is drawn: a view is made once for its element, make(body), and returns update(reading and span), which
// says whether there was anything to draw.
"use strict";

// `middle` is what the fitted curve is to be compared with: "p50" or "mean".
function latencyPanel(family, middle, describeFit) {
  return (body) => {
    const chart = new Chart(body);
    const note = body.appendChild(element("p", { class: "quiet" }));
    return ({ span, now }) => {
      const rows = span.byContext(family);
      if (!rows.length) return false;
      const at = (what, some = rows) => some.map((row) => [middleOf(row.ctx), row[what]]);
      const fit = describeFit(now);
      const lines = [
        { label: middle, colour: "c1", points: true, at: at(middle) },
        { label: "p95", colour: "c2", points: true, at: at("p95", rows.filter((row) => row.count >= 20)) },
      ].filter((line) => line.at.length);
      if (fit.curve.length) lines.push({ label: "fit, alone", colour: "c3", dash: [6, 4], at: fit.curve });
      drawByContext(chart, secondsText, lines);
      const counts = rows.map((row) => `${labelOf(row.ctx)}:\u00a0${numberText(row.count)}`).join(" · ");
      note.replaceChildren(fit.text, element("br"), `Samples ${counts}`);
      return true;
    };
  };
}

// A cost model of coefficients (of 1, n, n²) as a curve up to the longest context it has seen, and as words, in thousands
// of tokens, with the interval of the `last` term.
function fitOf(now, phase, what, coefficients, last) {
  const longest = now.value("cost_fit_max_tokens", phase);
  if (!coefficients.every(Number.isFinite) || !(longest > 0)) return { curve: [], text: "No fitted curve yet." };
  const cost = (n) => coefficients.reduce((sum, each, power) => sum + each * n ** power, 0);
  const curve = [];
  for (let n = 32; n < longest; n *= Math.SQRT2) curve.push([n, cost(n)]);
  curve.push([longest, cost(longest)]);
  const scale = 1000 ** (coefficients.length - 1);
  const terms = coefficients.map((each, power) => `${secondsText(each * 1000 ** power)}${["", "\u00a0n", "\u00a0n²"][power]}`);
  const [low, high] = ["lower95", "upper95"].map((end) => secondsText(scale * now.value(`cost_fit_${end}_seconds`, last)));
  const samples = numberText(now.value("cost_fit_samples", phase));
  return {
    curve,
    text:
      `${what}, n in thousands: ${terms.join(" + ")} (95 %: ${low} to ${high}), from ${samples} steps ` +
      `up to ${numberText(longest)} tokens.`,
  };
}

function prefillFit(now) {
  const coefficients = ["prefill_a", "prefill_b", "prefill_c"].map((term) => now.value("cost_fit_seconds", term));
  const fit = fitOf(now, "prefill", "A prompt of n tokens alone", coefficients, "prefill_c");
  const crossover = now.value("cost_fit_crossover_tokens");
  if (fit.curve.length)
    fit.text +=
      crossover > 0 ? ` The square costs as much as the line at ${numberText(crossover)} tokens.` : " The square may be 0.";
  return fit;
}

function decodeFit(now) {
  const [step, row, token] = ["decode_a", "decode_row", "decode_b"].map((term) => now.value("cost_fit_seconds", term));
  return fitOf(now, "decode", "A step of one answer at n tokens", [step + row, token], "decode_b");
}

// Stalls are counted from then on.
function hasForecast(now) {
  return Number.isFinite(now.value("cost_fit_seconds", "decode_a"));
}

function waitsPanel(body) {
  const key = legend({ c1: "running", c2: "waiting", c5: "stall caused" });
  const holder = element("div");
  const note = element("p", { class: "quiet" });
  body.append(key, holder, note);
  return ({ now, span }) => {
    const rows = CTX.map((ctx) => ({
      ctx,
      running: now.value("running_requests", ctx) ?? 0,
      waiting: now.value("waiting_requests", ctx) ?? 0,
      caused: span.count("stall_caused_seconds_total", ctx),
      seen: (span.histogram("time_to_first_token_seconds", ctx)?.counts.at(-1) ?? 0) > 0,
    })).filter((row) => row.running || row.waiting || row.caused || row.seen);
    const most = Math.max(1, ...rows.map((row) => row.running + row.waiting));
    const worst = Math.max(...rows.map((row) => row.caused), 0);
    holder.replaceChildren(
      table(
        ["context", "now", "", "stall caused", ""],
        rows.map(({ ctx, running, waiting, caused }) => [
          labelOf(ctx),
          `${running} + ${waiting}`,
          barCell([{ value: running, colour: "c1" }, { value: waiting, colour: "c2" }], most),
          caused || hasForecast(now) ? secondsText(caused) : "–",
          barCell([{ value: caused, colour: "c5" }], worst),
        ]),
      ),
    );
    const seconds = (mix) => span.count("decode_step_seconds_total", mix) / span.count("decode_step_tokens_total", mix);
    const factor = seconds("with_prefill") / seconds("pure");
    note.textContent =
      `Oldest in the queue: ${secondsText(now.value("oldest_waiting_seconds"))}. ` +
      (Number.isFinite(factor) && factor > 0
        ? `A token beside prompts takes ${numberText(factor)} times what it takes without.`
        : "Not both kinds of steps yet: with prompts beside answers, and without.");
    return rows.length > 0;
  };
}

function stallsPanel(body) {
  const chart = new Chart(body);
  const note = body.appendChild(element("p", { class: "quiet" }));
  const causes = ["prefill", "preemption", "other"];
  return ({ now, span, history }) => {
    if (!now.series("stall_seconds_total").size) return false;
    const columns = causes.map((cause) => history.rate((point) => point.stalls[cause] ?? 0));
    const series = causes.map((cause, index) => ({ label: cause, colour: `c${[2, 5, 4][index]}`, fill: true }));
    drawOverTime(chart, (v) => numberText(v), series, [history.times(), ...columns]);
    const totals = causes.map((cause) => `${cause} ${secondsText(span.count("stall_seconds_total", cause))}`);
    note.textContent =
      `Suffered in all: ${totals.join(", ")}.` +
      (hasForecast(now) ? "" : " Not counted before there is a forecast, which takes steps that only decode.");
    return true;
  };
}

function meanByContext(span, name, layers, rows = "attention_rows_total") {
  return CTX.map((ctx) => {
    const count = span.count(rows, ctx, layers);
    const context = Math.exp(span.count("attention_log_context_total", ctx, layers) / count);
    return count > 0 ? [context, span.count(name, ctx, layers) / count] : null;
  }).filter(Boolean);
}

function effectiveContextPanel(body) {
  const chart = new Chart(body);
  const note = body.appendChild(element("p", { class: "quiet" }));
  return ({ now, span }) => {
    const lines = LAYERS.map((layers, index) => ({
      label: layers,
      colour: `c${index + 1}`,
      points: true,
      at: meanByContext(span, "attention_entropy_nats_total", layers).map(([n, nats]) => [n, Math.exp(nats)]),
    })).filter((line) => line.at.length);
    if (!lines.length) return false;
    const contexts = lines.flatMap((line) => line.at.map(([n]) => n));
    const ends = [Math.min(...contexts), Math.max(...contexts)];
    lines.push({ label: "uniform", colour: "quiet", dash: [3, 4], at: ends.map((n) => [n, n]) });
    drawByContext(chart, (v) => numberText(v), lines);
    const slopes = LAYERS.map((layers) => now.value("attention_dilution_exponent", layers));
    const samples = LAYERS.map((layers) => now.value("attention_dilution_samples", layers) ?? 0);
    note.textContent = slopes.some(Number.isFinite)
      ? `Dilution exponent (0: focus independent of length, 1: uniform): ` +
        LAYERS.map((layers, i) => `${layers} ${numberText(slopes[i], 2)} of ${numberText(samples[i])} rows`).join(", ")
      : "No dilution exponent yet: it takes some hundred rows of different lengths.";
    return true;
  };
}

function massesPanel(body) {
  const holder = element("div");
  const note = element("p", { class: "quiet" });
  body.append(legend({ c4: "sink (first tokens)", c1: "between", c2: "recent" }), holder, note);
  return ({ span }) => {
    const rows = CTX.map((ctx) => {
      const cells = LAYERS.map((layers) => {
        const count = span.count("attention_rows_total", ctx, layers);
        const [sink, recent] = ["sink", "recent"].map((kind) => span.count(`attention_${kind}_mass_total`, ctx, layers) / count);
        if (!(count > 0)) return "–";
        const shares = [sink, 1 - sink - recent, recent];
        const cell = barCell(shares.map((value, index) => ({ value, colour: ["c4", "c1", "c2"][index] })), 1);
        cell.append(element("small", {}, `${shares.map((share) => Math.round(100 * share)).join(" · ")}\u00a0%`));
        return cell;
      });
      return cells.some((cell) => cell !== "–") ? [labelOf(ctx), ...cells] : null;
    }).filter(Boolean);
    holder.replaceChildren(table(["context", ...LAYERS.map((layers) => `${layers} layers`)], rows));
    const pages = CTX.map((ctx) => [
      ctx,
      span.count("attention_pages95_total", ctx) / span.count("attention_sampled_rows_total", ctx),
    ]).filter(([, mean]) => mean > 0);
    note.textContent = pages.length
      ? `Pages that hold 95 %: ${pages.map(([ctx, mean]) => `${labelOf(ctx)}:\u00a0${numberText(mean, 2)}`).join(" · ")}`
      : "";
    return rows.length > 0;
  };
}

function poolPanel(body) {
  const key = legend({ c1: "active", c3: "cached", line: "free" });
  const now_ = element("div");
  const note = element("p", { class: "quiet" });
  body.append(key, now_);
  const chart = new Chart(body);
  body.append(note);
  return ({ now, span, history }) => {
    const [active, cached, free] = ["active", "cached", "free"].map((state) => now.value("kv_blocks", state) ?? 0);
    const all = active + cached + free;
    if (!all) return false;
    now_.replaceChildren(
      bar([{ value: active, colour: "c1" }, { value: cached, colour: "c3" }, { value: free, colour: "line" }], all),
    );
    const share = (pick) => history.points.map((point) => (100 * pick(point)) / all);
    const series = [
      { label: "active and cached", colour: "c3", fill: true },
      { label: "active", colour: "c1", fill: true },
    ];
    const data = [history.times(), share((p) => p.active + p.cached), share((p) => p.active)];
    drawOverTime(chart, (v) => `${numberText(v, 2)} %`, series, data);
    const queried = span.count("prefix_cache_queried_tokens_total");
    const hits = queried ? `${Math.round((100 * span.count("prefix_cache_hit_tokens_total")) / queried)} %` : "–";
    note.textContent =
      `${numberText(active)} active, ${numberText(cached)} cached, ${numberText(free)} free blocks; ` +
      `prompt tokens found in the cache ${hits}; preemptions ${span.count("preemptions_total", "out_of_blocks")}; ` +
      `leaked ${now.value("kv_leaked_blocks")}`;
    return true;
  };
}

function canariesPanel(body) {
  return ({ now }) => {
    const rows = [...now.series("canary_logprob").values()].map(([[task, ctx], logprob]) => {
      const baseline = now.value("canary_baseline_logprob", task, ctx);
      const change = logprob - baseline;
      const verdict = element("td", { class: change < -0.3 ? "bad" : "good" }, numberText(change, 2));
      return [task.replace("_", "-"), tokensText(Number(ctx)), numberText(logprob), numberText(baseline), verdict];
    });
    const runs = [...now.series("canary_runs_total").values()].map(([[result], count]) => `${result} ${count}`);
    body.replaceChildren(
      table(["task", "context", "log-prob.", "baseline", "change"], rows),
      element("p", { class: "quiet" }, `Runs: ${runs.join(", ")}`),
    );
    return rows.length > 0;
  };
}

function selftestPanel(body) {
  return ({ now }) => {
    const tests = [...now.series("selftest_ok").values()].map(([[test], ok]) => [
      test,
      element("td", { class: ok ? "good" : "bad" }, ok ? "passed" : "FAILED"),
      `${numberText(100 * now.value("selftest_max_error", test), 2)} %`,
    ]);
    const events = [...now.series("integrity_events_total").values()].map(([[kind], count]) =>
      element("span", { class: count && !kind.startsWith("entropy") ? "bad" : "" }, `${kind.replace("_", "\u00a0")}\u00a0${count}`),
    );
    const listed = events.flatMap((each, i) => (i ? [", ", each] : [each]));
    body.replaceChildren(
      ...(tests.length ? [table(["test", "result", "error, of what is allowed"], tests)] : []),
      element("p", {}, events.length ? "Integrity events: " : "No integrity monitor.", ...listed),
    );
    return tests.length > 0 || events.length > 0;
  };
}

function recentPanel(body) {
  return ({ now }) => {
    const heads = ["ended", "prompt", "output", "queued", "prefill", "mean gap", "in all", "cached", "preempted", "ended by"];
    const rows = now.recent.map((request) => [
      `${Math.round(request.ended)} s ago`,
      numberText(request.prompt_tokens),
      numberText(request.output_tokens),
      secondsText(request.queue),
      secondsText(request.prefill),
      secondsText(request.mean_gap),
      secondsText(request.duration),
      numberText(request.cached_tokens),
      String(request.preemptions),
      request.reason.replaceAll("_", " "),
    ]);
    body.replaceChildren(table(heads, rows));
    return rows.length > 0;
  };
}
