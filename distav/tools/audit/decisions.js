"use strict";
// Decisions as CSV and back: one row per clip, with the label to use, whether the pair is mismatched, and whether to
// remove the clip because of another issue.
// tools/make_shards.py clean and data.label_overrides read this file.
const REMOVAL_KINDS = ["duplicate", "leak", "off_topic", "media"];
const DECISION_COLUMNS = ["label", "pair", ...REMOVAL_KINDS].map((kind) => kind + "_decision");
const COLUMNS = ["key", "label", "pair", "action", "given_label", "knn_label", ...DECISION_COLUMNS, "source", "start_s"];

// Rows of a loaded file whose clips this page does not show; they are written again.
const otherRows = new Map();

function decisionsToCsv() {
  const rows = new Map([...otherRows].map(([key, row]) => [key, { ...row }]));
  for (let issue = 0; issue < issues.clip.length; issue++) {
    const decision = decisionOf(issue), clip = issues.clip[issue];
    if (decision === undefined) continue;
    const row = rows.get(clips.key[clip]) ?? { key: clips.key[clip], given_label: classes[clips.given_label[clip]],
      knn_label: classes[clips.knn_label[clip]], source: clips.source[clip], start_s: clips.start_s[clip] };
    if (issues.kind[issue] === "label") {
      row.label_decision = Number.isInteger(decision) ? "other" : decision;
      row.label = Number.isInteger(decision) ? classes[decision] : decision === "accepted" ? row.knn_label : row.given_label;
    } else if (issues.kind[issue] === "pair") {
      row.pair_decision = decision;
      row.pair = decision === "accepted" ? "mismatched" : "matched";
    } else {
      row[issues.kind[issue] + "_decision"] = decision;
      row.action = decision === "accepted" || row.action === "remove" ? "remove" : "keep";
    }
    rows.set(row.key, row);
  }
  return formatCsv(COLUMNS, [...rows.values()]);
}

// Apply the rows of a file. Labels are compared by name, since the page of another run may propose other labels.
function applyRows(rows) {
  const clipOf = new Map(issues.clip.map((clip, issue) => [issues.kind[issue] + " " + clips.key[clip], clip]));
  let applied = 0, unknown = 0;
  for (const row of rows) {
    const rest = { ...row }, labelKey = "label " + row.key, pairKey = "pair " + row.key, label = classes.indexOf(row.label);
    if (row.label_decision && label < 0) unknown++;
    if (row.label_decision && (clipOf.has(labelKey) || label < 0)) {
      const clip = clipOf.get(labelKey);
      if (label >= 0) decisions[labelKey] = label === clips.knn_label[clip] ? "accepted" : label === clips.given_label[clip] ? "rejected" : label;
      rest.label = rest.label_decision = "";
    }
    if (row.pair_decision && clipOf.has(pairKey)) {
      decisions[pairKey] = row.pair_decision;
      rest.pair = rest.pair_decision = "";
    }
    for (const kind of REMOVAL_KINDS) {
      const decision = rest[kind + "_decision"], key = kind + " " + row.key;
      if (!decision || !clipOf.has(key)) continue;
      decisions[key] = decision;
      rest[kind + "_decision"] = "";
    }
    // The action follows from the decisions that remain; those of this page are added when the file is written.
    const remaining = REMOVAL_KINDS.map((kind) => rest[kind + "_decision"]).filter(Boolean);
    if (REMOVAL_KINDS.some((kind) => row[kind + "_decision"])) {
      rest.action = remaining.includes("accepted") ? "remove" : remaining.length ? "keep" : "";
    }
    if (DECISION_COLUMNS.some((name) => rest[name])) otherRows.set(row.key, rest); else applied++;
  }
  const parts = [`${applied} clips loaded`, otherRows.size && `${otherRows.size} not on this page kept`,
    unknown && `${unknown} with unknown labels ignored`];
  return parts.filter(Boolean).join(", ");
}
