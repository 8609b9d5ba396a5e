// What is said about a job, on the list and on its own page alike. Pure. Next: job.js.

import { count, modelName } from "../format.js";

export const ENDED = new Set(["succeeded", "failed", "cancelled"]);

/** Return what a job is called: its suffix, else the last letters of its id. */
export function jobTitle(job) {
  return job.user_provided_suffix || (job.fine_tuned_model && modelName(job.fine_tuned_model).called) || `Job ${job.id.slice(-6)}`;
}

/** Return how far a job is, as a share and in words. */
export function progress(job) {
  const { step = 0, total_steps: total = null } = job.x_progress ?? {};
  const share = job.status === "succeeded" ? 1 : total ? step / total : 0;
  const words = {
    validating_files: "reading the files",
    queued: job.x_queue ? `${count(job.x_queue.position)}. in the queue` : "in the queue",
    succeeded: total ? `${count(total)} steps` : "done",
  }[job.status];
  return { share, words: words ?? (total ? `step ${count(step)} of ${count(total)}` : "not begun") };
}

/** Return how the bar of a job is drawn: one that stands still is grey. */
export function trackKind(job) {
  return { failed: "bad", cancelled: "still", paused: "still", queued: "still" }[job.status] ?? "";
}

// What one can do about the errors that jobs end with.
const REMEDIES = {
  invalid_training_file: "Open the file's report: it names each line. Mend the lines, send the file again and start a new job.",
  invalid_validation_file: "Open the validation file's report, mend it and start a new job, or start one without it.",
  invalid_n_examples: "Add examples to the file, send it again and start a new job.",
  insufficient_memory: "Choose a smaller base, a lower rank or shorter examples; the plan shows what fits before the job starts.",
  exceeded_quota: "Ask the operator for a higher limit, or wait until other jobs have ended.",
  context_length_exceeded: "Shorten the examples that the report names, or let them be cut: parameters, More.",
};

/** Return what to do about a job's error. */
export function remedy(code) {
  return (
    REMEDIES[code] ??
    "Plan the job again: the same files and parameters are filled in. If it fails once more, give the operator this job's id."
  );
}
