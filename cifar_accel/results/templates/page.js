"use strict";
// Charts are drawn one after the other, in the colours of the system; folded ones once they open.
const charts = JSON.parse(document.getElementById("charts").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const places = [...document.querySelectorAll("[data-chart]")];
const drawn = new Set();
async function draw(place, isDark) {
  drawn.add(place);
  const options = {renderer: "svg", actions: false, theme: isDark ? "dark" : undefined};
  await vegaEmbed(place, structuredClone(charts[place.dataset.chart]), options);
}
async function drawVisible() {
  for (const place of places) {
    if (!drawn.has(place) && place.clientWidth) await draw(place, dark.matches);
  }
}
drawVisible();
document.querySelectorAll("details").forEach((it) => it.addEventListener("toggle", drawVisible));
dark.addEventListener("change", () => drawn.forEach((place) => draw(place, dark.matches)));
// On paper everything is open and light.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details").forEach((it) => { it.open = true; });
  places.forEach((place) => draw(place, false));
});
addEventListener("afterprint", () => places.forEach((place) => draw(place, dark.matches)));

// A click on a heading sorts by it; numbers by their value, cells without one last.
function value(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replaceAll(",", ""));
  return Number.isNaN(number) ? text : number;
}
function compare(a, b, sign) {
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
}
for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(value(a, column), value(b, column), sign));
      table.tBodies[0].append(...rows);
    });
  });
}

// The table as text, in the order that is shown.
const written = {
  markdown: (rows) => rows.map((row, i) => {
    const line = `| ${row.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`;
    return i ? line : `${line}\n|${"---|".repeat(row.length)}`;
  }).join("\n"),
  csv: (rows) => rows.map((row) => row.map((cell) => `"${cell.replaceAll('"', '""')}"`).join(",")).join("\n"),
};
for (const button of document.querySelectorAll("[data-copy]")) {
  button.parentElement.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    const table = document.getElementById(button.dataset.table);
    const rows = [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.trim()));
    await navigator.clipboard.writeText(written[button.dataset.copy](rows));
    button.textContent = "copied";
  });
}
