"use strict";

// In both directions, numbers come before text and empty cells come last.
function keyOf(cell) {
  const text = cell.dataset.key ?? cell.textContent;
  const number = Number(text);
  if (text.trim() === "") return { rank: 2, value: "" };
  return Number.isNaN(number) ? { rank: 1, value: text } : { rank: 0, value: number };
}

const natural = new Intl.Collator("en", { numeric: true });

function compare(a, b, direction) {
  if (a.rank !== b.rank) return a.rank - b.rank;
  if (a.rank === 1) return direction * natural.compare(a.value, b.value);
  return a.value === b.value ? 0 : direction * (a.value < b.value ? -1 : 1);
}

function sortBy(header) {
  const ascending = header.getAttribute("aria-sort") !== "ascending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = header.closest("table").tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, key: keyOf(row.cells[header.cellIndex]) }));
  rows.sort((a, b) => compare(a.key, b.key, ascending ? 1 : -1));
  body.append(...rows.map(({ row }) => row));
}

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => sortBy(button.parentNode));
}

// Fade everything except the setting under the pointer or the focus.
const marked = [...document.querySelectorAll("[data-group]")];
let highlighted;

function highlight(event) {
  const group = event.target.closest?.("[data-group]")?.dataset.group;
  if (group === highlighted) return;
  highlighted = group;
  for (const element of marked) {
    element.classList.toggle("faded", group !== undefined && element.dataset.group !== group);
  }
}

document.addEventListener("mouseover", highlight);
document.addEventListener("focusin", highlight);
