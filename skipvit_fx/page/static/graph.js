// Draws what skipvit_fx.page.graph.graph_data returns: the layers as boxes that open down to nodes, before and after
// side by side, and a step through the passes. Data gets into the page as text only, never as markup.
// Needs dagre (vendor/dagre.min.js) for the nodes of an open layer; boxes of layers are a column, which needs no layout.
"use strict";

const drawGraph = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const CHARACTER = 7.3; // pixels, of the monospace font in which nodes are labelled
  const NODE_HEIGHT = 38;
  const PILL_HEIGHT = 22;
  const LANES = 5; // connections that pass layers, side by side
  const SMALLEST = 0.85; // scale of a wide layer
  const FOUND = 30; // search results that are listed
  let drawings = 0;

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return element;
  }

  function draw(tag, attributes) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  }

  const count = (number, one, many) => `${number} ${number === 1 ? one : (many ?? `${one}s`)}`;
  function grouped(items, key) {
    const groups = {};
    for (const item of items) (groups[key(item)] ??= []).push(item);
    return groups;
  }

  const same = (a, b) => a.length === b.length && a.every((item, i) => item === b[i]);

  function multiplyAdds(number) {
    for (const [unit, size] of [["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
      if (number >= size) return `${(number / size).toPrecision(3)} ${unit} MACs`;
    }
    return `${number} MACs`;
  }

  function shapeText(shape) {
    if (!Array.isArray(shape[0])) return shape.join("×");
    const all = shape.map((one) => one.join("×"));
    return all.length > 1 && all.every((one) => one === all[0]) ? `${all.length} of ${all[0]}` : all.join(", ");
  }

  // A shape with, in bold, the axes of the tokens.
  function shapeParts(shape, tokenDims) {
    if (!shape.length || Array.isArray(shape[0])) return [shapeText(shape)];
    return shape.flatMap((size, axis) => [
      axis ? "×" : "",
      tokenDims.includes(axis) ? make("b", {}, String(size)) : String(size),
    ]);
  }

  // -- what there is to show ------------------------------------------------------------------------------------------

  // The graph as written, after each pass that changed it, and the result with all changes at once.
  function framesOf(data) {
    const frames = [frame("as written", "The author's graph, before any pass.", data.before, {})];
    let graph = data.before;
    for (const step of data.steps) {
      if (!step.inserted.length && !step.rewired.length && !step.erased.length) continue;
      graph = replayed(graph, step);
      frames.push(frame(step.name, step.about, graph, step));
    }
    const first = new Map(data.before.map((node) => [node.name, node.reads]));
    const there = new Set(graph.map((node) => node.name));
    const all = {
      inserted: graph.filter((node) => !first.has(node.name)),
      rewired: graph
        .filter((node) => first.has(node.name) && !same(node.reads, first.get(node.name)))
        .map((node) => ({ ...node, before: first.get(node.name) })),
      erased: data.before.map((node) => node.name).filter((name) => !there.has(name)),
    };
    frames.push(frame("result", "The rewritten graph, with what all passes changed.", graph, all));
    frames.at(-1).isResult = true;
    return frames;
  }

  function frame(name, about, graph, { inserted = [], rewired = [], erased = [] }) {
    const changed = new Map(inserted.map((node) => [node.name, "inserted"]));
    for (const node of rewired) changed.set(node.name, "rewired");
    for (const node of erased) changed.set(node, "erased");
    return { name, about, graph, inserted, rewired, erased, changed };
  }

  function replayed(graph, step) {
    const rewired = new Map(step.rewired.map((node) => [node.name, node]));
    const order = graph.map((node) => rewired.get(node.name) ?? node);
    for (const node of step.inserted) {
      order.splice(order.findIndex((other) => other.name === node.after) + 1, 0, node);
    }
    return order.filter((node) => !step.erased.includes(node.name));
  }

  // -- the drawing ----------------------------------------------------------------------------------------------------

  class Drawing {
    constructor(element, data) {
      this.data = data;
      this.id = `graph-${++drawings}`;
      this.frames = framesOf(data);
      this.step = this.frames.length - 1;
      this.opened = new Set();
      this.selected = null;
      this.sizes = false;
      this.wanted = "";
      this.layouts = new Map();
      this.cells = { before: [], after: [] };
      this.build(element);
      this.showStep(this.step);
      this.prepare(1);
      new ResizeObserver(() => this.arrange()).observe(this.rows);
    }

    // Layers are laid out when they are opened; while the browser has nothing else to do, those that are still closed.
    prepare(i) {
      if (i >= this.data.groups.length) return;
      const whenIdle = window.requestIdleCallback ?? setTimeout;
      whenIdle(() => {
        for (const side of ["before", "after"]) this.layoutOf(this.boxesIn(i, side));
        this.prepare(i + 1);
      });
    }

    get frame() {
      return this.frames[this.step];
    }

    // The graph that a side shows, and the nodes of an erasing pass that are shown although they are gone.
    graphOf(side) {
      if (side === "before") return this.frames[0].graph;
      const last = this.frames[Math.max(0, this.step - 1)].graph;
      const gone = this.frame.isResult ? [] : last.filter((node) => this.frame.changed.get(node.name) === "erased");
      return [...this.frame.graph, ...gone];
    }

    // -- controls -----------------------------------------------------------------------------------------------------

    build(element) {
      const { data, id } = this;
      this.search = make("input", {
        type: "search", id: `${id}-search`, autocomplete: "off", spellcheck: "false",
        placeholder: "a node, a module", oninput: () => this.find(this.search.value),
        onkeydown: (event) => this.searchKey(event),
      });
      this.found = make("ul", { class: "gv-found", "aria-label": "nodes found", hidden: true });
      this.foundCount = make("span", { class: "gv-count", role: "status" });
      this.stepButtons = this.frames.map((frame, i) =>
        make("button", { type: "button", class: "gv-step", onclick: () => this.showStep(i) }, frame.name));
      this.previous = make("button", { type: "button", class: "gv-move", onclick: () => this.showStep(this.step - 1) }, "◀ previous pass");
      this.next = make("button", { type: "button", class: "gv-move", onclick: () => this.showStep(this.step + 1) }, "next pass ▶");
      this.said = make("p", { class: "gv-said", role: "status" });
      this.changes = make("div", { class: "gv-changes" });
      this.rows = make("div", { class: "gv-rows" });
      this.lanes = { before: draw("svg", { class: "gv-lanes gv-lanes-before", "aria-hidden": "true" }), after: draw("svg", { class: "gv-lanes gv-lanes-after", "aria-hidden": "true" }) };
      this.rows.append(
        make("h3", { class: "gv-title gv-before" }, "as written"),
        make("h3", { class: "gv-title gv-after" }, "rewritten"),
        this.lanes.before, this.lanes.after,
      );
      data.groups.forEach((group, i) => this.buildRow(group, i));
      this.panel = make("section", { class: "gv-panel", "aria-label": "the chosen node", tabindex: "0", onkeydown: (event) => this.panelKey(event) });
      this.root = make("div", { class: "gv gv-both" },
        make("div", { class: "gv-controls" },
          make("div", { class: "gv-search" },
            make("label", { for: this.search.id }, "search"), this.search, this.foundCount, this.found),
          this.choice("show", [["both", "both"], ["before", "as written"], ["after", "rewritten"]],
            matchMedia("(max-width: 47rem)").matches ? "after" : "both", (view) => this.show(view)),
          make("label", { class: "gv-check" },
            make("input", { type: "checkbox", class: "gv-sizes", onchange: (event) => this.showSizes(event.target.checked) }),
            "sizes and guards"),
          make("button", { type: "button", class: "gv-close", onclick: () => this.closeAll() }, "close all layers")),
        make("div", { class: "gv-steps", role: "group", "aria-label": "step through the passes", onkeydown: (event) => this.stepKey(event) },
          this.previous, make("ol", { class: "gv-passes" }, ...this.stepButtons.map((button) => make("li", {}, button))), this.next),
        this.said, this.changes, this.legend(),
        make("div", { class: "gv-main" }, this.rows, this.panel));
      element.replaceChildren(this.root);
      this.show(this.root.querySelector("input[type=radio]:checked").value);
      this.showPanel();
    }

    choice(legend, options, chosen, change) {
      const name = `${this.id}-${legend}`;
      return make("fieldset", { class: "gv-choice" }, make("legend", {}, legend),
        ...options.map(([value, text]) => make("label", {},
          make("input", { type: "radio", name, value, checked: value === chosen, onchange: () => change(value) }), text)));
    }

    legend() {
      const idle = this.data.steps.filter((step) => !this.frames.some((frame) => frame.name === step.name));
      return make("p", { class: "gv-legend" },
        make("span", { class: "gv-key" }, "the author's node"),
        make("span", { class: "gv-key gv-is-inserted" }, "inserted"),
        make("span", { class: "gv-key gv-is-rewired" }, "reads something else now"),
        make("span", { class: "gv-key gv-is-erased" }, "erased"),
        idle.length ? make("span", { class: "gv-idle" }, `Changed nothing: ${idle.map((step) => step.name).join(", ")}.`) : null);
    }

    show(view) {
      this.root.classList.remove("gv-both", "gv-before-only", "gv-after-only");
      this.root.classList.add(view === "both" ? "gv-both" : `gv-${view}-only`);
      const radio = this.root.querySelector(`input[type=radio][value=${view}]`);
      radio.checked = true;
      this.arrange();
    }

    showSizes(on) {
      this.sizes = on;
      this.root.querySelector(".gv-sizes").checked = on;
      this.refresh();
    }

    // -- passes -------------------------------------------------------------------------------------------------------

    showStep(step) {
      this.step = Math.min(Math.max(step, 0), this.frames.length - 1);
      const { frame } = this;
      this.stepButtons.forEach((button, i) => {
        if (i === this.step) button.setAttribute("aria-current", "step");
        else button.removeAttribute("aria-current");
      });
      this.previous.disabled = this.step === 0;
      this.next.disabled = this.step === this.frames.length - 1;
      this.said.replaceChildren(
        make("strong", {}, frame.name), ": ", frame.about,
        this.step ? ` ${frame.inserted.length} inserted, ${frame.rewired.length} rewired, ${frame.erased.length} erased.` : "");
      this.changes.replaceChildren(...[
        this.changeList("inserted", frame.inserted.map((node) => [node.name, ""])),
        this.changeList("rewired", frame.rewired.map((node) => [node.name, insteadOf(node)])),
        this.changeList("erased", frame.erased.map((name) => [name, ""])),
      ].filter(Boolean));
      const groups = [...frame.changed.keys()].map((name) => this.data.nodes[name].group);
      if (groups.length && !frame.isResult && !groups.some((group) => this.opened.has(group))) {
        this.opened.add(Math.min(...groups));
      }
      this.refresh();
    }

    changeList(kind, items) {
      if (!items.length || this.frame.isResult) return null;
      return make("div", { class: `gv-change gv-is-${kind}` }, make("h4", {}, kind),
        make("ul", {}, ...items.map(([name, text]) => make("li", {}, this.link(name), text ? ` ${text}` : ""))));
    }

    stepKey(event) {
      const to = { ArrowLeft: this.step - 1, ArrowRight: this.step + 1, Home: 0, End: this.frames.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.showStep(to);
      this.stepButtons[this.step].focus();
    }

    // -- layers -------------------------------------------------------------------------------------------------------

    buildRow(group, i) {
      for (const side of ["before", "after"]) {
        const body = make("div", { class: "gv-body", id: `${this.id}-${side}-${i}`, role: "group", hidden: true,
          "aria-label": `nodes of ${group.name}, ${side === "before" ? "as written" : "rewritten"}` });
        const head = make("button", { type: "button", class: "gv-head", "aria-expanded": "false", "aria-controls": body.id, onclick: () => this.toggle(i) });
        const cell = make("div", { class: `gv-cell gv-${side}`, "data-group": i }, head, body);
        this.cells[side].push({ cell, head, body });
        this.rows.append(cell);
      }
    }

    toggle(i) {
      if (!this.opened.delete(i)) this.opened.add(i);
      this.refreshRow(i);
      this.arrange();
    }

    closeAll() {
      this.opened.clear();
      this.refresh();
    }

    refresh() {
      this.rowsOf = {};
      for (const side of ["before", "after"]) this.rowsOf[side] = grouped(this.graphOf(side), (node) => this.data.nodes[node.name].group);
      this.data.groups.forEach((_, i) => this.refreshRow(i));
      this.arrange();
    }

    refreshRow(i) {
      const open = this.opened.has(i);
      for (const side of ["before", "after"]) {
        const { cell, head, body } = this.cells[side][i];
        head.replaceChildren(...this.headOf(i, side));
        head.setAttribute("aria-expanded", open);
        cell.classList.toggle("gv-open", open);
        cell.classList.toggle("gv-touched", this.changesIn(i).length > 0 && side === "after");
        body.hidden = !open;
        if (open) body.replaceChildren(this.graphIn(i, side));
        else body.replaceChildren();
      }
    }

    changesIn(i) {
      return [...this.frame.changed].filter(([name]) => this.data.nodes[name].group === i);
    }

    headOf(i, side) {
      const { data, frame } = this;
      const group = data.groups[i];
      const nodes = this.rowsOf[side][i] ?? [];
      const parts = [make("span", { class: "gv-name" }, group.name), make("span", { class: "gv-path" }, group.module_path)];
      const facts = [count(nodes.length, "node")];
      let share = 0;
      if (group.tokens && (side === "before" || frame.isResult)) {
        const [into, out] = side === "before" ? [data.tokens, data.tokens] : [group.tokens.attention, group.tokens.ffn];
        facts.unshift(into === out ? `${into} tokens` : `${into} → ${out} tokens`);
        share = out / data.tokens;
      }
      if (side === "before") facts.push(multiplyAdds(group.macs_before));
      else if (frame.isResult) facts.push(multiplyAdds(group.macs));
      parts.push(make("span", { class: "gv-facts" }, facts.join(" · ")));
      if (side === "after") parts.push(this.badges(i, group));
      if (share) {
        const bar = make("span", { class: "gv-bar" });
        bar.style.setProperty("--share", share);
        parts.push(bar);
      }
      return parts;
    }

    badges(i, group) {
      const kinds = grouped(this.changesIn(i), ([, kind]) => kind);
      const badges = ["inserted", "rewired", "erased"]
        .filter((kind) => kinds[kind])
        .map((kind) => make("span", { class: `gv-badge gv-is-${kind}` }, `${kinds[kind].length} ${kind}`));
      if (this.frame.isResult && group.leave) badges.push(make("span", { class: "gv-badge gv-leave" }, `${group.leave} leave`));
      if (this.frame.isResult && group.return) badges.push(make("span", { class: "gv-badge gv-return" }, `${group.return} return`));
      const hits = this.wanted ? this.matches().filter((name) => this.data.nodes[name].group === i).length : 0;
      if (hits) badges.push(make("span", { class: "gv-badge gv-hits" }, `${hits} found`));
      return make("span", { class: "gv-badges" }, ...badges);
    }

    // -- nodes --------------------------------------------------------------------------------------------------------

    // Sizes and guards are left out unless they are asked for, chosen, or a pass touched them.
    isShown(name) {
      return this.sizes || name === this.selected || !this.isAside(name);
    }

    isAside(name) {
      const node = this.data.nodes[name];
      return !node.tensor && node.kind === "author" && !["placeholder", "output"].includes(node.op);
    }

    // The boxes of an open layer: its nodes, where their inputs come from, and where their results go; and the edges
    // between them, as pairs of boxes by number.
    boxesIn(i, side) {
      const { data } = this;
      const boxes = (this.rowsOf[side][i] ?? [])
        .filter((node) => this.isShown(node.name))
        .map((node) => ({ ...node, width: this.widthOf(node.name, side), height: NODE_HEIGHT }));
      const nodes = [...boxes];
      const numbers = new Map(boxes.map((box, number) => [box.name, number]));
      const pill = (name, text, to) => boxes.push({ name, text, to, width: Math.min(200, text.length * 6.4 + 18), height: PILL_HEIGHT }) - 1;
      const edges = [];
      for (const [number, { reads }] of nodes.entries()) {
        for (const read of new Set(reads)) {
          if (!this.isShown(read)) continue;
          const { group } = data.nodes[read];
          if (!numbers.has(read)) numbers.set(read, pill(read, `from ${data.groups[group].name}`, read));
          edges.push([numbers.get(read), number]);
        }
      }
      for (const [name, groups] of this.readersOutside(i, side)) {
        if (!numbers.has(name)) continue;
        const [first, ...more] = [...groups].map((group) => data.groups[group].name);
        const text = more.length ? `to ${count(more.length + 1, "other layer")}` : `to ${first}`;
        edges.push([numbers.get(name), pill(name, text, null)]);
      }
      return { boxes, edges };
    }

    // Layers that are built alike, as most are, are laid out once.
    layoutOf({ boxes, edges }) {
      const key = JSON.stringify([boxes.map((box) => Math.round(box.width)), edges]);
      if (!this.layouts.has(key)) this.layouts.set(key, layout(boxes, edges));
      return this.layouts.get(key);
    }

    readersOutside(i, side) {
      const readers = new Map();
      for (const { name, reads } of this.graphOf(side)) {
        const { group } = this.data.nodes[name];
        if (group === i || !this.isShown(name)) continue;
        for (const read of reads) {
          if (this.data.nodes[read].group === i) readers.set(read, (readers.get(read) ?? new Set()).add(group));
        }
      }
      return readers;
    }

    secondLine(name, side) {
      const node = this.data.nodes[name];
      if (side === "before") return shapeParts(node.shape_before, node.token_dims);
      if (this.frame.isResult) return shapeParts(node.shape, node.token_dims);
      return [node.inserted_by ?? ""];
    }

    widthOf(name, side) {
      const node = this.data.nodes[name];
      const second = side === "before" ? shapeText(node.shape_before) : this.frame.isResult ? shapeText(node.shape) : (node.inserted_by ?? "");
      const longest = Math.max(node.label.length + (node.kind === "author" ? 0 : 2), second.length * 0.9);
      return Math.min(210, Math.max(56, longest * CHARACTER + 20));
    }

    // How a node looks on a side: what became of it up to this step, and whether this step did it.
    lookOf(name, side) {
      const now = this.frame.changed.get(name);
      if (now && !(side === "before" && now === "inserted")) return { kind: now, now: !this.frame.isResult };
      if (side === "before") return { kind: "author", now: false };
      for (const frame of this.frames.slice(1, this.step + 1)) {
        if (frame.changed.has(name)) return { kind: this.data.nodes[name].inserted_by ? "inserted" : frame.changed.get(name), now: false };
      }
      return { kind: "author", now: false };
    }

    graphIn(i, side) {
      const inside = this.boxesIn(i, side);
      const { width, height, places, points } = this.layoutOf(inside);
      const svg = draw("svg", { class: "gv-edges", width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
      const canvas = make("div", { class: "gv-canvas", onkeydown: (event) => this.nodeKey(event) }, svg);
      canvas.style.width = `${width}px`;
      canvas.style.height = `${height}px`;
      inside.edges.forEach((ends, number) => {
        const inserted = side === "after" && ends.some((end) => this.lookOf(inside.boxes[end].name, side).kind === "inserted");
        const kind = inserted ? "gv-edge gv-edge-inserted" : "gv-edge";
        svg.append(draw("path", { class: kind, d: curve(points[number]) }), draw("path", { class: `${kind} gv-tip`, d: tip(points[number]) }));
      });
      inside.boxes.forEach((box, number) => {
        const element = box.text === undefined ? this.nodeBox(box.name, side) : this.pill(box);
        canvas.append(placed(element, box, places[number]));
      });
      const first = canvas.querySelector(".gv-node[aria-pressed=true]") ?? canvas.querySelector(".gv-node");
      if (first) first.tabIndex = 0;
      return make("div", { class: "gv-scroll" }, canvas);
    }

    nodeBox(name, side) {
      const node = this.data.nodes[name];
      const { kind, now } = this.lookOf(name, side);
      const said = [name, kind === "author" ? "" : kind, node.inserted_by ? `by ${node.inserted_by}` : "", shapeText(node.shape) && `shape ${shapeText(side === "before" ? node.shape_before : node.shape)}`];
      return make("button", {
        type: "button", class: `gv-node gv-is-${kind}${now ? " gv-now" : ""}${this.isHit(name) ? " gv-hit" : ""}`, "data-name": name, tabindex: "-1",
        "aria-pressed": String(name === this.selected), "aria-label": said.filter(Boolean).join(", "), onclick: (event) => this.selectFrom(event, name),
      }, make("span", { class: "gv-label" }, node.label), make("span", { class: "gv-shape" }, ...this.secondLine(name, side)));
    }

    pill({ text, to }) {
      if (to === null) return make("span", { class: "gv-pill" }, text);
      return make("button", { type: "button", class: "gv-pill", tabindex: "-1", title: to, "aria-label": `${text}: ${to}`, onclick: () => this.select(to) }, text);
    }

    nodeKey(event) {
      const move = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const boxes = [...event.currentTarget.querySelectorAll("button")];
      const at = boxes.indexOf(document.activeElement);
      const to = boxes[Math.min(Math.max(at + move, 0), boxes.length - 1)];
      for (const box of boxes) box.tabIndex = box === to ? 0 : -1;
      to.focus();
    }

    // -- choosing -----------------------------------------------------------------------------------------------------

    link(name) {
      return make("button", { type: "button", class: "gv-link", onclick: () => this.select(name, true) }, name);
    }

    select(name, scroll = false) {
      const written = this.frames[0].graph.some((node) => node.name === name);
      if (!written && !this.graphOf("after").some((node) => node.name === name)) this.showStep(this.frames.length - 1);
      const there = this.graphOf("after").some((node) => node.name === name);
      if (!written && this.root.classList.contains("gv-before-only")) this.show("after");
      if (!there && this.root.classList.contains("gv-after-only")) this.show("before");
      const earlier = this.selected;
      this.selected = name;
      const hidden = !this.boxesOf(name).length;
      if (hidden) this.opened.add(this.data.nodes[name].group);
      if (hidden || (earlier !== null && this.isAside(earlier))) this.refresh();
      for (const box of this.rows.querySelectorAll(".gv-node")) box.setAttribute("aria-pressed", box.dataset.name === name);
      this.showPanel();
      if (scroll || hidden) this.visible(name)?.scrollIntoView({ block: "center", inline: "nearest" });
    }

    forget() {
      const name = this.selected;
      this.selected = null;
      this.refresh();
      this.showPanel();
      this.visible(name)?.focus();
    }

    visible(name) {
      return this.boxesOf(name).findLast((box) => box.offsetParent);
    }

    boxesOf(name) {
      return [...this.rows.querySelectorAll(`.gv-node[data-name="${CSS.escape(name)}"]`)];
    }

    // With the keyboard, what is said about a node follows the node; Escape goes back to it.
    selectFrom(event, name) {
      this.select(name);
      if (event.detail === 0) this.panel.focus();
    }

    panelKey(event) {
      if (event.key === "Escape" && this.selected !== null) this.visible(this.selected)?.focus();
    }

    showPanel() {
      const name = this.selected;
      const inside = this.panel.contains(document.activeElement);
      this.panel.classList.toggle("gv-nothing", name === null);
      if (name === null) {
        this.panel.replaceChildren(make("h3", {}, "No node is chosen"), make("p", {}, "Open a layer and choose a node to see its shape, the author's line that made it, and what reads it."));
        return;
      }
      const node = this.data.nodes[name];
      const inputs = (graph) => graph.find((other) => other.name === name)?.reads;
      const before = inputs(this.frames[0].graph);
      const now = inputs(this.frames.at(-1).graph);
      const readers = (now ? this.frames.at(-1) : this.frames[0]).graph.filter((other) => other.reads.includes(name)).map((other) => other.name);
      const passes = this.frames.filter((frame) => !frame.isResult && frame.changed.has(name)).map((frame) => `${frame.changed.get(name)} by ${frame.name}`);
      const rows = [
        ["kind", [{ author: "the author's, unchanged", rewired: "the author's, reads something else now", inserted: "inserted" }[node.kind]]],
        ["inserted by", node.inserted_by ? [node.inserted_by] : null],
        ["passes", passes.length ? [passes.join("; ")] : null],
        ["computes", [`${node.op} ${node.target}`]],
        ["shape", this.shapeSaid(node)],
        ["multiply-adds", node.macs ? [multiplyAdds(node.macs)] : null],
        ["module", node.module_path ? [make("code", {}, node.module_path)] : null],
        ["source line", node.source ? [make("code", { class: "gv-place" }, node.source.place), make("pre", {}, node.source.code)] : null],
        ["layer", [this.data.groups[node.group].name]],
        [now && before && !same(now, before) ? "reads now" : "reads", this.links(now ?? before)],
        ["read before", now && before && !same(now, before) ? this.links(before) : null],
        ["read by", this.links(readers)],
      ];
      const close = make("button", { type: "button", class: "gv-close gv-forget", "aria-label": "close", onclick: () => this.forget() }, "×");
      this.panel.replaceChildren(close, make("h3", {}, name),
        make("dl", {}, ...rows.filter(([, value]) => value).flatMap(([term, value]) => [make("dt", {}, term), make("dd", {}, ...value)])));
      if (inside) this.panel.focus();
    }

    links(names) {
      if (!names.length) return ["nothing"];
      return names.flatMap((name, i) => [i ? ", " : "", this.link(name)]);
    }

    shapeSaid(node) {
      if (!node.tensor) return null;
      const now = node.shape.length ? shapeParts(node.shape, node.token_dims) : ["nothing"];
      const lines = [make("span", { class: "gv-shape-now" }, ...now)];
      if (shapeText(node.shape) !== shapeText(node.shape_before) && node.shape_before.length) {
        lines.push(make("br"), "with skipping off ", ...shapeParts(node.shape_before, node.token_dims));
      }
      if (node.token_dims.length) {
        const lengths = node.token_dims.map((axis) => node.shape[axis] ?? node.shape_before[axis]);
        lines.push(make("br"), make("small", {}, `for one image; tokens along axis ${node.token_dims.join(" and ")}: ${lengths.join(" and ")}`));
      } else lines.push(make("br"), make("small", {}, "for one image"));
      return lines;
    }

    // -- search -------------------------------------------------------------------------------------------------------

    isHit(name) {
      const node = this.data.nodes[name];
      return this.wanted !== "" && [name, node.target, node.module_path].some((text) => text.toLowerCase().includes(this.wanted));
    }

    matches() {
      return Object.keys(this.data.nodes).filter((name) => this.isHit(name));
    }

    find(text) {
      this.wanted = text.trim().toLowerCase();
      const names = this.wanted ? this.matches() : [];
      this.foundCount.textContent = this.wanted ? `${names.length} found` : "";
      this.found.hidden = !names.length;
      this.found.replaceChildren(...names.slice(0, FOUND).map((name) => {
        const node = this.data.nodes[name];
        return make("li", {}, make("button", { type: "button", class: "gv-link", onclick: () => this.select(name, true) }, name),
          make("span", {}, ` ${this.data.groups[node.group].name} ${node.module_path}`));
      }), ...(names.length > FOUND ? [make("li", {}, `and ${names.length - FOUND} more`)] : []));
      this.refresh();
    }

    searchKey(event) {
      if (event.key === "Enter") {
        event.preventDefault();
        const [first] = this.wanted ? this.matches() : [];
        if (first) this.select(first, true);
      } else if (event.key === "Escape") {
        this.search.value = "";
        this.find("");
      }
    }

    // -- connections that pass layers ---------------------------------------------------------------------------------

    // What depends on the width of the page: wide layers are drawn a little smaller, then scroll.
    arrange() {
      if (!this.rowsOf) return;
      const canvases = [...this.rows.querySelectorAll(".gv-canvas")];
      const fits = canvases.map((canvas) => (canvas.parentElement.clientWidth - 10) / parseFloat(canvas.style.width));
      canvases.forEach((canvas, i) => (canvas.style.zoom = Math.min(1, Math.max(SMALLEST, fits[i]))));
      this.drawLanes();
    }

    drawLanes() {
      for (const side of ["before", "after"]) {
        const svg = this.lanes[side];
        const cells = this.cells[side];
        svg.replaceChildren();
        if (!cells[0].cell.offsetParent) continue;
        svg.setAttribute("height", this.rows.scrollHeight);
        const top = (i) => cells[i].cell.offsetTop;
        this.passing(side).slice(0, LANES).forEach(({ from, to, inserted }, lane) => {
          const kind = inserted ? "gv-edge gv-edge-inserted" : "gv-edge";
          const x = 26 - 5 * lane;
          const start = top(from) + cells[from].cell.offsetHeight - 10;
          let path = `M 32 ${start} H ${x}`;
          for (const i of to) path += ` M ${x} ${start} V ${top(i) + 14 + 3 * lane} H 32`;
          svg.append(draw("path", { class: kind, d: path }));
          for (const i of to) svg.append(draw("path", { class: `${kind} gv-tip`, d: `M 32 ${top(i) + 14 + 3 * lane} l -6 -3.5 v 7 z` }));
        });
      }
    }

    // From which layer to which others something is read that passes at least one, inserted connections first.
    passing(side) {
      const found = new Map();
      for (const { name, reads } of this.graphOf(side)) {
        const to = this.data.nodes[name].group;
        for (const read of reads) {
          const node = this.data.nodes[read];
          if (to <= node.group + 1 || !node.tensor) continue;
          const inserted = node.inserted_by !== null;
          const key = `${node.group} ${inserted}`;
          if (!found.has(key)) found.set(key, { from: node.group, to: new Set(), inserted });
          found.get(key).to.add(to);
        }
      }
      return [...found.values()].sort((a, b) => b.inserted - a.inserted || a.from - b.from);
    }
  }

  function insteadOf(node) {
    const gone = node.before.filter((name) => !node.reads.includes(name));
    const come = node.reads.filter((name) => !node.before.includes(name));
    return `reads ${come.join(", ") || "fewer"}${gone.length ? ` instead of ${gone.join(", ")}` : ""}`;
  }

  // Places of the boxes, and the points of the edges. dagre makes room for boxes, not for edges beside them.
  function layout(boxes, edges) {
    const graph = new dagre.graphlib.Graph();
    graph.setGraph({ rankdir: "TB", nodesep: 10, ranksep: 24, edgesep: 6, marginx: 12, marginy: 4, ranker: "tight-tree" });
    graph.setDefaultEdgeLabel(() => ({}));
    boxes.forEach(({ width, height }, number) => graph.setNode(String(number), { width, height }));
    for (const [from, to] of edges) graph.setEdge(String(from), String(to));
    dagre.layout(graph);
    const points = edges.map(([from, to]) => graph.edge(String(from), String(to)).points);
    const xs = points.flat().map((point) => point.x);
    const left = Math.min(0, ...xs.map((x) => x - 6));
    const right = Math.max(graph.graph().width, ...xs.map((x) => x + 6));
    return {
      width: right - left,
      height: graph.graph().height,
      places: boxes.map((_, number) => ({ x: graph.node(String(number)).x - left, y: graph.node(String(number)).y })),
      points: points.map((line) => line.map(({ x, y }) => ({ x: x - left, y }))),
    };
  }

  function placed(element, { width, height }, { x, y }) {
    Object.assign(element.style, { left: `${x - width / 2}px`, top: `${y - height / 2}px`, width: `${width}px`, height: `${height}px` });
    return element;
  }

  function curve(points) {
    const middle = (a, b) => `${(a.x + b.x) / 2} ${(a.y + b.y) / 2}`;
    let path = `M ${points[0].x} ${points[0].y}`;
    for (let i = 1; i < points.length - 1; i++) path += ` Q ${points[i].x} ${points[i].y} ${middle(points[i], points[i + 1])}`;
    const last = points.at(-1);
    return `${path} L ${last.x} ${last.y}`;
  }

  function tip(points) {
    const [from, to] = points.slice(-2);
    const angle = Math.atan2(to.y - from.y, to.x - from.x);
    const corner = (turn) => `${to.x - 7 * Math.cos(angle + turn)} ${to.y - 7 * Math.sin(angle + turn)}`;
    return `M ${to.x} ${to.y} L ${corner(0.45)} L ${corner(-0.45)} Z`;
  }

  return (element, data) => new Drawing(element, data);
})();
