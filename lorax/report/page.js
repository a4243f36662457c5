// Sort a table by the column whose header is clicked; numbers by value, missing ones last.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th"), table = header.closest("table");
    const column = header.cellIndex, body = table.tBodies[0];
    const falling = header.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const rows = [...body.rows].sort((one, other) => {
      const x = key(one), y = key(other);
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
      return falling ? -order : order;
    });
    body.append(...rows);
  });
}
// Print folded parts too.
const folded = () => document.querySelectorAll("details:not([open])");
const paper = matchMedia("print");
let unfolded = [];
const unfold = () => { for (const part of folded()) { part.open = true; unfolded.push(part); } };
const refold = () => { for (const part of unfolded) part.open = false; unfolded = []; };
paper.addEventListener("change", () => paper.matches ? unfold() : refold());
addEventListener("beforeprint", unfold);
addEventListener("afterprint", refold);

// ------------------------------------------------------------------------------------------ charts

const page = JSON.parse(document.getElementById("charts").textContent);
const drawn = new Map();  // the view of every chart that is drawn, by its element
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);

// The values of a mark under the pointer, beside it.
function tell(handler, event, item, values) {
  tip.hidden = values === null || values === undefined || values === "";
  if (tip.hidden) return;
  const list = document.createElement("dl");
  const pairs = typeof values === "object" ? Object.entries(values) : [["", values]];
  for (const [name, value] of pairs) {
    const term = document.createElement("dt"), text = document.createElement("dd");
    term.textContent = name;
    text.textContent = value;
    list.append(term, text);
  }
  tip.replaceChildren(list);
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(event.clientX + 14, room))}px`;
  tip.style.top = `${scrollY + event.clientY + 14}px`;
}

// A table as Vega takes it: a row is an object.
const rows = ({names, rows}) => rows.map(
  (row) => Object.fromEntries(names.map((name, n) => [name, row[n]])));

// A chart, or the panels of one, as wide as there is room. Pixels are those of style.py; PANEL is
// the least width of a panel with its axis, where the panels of a row may be fewer.
const SPACING = 20, AXIS = 80, HEADER = 60, PANEL = 190;
function fit(chart, room) {
  if (chart.hconcat) {
    chart.concat = chart.hconcat;
    chart.columns = chart.concat.length;
    delete chart.hconcat;
  }
  const each = (columns, beside) => Math.floor((room - beside - SPACING * (columns - 1)) / columns);
  if (chart.width === "container") {
    chart.width = room;
    chart.autosize = {type: "fit-x", contains: "padding"};
  } else if (chart.concat) {  // every panel has its axis
    chart.columns = Math.max(1, Math.min(chart.columns, Math.floor(room / PANEL)));
    const width = each(chart.columns, AXIS * chart.columns);
    chart.concat = chart.concat.map((panel) => ({...panel, width}));
  } else if (chart.columns) {
    chart.columns = Math.max(1, Math.min(chart.columns, Math.floor(room / PANEL)));
    chart.spec = {...chart.spec, width: each(chart.columns, AXIS)};
  } else if (chart.usermeta?.columns) {
    chart.spec = {...chart.spec, width: Math.max(60, each(chart.usermeta.columns, AXIS + HEADER))};
  }
}

async function draw(element) {
  drawn.set(element, drawn.get(element) ?? null);  // nothing else begins to draw it
  const {tables, ...chart} = page.charts[element.dataset.chart];
  const room = element.clientWidth || document.querySelector("main").clientWidth;
  const legend = {...page.config.legend, columns: room < 500 ? 2 : 4};
  fit(chart, room);
  chart.datasets = Object.fromEntries(tables.map((name) => [name, rows(page.datasets[name])]));
  const place = document.createElement("div");
  const {view} = await vegaEmbed(place, chart, {
    mode: "vega-lite", renderer: "svg", actions: false, tooltip: tell, logLevel: 1,  // errors
    config: {...page.config, legend}});
  drawn.get(element)?.finalize();
  drawn.set(element, view);
  element.replaceChildren(place);
}

// First the charts that are on the screen or close to it, then the others, so that they are there
// when the page is printed.
const charts = [...document.querySelectorAll("[data-chart]")];
const seen = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}, {rootMargin: "600px"});
for (const element of charts) seen.observe(element);
const idle = window.requestIdleCallback ?? ((call) => setTimeout(call, 200));
idle(async function rest() {
  const next = charts.find((element) => !drawn.has(element));
  if (next) { await draw(next); idle(rest); }
});
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  for (const element of drawn.keys()) draw(element);
});
