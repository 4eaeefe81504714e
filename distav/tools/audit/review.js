"use strict";
// The list of issues, the detail of the selected one, and the decisions. page.js and decisions.js define issues and
// decisions of clips with one label, list_page.js and list_decisions.js those of label lists. The page reads its data
// from the document alone. `issues` and `clips` are tables by column; `issues.clip` is an index into `clips`, and labels
// are indices into `classes`.
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, clips, issues } = data;
const ROW_HEIGHT = 72, EXTRA_ROWS = 6, STORAGE_KEY = "distav-audit-" + data.digest;
const $ = (selector) => document.querySelector(selector);
const undoStack = [];
let view = "", shown = [], selected = -1, decisions = {};

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// A decision is "accepted", "rejected" or the index of another class.
function decisionOf(issue) { return decisions[decisionKey(issue)]; }

function stateOf(issue) {
  const decision = decisionOf(issue);
  return decision === undefined ? "open" : decision === "rejected" ? "rejected" : "accepted";
}

function setDecision(issue, decision) {
  const key = decisionKey(issue);
  if (decision === undefined) delete decisions[key]; else decisions[key] = decision;
  storeDecisions();
  updateCounts();
}

function storeDecisions() {
  try { localStorage.setItem(STORAGE_KEY, JSON.stringify(decisions)); } catch { /* without storage, CSV can still be saved */ }
}

function updateCounts() {
  const listed = Object.fromEntries(VIEWS.map((kind) => [kind, 0]));
  issues.kind.forEach((kind) => listed[kind]++);
  document.querySelectorAll("nav span").forEach((span, index) => {
    const kind = VIEWS[index], total = data.totals[kind];
    span.textContent = total === null ? "–" : listed[kind] < total ? `${listed[kind]} of ${total}` : total ?? 0;
  });
  const count = Object.keys(decisions).length;
  $("#decided").textContent = count ? `${count} decided` : "no decisions";
}

function applyFilters() {
  const form = $("#filters").elements, text = form.text.value.toLowerCase();
  shown = [];
  for (let issue = 0; issue < issues.clip.length; issue++) {
    const clip = issues.clip[issue];
    if (issues.kind[issue] === view && matchesFilters(issue, form)
      && issues.score[issue] >= +form.low.value && issues.score[issue] <= +(form.high.value || 1)
      && (form.state.value === "" || form.state.value === stateOf(issue))
      && (!text || (clips.key[clip] + " " + clips.source[clip]).toLowerCase().includes(text))) shown.push(issue);
  }
  $("#shown").textContent = `${shown.length} shown`;
  $("#rows").style.height = shown.length * ROW_HEIGHT + "px";
}

function drawRows() {
  const list = $("#list"), first = Math.max(0, Math.floor(list.scrollTop / ROW_HEIGHT) - EXTRA_ROWS);
  const end = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW_HEIGHT) + EXTRA_ROWS);
  const rows = [];
  for (let index = first; index < end; index++) rows.push(makeRow(index));
  $("#rows").replaceChildren(...rows);
}

function makeRow(index) {
  const issue = shown[index], clip = issues.clip[issue], state = stateOf(issue);
  const node = make("div", { className: "row" + (index === selected ? " selected" : ""), role: "option" },
    makeStrip(clip, ""),
    make("div", {}, make("p", {}, ...rowTitle(issue)), make("p", { className: "dim", textContent: rowText(issue) })),
    make("span", { className: "mark " + state, textContent: state === "open" ? scoreText(issue) : state }));
  node.style.top = index * ROW_HEIGHT + "px";
  node.dataset.index = index;
  node.setAttribute("aria-selected", index === selected);
  return node;
}

function percent(fraction) {
  const value = 100 * fraction;
  return (value > 99.95 && value < 100 ? ">99.9" : value.toFixed(1)) + " %";
}

function select(index) {
  selected = Math.max(shown.length ? 0 : -1, Math.min(shown.length - 1, index));
  const list = $("#list"), top = selected * ROW_HEIGHT;
  if (selected >= 0 && top < list.scrollTop) list.scrollTop = top;
  if (selected >= 0 && top + ROW_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW_HEIGHT - list.clientHeight;
  drawRows();
  drawDetail();
}

function emptyText() {
  return data.totals[view] ? "Nothing to show: no issue matches the filters." : data.no_issues[view];
}

function drawDetail() {
  const pane = $("#detail");
  if (selected < 0) return pane.replaceChildren(make("p", { className: "dim", textContent: emptyText() }));
  const issue = shown[selected], clip = issues.clip[issue];
  const [question, explanation] = describeIssue(issue);
  const facts = `${explanation} ${clips.key[clip]}, ${clips.source[clip]} from ${clips.start_s[clip]} s`;
  pane.replaceChildren(
    makeStrip(clip, "four frames of the clip"), makeAudio(clip),
    make("p", { className: "question" }, ...question), make("p", { className: "dim", textContent: facts }),
    makeChoices(issue), ...makeComparisons(issue));
}

// The button of a decision.
function makeDecision(text, key, value, issue) {
  const node = make("button", { onclick: () => decide(value) }, text + " ", make("kbd", { textContent: key }));
  node.setAttribute("aria-pressed", decisionOf(issue) === value);
  return node;
}

function makeUndo() {
  return make("button", { onclick: undo, disabled: !undoStack.length }, "Undo ", make("kbd", { textContent: "U" }));
}

function decide(decision) {
  if (selected < 0) return;
  const before = shown.length, issue = shown[selected];
  undoStack.push([issue, decisionOf(issue)]);
  setDecision(issue, decision);
  applyFilters();
  select(shown.length < before ? selected : selected + 1);
}

function undo() {
  if (!undoStack.length) return;
  const [issue, decision] = undoStack.pop();
  setDecision(issue, decision);
  showView(issues.kind[issue]);
  select(shown.indexOf(issue));
}

function showView(name) {
  view = name;
  document.querySelectorAll("nav button").forEach((button) => button.setAttribute("aria-selected", button.dataset.view === name));
  $("#review").hidden = name === "overview";
  $("#overview").hidden = name !== "overview";
  if (name !== "overview") resetList();
}

function resetList() {
  applyFilters();
  $("#list").scrollTop = 0;
  select(0);
}

function makeTable(rows, properties = {}) {
  return make("table", properties, ...rows.map((cells) => make("tr", {}, ...cells.map((text) => make("td", { textContent: text })))));
}

function formatRate(rate) {
  return rate ? `${percent(rate.estimate)} (95 % interval ${percent(rate.ci95_low)} to ${percent(rate.ci95_high)})` : "unknown";
}

// Offer all classes in a filter.
function fillFilter(name) {
  $(`#filters [name=${name}]`).append(make("option", { value: "", textContent: "any" }), ...classes.map((label, index) => make("option", { value: index, textContent: label })));
}

function saveDecisions() {
  const link = make("a", { href: URL.createObjectURL(new Blob([decisionsToCsv()], { type: "text/csv" })), download: "decisions.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function loadDecisions(file) {
  const summary = applyRows(parseCsv(await file.text()));
  storeDecisions();
  updateCounts();
  showView(view === "overview" ? VIEWS[0] : view);
  $("#decided").textContent = `${summary} from ${file.name}`;
}

function formatCsv(columns, rows) {
  const quote = (value = "") => /[",\r\n]|^\s|\s$/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value;
  const lines = [columns, ...rows.map((row) => columns.map((name) => quote(row[name])))];
  return lines.map((line) => line.join(",") + "\n").join("");
}

function parseCsv(text) {
  const lines = [[]];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r?\n|$)/g)) {
    lines.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end === "") break;
    if (end !== ",") lines.push([]);
  }
  const [head, ...body] = lines.filter((line) => line.length > 1);
  return body.map((line) => Object.fromEntries(head.map((name, column) => [name, line[column]])));
}

function actions() {
  return { j: () => select(selected + 1), arrowdown: () => select(selected + 1), k: () => select(selected - 1), arrowup: () => select(selected - 1),
  a: () => decide("accepted"), r: () => decide("rejected"), u: undo, c: () => { const pick = $("#pick"); pick?.focus(); pick?.showPicker?.(); }, s: saveDecisions,
  " ": () => { const audio = $("#audio"); if (audio) audio.paused ? audio.play() : audio.pause(); },
  ...Object.fromEntries(VIEWS.map((name, index) => [index + 1, () => showView(name)])), 0: () => showView("overview"), "?": () => $("#keys").showModal() };
}

// Show the page; called at the end of the script that defines the issues.
function start() {
  const pageActions = actions();
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("#keys").open || event.target.matches("input, select")) return;
    const action = pageActions[event.key.toLowerCase()];
    if (!action || (event.key === " " && event.target.matches("button, audio"))) return;
    event.preventDefault();
    action();
  });
  document.querySelectorAll("nav button").forEach((button) => { button.onclick = () => showView(button.dataset.view); });
  $("#list").addEventListener("scroll", () => requestAnimationFrame(drawRows), { passive: true });
  $("#rows").onclick = (event) => { const row = event.target.closest(".row"); if (row) select(+row.dataset.index); };
  $("#filters").oninput = resetList;
  $("#filters").onsubmit = (event) => event.preventDefault();
  $("#save").onclick = saveDecisions;
  $("#load").onchange = (event) => { if (event.target.files[0]) loadDecisions(event.target.files[0]); event.target.value = ""; };
  $("#help").onclick = () => $("#keys").showModal();
  addEventListener("resize", drawRows);

  try { decisions = JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? {}; } catch { /* no stored decisions */ }
  document.title = $("h1").textContent = data.title;
  $("#keys").append(make("table", {}, ...KEYS.map(([key, effect]) => make("tr", {}, make("td", {}, make("kbd", { textContent: key })), make("td", { textContent: effect })))),
    make("form", { method: "dialog" }, make("button", { textContent: "Close" })));
  updateCounts();
  drawOverview();
  showView(VIEWS[0]);
}
