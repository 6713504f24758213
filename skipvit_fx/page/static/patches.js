// The pictures: which patches are present after each layer, their scores, and what became of the one pointed at.
"use strict";

// What an earlier call drew goes; `signal`, if there is one, ends it.
function drawPatches(data, signal) {
  const slider = document.getElementById("layer");
  const { rows, columns, patches, stages } = data;
  const last = data.depth + 1;
  const figures = [...document.querySelectorAll(".picture")].map(prepare);
  const DARK = [16, 20, 24, 205];
  const some = (test) => stages.some(test);
  const ever = some((stage) => stage.merged) ? "part of another" : "away";

  function words(layer) {
    if (layer === 0) return "before layer 1";
    return layer === last ? "before the head" : `after layer ${layer}`;
  }

  // -- what is known of one image after a layer ----------------------------------------------------------------------

  function stateAfter(image, layer) {
    const away = new Map(); // patch: the stage in which it left
    const returned = new Set();
    let now = null; // the last stage of the span that tokens are in
    let scored = null; // the last stage that has scores
    stages.forEach((stage, i) => {
      if (stage.layer > layer) return;
      scored = i;
      const back = stage.returns !== null && stage.returns <= layer;
      for (const patch of image[i].dropped) {
        if (back) returned.add(patch);
        else away.set(patch, i);
      }
      if (!back) now = i;
    });
    const owner = now !== null && image[now].owner ? image[now].owner : null;
    for (const patch of away.keys()) returned.delete(patch);
    return { away, returned, owner, scored, now, fused: now === null ? 0 : image[now].fused };
  }

  function ranks(scores) {
    const order = scores.flatMap((score, i) => (score === null ? [] : [i]));
    order.sort((a, b) => scores[b] - scores[a]);
    const rank = new Map();
    order.forEach((patch, i) => rank.set(patch, i + 1));
    return rank;
  }

  // -- drawing -------------------------------------------------------------------------------------------------------

  // One pixel a patch: clear, dark where it has left, or of the colour of its token.
  function paint(canvas, state, colours, scores) {
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    const rank = scores && ranks(scores);
    const means = state.owner && !scores ? tokenColours(state.owner, colours) : null;
    for (let i = 0; i < patches; i++) {
      let colour = [0, 0, 0, 0];
      if (scores) {
        const share = rank.has(i) ? 1 - (rank.get(i) - 1) / Math.max(1, rank.size - 1) : null;
        colour = share === null ? DARK : [0, 178, 214, 255 * (0.04 + 0.86 * share)];
      } else if (means) {
        if (means[i]) colour = means[i];
      } else if (state.away.has(i)) colour = DARK;
      pixels.data.set(over(colour, i, colours), 4 * i);
    }
    context.putImageData(pixels, 0, 0);
  }

  // Where no picture is below, a colour lies on that of the patch.
  function over(colour, i, colours) {
    if (data.known) return colour;
    const share = colour[3] / 255;
    return [0, 1, 2].map((c) => share * colour[c] + (1 - share) * colours[4 * i + c]).concat(255);
  }

  // The mean colour of each token with more than one patch.
  function tokenColours(owner, colours) {
    const sums = new Map();
    owner.forEach((token, i) => {
      const sum = sums.get(token) || [0, 0, 0, 0];
      for (let c = 0; c < 3; c++) sum[c] += colours[4 * i + c];
      sum[3] += 1;
      sums.set(token, sum);
    });
    return owner.map((token) => {
      const [red, green, blue, size] = sums.get(token);
      return size > 1 ? [red / size, green / size, blue / size, 255] : null;
    });
  }

  // The edges between patches of different label, except between two without one.
  function edges(labels) {
    let path = "";
    for (let i = 0; i < patches; i++) {
      const x = i % columns, y = Math.floor(i / columns);
      const differs = (j) => j < patches && labels[i] !== labels[j];
      if (x + 1 < columns && differs(i + 1)) path += `M${x + 1} ${y}v1`;
      if (differs(i + columns)) path += `M${x} ${y + 1}h1`;
    }
    return path;
  }

  function merged(owner) {
    const size = new Map();
    for (const token of owner) size.set(token, (size.get(token) || 0) + 1);
    return owner.map((token) => (size.get(token) > 1 ? token : null));
  }

  function squares(set) {
    return [...set].map((i) => `M${i % columns} ${Math.floor(i / columns)}h1v1h-1z`).join("");
  }

  // -- one image -----------------------------------------------------------------------------------------------------

  function prepare(element) {
    const image = data.images[Number(element.dataset.image)];
    const frame = element.querySelector(".frame");
    for (const old of frame.querySelectorAll("canvas, svg")) old.remove();
    const canvas = frame.appendChild(sized(document.createElement("canvas")));
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${columns} ${rows}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    for (const name of ["outline", "back", "group", "cursor"]) {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", name);
      svg.append(path);
    }
    frame.append(svg);
    const figure = { element, image, frame, canvas, svg, colours: null, cursor: null, thumbs: [] };
    const list = element.querySelector(".stages");
    list.replaceChildren();
    stages.forEach((stage, i) => figure.thumbs.push(thumbnail(figure, list, stage, i)));
    listen(frame, "pointermove", (event) => point(figure, under(frame, event)));
    listen(frame, "pointerdown", (event) => point(figure, under(frame, event)));
    listen(frame, "pointerleave", () => point(figure, null));
    listen(frame, "blur", () => point(figure, null));
    listen(frame, "keydown", (event) => step(figure, event));
    return figure;
  }

  function listen(element, kind, act) {
    element.addEventListener(kind, act, { signal });
  }

  function sized(canvas) {
    canvas.width = columns;
    canvas.height = rows;
    return canvas;
  }

  function thumbnail(figure, list, stage, i) {
    const button = document.createElement("button");
    button.type = "button";
    const shown = document.createElement("span");
    shown.className = "thumb";
    shown.style.setProperty("--aspect", data.aspect);
    const source = figure.frame.querySelector("img");
    if (source) shown.append(Object.assign(document.createElement("img"), { src: source.src, alt: "" }));
    const canvas = shown.appendChild(sized(document.createElement("canvas")));
    const item = document.createElement("li");
    const state = stateAfter(figure.image, stage.layer);
    button.append(shown, `layer ${stage.layer}: ${patches - state.away.size}`);
    button.setAttribute("aria-label", `Show layer ${stage.layer}: ${patches - state.away.size} patches are left`);
    button.addEventListener("click", () => {
      slider.value = String(stage.layer);
      update();
    });
    item.append(button);
    list.append(item);
    return { button, canvas, state, layer: stage.layer };
  }

  function under(frame, event) {
    const box = frame.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const y = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const patch = y * columns + x;
    return x >= 0 && x < columns && patch >= 0 && patch < patches ? patch : null;
  }

  function step(figure, event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const from = figure.cursor === null ? 0 : figure.cursor;
    let to = null;
    if (event.key in moves) to = figure.cursor === null ? 0 : from + moves[event.key];
    else if (event.key === "Home") to = 0;
    else if (event.key === "End") to = patches - 1;
    else if (event.key !== "Escape") return;
    event.preventDefault();
    if (to === null || (to >= 0 && to < patches)) point(figure, to);
  }

  // -- what is said --------------------------------------------------------------------------------------------------

  function point(figure, patch) {
    if (figure.cursor === patch) return;
    figure.cursor = patch;
    const state = stateAfter(figure.image, Number(slider.value));
    const path = (name) => figure.svg.querySelector(`.${name}`);
    path("cursor").setAttribute("d", patch === null ? "" : squares([patch]));
    const owner = patch === null ? null : state.owner;
    const group = owner ? owner.flatMap((token, i) => (token === owner[patch] ? [i] : [])) : [];
    path("group").setAttribute("d", group.length > 1 ? squares(group) : "");
    figure.element.querySelector(".patch").textContent =
      patch === null ? "Point at a patch, or move to one with the arrow keys." : story(figure, patch, state, group.length);
  }

  function story(figure, patch, state, size) {
    const place = data.known ? `row ${Math.floor(patch / columns) + 1}, column ${(patch % columns) + 1}` : "place not known";
    const parts = [`Patch ${patch} (${place})`];
    if (state.scored !== null) {
      const { scores } = figure.image[state.scored];
      const layer = stages[state.scored].layer;
      const what = stages[state.scored].merged ? "similarity" : "score";
      const rank = ranks(scores);
      parts.push(
        scores[patch] === null
          ? `no ${what} in layer ${layer}`
          : `${what} ${scores[patch]} in layer ${layer}, rank ${rank.get(patch)} of ${rank.size}`,
      );
    }
    const moves = [];
    stages.forEach((stage, i) => {
      const { dropped, owner } = figure.image[i];
      if (!dropped.includes(patch)) return;
      const how = owner ? `joined the token of patch ${owner[patch]} in layer ${stage.layer}` : stage.layer ? `left in layer ${stage.layer}` : "left in front of layer 1";
      const back = stage.returns === null ? "never back" : stage.returns === last ? "back before the head" : `back at layer ${stage.returns}`;
      moves.push(`${how}, ${back}`);
    });
    if (size > 1) parts.push(`its token is ${size} patches`);
    return `${parts.join(": ").replace(/: (?=its)/, "; ")}. ${moves.length ? capital(moves.join("; ")) : `Never ${ever}`}.`;
  }

  function capital(text) {
    return text[0].toUpperCase() + text.slice(1);
  }

  function summary(state) {
    const left = patches - state.away.size;
    const gone = state.away.size;
    let text = `${left} of ${patches} ${state.owner ? "tokens" : "patches"} are present`;
    if (gone) text += state.owner ? `; ${gone} patches are part of others` : `; ${gone} have left`;
    if (state.fused) text += `; with ${state.fused} fused token${state.fused > 1 ? "s" : ""} of earlier stages`;
    if (state.returned.size) text += `; ${state.returned.size} have come back`;
    return `${text}.`;
  }

  // -- all of it -----------------------------------------------------------------------------------------------------

  function update() {
    const layer = Number(slider.value);
    const showScores = document.querySelector("[name=show]:checked").value === "scores";
    document.getElementById("layer-now").textContent = words(layer);
    slider.setAttribute("aria-valuetext", words(layer));
    for (const figure of figures) {
      const state = stateAfter(figure.image, layer);
      const scores = showScores && state.scored !== null ? figure.image[state.scored].scores : null;
      paint(figure.canvas, state, figure.colours, scores);
      figure.frame.classList.toggle("scores", showScores);
      const lines = (name) => figure.svg.querySelector(`.${name}`);
      lines("outline").setAttribute("d", state.owner && !scores ? edges(merged(state.owner)) : "");
      const were = Array.from({ length: patches }, (_, i) => state.returned.has(i));
      lines("back").setAttribute("d", state.returned.size && !scores ? edges(were) : "");
      figure.element.querySelector(".state").textContent = summary(state);
      figure.frame.dataset.away = state.away.size;
      for (const thumb of figure.thumbs) thumb.button.setAttribute("aria-pressed", String(thumb.layer === layer));
      const { cursor } = figure;
      figure.cursor = undefined;
      point(figure, cursor);
    }
    document.getElementById("legend").textContent = showScores ? SCORES : PATCHES;
  }

  const SCORES = "Scores of the last stage so far: the stronger the blue, the higher, by rank within the image. Dark: not scored there.";
  const PATCHES = [
    some((stage) => !stage.merged) && "Dark: not in the sequence.",
    some((stage) => stage.merged) && "One colour in an outline: patches that are one token.",
    some((stage) => stage.returns !== null) && "Dashed: were away and are back.",
  ].filter(Boolean).join(" ");

  function ticks() {
    const line = document.getElementById("ticks");
    line.replaceChildren();
    const marks = new Map();
    const add = (layer, sign) => marks.set(layer, (marks.get(layer) || "") + sign);
    const seen = new Set();
    for (const stage of stages) {
      add(stage.layer, stage.merged ? "◆" : "▼");
      if (stage.returns !== null && !seen.has(stage.span)) add(stage.returns, "▲");
      seen.add(stage.span);
    }
    const spelled = marks.size <= 4;
    for (const [layer, signs] of marks) {
      const mark = document.createElement("span");
      mark.style.left = `${(100 * layer) / last}%`;
      mark.classList.toggle("end", layer > 0.9 * last);
      mark.textContent = spelled ? `${signs} ${layer === last ? "head" : layer}` : signs;
      line.append(mark);
    }
  }

  // The mean colour of every patch, as the browser scales the picture down.
  function colours(figure) {
    const canvas = sized(document.createElement("canvas"));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const source = figure.frame.querySelector("img");
    context.imageSmoothingQuality = "high";
    if (source) context.drawImage(source, 0, 0, columns, rows);
    else checks(context);
    figure.colours = context.getImageData(0, 0, columns, rows).data;
  }

  // Without a picture, two tones tell neighbours apart.
  function checks(context) {
    for (let i = 0; i < patches; i++) {
      context.fillStyle = i % 2 ? "#b9cdd4" : "#a9c0c8";
      context.fillRect(i % columns, Math.floor(i / columns), 1, 1);
    }
  }

  function begin() {
    if (signal && signal.aborted) return; // another call came while the pictures were decoded
    for (const figure of figures) {
      colours(figure);
      for (const thumb of figure.thumbs) paint(thumb.canvas, thumb.state, figure.colours, null);
    }
    ticks();
    listen(slider, "input", update);
    for (const choice of document.getElementsByName("show")) listen(choice, "change", update);
    update();
    document.documentElement.dataset.drawn = "patches";
  }

  const images = figures.flatMap((figure) => [...figure.frame.querySelectorAll("img")]);
  return Promise.all(images.map((image) => image.decode())).then(begin);
}
