// The fourth step, from above: all jobs, the newest first, each with how far it is. Next: job.js.

import { get } from "../api.js";
import { fill, h, said } from "../dom.js";
import { ago, moment } from "../format.js";
import { button, empty, failure, ghosts, head, link, loaded, status, track } from "../parts.js";
import { ENDED, jobTitle, progress, trackKind } from "./job_words.js";

const PAGE = 20;

export function jobs({ place, signal, every }) {
  const list = h("div", {});
  let shown = [];

  function drawn(page, before = []) {
    shown = [...before, ...page.data];
    if (!shown.length)
      return empty(
        "jobs",
        "No job yet",
        "A job that you start is shown here, from its place in the queue to the finished model.",
        link("Plan a job", "#/tune", { symbol: "arrow" }),
      );
    const more =
      page.has_more &&
      button("Show more", async () => {
        try {
          fill(list, drawn(await get("fine_tuning/jobs", { limit: PAGE, after: shown.at(-1).id }, signal), shown));
        } catch (error) {
          if (!signal.aborted) list.append(failure(error));
        }
      });
    return [h("ul", { class: "jobs" }, shown.map(line)), more && h("div", { class: "row more" }, more)];
  }

  fill(
    place,
    head("Jobs", "Each job from its place in the queue to the model that came of it.", {
      actions: [link("New job", "#/tune", { kind: "first", symbol: "plus" })],
    }),
    list,
  );
  loaded(list, { signal, waiting: ghosts(4, 84), load: () => get("fine_tuning/jobs", { limit: PAGE }, signal), draw: drawn });
  every(2500, async () => {
    if (shown.every((job) => ENDED.has(job.status) || job.status === "paused")) return;
    const focused = document.activeElement?.closest?.("[data-job]")?.dataset.job;
    const page = await get("fine_tuning/jobs", { limit: Math.min(100, Math.max(PAGE, shown.length)) }, signal);
    fill(list, drawn(page));
    if (focused) list.querySelector(`[data-job="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  });
}

function line(job) {
  const { share, words } = progress(job);
  return h(
    "li",
    {},
    h(
      "a",
      { class: "card job-line", href: `#/jobs/${job.id}`, "data-job": job.id },
      h(
        "div",
        { class: "what" },
        h("h3", {}, said(jobTitle(job))),
        h("div", { class: "soft small" }, said(job.model), " · ", ago(job.created_at)),
      ),
      h(
        "div",
        { class: "how" },
        h("div", { class: "line" }, status(job.status), h("span", { class: "soft small number" }, words)),
        track(share, { label: "Progress", kind: trackKind(job) }),
      ),
      h(
        "div",
        { class: "when soft small number" },
        job.finished_at ? `ended ${moment(job.finished_at)}` : job.estimated_finish ? `about ${moment(job.estimated_finish)}` : "",
      ),
    ),
  );
}
