// Runs before anything is drawn, so that a chosen theme does not flash the other one. The choice itself is made in theme.js.
(() => {
  const chosen = localStorage.getItem("kivnun.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
