"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });
  const keyOf = (row, column) => {
    // The first number in a cell counts: "65.0 ± 7.1" sorts by 65.0; empty cells come last.
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text);
    return text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === typeof b
    ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement, body = head.closest("table").tBodies[0];
      // The first click sorts numbers from the highest and names from A.
      const numeric = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const direction = before === null ? (numeric ? -1 : 1) : before === "ascending" ? -1 : 1;
      for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const rows = [...body.rows].map((row) => [keyOf(row, head.cellIndex), row]);
      rows.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null)
        : direction * compare(a, b));
      for (const [, row] of rows) body.append(row);
    });
  }
  for (const chart of document.querySelectorAll(".chart svg")) {
    for (const entry of chart.querySelectorAll("[data-legend]")) {
      const show = (only) => {
        for (const part of chart.querySelectorAll("[data-series]")) {
          part.classList.toggle("dimmed", only !== null && part.dataset.series !== only);
        }
      };
      entry.addEventListener("pointerenter", () => show(entry.dataset.legend));
      entry.addEventListener("pointerleave", () => show(null));
    }
  }
  root.dataset.ready = "true";
})();
