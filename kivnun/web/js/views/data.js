// The second step: files. Sending them, what the service found in each, line by line, and deleting them. Next: tune.js.

import { call, download, get, session } from "../api.js";
import { fill, h, icon, said } from "../dom.js";
import { ago, bytes, count, moment, plural, sentence } from "../format.js";
import {
  announce,
  button,
  chip,
  confirmed,
  empty,
  facts,
  failure,
  field,
  ghosts,
  head,
  lacking,
  link,
  loaded,
  notice,
  select,
  status,
  table,
  tiles,
  track,
} from "../parts.js";
import { uploaded } from "../upload.js";

const PURPOSES = [
  { value: "fine-tune", text: "training or validation" },
  { value: "batch", text: "a batch of requests" },
];
const PURPOSE_WORDS = { "fine-tune": "Examples", batch: "Batch", "fine-tune-results": "Results", batch_output: "Batch output" };
const PAGE = 50;
const settled = (file) => file.status !== "uploaded" && file.status !== "pending" && file.status !== "running";

export function data({ place, signal, every }) {
  const list = h("div", {});
  let shown = [];
  const show = () =>
    loaded(list, { signal, waiting: ghosts(3, 64), load: () => get("files", { limit: PAGE }, signal), draw: drawn });

  function drawn(page, before = []) {
    shown = [...before, ...page.data];
    if (!shown.length)
      return empty("data", "No files yet", "Files that you send appear here, with what was found in them line by line.");
    const more =
      page.has_more &&
      button("Show more", async () => {
        try {
          fill(list, drawn(await get("files", { limit: PAGE, after: shown.at(-1).id }, signal), shown));
        } catch (error) {
          if (!signal.aborted) list.append(failure(error));
        }
      });
    return h("div", { class: "card" }, files(shown, show), more && h("div", { class: "row more" }, more));
  }

  fill(
    place,
    head(
      "Data",
      "Examples as JSON lines: chats, prompts with completions, or pairs of a better and a worse answer. Each file is checked.",
      { actions: [link("Next: parameters", "#/tune", { kind: "first", symbol: "arrow" })] },
    ),
    lacking(session, "data", "upload or delete files") ?? sender(signal, show),
    h("section", { class: "section" }, h("h2", {}, "Files"), list),
  );
  show();
  every(1500, async () => {
    if (!shown.some((file) => !settled(file))) return;
    const page = await get("files", { limit: Math.max(PAGE, shown.length) }, signal);
    const before = shown;
    fill(list, drawn(page));
    for (const file of page.data) {
      if (settled(file) && before.some((old) => old.id === file.id && !settled(old)))
        announce(`${file.filename}: ${file.status === "processed" ? "ready" : "has problems"}`);
    }
  });
}

function sender(signal, done) {
  const purpose = field("What they hold", select(PURPOSES, "fine-tune"));
  const chosen = h("input", {
    type: "file",
    id: "file-chosen",
    class: "unseen",
    multiple: true,
    accept: ".jsonl,.json,.txt,application/jsonl",
    on: {
      change: () => {
        take(chosen.files);
        chosen.value = "";
      },
    },
  });
  const going = h("ul", { class: "going", "aria-label": "Being sent" });
  const zone = h(
    "div",
    {
      class: "drop",
      on: {
        dragover: (event) => {
          event.preventDefault();
          zone.classList.add("over");
        },
        dragleave: () => zone.classList.remove("over"),
        drop: (event) => {
          event.preventDefault();
          zone.classList.remove("over");
          take(event.dataTransfer.files);
        },
      },
    },
    icon("data"),
    h("p", { class: "title" }, "Drop files here, or ", h("label", { for: "file-chosen" }, "choose them")),
    chosen,
    h("p", { class: "soft small" }, "JSON lines in UTF-8. Files over 64 MiB go in parts, and a part that is lost is sent again."),
    purpose,
  );

  function take(list) {
    for (const file of list) sendOne(file, purpose.control.value, going, signal, done);
  }
  return h("section", { class: "sender" }, zone, going);
}

async function sendOne(file, purpose, going, signal, done) {
  const stopping = new AbortController();
  signal.addEventListener("abort", () => stopping.abort(), { once: true });
  const bar = track(0, { label: `Sending ${file.name}` });
  const told = h("span", { class: "soft small number" }, `0 of ${bytes(file.size)}`);
  const stop = button("Stop", () => stopping.abort(), { kind: "slim plain", label: `Stop sending ${file.name}` });
  const item = h("li", {}, h("div", { class: "line" }, said(file.name, { class: "file-name" }), told, stop), bar);
  going.prepend(item);
  try {
    await uploaded(
      file,
      purpose,
      (out) => {
        bar.set(file.size ? out / file.size : 1);
        told.textContent = `${bytes(out)} of ${bytes(file.size)}`;
      },
      stopping.signal,
    );
    announce(`${file.name} is sent and being checked`);
    item.remove();
    done();
  } catch (error) {
    if (signal.aborted) return;
    const close = button("Dismiss", () => item.remove(), { kind: "slim plain" });
    if (error.name === "AbortError")
      fill(item, h("div", { class: "line" }, said(file.name), h("span", { class: "soft small" }, "Stopped."), close));
    else
      fill(
        item,
        h("p", {}, said(file.name, { class: "file-name" })),
        failure(error, () => {
          item.remove();
          sendOne(file, purpose, going, signal, done);
        }),
        close,
      );
  }
}

function files(list, again) {
  return table(
    "Files",
    [
      {
        name: "File",
        lead: true,
        cell: (file) => [
          h("a", { href: `#/data/${file.id}`, class: "file-name" }, said(file.filename)),
          h(
            "div",
            { class: "soft small" },
            PURPOSE_WORDS[file.purpose] ?? file.purpose,
            " · ",
            h("span", { class: "mono" }, file.id),
          ),
        ],
      },
      {
        name: "State",
        fit: true,
        cell: (file) => (file.purpose === "fine-tune" || file.purpose === "batch" ? status(file.status) : chip("Ready", "good")),
      },
      { name: "Size", end: true, fit: true, cell: (file) => bytes(file.bytes) },
      { name: "Sent", fit: true, cell: (file) => ago(file.created_at) },
      {
        name: "What to do",
        hidden: true,
        fit: true,
        cell: (file) =>
          h(
            "div",
            { class: "row" },
            file.purpose === "fine-tune" &&
              file.status === "processed" &&
              link("Use", `#/tune?training_file=${file.id}`, { kind: "slim" }),
            session.may("data") &&
              button(null, () => removed(file, again), {
                kind: "slim plain",
                symbol: "bin",
                label: `Delete ${file.filename}`,
                title: "Delete",
              }),
          ),
      },
    ],
    list,
  );
}

async function removed(file, then) {
  const done = await confirmed(
    "Delete this file?",
    [said(file.filename), " is erased. Models that were tuned on it stay. This cannot be undone."],
    "Delete the file",
    () => call("DELETE", `files/${file.id}`),
  );
  if (!done) return;
  announce("File deleted");
  then();
}

/** The page of one file: what was found in it. */
export function report({ place, id, signal, every }) {
  const show = () =>
    loaded(place, { signal, waiting: ghosts(3, 120), load, draw: ([file, found]) => drawReport(file, found, signal) });
  async function load() {
    const file = await get(`files/${encodeURIComponent(id)}`, {}, signal);
    const judged = settled(file) && (file.purpose === "fine-tune" || file.purpose === "batch");
    return [file, judged ? await get(`files/${encodeURIComponent(id)}/x_report`, {}, signal) : null];
  }
  show().then(() => {
    place.querySelector("h1")?.focus({ preventScroll: true });
    every(1000, async () => {
      if (!place.querySelector("[data-waiting]")) return "enough";
      if (settled(await get(`files/${encodeURIComponent(id)}`, {}, signal))) await show();
      return undefined;
    });
  });
}

function drawReport(file, found, signal) {
  const good = found && !found.problems_total;
  const top = head(
    said(file.filename),
    `${PURPOSE_WORDS[file.purpose] ?? file.purpose} · ${bytes(file.bytes)} · sent ${moment(file.created_at)}`,
    {
      crumb: { href: "#/data", text: "Data" },
      chip: found || settled(file) ? status(file.status) : null,
      actions: [
        file.purpose === "fine-tune" &&
          file.status === "processed" &&
          link("Use for training", `#/tune?training_file=${file.id}`, { kind: "first", symbol: "arrow" }),
        button("Download", () => download(`files/${file.id}/content`, file.filename, { encoding: "raw" }, signal), {
          symbol: "down",
        }),
        session.may("data") &&
          button(
            "Delete",
            () =>
              removed(file, () => {
                location.hash = "#/data";
              }),
            { kind: "danger", symbol: "bin" },
          ),
      ],
    },
  );
  if (!settled(file)) {
    return [
      top,
      h(
        "div",
        { "data-waiting": true },
        notice(
          "",
          "The file is being checked",
          h("p", {}, "Every line is read. This page shows what was found as soon as it is done."),
        ),
      ),
    ];
  }
  if (!found) return [top];
  return [
    top,
    good
      ? notice(
          "good",
          "Nothing is wrong with this file",
          h("p", {}, found.rows ? `${plural(found.rows, "row")} can be trained on.` : "It can be used."),
        )
      : notice(
          "bad",
          sentence(file.status_details) || `${plural(found.problems_total, "problem")} must be mended`,
          h("p", {}, "Mend the lines below, and send the file again: a job that is given it as it is would fail."),
        ),
    tiles([
      ["Format", FORMATS[found.format] ?? found.format ?? "–"],
      ["Rows", count(found.rows)],
      ["Problems", count(found.problems_total)],
      ["Warnings", count(found.warnings.length)],
    ]),
    found.problems.length > 0 && problems(found),
    found.warnings.length > 0 && warnings(found.warnings),
    h(
      "details",
      {},
      h("summary", {}, "The file's record"),
      facts([
        ["Id", h("code", {}, file.id)],
        ["Purpose", file.purpose],
        ["Expires", file.expires_at ? moment(file.expires_at) : "never"],
      ]),
    ),
  ];
}

const FORMATS = {
  messages: "Chats",
  prompt_completion: "Prompt and completion",
  preference: "Preferences",
  batch: "Batch requests",
  text: "Text",
};

function problems(found) {
  const rest = found.problems_total - found.problems.length;
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Problems by line"),
    table(
      "Problems by line",
      [
        { name: "Line", end: true, fit: true, cell: (problem) => (problem.line ? count(problem.line) : "whole file") },
        { name: "What is wrong", lead: true, cell: (problem) => h("span", { dir: "auto" }, sentence(problem.message)) },
        { name: "Code", fit: true, cell: (problem) => h("code", {}, problem.code) },
      ],
      found.problems,
    ),
    rest > 0 && h("p", { class: "soft small" }, `${plural(rest, "more problem")} of the same file are not listed.`),
  );
}

function warnings(list) {
  return h(
    "section",
    { class: "card" },
    h("h2", {}, "Warnings"),
    h(
      "ul",
      { class: "lines" },
      list.map((warning) =>
        h("li", { dir: "auto" }, warning.line ? h("b", {}, `Line ${count(warning.line)}: `) : null, sentence(warning.message)),
      ),
    ),
  );
}
