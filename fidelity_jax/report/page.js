"use strict";
// Tables sort by the column whose heading is pressed; once more turns the order round.
(() => {
  const natural = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

  // What a cell is sorted by: its number, or its text; null if there is nothing in it.
  const key = (cell) => {
    if (cell.dataset.sort !== undefined) return Number(cell.dataset.sort);
    const text = cell.dataset.text ?? cell.textContent.trim();
    return text === "" || text === "–" ? null : text;
  };

  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    return natural.compare(String(a), String(b));
  };

  const sort = (table, heading) => {
    const headings = [...heading.parentNode.children];
    const column = headings.indexOf(heading);
    const falling = heading.getAttribute("aria-sort") === "ascending";
    const body = table.tBodies[0];
    const lines = [...body.rows].map((row) => [key(row.cells[column]), row]);
    lines.sort(([a], [b]) => {
      // Nothing comes last either way.
      if (a === null || b === null) return (a === null) - (b === null);
      return falling ? compare(b, a) : compare(a, b);
    });
    body.append(...lines.map(([, row]) => row));
    for (const other of headings) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.querySelector("button").addEventListener("click", () => sort(table, heading));
    }
  }
})();
