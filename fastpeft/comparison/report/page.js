"use strict";
// What the page can do beside being read: the theme, the table, and values under the pointer. Texts of runs are only
// ever set as text, never as markup.

const root = document.documentElement;
const all = (selector, within = document) => [...within.querySelectorAll(selector)];

function make(tag, text, click) {
  const element = document.createElement(tag);
  element.textContent = text;
  if (click) {
    element.type = "button";
    element.addEventListener("click", click);
  }
  return element;
}

// -- theme ------------------------------------------------------------------------------------------------------------

const stored = {
  get() { try { return localStorage.getItem("fastpeft-theme"); } catch { return null; } },
  set(theme) { try { localStorage.setItem("fastpeft-theme", theme); } catch { /* a page of a file may have no storage */ } },
};
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const toggle = make("button", "", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  stored.set(root.dataset.theme);
  nameToggle();
});
function nameToggle() {
  toggle.textContent = isDark() ? "Light theme" : "Dark theme";
}
if (["light", "dark"].includes(stored.get())) root.dataset.theme = stored.get();
system.addEventListener("change", nameToggle);
nameToggle();
document.querySelector("header").append(toggle);

// -- table ------------------------------------------------------------------------------------------------------------

const table = document.getElementById("results");
const tools = document.getElementById("tools");
const body = table.tBodies[0];
const heads = [...table.tHead.rows[0].cells];
const status = make("p", "");
status.setAttribute("role", "status");

const textOf = (cell) => (cell.querySelector(".name") ?? cell).textContent.trim();
const titles = heads.map(textOf);
const isNumber = (column) => heads[column].classList.contains("number");

function sort(column) {
  const down = heads[column].getAttribute("aria-sort") === (isNumber(column) ? "ascending" : "descending")
    || (isNumber(column) && !heads[column].hasAttribute("aria-sort"));
  const key = (row) => {
    const text = textOf(row.cells[column]);
    return isNumber(column) ? Number.parseFloat(text.replaceAll(",", "")) : text;
  };
  const compare = (one, other) => {
    const [first, second] = [key(one), key(other)];
    if (!isNumber(column)) return first.localeCompare(second, undefined, { numeric: true }) * (down ? -1 : 1);
    if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second);
    return (first - second) * (down ? -1 : 1);
  };
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(compare));
}

function hide(variant, hidden) {
  all(`[data-variant="${variant}"]`).forEach((element) => element.toggleAttribute("hidden", hidden));
  const count = [...body.rows].filter((row) => row.hidden).length;
  showAll.hidden = count === 0;
  showAll.textContent = `Show all (${count} hidden)`;
}

const showAll = make("button", "", () => {
  [...body.rows].forEach((row) => hide(row.dataset.variant, false));
  status.textContent = "All rows are shown.";
  body.querySelector("button").focus();
});
showAll.hidden = true;

const shownRows = () => [...body.rows, ...(table.tFoot?.rows ?? [])].filter((row) => !row.hidden)
  .map((row) => [...row.cells].map(textOf));

function download() {
  const plain = shownRows().map((row) => row.map((text, column) => (isNumber(column) ? text.replaceAll(",", "") : text)));
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [titles, ...plain].map((row) => row.map(quoted).join(","));
  const link = make("a", "");
  link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "text/csv" }));
  link.download = "comparison.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  status.textContent = "Downloaded the rows that are shown.";
}

const escaped = (text) => text.replace(/[\\`*_<>&[\]]/g, "\\$&").replaceAll("|", "&#124;").replace(/\s+/g, " ");

async function copy() {
  const line = (texts) => `| ${texts.join(" | ")} |`;
  const rule = `|${titles.map((_, column) => (isNumber(column) ? "---:|" : "---|")).join("")}`;
  const text = [line(titles.map(escaped)), rule, ...shownRows().map((row) => line(row.map(escaped)))].join("\n");
  try {
    await navigator.clipboard.writeText(`${text}\n`);
  } catch { // a page over plain http has no clipboard
    const area = make("textarea", `${text}\n`);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  status.textContent = "Copied the rows that are shown.";
}

heads.forEach((head, column) => head.replaceChildren(make("button", titles[column], () => sort(column))));
for (const row of body.rows) {
  const button = make("button", "×", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    hide(row.dataset.variant, true);
    status.textContent = `${textOf(row.cells[0])} is hidden.`;
    (next && !next.hidden ? next.querySelector("button") : showAll).focus();
  });
  button.className = "hide";
  button.title = "Hide in table and charts";
  button.setAttribute("aria-label", `Hide ${textOf(row.cells[0])}`);
  row.cells[0].append(button);
}
tools.append(make("button", "Download CSV", download), make("button", "Copy as Markdown", copy), showAll, status);

// -- values under the pointer and at the focus ------------------------------------------------------------------------

const tip = make("div", "");
tip.id = "tip";
tip.hidden = true;
tip.setAttribute("aria-hidden", "true"); // marks have the same text as their name
document.body.append(tip);

for (const title of all(".chart title")) { // else a browser would show it beside the tip
  title.parentElement.setAttribute("aria-label", title.textContent);
  title.remove();
}

function light(variant) {
  all(".lit").forEach((element) => element.classList.remove("lit"));
  if (variant !== undefined) {
    all(`[data-variant="${variant}"]`).forEach((element) => element.classList.add("lit"));
  }
}

function show(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(4, x + 14 + width > innerWidth ? x - width - 14 : x + 14)}px`;
  tip.style.top = `${Math.max(4, y + 14 + height > innerHeight ? y - height - 14 : y + 14)}px`;
}

function clear() {
  tip.hidden = true;
  light();
}

// The places of a series in its chart: those of its line, or that of its mark.
function places(series) {
  const line = series.querySelector("polyline");
  if (line) return [...line.points].map(({ x, y }) => [x, y]);
  const { e, f } = series.querySelector(".mark").transform.baseVal.consolidate().matrix;
  return [[e, f]];
}

function nearest(chart, event) {
  const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.getScreenCTM().inverse());
  let best = { distance: 40 };
  for (const series of all("[data-variant]:not([hidden])", chart)) {
    for (const [x, y] of places(series)) {
      const distance = Math.hypot(x - at.x, y - at.y);
      if (distance < best.distance) best = { distance, series, x, y };
    }
  }
  return best;
}

function told(chart, { series, x, y }) {
  const label = series.getAttribute("aria-label");
  if (!chart.dataset.x) return label;
  const [step, value] = [[chart.dataset.x, x], [chart.dataset.y, y]].map(([scale, pixel]) => {
    const [factor, offset] = scale.split(" ").map(Number);
    return pixel * factor + offset;
  });
  return `${label.split("\n")[0]}\nstep ${Math.round(step)}: ${value.toFixed(3)}`;
}

for (const chart of all(".chart")) {
  const point = (event) => {
    const named = event.target.closest("text")?.closest("[data-variant]");
    const found = named ? { series: named } : nearest(chart, event);
    if (!found.series) return clear();
    light(found.series.dataset.variant);
    show(named ? named.getAttribute("aria-label") : told(chart, found), event.clientX, event.clientY);
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", clear);
  chart.addEventListener("focusin", ({ target }) => {
    if (!target.matches(":focus-visible")) return;
    light(target.dataset.variant);
    const { right, top } = target.querySelector(".mark").getBoundingClientRect();
    show(target.getAttribute("aria-label"), right, top);
  });
  chart.addEventListener("focusout", clear);
}
for (const row of body.rows) {
  row.addEventListener("pointerenter", () => light(row.dataset.variant));
  row.addEventListener("pointerleave", clear);
  row.addEventListener("focusin", () => light(row.dataset.variant));
  row.addEventListener("focusout", clear);
}
addEventListener("keydown", ({ key }) => {
  if (key === "Escape") clear();
});
