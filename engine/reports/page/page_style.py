"""Style sheet and script of the pages that `page` writes; nothing in them loads anything."""

STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #ffffff; --ink: #1b1f24; --soft: #565e68;
  --line: #dcdfe3; --shade: #f0f2f4; --accent: #1d5fa6; --strong: #0d6b46; }
@media (prefers-color-scheme: dark) { :root { --page: #13161a; --card: #1a1e23; --ink: #e7e9eb;
  --soft: #a7afb9; --line: #333a42; --shade: #22272e; --accent: #86b9f2; --strong: #6fd0a2; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--ink); overflow-wrap: break-word;
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
.layout { max-width: 82rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
header h1 { font-size: clamp(1.5rem, 1.1rem + 1.8vw, 2.3rem); line-height: 1.2; margin: 0 0 .6rem;
  letter-spacing: -.01em; }
.findings { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  border-left: .3rem solid var(--accent); padding: .8rem 1.2rem; margin: 1rem 0 1.4rem; }
.findings p { margin: .3rem 0; } .findings ul { margin: .2rem 0; padding-left: 1.1rem; }
.findings li { margin: .35rem 0; }
.facts { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 0;
  font-size: .93rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; min-width: 0; }
@media (max-width: 40rem) { .facts { grid-template-columns: 1fr; gap: 0; }
  .facts dd { margin-bottom: .5rem; } }
nav { font-size: .93rem; margin: 1.6rem 0; }
nav h2 { font-size: .8rem; text-transform: uppercase; letter-spacing: .08em; color: var(--soft);
  margin: 0 0 .4rem; border: 0; padding: 0; }
nav ol { list-style: none; margin: 0; padding: 0; } nav li { margin: .25rem 0; }
a { color: var(--accent); text-underline-offset: .15em; }
nav a { text-decoration: none; } nav a:hover { text-decoration: underline; }
@media (min-width: 70rem) {
  .layout { display: grid; grid-template-columns: 14rem minmax(0, 1fr); column-gap: 3rem; }
  header { grid-column: 2; } nav { grid-column: 1; grid-row: 1 / span 2; }
  nav > div { position: sticky; top: 1.5rem; max-height: calc(100vh - 3rem); overflow-y: auto; }
  main, footer { grid-column: 2; } }
main, header { min-width: 0; }
section { margin: 2.6rem 0 0; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 0 0 .6rem; }
section > p { max-width: 48rem; margin: .6rem 0; }
figure { margin: 1.2rem 0; }
figcaption { font-size: .92rem; color: var(--soft); max-width: 48rem; margin: .5rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.scroll { overflow-x: auto; max-width: 100%; }
.chart { padding: .6rem; width: fit-content; }
.chart svg, .chart img { display: block; max-width: 100%; height: auto; }
.chart img { width: 48rem; min-width: 26rem; }
.chart svg * { stroke-linejoin: round; stroke-linecap: butt; }
.chart [data-series] { transition: opacity .12s; }
.chart .dimmed { opacity: .12; } .chart [data-legend] { cursor: pointer; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--shade); white-space: nowrap; padding: 0; }
thead button { all: unset; box-sizing: border-box; cursor: pointer; width: 100%; font-weight: 600;
  padding: .45rem .8rem; } thead button::after { content: "\\2195"; opacity: .35;
  margin-left: .35rem; font-size: .8em; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
thead button:focus-visible, a:focus-visible, .scroll:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: -2px; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--card); min-width: 7rem; }
.number { text-align: right; } td.number { white-space: nowrap; }
td strong { color: var(--strong); }
.notes { font-size: .92rem; color: var(--soft); padding-left: 1.1rem; max-width: 48rem; }
.files { font-size: .86rem; color: var(--soft); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: .86em; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .7rem .9rem; margin: .5rem 0; overflow-x: auto; line-height: 1.5; }
summary { cursor: pointer; padding: .2rem 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: .86rem;
  color: var(--soft); }
@media print { nav { display: none; } .card { break-inside: avoid; } }
"""

# A number in a cell is its first one: "65.0 ± 7.1" sorts by 65.0, and an empty cell comes last.
SCRIPT = """
"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });
  const keyOf = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text);
    return text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const compare = (a, b) => typeof a === typeof b
    ? (typeof a === "number" ? a - b : a.localeCompare(b)) : typeof a === "number" ? -1 : 1;
  for (const button of document.querySelectorAll("thead button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement, body = head.closest("table").tBodies[0];
      // Scores first from the best; names first from A.
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
"""
