// What is shown: each panel says which families it is made of, what its numbers must not be taken for, and its view.
"use strict";

const ATTENTION_CAVEAT =
  "Means over the heads of a layer group, of rows that were observed; a few heads can behave differently. Weights show " +
  "where value vectors were mixed, they do not explain an output, and entropy does not tell right answers from wrong ones.";

const PANELS = [
  {
    id: "ttft",
    title: "Time to first token by prompt length",
    families: ["time_to_first_token_seconds"],
    caveat:
      "Time in the queue and beside other requests is in the points, and not in the fitted curve, which is a prompt alone. A " +
      "point stands in the middle of its bucket; edges of time buckets double, so a quantile is known to within a factor of 2. " +
      "A p95 is drawn of 20 samples or more.",
    make: latencyPanel("time_to_first_token_seconds", "p50", prefillFit),
  },
  {
    id: "gap",
    title: "Gap between tokens by context",
    families: ["inter_token_latency_seconds"],
    caveat:
      "Engine side, at the context of the later token; tokens of one step count as gaps of 0 after the first, so with " +
      "speculation the mean can lie below the curve, which is a step of one answer alone. Batches and prompts of others lie " +
      "above it. The curve ends where its data end.",
    make: latencyPanel("inter_token_latency_seconds", "mean", decodeFit),
  },
  {
    id: "waits",
    title: "Who waits, and who stalls whom",
    families: ["running_requests", "waiting_requests"],
    caveat:
      "Running + waiting requests at this moment. Stall caused: seconds that others' answers took beyond the forecast of their " +
      "own work, charged to the prompts read in those steps; it is as good as the cost model.",
    make: waitsPanel,
  },
  {
    id: "stalls",
    title: "Stall suffered, seconds per second",
    families: ["stall_seconds_total"],
    caveat: "Summed over streams, so several streams stalled at once can exceed one second per second. By the cost model's forecast.",
    make: stallsPanel,
  },
  {
    id: "effective-context",
    title: "Effective context, tokens",
    families: ["attention_rows_total", "attention_entropy_nats_total"],
    caveat: `How many tokens attention is spread over: exp of its mean entropy. Neither large nor small is good. ${ATTENTION_CAVEAT}`,
    make: effectiveContextPanel,
  },
  {
    id: "masses",
    title: "Where attention's mass lies",
    families: ["attention_rows_total", "attention_sink_mass_total", "attention_recent_mass_total"],
    caveat:
      "The sink is idle capacity, not a sign that the prompt is ignored. The uniform share of the recent tokens shrinks as the " +
      `context grows, so compare along a row, not down a column. ${ATTENTION_CAVEAT}`,
    make: massesPanel,
  },
  {
    id: "kv",
    title: "KV pool",
    families: ["kv_blocks"],
    caveat: "Cached blocks are given up when the room is needed, so only active ones are in use. The share of hits is of looked-up tokens.",
    make: poolPanel,
  },
  {
    id: "canaries",
    title: "Canaries",
    families: ["canary_logprob", "canary_baseline_logprob"],
    caveat: "Small copy and look-up probes with known answers, in nats per token; the baseline is the first run. They show damage to the model or its cache, not how well your task goes.",
    make: canariesPanel,
  },
  {
    id: "selftest",
    title: "Self-test and integrity",
    families: ["selftest_ok"],
    caveat: "The self-test ran once, at the start, on the real device: T1 weights and sums, T7 bounds of a mean, T13 entropy without structure, T19 cuts at pages. Of the events, nan and sink lost mean damage; the entropy kinds are a hint to look.",
    make: selftestPanel,
  },
  {
    id: "recent",
    title: "Recent requests",
    families: [],
    wide: true,
    caveat: "The last thirty that ended, without texts, ids or tenants. Prompt, output and cached are tokens. Prefill is from the first turn to the first token, with what else ran beside it.",
    make: recentPanel,
  },
];
