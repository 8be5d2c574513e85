"use strict";
(() => {
  const { run, flags, folders, files } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const COLORS = ["#0b6fb3", "#c8500a", "#00825d", "#9c3f88", "#7a6200", "#c22f4e", "#4b52b5", "#00798a"];
  const OTHER = "#666666";
  const NONE = "\u2013";

  /** An element with attributes and children; texts stay texts, whatever is in them. */
  const make = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const draw = (name, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  function fill(element, attributes, children) {
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }
  const signed = (value) => (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(1);
  /** A name, which may be written from right to left, and may break after a folder or a word. */
  const isolated = (text) => make("bdi", {}, ...text.split(/(?<=[/_])/).flatMap((part) => [part, make("wbr")]));

  // --- the figures of each file

  const COLUMNS = [
    { title: "File", of: (file) => file.name },
    // Those with most flags come first, and of those the gravest.
    { title: "Flags", of: (file) => (file.flags.length ? [9 - file.flags.length, ...file.flags.map(gravity)].join() : null) },
    { title: "Kind", of: (file) => file.kind },
    { title: "Offset a*", number: true, of: (file) => file.offset && file.offset[0], show: signed },
    { title: "Offset b*", number: true, of: (file) => file.offset && file.offset[1], show: signed },
    { title: "Length", number: true, of: (file) => file.offset && Math.hypot(...file.offset), show: (value) => value.toFixed(1) },
    { title: "Tiles", number: true, of: (file) => file.tiles, show: String },
    { title: "Left out", number: true, of: (file) => file.left_out, show: String },
    { title: "Standard error", number: true, of: (file) => file.error, show: (value) => value.toFixed(2) },
  ];
  const gravity = (flag) => Object.keys(flags).indexOf(flag);
  const described = (file) =>
    !file.offset ? "not normalized" : file.tiles === 0 || (file.tiles === null && !run.given) ? "unchanged" : `taken away: a* ${signed(file.offset[0])}, b* ${signed(file.offset[1])}`;
  const flagsOf = (file) => file.flags.map((flag) => make("span", { class: "flag" }, flag))
    .flatMap((element, index) => (index ? [", ", element] : [element]));

  // --- what the page begins with

  function showFacts() {
    const failed = files.filter((file) => !file.offset).length;
    const facts = {
      Target: run.target,
      Weights: run.weights,
      Program: run.program,
      Written: run.date,
      Files: `${files.length - failed} of ${files.length} normalized` + (run.earlier ? `, ${run.earlier} by an earlier run` : ""),
      Flagged: `${files.filter((file) => file.flags.length).length}`,
    };
    if (run.given) facts.Offsets = "given by --offset, not estimated";
    if (run.profiles) facts.Results = "color profiles; the pictures show what they do";
    for (const [name, text] of Object.entries(facts))
      byId("facts").append(make("div", {}, make("dt", {}, name), make("dd", {}, isolated(text))));
    for (const [flag, meaning] of Object.entries(flags)) {
      const count = files.filter((file) => file.flags.includes(flag)).length;
      if (count)
        byId("flags").append(make("dt", {}, make("span", { class: "flag" }, flag), ` (${count})`), make("dd", {}, meaning));
    }
    if (!byId("flags").children.length) byId("flags").replaceWith(make("p", {}, "No file is flagged: none of these warnings applies. That does not say that the colors are right: look at the pictures."));
  }

  // --- the table

  const rows = files.map((file, index) =>
    make("tr", {}, ...COLUMNS.map((column, place) => {
      if (!place) return make("th", { scope: "row" }, make("a", { href: `#file-${index}`, "data-file": index }, isolated(file.name)));
      if (column.title === "Flags") return make("td", {}, ...flagsOf(file), ...said(file));
      const value = column.of(file);
      return make("td", column.number ? { class: "number" } : {}, value == null ? NONE : column.show ? column.show(value) : value);
    })));
  function said(file) {
    return file.message ? [make("p", {}, isolated(file.message))] : [];
  }

  const sorting = { column: null, descending: false };
  const heads = COLUMNS.map((column) => {
    const button = make("button", { type: "button" }, column.title);
    const head = make("th", { scope: "col", ...(column.number ? { class: "number" } : {}) }, button);
    button.addEventListener("click", () => {
      sorting.descending = sorting.column === column && !sorting.descending;
      sorting.column = column;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
      order();
    });
    return head;
  });

  const words = new Intl.Collator("en", { numeric: true });
  function compare(first, second) {
    const [a, b] = [first, second].map((index) => sorting.column.of(files[index]));
    if (a == null || b == null) return (a == null) - (b == null);
    return (sorting.descending ? -1 : 1) * (sorting.column.number ? a - b : words.compare(a, b));
  }

  // --- the pictures

  const cards = files.map((file, index) => {
    const head = make("h3", { id: `name-${index}`, tabindex: -1 }, isolated(file.name));
    const figures = [make("p", {}, described(file) + counted(file))];
    if (file.flags.length) figures.push(make("p", {}, ...flagsOf(file)));
    const card = make("article", { class: "card", id: `file-${index}`, "aria-labelledby": `name-${index}` }, head);
    if (byId(`pictures-${index}`)) card.append(pair(file, card));
    else if (file.offset) figures.push(make("p", {}, "No picture could be made."));
    card.append(...figures, ...said(file));
    return card;
  });

  function counted(file) {
    if (file.kind === "image" || !file.tiles) return "";
    return `, ${file.tiles} tile${file.tiles === 1 ? "" : "s"}` + (file.error === null ? "" : `, standard error ${file.error.toFixed(2)}`);
  }

  function pair(file, card) {
    const slider = make("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `Before and after: ${file.name}` });
    slider.addEventListener("input", () => {
      card.style.setProperty("--at", `${slider.value}%`);
      tell(slider);
    });
    tell(slider);
    const images = ["before", "after"].map((when) => make("img", { class: when, alt: `${file.name}, ${when}` }));
    return make("div", { class: "pair" }, ...images, slider, make("span", {}, "before"), make("span", {}, "after"));
  }

  function tell(slider) {
    slider.setAttribute("aria-valuetext", `left ${slider.value} % before, the rest after`);
  }

  /** Only pictures that are in view, or nearly, are decoded. */
  function show(card, isNear) {
    const [before, after] = card.querySelectorAll("img");
    if (!before || before.hasAttribute("src") === isNear) return;
    if (!isNear) return [before, after].forEach((image) => image.removeAttribute("src"));
    const texts = byId(card.id.replace("file", "pictures")).textContent.split(" ");
    [before.src, after.src] = texts.map((text) => `data:image/webp;base64,${text}`);
  }
  const watcher = new IntersectionObserver(
    (changes) => changes.forEach((change) => show(change.target, change.isIntersecting)), { rootMargin: "400px" });

  byId("divide").addEventListener("input", (event) => {
    byId("cards").style.setProperty("--at", `${event.target.value}%`);
    for (const card of cards) {
      card.style.removeProperty("--at");
      const slider = card.querySelector("input");
      if (slider) {
        slider.value = event.target.value;
        tell(slider);
      }
    }
  });

  // --- the plot

  // Where there is no tissue, and for label masks, nothing is estimated.
  const known = files.map((file, index) => index)
    .filter((index) => files[index].offset && (files[index].tiles || (run.given && files[index].tiles === null)));
  const sizes = folders.map(() => 0);
  for (const file of files) sizes[file.folder]++;
  const colored = folders.map((folder, number) => number).sort((a, b) => sizes[b] - sizes[a]).slice(0, COLORS.length);
  const colorOf = (number) => COLORS[colored.indexOf(number)] || OTHER;
  const dots = new Map();

  function plot() {
    const [left, top, side] = [58, 10, 490];
    const ranges = [0, 1].map((axis) => {
      const values = [0, ...known.map((index) => files[index].offset[axis])].sort((a, b) => a - b);
      return [values[0], values.at(-1)];
    });
    // Both axes have one scale, so that distances are what they look like.
    const span = Math.max(4, ...ranges.map(([low, high]) => high - low)) * 1.12;
    const start = ranges.map(([low, high]) => (low + high - span) / 2);
    const x = (a) => left + ((a - start[0]) / span) * side;
    const y = (b) => top + side - ((b - start[1]) / span) * side;
    const step = [1, 2, 5, 10, 20, 50, 100].find((size) => span / size <= 8) || 200;
    const axes = draw("g", { "aria-hidden": true }, draw("clipPath", { id: "inside" }, draw("rect", { x: left, y: top, width: side, height: side })));
    for (let k = Math.ceil(start[0] / step); k * step <= start[0] + span; k++) {
      axes.append(draw("line", { class: k ? "grid" : "zero", x1: x(k * step), x2: x(k * step), y1: top, y2: top + side }),
        draw("text", { x: x(k * step), y: top + side + 18, "text-anchor": "middle" }, tick(k * step)));
    }
    for (let k = Math.ceil(start[1] / step); k * step <= start[1] + span; k++) {
      axes.append(draw("line", { class: k ? "grid" : "zero", x1: left, x2: left + side, y1: y(k * step), y2: y(k * step) }),
        draw("text", { x: left - 6, y: y(k * step) + 5, "text-anchor": "end" }, tick(k * step)));
    }
    axes.append(
      draw("text", { x: left + side / 2, y: top + side + 42, "text-anchor": "middle" },
        "greener \u2190 a* offset, Lab units \u2192 redder"),
      draw("text", { transform: `translate(16 ${top + side / 2}) rotate(-90)`, "text-anchor": "middle" },
        "bluer \u2190 b* offset, Lab units \u2192 yellower"));
    byId("plot").append(axes);
    const usual = colored.filter((number) => folders[number].usual);
    byId("usual-help").hidden = !usual.length;
    for (const number of usual) {
      const [a, b, limit] = folders[number].usual;
      axes.append(draw("circle", { class: "usual", "clip-path": "url(#inside)", cx: x(a), cy: y(b), r: (limit / span) * side, stroke: colorOf(number) }));
    }
    for (const index of known) {
      const file = files[index];
      const name = [file.name, described(file), ...file.flags].join(", ");
      const circle = draw("circle", { class: "dot", cx: x(file.offset[0]), cy: y(file.offset[1]), r: 6, fill: colorOf(file.folder) });
      const link = draw("a", { href: `#file-${index}`, "data-file": index, "aria-label": name, tabindex: -1 },
        circle, draw("title", {}, name));
      link.classList.toggle("flagged", file.flags.length > 0);
      dots.set(index, link);
    }
    // Flagged dots lie on top.
    byId("plot").append(...[...dots.values()].sort((a, b) => a.classList.contains("flagged") - b.classList.contains("flagged")));
    if (folders.length < 2) return byId("legend").remove();
    const legend = colored.map((number) => [colorOf(number), folders[number].name || "(top folder)"]);
    if (folders.length > COLORS.length) legend.push([OTHER, "other folders"]);
    byId("legend").append(...legend.map(([color, name]) => make("li", {},
      draw("svg", { viewBox: "0 0 10 10", "aria-hidden": true }, draw("circle", { cx: 5, cy: 5, r: 5, fill: color })),
      isolated(name))));
  }
  const tick = (value) => String(value).replace("-", "\u2212");

  /** One dot can be reached by Tab; arrow keys lead to the next one in their direction. */
  byId("plot").addEventListener("keydown", (event) => {
    const axis = { ArrowLeft: 0, ArrowRight: 0, ArrowUp: 1, ArrowDown: 1 }[event.key];
    const link = event.target.closest("a");
    if (axis === undefined || !link) return;
    event.preventDefault();
    const ordered = known.filter((index) => !dots.get(index).hasAttribute("hidden"))
      .sort((a, b) => files[a].offset[axis] - files[b].offset[axis] || a - b);
    const by = event.key === "ArrowRight" || event.key === "ArrowUp" ? 1 : -1;
    const next = dots.get(ordered[ordered.indexOf(Number(link.dataset.file)) + by]);
    if (!next) return;
    link.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });

  // --- what is shown, and what is open

  function filter() {
    const text = byId("text").value.trim().toLowerCase();
    const isShown = (file) => (file.flags.length > 0 || !byId("flagged").checked)
      && (!text || `${file.name}\n${file.flags}\n${file.message}`.toLowerCase().includes(text));
    files.forEach((file, index) => {
      for (const element of [rows[index], cards[index], dots.get(index)]) element?.toggleAttribute("hidden", !isShown(file));
    });
    const drawn = [...dots.values()].filter((link) => !link.hasAttribute("hidden"));
    for (const link of dots.values()) link.setAttribute("tabindex", link === drawn[0] ? 0 : -1);
    byId("status").textContent = `${files.filter(isShown).length} of ${files.length} files shown`;
  }

  function order() {
    const indices = files.map((file, index) => index);
    if (sorting.column) indices.sort(compare);
    byId("table").tBodies[0].replaceChildren(...indices.map((index) => rows[index]));
    byId("cards").replaceChildren(...indices.map((index) => cards[index]));
  }

  function open(index) {
    for (const element of document.querySelectorAll("[aria-current]")) element.removeAttribute("aria-current");
    for (const element of [rows[index], cards[index], dots.get(index)]) element?.setAttribute("aria-current", true);
    cards[index].scrollIntoView({ block: "center" });
    (cards[index].querySelector("input") || cards[index].querySelector("h3")).focus({ preventScroll: true });
  }
  const openTarget = () => {
    const card = cards.find((card) => `#${card.id}` === location.hash);
    if (card) open(cards.indexOf(card));
  };
  document.addEventListener("click", (event) => {
    const link = event.target.closest("[data-file]");
    // After the browser has gone there, so that its button Back leads back.
    if (link) setTimeout(() => open(Number(link.dataset.file)));
  });

  showFacts();
  plot();
  byId("table").tHead.rows[0].append(...heads);
  order();
  filter();
  for (const card of cards) watcher.observe(card);
  for (const [id, kind] of [["text", "input"], ["flagged", "change"]]) byId(id).addEventListener(kind, filter);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("beforeprint", () => cards.forEach((card) => card.hidden || show(card, true)));
  for (const event of ["load", "hashchange"]) addEventListener(event, openTarget);
})();
