// One job as it goes: how far, how well, what it said; pause, resume, cancel; and what came of it. Its events are read newest
// first, back to the one that is known already, so that no step is missed and none is asked for twice. Next: job_results.js,
// playground.js.

import { call, get, post, session } from "../api.js";
import { curve } from "../chart.js";
import { fill, h, said } from "../dom.js";
import { count, moment, sentence, significant, span } from "../format.js";
import {
  announce,
  button,
  busy,
  chip,
  confirmed,
  facts,
  failure,
  ghosts,
  link,
  loaded,
  notice,
  status,
  statusText,
  tiles,
  track,
} from "../parts.js";
import { drawResults } from "./job_results.js";
import { ENDED, jobTitle, progress, remedy, trackKind } from "./job_words.js";

const EVENTS_PAGE = 100;
const MOST_EVENTS = 20_000;

export function job({ place, id, signal, every }) {
  const path = `fine_tuning/jobs/${encodeURIComponent(id)}`;
  loaded(place, {
    signal,
    waiting: ghosts(3, 140),
    load: () => get(path, {}, signal),
    draw: (found) => {
      const page = pageOf(path, signal);
      page.follow(found);
      watch(page, found, path, every, signal);
      queueMicrotask(() => place.querySelector("h1")?.focus({ preventScroll: true }));
      return page.elements;
    },
  });
}

async function watch(page, first, path, every, signal) {
  const history = [];
  let status = first.status;
  const turn = async () => {
    const now = await get(path, {}, signal); // Before its events: an end is seen only when the events that led to it are there.
    page.told(await newer(path, history, signal));
    page.follow(now);
    if (now.status !== status) announce(`The job: ${statusText(now.status)}`);
    status = now.status;
    return ENDED.has(status) ? "enough" : undefined;
  };
  try {
    if ((await turn()) === "enough") return;
  } catch (error) {
    if (signal.aborted) return;
    page.failed(error);
  }
  every(1000, async () => {
    try {
      const enough = await turn();
      page.failed(null);
      return enough;
    } catch (error) {
      if (!signal.aborted) page.failed(error);
      throw error;
    }
  });
}

/** Put events that are not in `history` (newest first) in front of it; return it. */
async function newer(path, history, signal) {
  const known = history[0]?.id;
  const found = [];
  for (let after; found.length < MOST_EVENTS; after = found.at(-1).id) {
    const page = await get(`${path}/events`, { limit: EVENTS_PAGE, after }, signal);
    const at = page.data.findIndex((event) => event.id === known);
    found.push(...(at < 0 ? page.data : page.data.slice(0, at)));
    if (at >= 0 || !page.has_more || page.data.length === 0) break;
  }
  history.unshift(...found);
  return history;
}

/** Return the page's elements, and what changes them: `follow(job)`, `told(events)`, `failed(fault or null)`. */
function pageOf(path, signal) {
  const top = h("header", { class: "head" });
  const lost = h("div", { hidden: true });
  const ended = h("div", { class: "stack outcome", hidden: true });
  const bar = track(0, { label: "Progress" });
  const words = h("div", { class: "line" });
  const numbers = h("div", {});
  const loss = curve("Loss by step");
  const accuracy = curve("Share of tokens that were the likeliest, by step");
  const accurate = h("div", { class: "card", hidden: true }, h("h2", {}, "Token accuracy"), accuracy); // Not every trainer measures it.
  const log = h("ol", { class: "log", tabindex: "0", role: "log", "aria-label": "Events, the newest first" });
  const results = h("div", { class: "stack" });
  const given = h("div", {});
  let drawn = null;
  let lines = 0;

  function command(name, text) {
    const press = button(text, () =>
      busy(press, async () => {
        try {
          follow(await post(`${path}/${name}`, undefined, { signal }));
        } catch (error) {
          if (!signal.aborted) told(error);
        }
      }),
    );
    return press;
  }

  function told(error) {
    lost.hidden = !error;
    fill(lost, error && failure(error));
  }

  const cancelled = (job) =>
    confirmed(
      "Cancel this job?",
      "It stops at the next step. What it had learnt until its last checkpoint is kept; it cannot be resumed.",
      "Cancel the job",
      async () => follow(await call("POST", `${path}/cancel`)),
    );

  function actions(job) {
    const may = session.may("tune");
    return [
      may && (job.status === "running" || job.status === "queued") && command("pause", "Pause"),
      may && job.status === "paused" && command("resume", "Resume"),
      may && !ENDED.has(job.status) && button("Cancel", () => cancelled(job), { kind: "danger" }),
      job.fine_tuned_model &&
        link("Try the model", `#/playground?tuned=${encodeURIComponent(job.fine_tuned_model)}`, { kind: "first", symbol: "arrow" }),
      ENDED.has(job.status) && job.status !== "succeeded" && link("Plan it again", again(job), { kind: "first", symbol: "arrow" }),
    ];
  }

  function follow(job) {
    const { share, words: far } = progress(job);
    if (drawn !== job.status) {
      const held = top.contains(document.activeElement); // A button that was pressed goes: the focus stays with the page.
      fill(
        top,
        h(
          "div",
          {},
          h("a", { class: "crumb", href: "#/jobs" }, "← Jobs"),
          h("h1", { tabindex: "-1" }, said(jobTitle(job))),
          h("div", { class: "row under" }, status(job.status), h("span", { class: "soft small mono" }, job.id)),
        ),
        h("div", { class: "actions" }, actions(job)),
      );
      if (held) top.querySelector("h1").focus({ preventScroll: true });
      ended.hidden = !ENDED.has(job.status);
      fill(ended, outcome(job));
      if (job.status !== "validating_files") drawResults(results, job, path, signal);
      drawn = job.status;
    }
    bar.set(share);
    bar.className = `track ${trackKind(job)}`;
    fill(words, h("b", { class: "number" }, sentence(far).slice(0, -1)), h("span", { class: "soft number" }, when(job)));
    fill(numbers, tiles(measures(job)));
    fill(given, parameters(job));
  }

  return {
    elements: [
      top,
      lost,
      ended,
      h("section", { class: "card stack" }, words, bar, numbers),
      h("section", { class: "grid curves" }, h("div", { class: "card" }, h("h2", {}, "Loss"), loss), accurate),
      h("div", { class: "halves" }, h("section", { class: "card" }, h("h2", {}, "Events"), log), given),
      results,
    ],
    follow,
    failed(error) {
      told(error);
    },
    told(history) {
      const steps = history
        .filter((event) => event.type === "metrics")
        .map((event) => event.data)
        .reverse();
      const end = steps.at(-1)?.total_steps;
      loss.set(series(steps, "train_loss", "valid_loss", "full_valid_loss"), end);
      const shares = series(steps, "train_mean_token_accuracy", "valid_mean_token_accuracy", "full_valid_mean_token_accuracy");
      accurate.hidden = !shares.some(({ points }) => points.length);
      if (!accurate.hidden) accuracy.set(shares, end);
      log.prepend(...history.slice(0, history.length - lines).map(logLine));
      lines = history.length;
    },
  };
}

const finite = (value) => typeof value === "number" && Number.isFinite(value);

/** Return the lines of a chart. Validation is its whole file where a step has that, else its sample. */
function series(steps, train, sample, whole) {
  const validation = steps.map((step) => ({ x: step.step, y: step[whole] ?? step[sample] })).filter((point) => finite(point.y));
  return [
    {
      name: "training",
      noisy: true,
      points: steps.map((step) => ({ x: step.step, y: step[train] })).filter((point) => finite(point.y)),
    },
    ...(validation.length ? [{ name: "validation", points: validation }] : []),
  ];
}

function logLine(event) {
  return h(
    "li",
    { class: event.level },
    h("time", { class: "soft small number", datetime: new Date(event.created_at * 1000).toISOString() }, moment(event.created_at)),
    event.level !== "info" && chip(event.level, event.level === "error" ? "bad" : "warn"),
    h("span", { dir: "auto" }, event.message),
  );
}

function when(job) {
  if (ENDED.has(job.status)) return "";
  if (job.estimated_finish) return `about ${span(Math.max(0, job.estimated_finish - Date.now() / 1000))} left`;
  if (job.x_queue?.estimated_start) return `starts about ${moment(job.x_queue.estimated_start)}`;
  return job.status === "paused" ? "stands still until it is resumed" : "";
}

function measures(job) {
  const done = job.x_progress ?? {};
  const planned = done.planned_tokens ? ` of ${count(done.planned_tokens)}` : "";
  const first = ENDED.has(job.status)
    ? [
        ["Ended", moment(job.finished_at)],
        ["Took, waiting too", span(job.finished_at - job.created_at)],
      ]
    : [
        ["Expected end", job.estimated_finish ? moment(job.estimated_finish) : "–"],
        ["Queue", job.x_queue ? `${count(job.x_queue.position)}. place` : job.status === "running" ? "it runs" : "–"],
      ];
  return [
    ...first,
    ["Tokens trained", `${count(job.trained_tokens ?? done.trained_tokens ?? 0)}${planned}`],
    ["Examples", count(job.x_examples?.examples)],
  ];
}

function outcome(job) {
  if (job.status === "succeeded") {
    return notice(
      "good",
      "The model is ready",
      h("p", {}, "It answers at once, under the name ", said(job.fine_tuned_model, { class: "mono" }), "."),
    );
  }
  if (job.status === "failed") {
    return notice(
      "bad",
      sentence(job.error?.message ?? "The job failed"),
      h("p", {}, remedy(job.error?.code)),
      h(
        "p",
        { class: "small soft" },
        job.error?.code && ["Code ", h("code", {}, job.error.code)],
        job.error?.param && [" about ", h("code", {}, job.error.param)],
      ),
      job.error?.param?.endsWith("_file") &&
        job[job.error.param] &&
        h("div", { class: "row" }, link("Open the file's report", `#/data/${job[job.error.param]}`, { kind: "slim" })),
    );
  }
  return job.status === "cancelled"
    ? notice("", "The job was cancelled", h("p", {}, "Checkpoints that it had made are listed below and can be tuned on."))
    : null;
}

function parameters(job) {
  const numbers = { ...job.method?.[job.method.type]?.hyperparameters, ...(job.hyperparameters ?? {}) };
  const names = { n_epochs: "Epochs", batch_size: "Batch size", learning_rate_multiplier: "Rate multiplier", beta: "Beta" };
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Parameters"),
    facts([
      ["Model", said(job.model)],
      ["Method", job.method?.type === "dpo" ? "Preferences (DPO)" : "Supervised"],
      ["Training", h("a", { href: `#/data/${job.training_file}`, class: "mono" }, job.training_file)],
      job.validation_file && ["Validation", h("a", { href: `#/data/${job.validation_file}`, class: "mono" }, job.validation_file)],
      ...Object.entries(numbers).map(([name, value]) => [names[name] ?? name, finite(value) ? significant(value, 6) : value]),
      job.x_learning_rate && ["Learning rate", significant(job.x_learning_rate)],
      job.x_lora?.rank && ["LoRA rank", count(job.x_lora.rank)],
      ["Seed", String(job.seed)],
      ["Made", moment(job.created_at)],
    ]),
  );
}

/** Return the address of the form with this job's files filled in. */
function again(job) {
  const query = new URLSearchParams({
    model: job.model,
    training_file: job.training_file,
    method: job.method?.type ?? "supervised",
  });
  if (job.validation_file) query.set("validation_file", job.validation_file);
  return `#/tune?${query}`;
}
