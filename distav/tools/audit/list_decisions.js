"use strict";
// Decisions on label lists as CSV and back: one row per clip and class. tools/make_shards.py clean reads this file.
const COLUMNS = ["key", "class", "decision", "issue", "score", "given_label", "source", "start_s"];

// Rows of a loaded file whose clip and class this page does not show; they are written again.
const otherRows = new Map();

function decisionsToCsv() {
  const rows = [...otherRows.values()];
  for (let issue = 0; issue < issues.clip.length; issue++) {
    const decision = decisionOf(issue), clip = issues.clip[issue], kind = issues.kind[issue];
    if (decision === undefined) continue;
    rows.push({ key: clips.key[clip], class: classes[issues.class[issue]],
      decision: decision === "rejected" ? "keep" : kind === "missing" ? "add" : "remove", issue: kind,
      score: issues.score[issue].toFixed(4), given_label: listNames(clips.given[clip], "|"),
      source: clips.source[clip], start_s: clips.start_s[clip] });
  }
  return formatCsv(COLUMNS, rows);
}

function applyRows(rows) {
  const issueOf = new Map(issues.clip.map((clip, issue) => [clips.key[clip] + " " + classes[issues.class[issue]], issue]));
  let applied = 0;
  for (const row of rows) {
    const name = row.key + " " + row.class, issue = issueOf.get(name);
    if (!row.decision) continue;
    if (issue === undefined) {
      otherRows.set(name, row);
      continue;
    }
    decisions[decisionKey(issue)] = row.decision === (issues.kind[issue] === "missing" ? "add" : "remove") ? "accepted" : "rejected";
    applied++;
  }
  return [`${applied} labels loaded`, otherRows.size && `${otherRows.size} not on this page kept`].filter(Boolean).join(", ");
}
