// What a dry run said, drawn: does it fit, what does it take, what would make it fit. Next: tune.js, which asks for it.

import { h } from "../dom.js";
import { bytes, count, money, sentence, significant, span } from "../format.js";
import { facts, notice, tiles } from "../parts.js";

const NAMES = { n_epochs: "Epochs", batch_size: "Batch size", learning_rate_multiplier: "Rate multiplier", beta: "Beta" };
const FITS = {
  fits: ["good", "It fits", "The job can start with these parameters."],
  unknown: [
    "warn",
    "Whether it fits is not known",
    "Its memory cannot be foretold on this machine. The job may start, and fails at once if it does not fit.",
  ],
};

/** Return the verdict of a job that was not started. One that was refused before it was planned has no figures. */
export function drawVerdict(found) {
  const [kind, title, words] = found.fits
    ? (FITS[found.verdict] ?? FITS.unknown)
    : ["bad", found.verdict === "does_not_fit" ? "It does not fit" : "It would be refused", sentence(found.reason)];
  const verdict = notice(kind, title, h("p", { dir: "auto" }, words));
  return found.steps === undefined
    ? [verdict, warnings(found.warnings)]
    : [
        verdict,
        tiles([
          ["Cost", money(found.cost, found.currency)],
          ["Time", found.seconds === null ? "not known" : span(found.seconds)],
          ["Tokens trained", count(found.trained_tokens)],
          ["Steps", count(found.steps)],
        ]),
        facts([
          found.queue && [
            "Queue",
            found.queue.position > 1
              ? [`${count(found.queue.position - 1)} before it`, found.queue.seconds ? `, about ${span(found.queue.seconds)}` : ""]
              : "starts at once",
          ],
          found.memory && ["Memory", `${bytes(found.memory.bytes)} of ${bytes(found.memory.available)}`],
          [
            "Examples",
            [
              count(found.examples),
              found.held_out ? `, ${count(found.held_out)} held out` : "",
              found.truncated ? `, ${count(found.truncated)} cut` : "",
            ],
          ],
          ["Longest", `${count(found.longest_example)} tokens`],
          ...Object.entries(found.hyperparameters).map(([name, value]) => [NAMES[name] ?? name, significant(value, 6)]),
          ["Learning rate", significant(found.learning_rate)],
        ]),
        found.changes.length > 0 &&
          h(
            "div",
            {},
            h("h3", {}, "What would take less memory"),
            h(
              "ul",
              { class: "lines small" },
              found.changes.map((change) =>
                h("li", {}, change.what, h("span", { class: "soft number" }, ` · ${bytes(change.bytes)}`)),
              ),
            ),
          ),
        warnings(found.warnings),
      ];
}

const warnings = (list) => list.map((warning) => notice("warn", null, h("p", { dir: "auto" }, sentence(warning))));
