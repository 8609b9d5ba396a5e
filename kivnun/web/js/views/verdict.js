// What a dry run said, drawn: does it fit, what does it take, what would make it fit. Next: tune.js, which asks for it.

import { h } from "../dom.js";
import { bytes, count, money, sentence, significant, span } from "../format.js";
import { facts, notice, tiles } from "../parts.js";

const NAMES = { n_epochs: "Epochs", batch_size: "Batch size", learning_rate_multiplier: "Rate multiplier", beta: "Beta" };
const VERDICTS = {
  fits: ["good", "It fits", "The job can start with these parameters."],
  unknown: ["warn", "Whether it fits is not known", "The base is not on this machine yet, so that its memory cannot be foretold."],
  refused: ["bad", "It would be refused", null],
};
const NO = ["bad", "It does not fit", "The job would need more memory than there is."];

/** Return whether a job with this verdict may be started. */
export const canStart = (found) => ["good", "warn"].includes((VERDICTS[found.verdict] ?? NO)[0]);

/** Return the verdict of a job that was not started. */
export function drawVerdict(found) {
  const [kind, title, words] = VERDICTS[found.verdict] ?? NO;
  const said = notice(kind, title, h("p", { dir: "auto" }, found.error ? sentence(found.error.message) : words));
  return found.verdict === "refused" ? [said, warnings(found.warnings)] : [said,
    tiles([
      ["Cost", money(found.cost.amount, found.cost.currency)],
      ["Time", found.seconds === null ? "not known" : span(found.seconds)],
      ["Tokens trained", count(found.trained_tokens)],
      ["Steps", count(found.steps)],
    ]),
    facts([
      found.queue && ["Queue", found.queue.position > 1 ? [`${count(found.queue.position - 1)} before it`, found.queue.seconds ? `, about ${span(found.queue.seconds)}` : ""] : "starts at once"],
      found.memory && ["Memory", `${bytes(found.memory.peak_bytes)} of ${bytes(found.memory.limit_bytes)}`],
      ["Examples", [count(found.examples), found.held_out ? `, ${count(found.held_out)} held out` : "", found.truncated ? `, ${count(found.truncated)} cut` : ""]],
      ["Longest", `${count(found.longest_example)} tokens`],
      ...Object.entries(found.hyperparameters).map(([name, value]) => [NAMES[name] ?? name, significant(value, 6)]),
      ["Learning rate", significant(found.learning_rate)],
    ]),
    found.changes.length > 0 && h("div", {}, h("h3", {}, "What would take less memory"), h("ul", { class: "lines small" }, found.changes.map((change) =>
      h("li", {}, change.what, h("span", { class: "soft number" }, ` · ${bytes(change.peak_bytes)}`))))),
    warnings(found.warnings)];
}

const warnings = (list) => list.map((warning) => notice("warn", null, h("p", { dir: "auto" }, sentence(warning.message ?? warning))));
