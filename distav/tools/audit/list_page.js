"use strict";
// Issues of clips with several labels: classes whose label is missing or wrong.
const KEYS = [["J / ↓", "next"], ["K / ↑", "previous"], ["A", "accept: add the missing or remove the wrong label"],
  ["R", "reject: keep the given list"], ["U", "undo the last decision"], ["Space", "play the audio"],
  ["S", "save decisions"], ["1, 2", "missing labels, wrong labels"], ["0", "overview"]];
const VIEWS = ["missing", "wrong"];

function decisionKey(issue) { return clips.key[issues.clip[issue]] + " " + classes[issues.class[issue]]; }

function listNames(labels, separator = ", ") { return labels.map((label) => classes[label]).join(separator); }

function matchesFilters(issue, form) {
  return form.class.value === "" || issues.class[issue] === +form.class.value;
}

function rowTitle(issue) {
  const isMissing = issues.kind[issue] === "missing";
  return [isMissing ? "+ " : "− ", make("span", { className: isMissing ? "proposed" : "given", textContent: classes[issues.class[issue]] })];
}

function rowText(issue) { return `given: ${listNames(clips.given[issues.clip[issue]]) || "no labels"}`; }

function scoreText(issue) { return percent(issues.score[issue]); }

function describeIssue(issue) {
  const clip = issues.clip[issue], name = classes[issues.class[issue]], isMissing = issues.kind[issue] === "missing";
  const label = make("b", { className: isMissing ? "proposed" : "given", textContent: name });
  const question = isMissing ? ["Is ", label, " missing from the labels?"] : ["Is the label ", label, " wrong?"];
  return [question, `Probability, by held-out k-NN votes and the given labels: ${scoreText(issue)}. `
    + `Given labels: ${listNames(clips.given[clip]) || "none"}. The run's labels: ${listNames(clips.corrected[clip]) || "none"}.`];
}

function makeChoices(issue) {
  const accept = issues.kind[issue] === "missing" ? "Add" : "Remove";
  return make("div", { className: "choices" }, makeDecision(accept, "A", "accepted", issue),
    makeDecision("Keep given", "R", "rejected", issue), makeUndo());
}

function makeComparisons(issue) {
  const clip = issues.clip[issue];
  return [...(clips.has_frames[clip] ? makeNeighbors("Most similar video", issues.visual[issue], issue, false) : []),
    ...(clips.has_audio[clip] ? makeNeighbors("Most similar audio", issues.audio[issue], issue, true) : [])];
}

// The given labels of a neighbor, and whether the class of the issue is one of them.
function describeNeighbor(neighbor, issue) {
  const has = clips.given[neighbor].includes(issues.class[issue]);
  return [listNames(clips.given[neighbor]) || "no labels", has ? "proposed" : "given"];
}

function drawOverview() {
  const rateRows = VIEWS.map((kind) => [`${kind} label rate`, formatRate(data.rates[kind].overall)]);
  const facts = makeTable([...data.facts, ...rateRows], { className: "facts" });
  const rows = classes.map((name, index) => [name, data.counts.given[index], data.counts.corrected[index],
    ...VIEWS.map((kind) => formatRate(data.rates[kind].classes[name]))]);
  const head = ["class", "given labels", "corrected labels", "missing label rate", "wrong label rate"];
  const table = makeTable(rows);
  table.prepend(make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { textContent: text })))));
  $("#overview").append(make("h2", { textContent: "Dataset" }), facts, make("h2", { textContent: "Classes" }), table);
}

fillFilter("class");
start();
