// The choice between the system's theme, light and dark; theme_first.js reads it before the first drawing. Next: frame.js.

import { fill, h, icon } from "./dom.js";
import { announce } from "./parts.js";

const NAME = "kivnun.theme";
const AFTER = { auto: "light", light: "dark", dark: "auto" };
const WORDS = { auto: "as the system", light: "light", dark: "dark" };
const ICONS = { auto: "auto", light: "sun", dark: "moon" };

const chosen = () => document.documentElement.dataset.theme ?? "auto";

function choose(theme) {
  if (theme === "auto") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem(NAME);
  } else {
    document.documentElement.dataset.theme = theme;
    localStorage.setItem(NAME, theme);
  }
  document.dispatchEvent(new CustomEvent("kivnun:theme"));
}

/** Return the button that goes from theme to theme. */
export function themeButton() {
  const button = h("button", { type: "button", class: "button plain square", on: { click: turn } });
  function draw() {
    const label = `Theme: ${WORDS[chosen()]}`;
    button.title = label;
    button.setAttribute("aria-label", label);
    fill(button, icon(ICONS[chosen()]));
  }
  function turn() {
    choose(AFTER[chosen()]);
    announce(`Theme: ${WORDS[chosen()]}`);
  }
  document.addEventListener("kivnun:theme", draw);
  draw();
  return button;
}
