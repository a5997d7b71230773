// Draws the figures, sorts the tables, copies commands, and follows the reader's theme. Nothing is fetched, but by a page
// that is served with --watch, which asks its own server whether there is a newer one.
"use strict";
(() => {
  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colours = ["#3b82c4", "#d07a2d", "#4a9c5d", "#c25459", "#8f77b8", "#a1806a", "#c784b3", "#9a982f", "#45a3b3"];
  const plots = [...document.querySelectorAll(".plot")];
  let printing = false;

  const isDark = () => !printing && (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const axes = (layout) => ["xaxis", "yaxis"].filter((name) => layout[name]);

  function themed(layout, traces) {
    const ink = printing ? "#000000" : colour("--ink");
    const grid = printing ? "#dddddd" : colour("--grid");
    const narrow = window.innerWidth < 600;
    const own = {
      colorway: colours, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: narrow ? 11 : 12, color: ink },
      hoverlabel: { bgcolor: isDark() ? "#2b3138" : "#ffffff", bordercolor: grid, font: { color: isDark() ? "#e7eaee" : "#1b1f24" }, align: "left" },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      margin: { l: narrow ? 48 : 64, r: 12, t: 16, b: 48, ...(layout.margin || {}) },
      hovermode: "closest", autosize: true,
    };
    for (const name of axes(layout)) {
      own[name] = { gridcolor: grid, linecolor: grid, zerolinecolor: grid, automargin: true, ...layout[name] };
    }
    if (narrow && traces.length > 6) own.showlegend = false;  // it would hide the figure; hover and table name all
    const shapes = (layout.shapes || []).map((shape) => ({ ...shape, line: { color: ink, ...shape.line } }));
    return { ...layout, ...own, shapes };
  }

  function draw(plot) {
    const spec = JSON.parse(document.getElementById(`${plot.id}-spec`).textContent);
    const ink = printing ? "#000000" : colour("--ink");
    const traces = spec.data.map((trace) =>
      trace.type === "treemap" ? { ...trace, marker: { colors: undefined }, tiling: { pad: 2 }, outsidetextfont: { color: ink } } : trace);
    const config = { responsive: true, displaylogo: false, displayModeBar: false };
    return Plotly.react(plot, traces, themed(spec.layout, traces), config).then(() => { plot.dataset.drawn = "yes"; });
  }
  const drawAll = () => Promise.all(plots.map(draw));

  // ---- theme -----------------------------------------------------------------------------------------------------
  const button = document.getElementById("theme");
  function tellTheme() {
    button.setAttribute("aria-pressed", String(isDark()));
  }
  button.hidden = false;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    tellTheme();
    drawAll();
  });
  dark.addEventListener("change", () => { tellTheme(); drawAll(); });
  tellTheme();

  // ---- tables ----------------------------------------------------------------------------------------------------
  const said = document.getElementById("said");
  function valueOf(row, place) {
    const cell = row.cells[place];
    return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
  }
  function compare(first, second) {
    const blanks = (first === "") - (second === "");
    if (blanks) return { blanks };
    if (typeof first === "number" && typeof second === "number") return { order: first - second };
    if (typeof first !== typeof second) return { order: typeof first === "number" ? -1 : 1 };
    return { order: first.localeCompare(second, "en", { numeric: true }) };
  }
  for (const header of document.querySelectorAll("thead th")) {
    header.querySelector("button").addEventListener("click", () => {
      const table = header.closest("table");
      const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      const rows = [...table.tBodies[0].rows].map((row, place) => ({ row, place, value: valueOf(row, header.cellIndex) }));
      rows.sort((one, other) => {
        const found = compare(one.value, other.value);
        return found.blanks || sign * found.order || one.place - other.place;  // empty cells stay last
      });
      table.tBodies[0].append(...rows.map((one) => one.row));
      for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
      header.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      said.textContent = `Sorted by ${header.textContent}, ${header.getAttribute("aria-sort")}.`;
    });
  }

  // ---- commands --------------------------------------------------------------------------------------------------
  async function copy(code) {
    try {
      await navigator.clipboard.writeText(code.textContent);
      return true;
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      return document.execCommand("copy");
    }
  }
  for (const one of document.querySelectorAll(".copy")) {
    one.hidden = false;
    one.addEventListener("click", async () => {
      const done = await copy(one.previousElementSibling);
      one.textContent = done ? "Copied" : "Selected";
      said.textContent = done ? "Copied." : "Selected, copy with the keyboard.";
      setTimeout(() => { one.textContent = "Copy"; }, 2000);
    });
  }

  // ---- print: light, every table open, figures as wide as paper -------------------------------------------------------
  let opened = [];
  window.addEventListener("beforeprint", () => {
    printing = true;
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const one of opened) one.open = true;
    for (const plot of plots) plot.style.width = "680px";
    drawAll();
    for (const plot of plots) Plotly.Plots.resize(plot);
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    for (const one of opened) one.open = false;
    for (const plot of plots) plot.style.width = "";
    drawAll();
    for (const plot of plots) Plotly.Plots.resize(plot);
  });

  drawAll().then(() => { root.dataset.ready = "yes"; });

  // ---- served with --watch -------------------------------------------------------------------------------------------
  const version = document.querySelector('meta[name="report-version"]');
  if (version) {
    setInterval(async () => {
      try {
        const answer = await fetch("version", { cache: "no-store" });
        if (answer.ok && (await answer.text()) !== version.content) location.reload();
      } catch { /* the server has ended; the page stays as it is */ }
    }, 2000);
  }
})();
