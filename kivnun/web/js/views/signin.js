// Signing in: a key, kept in this tab alone. Next: frame.js.

import { get, session } from "../api.js";
import { fill, h, icon } from "../dom.js";
import { STEPS } from "../frame.js";
import { button, busy, failure, field, notice } from "../parts.js";
import { themeButton } from "../theme.js";

/** Draw the sign-in; call `then` when a key is good. `said` is why one is here. */
export function signIn(frame, then, said) {
  const place = h("div", { "aria-live": "polite" }, said && notice("", null, h("p", {}, said)));
  const key = field(
    "API key",
    h("input", {
      type: "password",
      name: "key",
      autocomplete: "off",
      spellcheck: "false",
      placeholder: "sk-kivnun-…",
      required: true,
      maxlength: 512,
    }),
    { help: "It is kept in this tab until you sign out or close it, and sent to this service alone." },
  );
  const enter = button("Sign in", null, { kind: "first", type: "submit" });
  const form = h(
    "form",
    { novalidate: true, on: { submit: submitted } },
    h("h1", { tabindex: "-1" }, "Sign in"),
    h(
      "p",
      { class: "soft" },
      "Paste an API key. The one that ",
      h("code", {}, "kivnun serve"),
      " printed when it first started has every right.",
    ),
    place,
    key,
    enter,
  );

  async function submitted(event) {
    event.preventDefault();
    const given = key.control.value.trim();
    if (!given) {
      key.wrong("Paste a key here.");
      key.control.focus();
      return;
    }
    fill(place);
    await busy(enter, async () => {
      session.key = given;
      try {
        await get("x_me");
        await then();
      } catch (error) {
        session.signOut();
        if (error.status !== 401) return void fill(place, failure(error));
        fill(place);
        key.wrong("The service does not know this key, or it was revoked or has expired.");
        key.control.select();
      }
    });
  }

  fill(
    frame,
    h(
      "div",
      { class: "gate" },
      h(
        "div",
        { class: "pitch" },
        h("div", { class: "brand" }, h("img", { src: "icon.svg", alt: "", width: 28, height: 28 }), "Kivnun"),
        h("p", { class: "claim" }, "Your examples in, your model out."),
        h(
          "ol",
          {},
          STEPS.map((step) =>
            h("li", {}, h("span", { class: "mark" }, icon(step.icon)), h("span", {}, h("b", {}, step.title), " · ", step.what)),
          ),
        ),
      ),
      h("main", { id: "content", tabindex: "-1" }, h("div", { class: "corner" }, themeButton()), form),
    ),
  );
  document.title = "Sign in · Kivnun";
  key.control.focus();
}
