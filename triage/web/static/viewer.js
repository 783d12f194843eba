// <ct-viewer src="…/viewer.json">: the images of one study with what the network marked in them.
// Values are windowed here (DICOM PS3.3 C.11.2.1.2), so that no window waits for the server.
const PRESETS = {Lung: [1500, -600], Mediastinum: [400, 40], Bone: [2000, 300]};
const LOWEST = -1024, HIGHEST = 32767;
const MOST_BYTES = 200e6;   // of images kept here
const AT_ONCE = 4;          // requests
const PATIENCE = 300;       // milliseconds that the first image waits for what is marked
const UNPACKED = 2, LABEL = 1;  // bytes a pixel
const LARGEST = 12;         // times
const STEP = 40;            // pixels that a key moves the image

const KEYS = ["Wheel, ↑ ↓, Page ↑ ↓, one finger: images", "n, p: next, previous with lesion", "drag, Shift + arrows: window", "1, 2, 3: lung, mediastinum, bone", "o: overlay",
  "+ −, Ctrl + wheel, two fingers: zoom", "Ctrl + arrows, Ctrl or middle button + drag: move", "0, double click: whole image"];

const make = (tag, values = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), values);
  node.append(...children);
  return node;
};
const json = async address => {
  const response = await fetch(address);
  if (!response.ok) throw new Error(response.status === 404 ? "There are no images of this study to show." : "The images could not be read.");
  return response.json();
};
const NOTHING = {segments: [], areas: [], notes: [], start: 0, surfaces: false};
const lines = event => event.deltaMode ? event.deltaY * 40 : event.deltaY;
const within = (least, value, most) => Math.min(most, Math.max(least, value));
const colour = ([red, green, blue]) => `rgb(${red} ${green} ${blue})`;

class Images {
  // Images around the one that is shown, as many as fit; the farthest go first.
  constructor(scan, marked, arrived) {
    Object.assign(this, {scan, marked, arrived, known: new Map(), asked: new Set(), place: 0, failed: new Set()});
    this.most = Math.max(3, Math.floor(MOST_BYTES / (scan.rows * scan.columns * (UNPACKED + LABEL))));
  }

  at(place) {
    this.place = place;
    this.fill();
    return this.known.get(place);
  }

  fill() {
    const {numbers} = this.scan, reach = Math.min(numbers.length, Math.floor(this.most / 2));
    for (let step = 0; step <= reach && this.asked.size < AT_ONCE; step++)
      for (const place of new Set([this.place + step, this.place - step]))
        if (place in numbers && !this.known.has(place) && !this.asked.has(place) && !this.failed.has(place) && this.asked.size < AT_ONCE)
          this.ask(place);
  }

  async ask(place) {
    this.asked.add(place);
    try {
      const image = {hu: new Int16Array(await this.bytes("images", place))};
      this.known.set(place, image);
      this.arrived(place);
      await this.marked;
      if (this.scan.areas[place]?.some(area => area > 0)) image.labels = new Uint8Array(await this.bytes("labels", place));
      image.complete = true;
    } catch {
      this.failed.add(place);
    }
    this.asked.delete(place);
    while (this.known.size > this.most)
      this.known.delete([...this.known.keys()].reduce((a, b) => Math.abs(a - this.place) > Math.abs(b - this.place) ? a : b));
    this.arrived(place);
    this.fill();
  }

  async bytes(kind, place) {
    const response = await fetch(`${this.scan.address}/${kind}/${place}`);
    if (!response.ok) throw new Error(response.statusText);
    return response.arrayBuffer();
  }
}

class Viewer extends HTMLElement {
  async connectedCallback() {
    if (this.scan) return;
    try {
      this.scan = {...NOTHING, ...await json(this.getAttribute("src"))};
    } catch (error) {
      this.replaceChildren(make("p", {className: "fine", textContent: error.message}));
      return;
    }
    const middle = this.scan.numbers.length >> 1;
    this.shown = {place: middle, window: PRESETS.Lung, fill: false, opacity: .6, boxes: true, hidden: new Set(), zoom: 1, shift: [0, 0]};
    const marked = this.mark();
    this.images = new Images(this.scan, marked, place => place === this.shown.place && this.draw());
    const soon = await Promise.race([marked, new Promise(late => setTimeout(late, PATIENCE))]);
    if (soon) this.shown.place = this.scan.start;
    this.addEventListener("keydown", event => this.key(event));
    this.build();
    this.draw();
    if (soon) return;
    await marked;  // large masks: the images are there before
    this.build();
    this.go(this.shown.place === middle ? this.scan.start : this.shown.place);
  }

  async mark() {
    try {
      Object.assign(this.scan, await json(`${this.scan.address}/marks.json`));
    } catch {
      this.scan.notes = ["Without an overlay: what is marked could not be read."];
    }
    for (const {kind, value} of this.scan.segments) if (kind === "lung") this.shown.hidden.add(value);
    return true;
  }

  build() {
    const {rows, columns, spacing, edges, numbers} = this.scan;
    this.canvas = make("canvas", {width: columns, height: rows, className: "image"});
    this.overlay = make("canvas", {width: columns, height: rows, className: "overlay"});
    this.context = this.canvas.getContext("2d", {alpha: false, willReadFrequently: true});
    this.where = make("output", {className: "where"});
    this.windowed = make("output", {className: "windowed"});
    this.marked = make("output", {className: "marked"});
    this.film = make("div", {className: "film"}, this.canvas, this.overlay);
    this.film.style.setProperty("--shape", columns * spacing[1] / (rows * spacing[0]));
    const letters = Object.entries(edges).map(([edge, textContent]) => make("span", {className: `edge edge-${edge}`, textContent}));
    this.screen = make("div", {className: "screen", tabIndex: 0}, this.film, ...letters, this.where, this.windowed, this.marked);
    this.screen.setAttribute("role", "application");
    this.screen.setAttribute("aria-roledescription", "CT images");
    this.screen.setAttribute("aria-describedby", "viewer-keys");
    this.bar = this.lesionBar();
    const top = make("div", {className: "bench"}, this.screen, this.bar);
    const notes = this.scan.notes.map(textContent => make("p", {className: "fine", textContent}));
    const keys = make("p", {className: "fine keys", id: "viewer-keys"}, ...KEYS.map(text => make("span", {textContent: text})));
    this.space = make("div", {className: "space", hidden: true, tabIndex: 0});
    for (const [name, value] of Object.entries({role: "application", "aria-roledescription": "3D view", "aria-label": "Lungs, with the infection in red; arrows turn it"}))
      this.space.setAttribute(name, value);
    this.replaceChildren(top, this.tools(), this.space, ...notes, keys);
    this.listen(numbers.length);
  }

  tools() {
    const radios = (name, choices, chosen, change) => make("fieldset", {}, make("legend", {className: "unseen", textContent: name}),
      ...choices.map(([text, value]) => {
        const input = make("input", {type: "radio", name: `viewer-${name}`, checked: value === chosen});
        input.addEventListener("change", () => change(value));
        return make("label", {}, input, text);
      }));
    this.presets = radios("Window", Object.entries(PRESETS), PRESETS.Lung, window => this.set({window}));
    const tools = make("div", {className: "tools"}, this.presets);
    this.toggles = this.scan.segments.map(segment => {
      const input = make("input", {type: "checkbox", checked: !this.shown.hidden.has(segment.value)});
      input.addEventListener("change", () => {
        this.shown.hidden[input.checked ? "delete" : "add"](segment.value);
        this.draw();
      });
      const sample = make("i", {className: "sample"});
      sample.style.background = colour(segment.colour);
      return make("label", {}, input, sample, segment.label);
    });
    if (this.scan.boxes.length) {
      const input = make("input", {type: "checkbox", checked: true});
      input.addEventListener("change", () => this.set({boxes: input.checked}));
      this.toggles.push(make("label", {}, input, "Boxes with scores"));
    }
    if (this.toggles.length) {
      const opacity = make("input", {type: "range", min: 10, max: 100, step: 10, value: 100 * this.shown.opacity});
      opacity.addEventListener("input", () => this.set({opacity: opacity.value / 100}));
      tools.append(make("fieldset", {className: "toggles"}, make("legend", {className: "unseen", textContent: "Overlay"}), ...this.toggles),
        radios("Overlay as", [["Contour", false], ["Fill", true]], false, fill => this.set({fill})),
        make("label", {}, "Opacity", opacity));
    } else
      tools.append(make("span", {className: "fine", textContent: "Nothing is marked in these images."}));
    if (this.scan.surfaces) tools.append(this.solid = make("button", {type: "button", textContent: "3D view"}));
    this.solid?.setAttribute("aria-expanded", "false");
    this.solid?.addEventListener("click", () => this.space.hidden ? this.open3d() : this.close3d());
    return tools;
  }

  async open3d() {
    this.space.hidden = false;
    this.solid.setAttribute("aria-expanded", "true");
    const opening = this.opening = {}, givenUp = () => this.opening !== opening || !this.isConnected;  // by another click
    const say = textContent => givenUp() || this.space.replaceChildren(make("p", {textContent}));
    if (!this.scan.built) return say("The 3D view is not part of this installation. Whoever runs it can add it with deploy/install, where the npm registry can be reached.");
    if (!make("canvas").getContext("webgl2")) return say("This browser draws no 3D (WebGL 2 is off or missing).");
    say("Surfaces are being made …");
    try {
      const [{show}, surfaces] = await Promise.all([import("./built/view3d.js"), fetch(`${this.scan.address}/surfaces.glb`)]);
      if (!surfaces.ok) return say("The surfaces of this study cannot be drawn.");
      const bytes = await surfaces.arrayBuffer();
      if (givenUp()) return;
      this.space.replaceChildren();
      const end = await show(this.space, bytes);
      if (givenUp()) return end();
      this.end3d = end;
      this.space.dataset.shown = "";
    } catch {
      say("The 3D view could not be started.");
    }
  }

  close3d() {
    this.end3d?.();
    this.end3d = this.opening = null;
    delete this.space.dataset.shown;
    this.space.hidden = true;
    this.solid.setAttribute("aria-expanded", "false");
  }

  disconnectedCallback() {
    if (this.end3d) this.close3d();
  }

  lesionBar() {
    const {areas, segments, numbers} = this.scan, total = numbers.length;
    const lesions = segments.flatMap((one, n) => one.kind === "lesion" ? [n] : []), most = Math.max(1e-9, ...areas.map(area => lesions.reduce((sum, n) => sum + area[n], 0)));
    const canvas = make("canvas", {width: 100, height: total}), context = canvas.getContext("2d");
    areas.forEach((area, place) => {
      let left = 0;
      for (const n of lesions) {
        const wide = area[n] && Math.max(8, 100 * area[n] / most);
        context.fillStyle = colour(segments[n].colour);
        context.fillRect(left, place, wide, 1);
        left += wide;
      }
    });
    this.mark = make("div", {className: "mark"});
    const bar = make("div", {className: "lesion-bar", tabIndex: 0, title: "Lesion in each image; click to jump"}, canvas, this.mark);
    for (const [name, value] of Object.entries({role: "slider", "aria-label": "Image, with the area of lesion in each", "aria-orientation": "vertical", "aria-valuemin": 1, "aria-valuemax": total}))
      bar.setAttribute(name, value);
    const jump = event => {
      const {top, height} = bar.getBoundingClientRect();
      this.go(Math.floor((event.clientY - top) / height * total));
    };
    bar.addEventListener("pointerdown", event => {
      bar.setPointerCapture(event.pointerId);
      jump(event);
    });
    bar.addEventListener("pointermove", event => event.buttons && jump(event));
    return bar;
  }

  listen(total) {
    const touches = new Map();
    let turned = 0;
    const middle = () => {
      const [a, b = a] = touches.values();
      return {x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.hypot(a.x - b.x, a.y - b.y) || 1};
    };
    const begin = () => touches.forEach(touch => Object.assign(touch, {begun: touch.y, place: this.shown.place}));
    this.screen.addEventListener("wheel", event => {
      event.preventDefault();
      if (event.ctrlKey || event.metaKey) return this.look(Math.exp(-lines(event) / 400), event);  // a trackpad's pinch, too
      turned += lines(event);
      const steps = Math.trunc(turned / 40);
      turned -= 40 * steps;
      if (steps) this.go(this.shown.place + Math.sign(steps) * Math.min(Math.abs(steps), event.deltaMode || Math.abs(event.deltaY) >= 100 ? 1 : 10));
    }, {passive: false});
    this.screen.addEventListener("contextmenu", event => event.preventDefault());  // the right button sets the window, too
    this.screen.addEventListener("mousedown", event => event.button === 1 && event.preventDefault());  // no scrolling by itself
    this.screen.addEventListener("dblclick", () => this.look(0));
    this.screen.addEventListener("pointerdown", event => {
      this.screen.setPointerCapture(event.pointerId);
      touches.set(event.pointerId, {x: event.x, y: event.y});
      begin();
    });
    for (const kind of ["pointerup", "pointercancel"]) this.screen.addEventListener(kind, event => {
      touches.delete(event.pointerId);
      begin();
    });
    this.screen.addEventListener("pointermove", event => {
      const touch = touches.get(event.pointerId);
      if (!touch) return;
      const before = middle(), [width, centre] = this.shown.window, speed = Math.max(1, width / 400);
      Object.assign(touch, {x: event.x, y: event.y});
      const after = middle();
      if (touches.size > 1) this.look(after.apart / before.apart, before, after);
      else if (event.pointerType === "touch") this.go(touch.place + Math.round((touch.y - touch.begun) / this.screen.clientHeight * Math.min(total, 120)));
      else if (event.ctrlKey || event.metaKey || event.buttons & 4) this.look(1, before, after);
      else this.set({window: [width + speed * (after.x - before.x), centre + speed * (after.y - before.y)]});
    });
  }

  key(event) {
    if (event.altKey || event.target.matches("input") || this.space.contains(event.target)) return;
    const {place, window: [width, centre]} = this.shown, last = this.scan.numbers.length - 1, presets = Object.values(PRESETS);
    const magnify = {"+": () => this.look(1.25), "=": () => this.look(1.25), "-": () => this.look(.8), 0: () => this.look(0)};
    const keys = event.ctrlKey || event.metaKey ? {
      ArrowUp: () => this.move(0, STEP), ArrowDown: () => this.move(0, -STEP), ArrowLeft: () => this.move(STEP, 0), ArrowRight: () => this.move(-STEP, 0),
    } : event.shiftKey ? {
      ...magnify,
      ArrowUp: () => this.set({window: [width, centre + 20]}), ArrowDown: () => this.set({window: [width, centre - 20]}),
      ArrowRight: () => this.set({window: [width + 50, centre]}), ArrowLeft: () => this.set({window: [width - 50, centre]}),
    } : {
      ...magnify,
      ArrowUp: () => this.go(place - 1), ArrowDown: () => this.go(place + 1), ArrowLeft: () => this.go(place - 1), ArrowRight: () => this.go(place + 1),
      PageUp: () => this.go(place - 10), PageDown: () => this.go(place + 10), Home: () => this.go(0), End: () => this.go(last),
      n: () => this.next(1), p: () => this.next(-1), o: () => this.overlays(),
      1: () => this.set({window: presets[0]}), 2: () => this.set({window: presets[1]}), 3: () => this.set({window: presets[2]}),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    event.stopPropagation();
    keys[event.key]();
  }

  next(step) {
    const {areas, segments} = this.scan, marked = place => areas[place].some((area, n) => area && segments[n].kind === "lesion");
    for (let place = this.shown.place + step; place in areas; place += step)
      if (marked(place)) return this.go(place);
  }

  overlays() {
    const boxes = this.toggles.map(label => label.querySelector("input")), on = boxes.some(box => box.checked);
    for (const box of boxes) if (box.checked === on) box.click();
  }

  go(place) {
    this.shown.place = within(0, place, this.scan.numbers.length - 1);
    this.draw();
  }

  // So many times as large; what lay at one point then lies at the other. A shift is counted in images.
  look(times, from = this.centre(), to = from) {
    const {zoom, shift} = this.shown, centre = this.centre(), size = [this.film.offsetWidth, this.film.offsetHeight];
    this.shown.zoom = within(1, zoom * times, LARGEST);
    const grown = this.shown.zoom / zoom, reach = (this.shown.zoom - 1) / 2;
    this.shown.shift = ["x", "y"].map((axis, n) => within(-reach, (to[axis] - centre[axis] - (from[axis] - centre[axis]) * grown) / size[n] + shift[n] * grown, reach));
    this.draw();
  }

  move(x, y) {
    const from = this.centre();
    this.look(1, from, {x: from.x + x, y: from.y + y});
  }

  centre() {
    const {left, top, width, height} = this.screen.getBoundingClientRect();
    return {x: left + width / 2, y: top + height / 2};
  }

  set(changes) {
    Object.assign(this.shown, changes);
    const [width, centre] = this.shown.window;
    this.shown.window = [within(2, Math.round(width), 8000), within(-2000, Math.round(centre), 4000)];
    const known = Object.values(PRESETS).findIndex(preset => preset.join() === this.shown.window.join());
    this.presets.querySelectorAll("input").forEach((input, n) => { input.checked = n === known; });
    this.draw();
  }

  draw() {
    const {place, window: [width, centre], zoom, shift: [x, y]} = this.shown, {numbers, areas, segments} = this.scan, total = numbers.length;
    const image = this.images.at(place), name = `Image ${numbers[place]}`;
    this.where.textContent = numbers[place] === place + 1 ? `${name} of ${total}` : `${name} · ${place + 1} of ${total}`;
    this.windowed.textContent = `W ${width}  L ${centre}${zoom > 1 ? `  × ${zoom.toFixed(1)}` : ""}`;
    this.film.style.transform = zoom > 1 ? `translate(${100 * x}%, ${100 * y}%) scale(${zoom})` : "";
    const found = segments.flatMap((one, n) => one.kind === "lesion" && areas[place]?.[n] ? [`${one.label} ${areas[place][n] < 100 ? "<1" : Math.round(areas[place][n] / 100)} cm²`] : []);
    this.marked.textContent = this.images.failed.has(place) ? "This image cannot be read." : found.join(" · ");
    this.bar.setAttribute("aria-valuenow", place + 1);
    this.bar.setAttribute("aria-valuetext", [name, ...found].join(", "));
    this.mark.style.top = `${100 * (place + .5) / total}%`;
    this.dataset.place = image?.complete ? place : "";
    this.screen.classList.toggle("loading", !image && !this.images.failed.has(place));
    this.context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    const over = this.overlay.getContext("2d");
    over.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (!image) return;
    this.context.putImageData(this.greys(image.hu, width, centre), 0, 0);
    if (image.labels) over.putImageData(this.colours(image.labels), 0, 0);
    if (this.shown.boxes) this.drawBoxes(over, place);
  }

  greys(hu, width, centre) {
    if (this.table?.window !== `${width} ${centre}`) {
      const grey = new Uint8ClampedArray(HIGHEST - LOWEST + 1);
      for (let n = 0; n < grey.length; n++) grey[n] = Math.round(255 * ((n + LOWEST - (centre - .5)) / (width - 1) + .5));
      this.table = {window: `${width} ${centre}`, grey};
    }
    const data = this.context.createImageData(this.canvas.width, this.canvas.height), pixels = new Uint32Array(data.data.buffer), {grey} = this.table;
    for (let n = 0; n < pixels.length; n++) pixels[n] = 0xff000000 | grey[hu[n] - LOWEST] * 0x10101;
    return data;
  }

  colours(labels) {
    const {columns, rows, segments} = this.scan, {hidden, fill, opacity} = this.shown, data = new ImageData(columns, rows);
    for (const {value, colour: [red, green, blue]} of segments.toReversed()) {  // lesions over lungs
      if (hidden.has(value)) continue;
      const mask = value < 16 ? 15 : 240, is = n => (labels[n] & mask) === value;
      for (let n = 0; n < labels.length; n++) {
        const inside = is(n) && !fill && n % columns && (n + 1) % columns && n >= columns && n < labels.length - columns && is(n - 1) && is(n + 1) && is(n - columns) && is(n + columns);
        if (is(n) && !inside) data.data.set([red, green, blue, Math.round(255 * opacity)], 4 * n);
      }
    }
    return data;
  }

  drawBoxes(over, place) {
    const size = Math.max(10, Math.round(this.scan.columns / 36));
    Object.assign(over, {strokeStyle: "#ffe14d", fillStyle: "#ffe14d", lineWidth: Math.max(1, this.scan.columns / 512), font: `${size}px sans-serif`});
    for (const [at, top, left, bottom, right, score] of this.scan.boxes) {
      if (at !== place) continue;
      over.strokeRect(left - .5, top - .5, right - left + 1, bottom - top + 1);
      over.fillText(score.toFixed(2), left, top > size + 2 ? top - 3 : bottom + size);
    }
  }
}

customElements.define("ct-viewer", Viewer);
