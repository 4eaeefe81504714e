"use strict";
// Decisions as CSV and back.
// One line a clip: the label to use, and whether the pair is wrong. tools/make_shards.py and data.labels take it back.
const COLUMNS = ["key", "label", "pair", "given", "proposed", "label_decision", "pair_decision", "source", "start_s"];

function csv() {
  const lines = new Map();
  for (let item = 0; item < items.clip.length; item++) {
    const decision = decisionOf(item), clip = items.clip[item];
    if (decision === undefined) continue;
    const line = lines.get(clip) ?? { key: clips.key[clip], label: "", pair: "", given: classes[clips.given[clip]],
      proposed: classes[clips.proposed[clip]], label_decision: "", pair_decision: "", source: clips.source[clip], start_s: clips.start_s[clip] };
    if (items.kind[item] === "label") {
      line.label_decision = Number.isInteger(decision) ? "other" : decision;
      line.label = Number.isInteger(decision) ? classes[decision] : decision === "accepted" ? line.proposed : line.given;
    } else {
      line.pair_decision = decision;
      line.pair = decision === "accepted" ? "wrong" : "right";
    }
    lines.set(clip, line);
  }
  const quoted = (value) => /[",\r\n]|^\s|\s$/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value;
  return [COLUMNS, ...[...lines.values()].map((line) => COLUMNS.map((name) => quoted(line[name])))].map((line) => line.join(",") + "\n").join("");
}

function parsed(text) {
  const rows = [[]];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end === "") break;
    if (end !== ",") rows.push([]);
  }
  const [head, ...body] = rows.filter((row) => row.length > 1);
  return body.map((row) => Object.fromEntries(head.map((name, at) => [name, row[at]])));
}
