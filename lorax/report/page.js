// What a page does. Without this it has its tables, links and the numbers of its charts.

const every = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, text, properties = {}) =>
  Object.assign(document.createElement(tag), {textContent: text, ...properties});

// ------------------------------------------------------------------------- contents, light and dark

const links = new Map(every("nav a").map((link) => [link.hash.slice(1), link]));
const headings = every("h2");
function mark() {
  const passed = headings.filter((heading) => heading.getBoundingClientRect().top < innerHeight / 3);
  const current = links.get((passed.at(-1) ?? headings[0])?.id);
  if (!current || current.ariaCurrent) return;
  for (const link of links.values()) link.removeAttribute("aria-current");
  current.ariaCurrent = "true";
  const list = current.closest("ul");
  list.scrollLeft = current.offsetLeft - list.clientWidth / 3;
}
addEventListener("scroll", () => requestAnimationFrame(mark), {passive: true});
mark();

const scheme = document.querySelector(".scheme");
const root = document.documentElement;
const isDark = () => root.style.colorScheme
  ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
const call = () => { scheme.textContent = isDark() ? "Light" : "Dark"; };
scheme.hidden = false;
scheme.addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  call();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", call);
call();

// -------------------------------------------------------------------------------- commands to copy

for (const command of every(".command")) {
  const button = make("button", "Copy", {type: "button", className: "copy"});
  const text = command.textContent;
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // not allowed: select it
      getSelection().selectAllChildren(command.querySelector("code"));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  command.append(button);
}

// ---------------------------------------------------------------------------------- tables: folding

const FEW = 12;  // rows of a long table that are shown at first
const unfolded = new Set();
function fold(table) {
  const more = table.parentElement.nextElementSibling;
  if (!more?.matches(".more")) return;  // it is short
  const shown = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  shown.forEach((row, n) => row.classList.toggle("folded", n >= FEW && !unfolded.has(table)));
  more.hidden = shown.length <= FEW;
  more.textContent = unfolded.has(table) ? `Show the first ${FEW} rows` : `Show all ${shown.length} rows`;
  more.ariaExpanded = unfolded.has(table);
}
for (const table of every("table")) {
  if (table.tBodies[0].rows.length <= FEW * 1.5) continue;
  const more = make("button", "", {type: "button", className: "more"});
  more.addEventListener("click", () => {
    unfolded.has(table) ? unfolded.delete(table) : unfolded.add(table);
    fold(table);
  });
  table.parentElement.after(more);
  fold(table);
}

// Sort a table by the column whose header is clicked; numbers by value, missing ones last.
for (const button of every("table.sortable th button")) {
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
    fold(table);
  });
}

// ------------------------------------------------------------------------------------------ charts

const page = JSON.parse(document.getElementById("charts").textContent);
const charts = every("[data-chart]");
const drawn = new Map();  // the view of every chart that is drawn, by its element
let hidden = [];  // numbers of the members that are filtered out
const tip = make("div", "", {className: "tip", hidden: true});
document.body.append(tip);

// The values of a mark under the pointer, beside it.
function tell(handler, event, item, values) {
  tip.hidden = values === null || values === undefined || values === "";
  if (tip.hidden) return;
  const list = document.createElement("dl");
  const pairs = typeof values === "object" ? Object.entries(values) : [["", values]];
  for (const [name, value] of pairs) list.append(make("dt", name), make("dd", value));
  tip.replaceChildren(list);
  const room = root.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${scrollX + Math.max(8, Math.min(event.clientX + 14, room))}px`;
  tip.style.top = `${scrollY + event.clientY + 14}px`;
}

// A table as Vega takes it: a row is an object.
const rows = ({names, rows}) => rows.map(
  (row) => Object.fromEntries(names.map((name, n) => [name, row[n]])));

// A chart, or the panels of one, as wide as there is room. PANEL is the least width of a panel with
// its axis, where the panels of a row may be fewer.
const {spacing, axis, header} = page.pixels, PANEL = 190;
function fit(chart, room) {
  for (const part of chart.vconcat ?? []) fit(part, room);
  if (chart.hconcat) {
    chart.concat = chart.hconcat;
    chart.columns = chart.concat.length;
    delete chart.hconcat;
  }
  const each = (columns, beside) => Math.floor((room - beside - spacing * (columns - 1)) / columns);
  if (chart.width === "container") {
    chart.width = room;
    chart.autosize = {type: "fit-x", contains: "padding"};
  } else if (chart.concat) {  // every panel has its axis
    chart.columns = Math.max(1, Math.min(chart.columns, Math.floor(room / PANEL)));
    const width = each(chart.columns, axis * chart.columns);
    chart.concat = chart.concat.map((panel) => ({...panel, width}));
  } else if (chart.columns) {
    chart.columns = Math.max(1, Math.min(chart.columns, Math.floor(room / PANEL)));
    const axes = chart.resolve?.scale?.y === "independent" ? chart.columns : 1;
    chart.spec = {...chart.spec, width: each(chart.columns, axis * axes)};
  } else if (chart.usermeta?.columns) {
    chart.spec = {...chart.spec, width: Math.max(60, each(chart.usermeta.columns, axis + header))};
  }
}

// Vega-Lite says so wherever the rows of a chart give its height, though only its width is to fit.
const warn = console.warn;
console.warn = (...said) => { if (!said.join(" ").includes('Dropping "fit-y"')) warn(...said); };

// Pixels beside the margins; a folded chart has none of its own yet.
const roomOf = (element) =>
  element.clientWidth || document.querySelector("main section").clientWidth;

async function draw(element) {
  drawn.set(element, drawn.get(element) ?? null);  // only a change of width draws it again
  const {tables, ...chart} = structuredClone(page.charts[element.dataset.chart]);
  const room = roomOf(element);
  const legend = {...page.config.legend, columns: room < 500 ? 2 : 4};
  const view = {...page.config.view};
  // Else Vega takes a chart whose axis has names for one of a fixed width, and warns.
  if (page.charts[element.dataset.chart].width === "container") view.discreteWidth = room;
  fit(chart, room);
  chart.datasets = Object.fromEntries(tables.map((name) => [name, rows(page.datasets[name])]));
  if (follows(element)) {
    chart.params = chart.params.map((p) => p.name === "hidden" ? {...p, value: hidden} : p);
  }
  const place = document.createElement("div");
  const {view: made} = await vegaEmbed(place, chart, {
    mode: "vega-lite", renderer: "svg", actions: false, tooltip: tell, logLevel: 1,  // errors
    config: {...page.config, legend, view}});
  if (room !== roomOf(element)) {  // it has changed meanwhile
    made.finalize();
    return draw(element);
  }
  drawn.get(element)?.finalize();
  drawn.set(element, made);
  place.querySelector("svg").ariaHidden = "true";  // the element around it says what it shows
  element.replaceChildren(place);
}
const follows = (element) =>
  page.charts[element.dataset.chart].params?.some(({name}) => name === "hidden");

// First the charts that are on the screen or close to it, then the others, so that they are there
// when the page is printed.
for (const element of charts) if (follows(element)) element.closest("figure").classList.add("follows");
const seen = new IntersectionObserver((entries) => {
  for (const {target, isIntersecting} of entries) {
    if (isIntersecting && !drawn.has(target)) draw(target);
  }
}, {rootMargin: "600px"});
for (const element of charts) seen.observe(element);
const idle = (work) => window.requestIdleCallback?.(work, {timeout: 300}) ?? setTimeout(work, 200);
idle(async function rest() {
  const next = charts.find((element) => !drawn.has(element));
  if (next) { await draw(next); idle(rest); }
});
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width || matchMedia("print").matches) return;
  width = innerWidth;
  for (const element of drawn.keys()) draw(element);
});

// ------------------------------------------------------------------------------------ the members

const form = document.querySelector(".filter"), said = document.querySelector(".filtered");
function filter() {
  const chosen = new Map();  // the values of every axis of which some are chosen
  for (const {name, value} of every("input:checked", form)) {
    chosen.set(name, (chosen.get(name) ?? new Set()).add(value));
  }
  const limits = every("input[type=number]", form).filter((input) => input.value !== "");
  const table = document.querySelector("table.members");
  const members = [...table.tBodies[0].rows];
  for (const row of members) {
    const values = JSON.parse(row.dataset.axes);
    const within = ({name, value, dataset}) => values[name] !== "" && (
      dataset.end === "low" ? values[name] >= Number(value) : values[name] <= Number(value));
    row.hidden = ![...chosen].every(([name, some]) => some.has(String(values[name])))
      || !limits.every(within);
  }
  hidden = members.filter((row) => row.hidden).map((row) => Number(row.dataset.member));
  fold(table);
  const all = members.length, shown = all - hidden.length;
  const count = hidden.length ? `${shown} of ${all} members are shown` : `All ${all} members are shown`;
  form.querySelector("output").textContent = count;
  said.hidden = !hidden.length;
  said.replaceChildren(count, make("button", "Show all", {type: "button", onclick: () => form.reset()}));
  for (const [element, view] of drawn) {
    if (view && follows(element)) view.signal("hidden", hidden).runAsync();
  }
}
if (form) {
  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
}

// ----------------------------------------------------------------------------------------- printing

const paper = matchMedia("print");
let opened = [];
const open = () => {
  for (const part of every("details:not([open])")) { part.open = true; opened.push(part); }
};
const close = () => { for (const part of opened) part.open = false; opened = []; };
paper.addEventListener("change", () => paper.matches ? open() : close());
addEventListener("beforeprint", open);
addEventListener("afterprint", close);
