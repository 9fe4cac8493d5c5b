// A click on a column's head sorts the table by it; a second click turns the order round. Numbers stand at the start
// of a cell, perhaps behind a sign such as > or "at least"; what is no number comes last in either order.
function sortKey(cell) {
  const found = cell.textContent.match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/);
  return found ? parseFloat(found[0]) : NaN;
}
function sortTable(head) {
  const table = head.closest("table"), body = table.tBodies[0], rows = Array.from(body.rows);
  const column = head.cellIndex, turn = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  const asText = head.classList.contains("text");
  rows.sort((one, other) => {
    const a = one.cells[column], b = other.cells[column];
    if (asText) return turn * a.textContent.localeCompare(b.textContent);
    const x = sortKey(a), y = sortKey(b);
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
    return turn * (x - y);
  });
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", turn === 1 ? "ascending" : "descending");
  rows.forEach((row) => body.appendChild(row));
}
document.querySelectorAll("table.sortable th").forEach((head) => {
  head.tabIndex = 0;
  head.addEventListener("click", () => sortTable(head));
  head.addEventListener("keydown", (event) => { if (event.key === "Enter") sortTable(head); });
});
