"use strict";
// The page reads its data from the document alone. `issues` and `clips` are tables by column; `issues.clip` is an index
// into `clips`, and labels are indices into `classes`.
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, clips, issues } = data;
const ROW_HEIGHT = 72, EXTRA_ROWS = 6, STORAGE_KEY = "distav-audit-" + data.digest;
const KEYS = [["J / ↓", "next"], ["K / ↑", "previous"], ["A", "accept the proposed change or removal"],
  ["R", "reject it and keep the given label, pair or clip"],
  ["C", "choose another label"], ["U", "undo the last decision"], ["Space", "play the audio"], ["S", "save decisions"],
  ["1 … 6", "labels, pairs, duplicates, leaks, off-topic, silent or black"], ["0", "overview"]];
const VIEWS = ["label", "pair", "duplicate", "leak", "off_topic", "media"];
const $ = (selector) => document.querySelector(selector);
const undoStack = [];
let view = "label", shown = [], selected = -1, decisions = {};

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function decisionKey(issue) { return issues.kind[issue] + " " + clips.key[issues.clip[issue]]; }

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
    const kind = VIEWS[index], total = data.totals[kind] ?? 0;
    span.textContent = listed[kind] < total ? `${listed[kind]} of ${total}` : total;
  });
  const count = Object.keys(decisions).length;
  $("#decided").textContent = count ? `${count} decided` : "no decisions";
}

function applyFilters() {
  const form = $("#filters").elements, text = form.text.value.toLowerCase();
  shown = [];
  for (let issue = 0; issue < issues.clip.length; issue++) {
    const clip = issues.clip[issue];
    if (issues.kind[issue] === view
      && (form.given.value === "" || clips.given_label[clip] === +form.given.value)
      && (form.proposed.value === "" || clips.knn_label[clip] === +form.proposed.value)
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
  const kind = issues.kind[issue], title = kind === "label"
    ? [make("span", { className: "given", textContent: classes[clips.given_label[clip]] }), " → ",
      make("span", { className: "proposed", textContent: classes[clips.knn_label[clip]] })]
    : kind === "pair" ? [make("span", { textContent: classes[clips.knn_label[clip]] }), " with mismatched audio?"]
    : [make("span", { className: "given", textContent: classes[clips.given_label[clip]] })];
  const node = make("div", { className: "row" + (index === selected ? " selected" : ""), role: "option" },
    makeStrip(clip, ""),
    make("div", {}, make("p", {}, ...title), make("p", { className: "dim", textContent: issues.note[issue] || clips.source[clip] })),
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

// Labels and pairs have probabilities, duplicates and leaks similarities, and the other lists have a rank alone.
function scoreText(issue) {
  const kind = issues.kind[issue], score = issues.score[issue];
  return kind === "media" ? "" : kind === "label" || kind === "pair" ? percent(score) : score.toFixed(3);
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
  const issue = shown[selected], clip = issues.clip[issue], match = issues.match[issue];
  const [question, explanation] = describeIssue(issue);
  const facts = `${explanation} ${clips.key[clip]}, ${clips.source[clip]} from ${clips.start_s[clip]} s`;
  pane.replaceChildren(
    makeStrip(clip, "four frames of the clip"), makeAudio(clip),
    make("p", { className: "question" }, ...question), make("p", { className: "dim", textContent: facts }),
    makeChoices(issue), ...(match < 0 ? [] : makeMatch(match)),
    ...(clips.has_frames[clip] ? makeNeighbors("Most similar video", issues.visual[issue], clip, false) : []),
    ...(clips.has_audio[clip] ? makeNeighbors("Most similar audio", issues.audio[issue], clip, true) : []));
}

// The question that a decision answers, as nodes, and an explanation of the score.
function describeIssue(issue) {
  const clip = issues.clip[issue], given = classes[clips.given_label[clip]], proposed = classes[clips.knn_label[clip]];
  const probability = percent(issues.score[issue]), label = make("b", { className: "given", textContent: given });
  switch (issues.kind[issue]) {
    case "label":
      return [["Given ", label, ", proposed ", make("b", { className: "proposed", textContent: proposed })],
        `Probability that the given label is wrong, by held-out k-NN votes: ${probability}. The run's label: ${classes[clips.corrected_label[clip]]}.`];
    case "pair":
      return [["Does the audio belong to this ", make("b", { textContent: proposed }), "?"],
        `Probability that audio and video are mismatched: ${probability}. Given label: ${given}.`];
    case "off_topic":
      return [["Is this ", label, ", or does it belong to none of the classes?"],
        `Far from all other clips in each modality, with a label that its neighbors do not support. Score: ${scoreText(issue)}.`];
    case "media":
      return [["Remove this clip? ", make("b", { textContent: issues.note[issue] })], `Given label: ${given}.`];
    default:
      return [["Remove this clip? ", make("b", { textContent: issues.note[issue] })],
        `Given label: ${given}. Similarity: ${scoreText(issue)}.`];
  }
}

function makeChoices(issue) {
  const decision = decisionOf(issue), kind = issues.kind[issue], isLabel = kind === "label";
  const [accept, reject] = { label: ["Accept", "Keep given"], pair: ["Mismatched", "Matched"] }[kind] ?? ["Remove", "Keep"];
  const pick = make("select", { id: "pick" }, make("option", { value: "", textContent: "another label …" }),
    ...classes.map((name, index) => make("option", { value: index, textContent: name })));
  if (Number.isInteger(decision)) pick.value = decision;
  pick.onchange = () => { if (pick.value !== "") decide(+pick.value); };
  const button = (text, key, value) => {
    const node = make("button", { onclick: () => decide(value) }, text + " ", make("kbd", { textContent: key }));
    node.setAttribute("aria-pressed", decision === value);
    return node;
  };
  return make("div", { className: "choices" }, button(accept, "A", "accepted"), button(reject, "R", "rejected"),
    ...(isLabel ? [pick] : []), make("button", { onclick: undo, disabled: !undoStack.length }, "Undo ", make("kbd", { textContent: "U" })));
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

function drawOverview() {
  const facts = makeTable([...data.facts, ["label noise rate", formatRate(data.rates.labels)],
    ["pair mismatch rate", formatRate(data.rates.pairs)]], { className: "facts" });
  const width = (fraction) => `${100 * fraction}%`;
  const rows = classes.map((name, index) => {
    const rate = data.rates.classes[name], bar = make("div", { className: "bar" });
    if (rate) {
      bar.append(make("b"), make("s"));
      bar.firstChild.style.width = width(rate.estimate);
      Object.assign(bar.lastChild.style, { left: width(rate.ci95_low), width: width(rate.ci95_high - rate.ci95_low) });
    }
    return make("tr", {}, make("td", { textContent: name }), make("td", { textContent: data.counts.given[index] }),
      make("td", { textContent: data.counts.corrected[index] }), make("td", { textContent: formatRate(rate) }), make("td", {}, bar));
  });
  const head = ["class", "given labels", "corrected labels", "label noise rate of the class", ""].map((name) => make("th", { textContent: name }));
  $("#overview").append(make("h2", { textContent: "Dataset" }), facts, make("h2", { textContent: "Classes" }),
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
    make("h2", { textContent: "Given labels (rows) and corrected labels (columns)" }), makeConfusion());
}

function makeConfusion() {
  if (classes.length > 60) {
    const pairs = data.confusion.flatMap((row, given) => row.map((count, corrected) => [count, given, corrected]));
    const changes = pairs.filter(([count, given, corrected]) => count && given !== corrected).sort((a, b) => b[0] - a[0]);
    return makeTable(changes.slice(0, 100).map(([count, given, corrected]) => [`${classes[given]} → ${classes[corrected]}`, count]));
  }
  const body = data.confusion.map((row, given) => {
    const total = row.reduce((sum, count) => sum + count, 0) || 1;
    return make("tr", {}, make("th", { textContent: classes[given] }), ...row.map((count, corrected) => {
      const cell = make("td", { textContent: count || "", title: `${classes[given]} → ${classes[corrected]}: ${count}` });
      cell.style.background = `color-mix(in srgb, var(${given === corrected ? "--green" : "--red"}) ${Math.round(70 * Math.sqrt(count / total))}%, transparent)`;
      return cell;
    }));
  });
  const head = make("tr", {}, make("td"), ...classes.map((name) => make("th", { textContent: name })));
  return make("table", { className: "confusion" }, make("thead", {}, head), make("tbody", {}, ...body));
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
  showView(view === "overview" ? "label" : view);
  $("#decided").textContent = `${summary} from ${file.name}`;
}

const ACTIONS = { j: () => select(selected + 1), arrowdown: () => select(selected + 1), k: () => select(selected - 1), arrowup: () => select(selected - 1),
  a: () => decide("accepted"), r: () => decide("rejected"), u: undo, c: () => { const pick = $("#pick"); pick?.focus(); pick?.showPicker?.(); }, s: saveDecisions,
  " ": () => { const audio = $("#audio"); if (audio) audio.paused ? audio.play() : audio.pause(); },
  ...Object.fromEntries(VIEWS.map((name, index) => [index + 1, () => showView(name)])), 0: () => showView("overview"), "?": () => $("#keys").showModal() };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#keys").open || event.target.matches("input, select")) return;
  const action = ACTIONS[event.key.toLowerCase()];
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
for (const name of ["given", "proposed"]) {
  $(`#filters [name=${name}]`).append(make("option", { value: "", textContent: "any" }), ...classes.map((label, index) => make("option", { value: index, textContent: label })));
}
$("#keys").append(make("table", {}, ...KEYS.map(([key, effect]) => make("tr", {}, make("td", {}, make("kbd", { textContent: key })), make("td", { textContent: effect })))),
  make("form", { method: "dialog" }, make("button", { textContent: "Close" })));
updateCounts();
drawOverview();
showView("label");
