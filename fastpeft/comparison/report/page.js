"use strict";
// A click on the head of a column sorts its table; a column of numbers begins with the largest.

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const isNumber = head.classList.contains("number");
  const before = head.getAttribute("aria-sort") ?? (isNumber ? "ascending" : "descending");
  const sign = before === "ascending" ? -1 : 1;
  const key = (row) => {
    const text = row.cells[column].textContent.trim();
    return isNumber ? Number.parseFloat(text.replaceAll(",", "")) : text;
  };
  const compare = (one, other) => {
    const [first, second] = [key(one), key(other)];
    if (!isNumber) return sign * first.localeCompare(second, undefined, { numeric: true });
    if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second);
    return sign * (first - second);
  };
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

for (const table of document.querySelectorAll("table")) {
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    if (!head.textContent) return;
    const button = document.createElement("button");
    button.textContent = head.textContent;
    button.addEventListener("click", () => sort(table, column));
    head.replaceChildren(button);
  });
}
