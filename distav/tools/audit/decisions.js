"use strict";
// Decisions as CSV and back.
// One line a clip: the label to use, and whether the pair is wrong. tools/make_shards.py and data.labels take it back.
const COLUMNS = ["key", "label", "pair", "given", "proposed", "label_decision", "pair_decision", "source", "start_s"];

// Lines of a loaded file on clips that this page does not show.
const carried = new Map();

function csv() {
  const lines = new Map([...carried].map(([key, line]) => [key, { ...line }]));
  for (let item = 0; item < items.clip.length; item++) {
    const decision = decisionOf(item), clip = items.clip[item];
    if (decision === undefined) continue;
    const line = lines.get(clips.key[clip]) ?? { key: clips.key[clip], label: "", pair: "", given: classes[clips.given[clip]],
      proposed: classes[clips.proposed[clip]], label_decision: "", pair_decision: "", source: clips.source[clip], start_s: clips.start_s[clip] };
    if (items.kind[item] === "label") {
      line.label_decision = Number.isInteger(decision) ? "other" : decision;
      line.label = Number.isInteger(decision) ? classes[decision] : decision === "accepted" ? line.proposed : line.given;
    } else {
      line.pair_decision = decision;
      line.pair = decision === "accepted" ? "mismatched" : "matched";
    }
    lines.set(line.key, line);
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

// Take the lines of a file: by their labels, since a page of another run proposes other ones.
function take(lines) {
  const place = new Map(items.clip.map((clip, item) => [items.kind[item] + " " + clips.key[clip], clip]));
  let taken = 0, unknown = 0;
  for (const line of lines) {
    const left = { ...line }, label = "label " + line.key, pair = "pair " + line.key, number = classes.indexOf(line.label);
    if (line.label_decision && number < 0) unknown++;
    if (line.label_decision && (place.has(label) || number < 0)) {
      const clip = place.get(label);
      if (number >= 0) decisions[label] = number === clips.proposed[clip] ? "accepted" : number === clips.given[clip] ? "rejected" : number;
      left.label = left.label_decision = "";
    }
    if (line.pair_decision && place.has(pair)) {
      decisions[pair] = line.pair_decision;
      left.pair = left.pair_decision = "";
    }
    if (left.label_decision || left.pair_decision) carried.set(line.key, left); else taken++;
  }
  const parts = [`${taken} clips taken`, carried.size && `${carried.size} not on this page kept`, unknown && `${unknown} with unknown labels left out`];
  return parts.filter(Boolean).join(", ");
}
