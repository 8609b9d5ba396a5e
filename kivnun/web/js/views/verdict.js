// What a dry run said, drawn: does it fit, what does it take. Next: tune.js, which asks for it.

import { h } from "../dom.js";
import { bytes, count, moment, money, significant, span } from "../format.js";
import { facts, notice, tiles } from "../parts.js";

/** Return the verdict of a job that was not started. */
export function drawVerdict(found, currency) {
  return [
    found.fits
      ? notice("good", "It fits", h("p", {}, "The job can start with these parameters."))
      : notice("bad", "It does not fit", h("p", {}, found.reason ?? "Change the parameters and check again.")),
    tiles([
      ["Cost", money(found.cost, found.currency ?? currency)],
      ["Time", found.seconds === null ? "not known yet" : span(found.seconds)],
      ["Tokens trained", count(found.tokens)],
      ["Steps", count(found.steps)],
    ]),
    facts([
      found.queue && ["Queue", found.queue.position ? `${count(found.queue.position - 1)} before it` : "starts at once"],
      found.queue?.estimated_start && ["Starts about", moment(found.queue.estimated_start)],
      found.memory && ["Memory", [bytes(found.memory.bytes), found.memory.available ? ` of ${bytes(found.memory.available)}` : ""]],
      found.rows && ["Examples", count(found.rows)],
      ...Object.entries(found.hyperparameters ?? {}).map(([name, value]) => [NAMES[name] ?? name, typeof value === "number" ? significant(value, 6) : value]),
      found.learning_rate && ["Learning rate", significant(found.learning_rate)],
    ]),
    (found.warnings ?? []).map((warning) => notice("warn", null, h("p", { dir: "auto" }, warning.message ?? warning))),
  ];
}

const NAMES = { n_epochs: "Epochs", batch_size: "Batch size", learning_rate_multiplier: "Rate multiplier", beta: "Beta" };
