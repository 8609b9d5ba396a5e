// What came of a job: its checkpoints, its files, and what became of each example. Next: job.js.

import { all, download, get, send } from "../api.js";
import { fill, h, said } from "../dom.js";
import { ago, bytes, count, loss, plural, sentence } from "../format.js";
import { button, busy, chip, failure, link, table } from "../parts.js";

const REPORT = "report.jsonl";
const SHOWN = 100;

/** Draw a job's checkpoints and files into `place`; nothing where there is none. */
export async function drawResults(place, job, path, signal) {
  try {
    const [checkpoints, files] = await Promise.all([
      all(`${path}/checkpoints`, { limit: 100 }, signal),
      Promise.all(job.result_files.map((id) => get(`files/${id}`, {}, signal).catch(() => null))),
    ]); // One may be deleted by now.
    if (!signal.aborted) fill(place, checkpointsCard(checkpoints), filesCard(files.filter(Boolean), path, signal));
  } catch (error) {
    if (!signal.aborted)
      fill(
        place,
        failure(error, () => drawResults(place, job, path, signal)),
      );
  }
}

function checkpointsCard(checkpoints) {
  return (
    checkpoints.length > 0 &&
    h(
      "section",
      { class: "card" },
      h("h2", {}, "Checkpoints"),
      table(
        "Checkpoints",
        [
          {
            name: "Step",
            lead: true,
            cell: (one) => [
              h("b", {}, `Step ${count(one.step_number)}`),
              h("div", { class: "soft small mono" }, said(one.fine_tuned_model_checkpoint)),
            ],
          },
          { name: "Training loss", end: true, cell: (one) => loss(one.metrics.train_loss) },
          { name: "Validation loss", end: true, cell: (one) => loss(one.metrics.full_valid_loss ?? one.metrics.valid_loss) },
          { name: "Made", fit: true, cell: (one) => ago(one.created_at) },
          {
            name: "What to do",
            hidden: true,
            fit: true,
            cell: (one) =>
              h(
                "div",
                { class: "row" },
                link("Try", `#/playground?tuned=${encodeURIComponent(one.fine_tuned_model_checkpoint)}`, { kind: "slim" }),
                link("Tune on", `#/tune?model=${encodeURIComponent(one.fine_tuned_model_checkpoint)}`, { kind: "slim plain" }),
              ),
          },
        ],
        checkpoints,
      ),
    )
  );
}

function filesCard(files, path, signal) {
  if (!files.length) return null;
  const place = h("div", {});
  const failed = (error) => {
    if (!signal.aborted) fill(place, failure(error));
  };
  const report = files.find((file) => file.filename === REPORT);
  const show =
    report &&
    button(
      "Example by example",
      () =>
        busy(show, async () => {
          try {
            const text = await (await send("GET", `${path}/x_report`, { signal })).text();
            fill(
              place,
              examples(
                text
                  .split("\n")
                  .filter(Boolean)
                  .map((line) => JSON.parse(line)),
              ),
            );
          } catch (error) {
            failed(error);
          }
        }),
      { kind: "slim" },
    );
  return h(
    "section",
    { class: "card stack" },
    h("h2", {}, "Results"),
    h(
      "ul",
      { class: "results" },
      files.map((file) =>
        h(
          "li",
          {},
          said(file.filename, { class: "file-name" }),
          h("span", { class: "soft small" }, bytes(file.bytes)),
          button("Download", () => download(`files/${file.id}/content`, file.filename, { encoding: "raw" }, signal).catch(failed), {
            kind: "slim",
            symbol: "down",
            label: `Download ${file.filename}`,
          }),
          file === report && show,
        ),
      ),
    ),
    place,
  );
}

const KINDS = { trained: ["Trained", "good"], cut: ["Cut", "warn"], refused: ["Refused", "bad"] };

/** Return what became of each line of the training file, with a choice of which to see. */
function examples(lines) {
  const counts = Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, lines.filter((line) => line.status === kind).length]));
  const list = h("div", {});
  const choices = [
    ["all", `All ${count(lines.length)}`],
    ...Object.entries(KINDS).map(([kind, [name]]) => [kind, `${name} ${count(counts[kind])}`]),
  ].map(([kind, text]) => button(text, () => show(kind), { kind: "slim" }));
  function show(kind) {
    const found = lines.filter((line) => kind === "all" || line.status === kind);
    choices.forEach((choice, n) => choice.setAttribute("aria-pressed", String(kind === ["all", ...Object.keys(KINDS)][n])));
    fill(
      list,
      found.length === 0
        ? h("p", { class: "soft" }, "None.")
        : h(
            "div",
            { class: "scrolls", tabindex: "0", role: "region", "aria-label": "Examples" },
            table(
              "Examples",
              [
                { name: "Line", end: true, fit: true, cell: (line) => count(line.line) },
                { name: "What became of it", fit: true, cell: (line) => chip(...(KINDS[line.status] ?? [line.status])) },
                { name: "Tokens", end: true, fit: true, cell: (line) => count(line.tokens) },
                { name: "Trained on", end: true, fit: true, cell: (line) => count(line.trained_tokens) },
                {
                  name: "Why",
                  lead: true,
                  cell: (line) =>
                    line.reason
                      ? h("span", { dir: "auto" }, sentence(line.reason))
                      : line.cut_tokens
                        ? `${plural(line.cut_tokens, "token")} cut off`
                        : "",
                },
              ],
              found.slice(0, SHOWN),
            ),
          ),
      found.length > SHOWN &&
        h("p", { class: "soft small" }, `The first ${SHOWN} of ${count(found.length)}; the file holds them all.`),
    );
  }
  show("all");
  return h("div", { class: "stack" }, h("div", { class: "row", role: "group", "aria-label": "Which examples" }, choices), list);
}
