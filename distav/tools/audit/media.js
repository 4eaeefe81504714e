"use strict";
// Frames and audio of clips, which the document stores in inert elements, and the neighbors of a clip.
function mediaUrl(medium, clip) {
  const element = document.getElementById(medium + clip);
  return element ? `data:${medium === "frames" ? "image/webp" : "audio/webm"};base64,${element.textContent}` : "";
}

// The first frames of a clip, or the reason why there are none.
function makeStrip(clip, alt) {
  const url = mediaUrl("frames", clip);
  if (url) return make("img", { src: url, alt, decoding: "async" });
  return make("div", { className: "missing", textContent: clips.has_frames[clip] ? "not readable" : "no video" });
}

function makeAudio(clip) {
  const url = mediaUrl("audio", clip);
  if (url) return make("audio", { controls: true, src: url, id: "audio" });
  const text = clips.has_audio[clip] ? "The audio could not be read." : "This clip has no audio.";
  return make("p", { className: "dim", textContent: text });
}

// The clip that an issue refers to, such as the clip that is duplicated.
function makeMatch(clip) {
  const url = mediaUrl("audio", clip);
  return [make("h2", { textContent: "Compare with" }), make("div", { className: "match" }, makeStrip(clip, "four frames of the other clip"),
    make("p", { className: "dim", textContent: `${classes[clips.given_label[clip]]}: ${clips.key[clip]}, ${clips.source[clip]} from ${clips.start_s[clip]} s` }),
    ...(url ? [make("audio", { controls: true, src: url })] : []))];
}

function makeNeighbors(title, neighbors, issue, audible) {
  const figures = neighbors.map(([neighbor, cosine]) => {
    const [name, supports] = describeNeighbor(neighbor, issue);
    const url = mediaUrl("frames", neighbor), frame = make("i", { textContent: url ? "" : "no video" });
    if (url) frame.style.backgroundImage = `url("${url}")`;
    const play = () => {
      $("#neighbor-audio")?.remove();
      const audio = make("audio", { src: mediaUrl("audio", neighbor), id: "neighbor-audio", hidden: true });
      document.body.append(audio);
      audio.play();
    };
    return make("figure", { title: `${clips.key[neighbor]}, cosine similarity ${cosine.toFixed(2)}: ${name}` }, frame,
      make("figcaption", { className: supports, textContent: name }),
      ...(audible ? [make("button", { textContent: "play", onclick: play })] : []));
  });
  return [make("h2", { textContent: title }), make("div", { className: "near" }, ...figures)];
}
