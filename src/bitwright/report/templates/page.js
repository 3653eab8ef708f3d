for (const table of document.querySelectorAll("table")) {
  const heads = [...table.querySelectorAll("th")], body = table.tBodies[0];
  const original = [...body.rows];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const numeric = head.classList.contains("number"), first = numeric ? "descending" : "ascending";
    const second = numeric ? "ascending" : "descending", now = head.getAttribute("aria-sort");
    // The third click restores the order in which the rows were written.
    const next = now === first ? second : now === second ? null : first;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    const rows = [...original];
    if (next) {
      head.setAttribute("aria-sort", next);
      const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const sign = next === "ascending" ? 1 : -1;
      const compare = numeric
        ? (a, b) => Number(a) - Number(b)
        : (a, b) => a.localeCompare(b, undefined, { numeric: true });
      // Empty cells stay last in either direction.
      rows.sort((a, b) => (key(a) === "") - (key(b) === "") || (key(a) === "" ? 0 : sign * compare(key(a), key(b))));
    }
    body.append(...rows);
  }));
}
for (const button of document.querySelectorAll(".scale")) {
  button.addEventListener("click", () => {
    const log = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(log));
    for (const rect of button.closest("figure").querySelectorAll("rect")) {
      rect.setAttribute("width", log ? rect.dataset.log : rect.dataset.linear);
    }
  });
}
