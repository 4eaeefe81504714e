"use strict";
// Issues of clips with one label: wrong labels, mismatched pairs, and clips to remove.
const KEYS = [["J / ↓", "next"], ["K / ↑", "previous"], ["A", "accept the proposed change or removal"],
  ["R", "reject it and keep the given label, pair or clip"],
  ["C", "choose another label"], ["U", "undo the last decision"], ["Space", "play the audio"], ["S", "save decisions"],
  ["1 … 6", "labels, pairs, duplicates, leaks, off-topic, silent or black"], ["0", "overview"]];
const VIEWS = ["label", "pair", "duplicate", "leak", "off_topic", "media"];

function decisionKey(issue) { return issues.kind[issue] + " " + clips.key[issues.clip[issue]]; }

function matchesFilters(issue, form) {
  const clip = issues.clip[issue];
  return (form.given.value === "" || clips.given_label[clip] === +form.given.value)
    && (form.proposed.value === "" || clips.knn_label[clip] === +form.proposed.value);
}

function rowTitle(issue) {
  const kind = issues.kind[issue], clip = issues.clip[issue];
  const given = make("span", { className: "given", textContent: classes[clips.given_label[clip]] });
  if (kind === "label") return [given, " → ", make("span", { className: "proposed", textContent: classes[clips.knn_label[clip]] })];
  if (kind === "pair") return [make("span", { textContent: classes[clips.knn_label[clip]] }), " with mismatched audio?"];
  return [given];
}

function rowText(issue) { return issues.note[issue] || clips.source[issues.clip[issue]]; }

// Labels and pairs have probabilities, duplicates and leaks similarities, and the other lists have a rank alone.
function scoreText(issue) {
  const kind = issues.kind[issue], score = issues.score[issue];
  return kind === "media" ? "" : kind === "label" || kind === "pair" ? percent(score) : score.toFixed(3);
}

function makeComparisons(issue) {
  const clip = issues.clip[issue], match = issues.match[issue];
  return [...(match < 0 ? [] : makeMatch(match)),
    ...(clips.has_frames[clip] ? makeNeighbors("Most similar video", issues.visual[issue], issue, false) : []),
    ...(clips.has_audio[clip] ? makeNeighbors("Most similar audio", issues.audio[issue], issue, true) : [])];
}

// The labels of a neighbor, and whether they support the proposed or the given label of the clip.
function describeNeighbor(neighbor, issue) {
  const clip = issues.clip[issue], given = classes[clips.given_label[neighbor]], proposed = classes[clips.knn_label[neighbor]];
  const supports = clips.knn_label[neighbor] === clips.knn_label[clip] ? "proposed"
    : clips.knn_label[neighbor] === clips.given_label[clip] ? "given" : "";
  return [given === proposed ? given : `${given} → ${proposed}`, supports];
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
  return make("div", { className: "choices" }, makeDecision(accept, "A", "accepted", issue),
    makeDecision(reject, "R", "rejected", issue), ...(isLabel ? [pick] : []), makeUndo());
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

for (const name of ["given", "proposed"]) fillFilter(name);
start();
