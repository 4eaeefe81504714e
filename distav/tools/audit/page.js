"use strict";
// The page reads its data from the document alone. Columns: `items` of problems, `clips` by place, `classes` by number.
const data = JSON.parse(document.getElementById("data").textContent);
const { classes, clips, items } = data;
const ROW = 72, SPARE = 6, KEPT = "distav-audit-" + data.digest;
const KEYS = [["J / ↓", "next"], ["K / ↑", "previous"], ["A", "accept what is proposed"], ["R", "reject it: all is right"],
  ["C", "choose another label"], ["U", "undo the last decision"], ["Space", "play the sound"], ["S", "save decisions"],
  ["1 2 3", "labels, pairs, overview"]];
const $ = (selector) => document.querySelector(selector);
const past = [];
let view = "label", shown = [], chosen = -1, decisions = {};

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function media(kind, clip) {
  const held = document.getElementById(kind + clip);
  return held ? `data:${kind === "f" ? "image/webp" : "audio/webm"};base64,${held.textContent}` : "";
}

// A decision is "accepted", "rejected" or the number of another class.
function decisionOf(item) { return decisions[items.kind[item] + " " + clips.key[items.clip[item]]]; }

function stateOf(item) {
  const decision = decisionOf(item);
  return decision === undefined ? "open" : decision === "rejected" ? "rejected" : "accepted";
}

function decide(item, decision) {
  const key = items.kind[item] + " " + clips.key[items.clip[item]];
  if (decision === undefined) delete decisions[key]; else decisions[key] = decision;
  keep();
  count();
}

function keep() {
  try { localStorage.setItem(KEPT, JSON.stringify(decisions)); } catch { /* a page without storage still saves CSV */ }
}

function count() {
  const kinds = { label: 0, pair: 0 };
  items.kind.forEach((kind) => kinds[kind]++);
  document.querySelectorAll("nav span").forEach((span, at) => {
    const kind = ["label", "pair"][at], all = data.found[kind];
    span.textContent = kinds[kind] < all ? `${kinds[kind]} of ${all}` : all;
  });
  const number = Object.keys(decisions).length;
  $("#decided").textContent = number ? `${number} decided` : "nothing decided yet";
}

function filtered() {
  const form = $("#filters").elements, text = form.text.value.toLowerCase();
  shown = [];
  for (let item = 0; item < items.clip.length; item++) {
    const clip = items.clip[item];
    if (items.kind[item] === view
      && (form.given.value === "" || clips.given[clip] === +form.given.value)
      && (form.proposed.value === "" || clips.proposed[clip] === +form.proposed.value)
      && items.score[item] >= +form.low.value && items.score[item] <= +(form.high.value || 1)
      && (form.state.value === "" || form.state.value === stateOf(item))
      && (!text || (clips.key[clip] + " " + clips.source[clip]).toLowerCase().includes(text))) shown.push(item);
  }
  $("#shown").textContent = `${shown.length} shown`;
  $("#rows").style.height = shown.length * ROW + "px";
}

function draw() {
  const list = $("#list"), first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  const rows = [];
  for (let place = first; place < last; place++) rows.push(row(place));
  $("#rows").replaceChildren(...rows);
}

function row(place) {
  const item = shown[place], clip = items.clip[item], state = stateOf(item);
  const words = items.kind[item] === "label"
    ? [make("span", { className: "given", textContent: classes[clips.given[clip]] }), " → ",
      make("span", { className: "proposed", textContent: classes[clips.proposed[clip]] })]
    : [make("span", { textContent: classes[clips.proposed[clip]] }), " with foreign sound?"];
  const node = make("div", { className: "row" + (place === chosen ? " chosen" : ""), role: "option" },
    make("img", { src: media("f", clip), alt: "", decoding: "async" }),
    make("div", {}, make("p", {}, ...words), make("p", { className: "dim", textContent: clips.source[clip] })),
    make("span", { className: "mark " + state, textContent: state === "open" ? percent(items.score[item]) : state }));
  node.style.top = place * ROW + "px";
  node.dataset.place = place;
  node.setAttribute("aria-selected", place === chosen);
  return node;
}

function percent(share) {
  const value = 100 * share;
  return (value > 99.95 && value < 100 ? ">99.9" : value.toFixed(1)) + " %";
}

function choose(place) {
  chosen = Math.max(shown.length ? 0 : -1, Math.min(shown.length - 1, place));
  const list = $("#list"), top = chosen * ROW;
  if (chosen >= 0 && top < list.scrollTop) list.scrollTop = top;
  if (chosen >= 0 && top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  draw();
  detail();
}

function detail() {
  const pane = $("#detail");
  if (chosen < 0) return pane.replaceChildren(make("p", { className: "dim", textContent: "Nothing to show: no problem, or none that passes the filters." }));
  const item = shown[chosen], clip = items.clip[item], isLabel = items.kind[item] === "label";
  const wrong = percent(items.score[item]);
  const verdict = isLabel
    ? [`Given `, make("b", { className: "given", textContent: classes[clips.given[clip]] }), `, proposed `,
      make("b", { className: "proposed", textContent: classes[clips.proposed[clip]] })]
    : [`Does the sound belong to this `, make("b", { textContent: classes[clips.proposed[clip]] }), `?`];
  const facts = (isLabel ? `By what its neighbours show, the given label is wrong with a probability of ${wrong}; the run took ${classes[clips.corrected[clip]]}. `
    : `Sound and picture are a wrong pair with a probability of ${wrong}. Given label: ${classes[clips.given[clip]]}. `)
    + `${clips.key[clip]}, ${clips.source[clip]} from ${clips.start_s[clip]} s`;
  const decision = decisionOf(item);
  const pick = make("select", { id: "pick" }, make("option", { value: "", textContent: "another label …" }),
    ...classes.map((name, number) => make("option", { value: number, textContent: name })));
  if (Number.isInteger(decision)) pick.value = decision;
  pick.onchange = () => { if (pick.value !== "") act(+pick.value); };
  const button = (word, key, value) => {
    const node = make("button", { onclick: () => act(value) }, word + " ", make("kbd", { textContent: key }));
    node.setAttribute("aria-pressed", decision === value);
    return node;
  };
  const sound = media("a", clip);
  pane.replaceChildren(
    make("img", { src: media("f", clip), alt: "four frames of the clip" }),
    sound ? make("audio", { controls: true, src: sound, id: "sound" }) : make("p", { className: "dim", textContent: "no sound could be read" }),
    make("p", { className: "verdict" }, ...verdict), make("p", { className: "dim", textContent: facts }),
    make("div", { className: "choices" }, button(isLabel ? "Accept" : "Wrong pair", "A", "accepted"),
      button(isLabel ? "Keep given" : "Right pair", "R", "rejected"), ...(isLabel ? [pick] : []),
      make("button", { onclick: undo, disabled: !past.length }, "Undo ", make("kbd", { textContent: "U" }))),
    ...near("Pictures like this one", items.visual[item], clip, false), ...near("Sounds like this one", items.audio[item], clip, true));
}

function near(title, found, clip, audible) {
  const figures = found.map(([other, cosine]) => {
    const given = classes[clips.given[other]], proposed = classes[clips.proposed[other]];
    const name = given === proposed ? given : `${given} → ${proposed}`;
    const kind = clips.proposed[other] === clips.proposed[clip] ? "proposed" : clips.proposed[other] === clips.given[clip] ? "given" : "";
    const frame = make("i");
    frame.style.backgroundImage = `url("${media("f", other)}")`;
    const play = () => { const old = $("#other"); old?.remove(); const a = make("audio", { src: media("a", other), id: "other", hidden: true }); document.body.append(a); a.play(); };
    return make("figure", { title: `${clips.key[other]}, cosine ${cosine.toFixed(2)}: ${name}` }, frame,
      make("figcaption", { className: kind, textContent: name }),
      ...(audible ? [make("button", { textContent: "play", onclick: play })] : []));
  });
  return [make("h2", { textContent: title }), make("div", { className: "near" }, ...figures)];
}

function act(decision) {
  if (chosen < 0) return;
  const before = shown.length, item = shown[chosen];
  past.push([item, decisionOf(item)]);
  decide(item, decision);
  filtered();
  choose(shown.length < before ? chosen : chosen + 1);
}

function undo() {
  if (!past.length) return;
  const [item, decision] = past.pop();
  decide(item, decision);
  show(items.kind[item]);
  choose(shown.indexOf(item));
}

function show(name) {
  view = name;
  document.querySelectorAll("nav button").forEach((each) => each.setAttribute("aria-selected", each.dataset.view === name));
  $("#review").hidden = name === "overview";
  $("#overview").hidden = name !== "overview";
  if (name !== "overview") again();
}

function again() {
  filtered();
  $("#list").scrollTop = 0;
  choose(0);
}

function overview() {
  const rate = (found) => found ? `${percent(found.estimate)} (${percent(found.ci95_low)} to ${percent(found.ci95_high)})` : "not known";
  const facts = make("table", { className: "facts" }, ...data.facts.map(([name, value]) => make("tr", {}, make("td", { textContent: name }), make("td", { textContent: value }))),
    make("tr", {}, make("td", { textContent: "labels that are wrong" }), make("td", { textContent: rate(data.noise.labels) })),
    make("tr", {}, make("td", { textContent: "pairs that are wrong" }), make("td", { textContent: rate(data.noise.pairs) })));
  const scale = (share) => `${100 * share}%`;
  const rows = classes.map((name, number) => {
    const found = data.noise.classes[name], bar = make("div", { className: "bar" });
    if (found) {
      bar.append(make("b"), make("s"));
      bar.firstChild.style.width = scale(found.estimate);
      Object.assign(bar.lastChild.style, { left: scale(found.ci95_low), width: scale(found.ci95_high - found.ci95_low) });
    }
    return make("tr", {}, make("td", { textContent: name }), make("td", { textContent: data.counts.given[number] }),
      make("td", { textContent: data.counts.corrected[number] }), make("td", { textContent: rate(found) }), make("td", {}, bar));
  });
  const head = ["class", "given", "after correction", "wrong labels of this class (interval)", ""].map((name) => make("th", { textContent: name }));
  $("#overview").append(make("h2", { textContent: "The set" }), facts, make("h2", { textContent: "Classes" }),
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
    make("h2", { textContent: "Given labels (rows) and what they were corrected to (columns)" }), confusion());
}

function confusion() {
  if (classes.length > 60) {
    const pairs = data.confusion.flatMap((row, a) => row.map((number, b) => [number, a, b])).filter(([number, a, b]) => number && a !== b);
    pairs.sort((a, b) => b[0] - a[0]);
    return make("table", {}, ...pairs.slice(0, 100).map(([number, a, b]) => make("tr", {}, make("td", { textContent: `${classes[a]} → ${classes[b]}` }), make("td", { textContent: number }))));
  }
  const body = data.confusion.map((row, a) => {
    const total = row.reduce((sum, each) => sum + each, 0) || 1;
    return make("tr", {}, make("th", { textContent: classes[a] }), ...row.map((number, b) => {
      const cell = make("td", { textContent: number || "", title: `${classes[a]} → ${classes[b]}: ${number}` });
      cell.style.background = `color-mix(in srgb, var(${a === b ? "--green" : "--red"}) ${Math.round(70 * Math.sqrt(number / total))}%, transparent)`;
      return cell;
    }));
  });
  const head = make("tr", {}, make("td"), ...classes.map((name) => make("th", { textContent: name })));
  return make("table", { className: "confusion" }, make("thead", {}, head), make("tbody", {}, ...body));
}

function save() {
  const link = make("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "decisions.csv" });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function load(file) {
  const said = take(parsed(await file.text()));
  keep();
  count();
  show(view === "overview" ? "label" : view);
  $("#decided").textContent = `${said} from ${file.name}`;
}

const ACTIONS = { j: () => choose(chosen + 1), arrowdown: () => choose(chosen + 1), k: () => choose(chosen - 1), arrowup: () => choose(chosen - 1),
  a: () => act("accepted"), r: () => act("rejected"), u: undo, c: () => { const pick = $("#pick"); pick?.focus(); pick?.showPicker?.(); }, s: save,
  " ": () => { const sound = $("#sound"); if (sound) sound.paused ? sound.play() : sound.pause(); },
  1: () => show("label"), 2: () => show("pair"), 3: () => show("overview"), "?": () => $("#keys").showModal() };

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("#keys").open || event.target.matches("input, select")) return;
  const action = ACTIONS[event.key.toLowerCase()];
  if (!action || (event.key === " " && event.target.matches("button, audio"))) return;
  event.preventDefault();
  action();
});
document.querySelectorAll("nav button").forEach((each) => { each.onclick = () => show(each.dataset.view); });
$("#list").addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
$("#rows").onclick = (event) => { const found = event.target.closest(".row"); if (found) choose(+found.dataset.place); };
$("#filters").oninput = again;
$("#filters").onsubmit = (event) => event.preventDefault();
$("#save").onclick = save;
$("#load").onchange = (event) => { if (event.target.files[0]) load(event.target.files[0]); event.target.value = ""; };
$("#help").onclick = () => $("#keys").showModal();
addEventListener("resize", draw);

try { decisions = JSON.parse(localStorage.getItem(KEPT)) ?? {}; } catch { /* kept nowhere yet */ }
document.title = $("h1").textContent = data.title;
for (const name of ["given", "proposed"]) {
  $(`#filters [name=${name}]`).append(make("option", { value: "", textContent: "any" }), ...classes.map((each, number) => make("option", { value: number, textContent: each })));
}
$("#keys").append(make("table", {}, ...KEYS.map(([key, what]) => make("tr", {}, make("td", {}, make("kbd", { textContent: key })), make("td", { textContent: what })))),
  make("form", { method: "dialog" }, make("button", { textContent: "Close" })));
count();
overview();
show("label");
