// The browser's half of inpaint_lib.demo.MaskPainter: painting, layers, results, comparison.
//
// One ES module without dependencies, loaded by anywidget. From top to bottom:
//   1 geometry   which pixels a stroke covers (pure; the same arithmetic as `rasterize` in Python)
//   2 Board      the layers as arrays, kept equal to a history of strokes, with fast undo
//   3 view       where the picture lies on the screen (pure)
//   4 Stage      the canvas: drawing it, pointers, keyboard
//   5 panels     tools, methods, result cards, comparison, files
//   6 App        ties them to the widget's model; `render` at the end
//
// The history in the model (`strokes`, `position`) is the only truth. A view that starts late, after
// a page reload or as a second output, replays it; a stroke is sent once, when the pointer goes up.

// ---------------------------------------------------------------------------------------------
// 1 Geometry. Image pixels: x right, y down, pixel (row i, column j) has its centre at (j+.5, i+.5).
// Every shape is emitted as spans `emit(row, from, to)`, `to` excluded, inside the w x h picture.

const clamp = (v, lo, hi) => Math.min(Math.max(v, lo), hi);

/** Points are stored to an eighth of a pixel: short JSON, and exact in binary. */
export const round8 = v => Math.round(v * 8) / 8;

/** Width 1: the pixels of a straight line, one for each step along its longer axis. */
function thinSpans([x0, y0], [x1, y1], w, h, emit) {
  const n = Math.ceil(Math.max(Math.abs(x1 - x0), Math.abs(y1 - y0)));
  for (let k = 0; k <= n; k++) {
    const x = n ? Math.floor(x0 + (x1 - x0) * k / n) : Math.floor(x0);
    const y = n ? Math.floor(y0 + (y1 - y0) * k / n) : Math.floor(y0);
    if (x >= 0 && x < w && y >= 0 && y < h) emit(y, x, x + 1);
  }
}

/** Where the row at height py can meet the capsule: two discs and the band between them. */
function rowReach(x0, y0, dx, dy, l2, reach, py) {
  let lo = Infinity, hi = -Infinity;
  const take = (a, b) => { if (a <= b) { lo = Math.min(lo, a); hi = Math.max(hi, b); } };
  const disc = (x, oy) => { const d = Math.sqrt(reach * reach - oy * oy); take(x - d, x + d); };
  const oy = py - y0;
  disc(x0, oy);
  disc(x0 + dx, oy - dy);
  if (dy === 0) { if (Math.abs(oy) <= reach) take(Math.min(x0, x0 + dx), Math.max(x0, x0 + dx)); }
  else {
    const mid = x0 + oy * dx / dy, half = reach * Math.sqrt(l2) / Math.abs(dy);
    if (dx !== 0) {
      const s = x0 - oy * dy / dx, e = s + l2 / dx;
      take(Math.max(mid - half, Math.min(s, e)), Math.min(mid + half, Math.max(s, e)));
    } else if (oy * dy >= 0 && oy * dy <= l2) take(mid - half, mid + half);
  }
  return [lo, hi];
}

/** Width 2 and more: all pixel centres within width/2 of the segment.
    A capsule is convex, so a row of it is one span: the algebra of `rowReach` says where to look,
    a hair too wide, and the exact test, the same as in Python, decides at both ends. */
function capsuleSpans([x0, y0], [x1, y1], width, w, h, emit) {
  const dx = x1 - x0, dy = y1 - y0, l2 = dx * dx + dy * dy;
  const r = width / 2, r2 = r * r, reach = r + 1e-6;
  const inside = (px, py) => {
    const t = l2 > 0 ? clamp(((px - x0) * dx + (py - y0) * dy) / l2, 0, 1) : 0;
    const ex = px - x0 - t * dx, ey = py - y0 - t * dy;
    return ex * ex + ey * ey <= r2;
  };
  const top = Math.max(0, Math.ceil(Math.min(y0, y1) - reach - .5));
  const bottom = Math.min(h - 1, Math.floor(Math.max(y0, y1) + reach - .5));
  for (let i = top; i <= bottom; i++) {
    const [lo, hi] = rowReach(x0, y0, dx, dy, l2, reach, i + .5);
    let a = Math.max(0, Math.ceil(lo - .5)), b = Math.min(w - 1, Math.floor(hi - .5));
    while (a <= b && !inside(a + .5, i + .5)) a++;
    while (b > a && !inside(b + .5, i + .5)) b--;
    if (a <= b) emit(i, a, b + 1);
  }
}

/** One step of a brush or a line. */
export function segmentSpans(p, q, width, w, h, emit) {
  if (width === 1) thinSpans(p, q, w, h, emit);
  else capsuleSpans(p, q, width, w, h, emit);
}

function rectSpans([[x0, y0], [x1, y1]], w, h, emit) {
  const a = Math.max(0, Math.ceil(Math.min(x0, x1) - .5));
  const b = Math.min(w - 1, Math.floor(Math.max(x0, x1) - .5));
  const top = Math.max(0, Math.ceil(Math.min(y0, y1) - .5));
  const bottom = Math.min(h - 1, Math.floor(Math.max(y0, y1) - .5));
  if (a <= b) for (let i = top; i <= bottom; i++) emit(i, a, b + 1);
}

/** Even-odd polygon: each edge notes where it crosses the rows' centre lines; pairs are inside. */
function lassoSpans(points, w, h, emit) {
  const rows = new Map();
  points.forEach(([bx, by], k) => {
    const [ax, ay] = points[(k + points.length - 1) % points.length];
    const top = Math.max(0, Math.ceil(Math.min(ay, by) - .5));
    const bottom = Math.min(h - 1, Math.floor(Math.max(ay, by) - .5));
    for (let i = top; i <= bottom; i++) {
      const py = i + .5;
      if ((ay > py) === (by > py)) continue;
      if (!rows.has(i)) rows.set(i, []);
      rows.get(i).push((bx - ax) * (py - ay) / (by - ay) + ax);
    }
  });
  for (const [i, xs] of rows) {
    xs.sort((u, v) => u - v);
    for (let k = 0; k + 1 < xs.length; k += 2) {
      const a = Math.max(0, Math.ceil(xs[k] - .5)), b = Math.min(w, Math.ceil(xs[k + 1] - .5));
      if (a < b) emit(i, a, b);
    }
  }
}

/** The spans of any shape (brush, line, rect, lasso); whole-layer tools are the Board's business. */
export function spans({ tool, points, width }, w, h, emit) {
  if (tool === 'rect') rectSpans(points, w, h, emit);
  else if (tool === 'lasso') lassoSpans(points, w, h, emit);
  else if (points.length === 1) segmentSpans(points[0], points[0], width, w, h, emit);
  else for (let k = 1; k < points.length; k++) segmentSpans(points[k - 1], points[k], width, w, h, emit);
}

// ---------------------------------------------------------------------------------------------
// 2 Board. Painting notes the pixels that it changes as runs (start, length, old value), so undo is
// writing these back: its cost is that of the stroke, not of the picture.

const UNDO_LIMIT = 24e6;  // numbers kept in all, 4 bytes each; beyond, the oldest strokes are replayed
const ARRAYS = { mask: Uint8Array, edges: Int8Array, sketch: Uint8Array, structure: Uint32Array };

/** '#rrggbb' as one little-endian RGBA number, opaque; 0 stands for 'not drawn'. */
export function packColour(hex) {
  const n = parseInt(hex.slice(1), 16);
  return ((255 << 24) | ((n & 255) << 16) | (n & 0xff00) | (n >> 16)) >>> 0;
}

/** What a stroke writes where it covers. */
function inkOf({ layer, erase, color }) {
  if (erase) return layer === 'edges' ? -1 : 0;
  return layer === 'structure' ? packColour(color) : 1;
}

const sameStroke = (a, b) => a === b || JSON.stringify(a) === JSON.stringify(b);
const union = (a, b) => !a || !b ? a || b
  : { x0: Math.min(a.x0, b.x0), y0: Math.min(a.y0, b.y0), x1: Math.max(a.x1, b.x1), y1: Math.max(a.y1, b.y1) };

export class Board {
  constructor(w, h) {
    Object.assign(this, { w, h });
    this.reset();
  }

  reset() {
    this.layers = {};       // name -> array, made when first needed
    this.hole = 0;          // pixels of the mask
    this.done = [];         // a record {stroke, runs, box} for each stroke that counts, in order
    this.kept = 0;          // length of all undo runs
    this.dirty = this.whole;  // the box that is not on the screen yet
  }

  get whole() { return { x0: 0, y0: 0, x1: this.w, y1: this.h }; }
  layer(name) { return this.layers[name] ??= new ARRAYS[name](this.w * this.h); }

  /** What a record covers is what it changed, and what the screen has to show anew. */
  touch(record, box) {
    record.box = union(record.box, box);
    this.dirty = union(this.dirty, box);
  }

  /** Write `value` into [from, to) of the record's layer, noting what was there. */
  write(record, from, to, value) {
    const name = record.stroke.layer, data = this.layer(name);
    for (let i = from; i < to;) {
      const old = data[i];
      let j = i + 1;
      while (j < to && data[j] === old) j++;
      if (old !== value) {
        data.fill(value, i, j);
        record.runs.push(i, j - i, old);
        if (name === 'mask') this.hole += (value - old) * (j - i);
      }
      i = j;
    }
  }

  /** Run some geometry, writing the record's ink on each of its spans. */
  trace(record, geometry) {
    const ink = inkOf(record.stroke), box = { x0: this.w, y0: this.h, x1: 0, y1: 0 };
    geometry((i, a, b) => {
      this.write(record, i * this.w + a, i * this.w + b, ink);
      box.x0 = Math.min(box.x0, a); box.x1 = Math.max(box.x1, b);
      box.y0 = Math.min(box.y0, i); box.y1 = Math.max(box.y1, i + 1);
    });
    if (box.x0 < box.x1) this.touch(record, box);
  }

  /** One more step of a brush under way. */
  extend(record, p, q) {
    this.trace(record, emit => segmentSpans(p, q, record.stroke.width, this.w, this.h, emit));
  }

  /** Paint a stroke; the record returned can take it back. */
  draw(stroke) {
    const record = { stroke, runs: [], box: null }, { tool } = stroke;
    if (tool === 'invert') this.flip();
    else if (tool === 'clear') this.write(record, 0, this.w * this.h, 0);
    else if (tool === 'bitmap') this.stamp(record);
    else this.trace(record, emit => spans(stroke, this.w, this.h, emit));
    if (['invert', 'clear', 'bitmap'].includes(tool)) this.touch(record, this.whole);
    return record;
  }

  flip() {
    const mask = this.layer('mask');
    for (let i = 0; i < mask.length; i++) mask[i] ^= 1;
    this.hole = mask.length - this.hole;
  }

  /** A whole layer from run lengths that begin with 0s. */
  stamp(record) {
    const off = record.stroke.layer === 'edges' ? -1 : 0;
    let at = 0;
    record.stroke.runs.forEach((n, k) => {
      this.write(record, at, at + n, k % 2 ? 1 : off);
      at += n;
    });
  }

  revert({ stroke, runs, box }) {
    const data = this.layer(stroke.layer);
    if (stroke.tool === 'invert') this.flip();
    for (let k = runs.length - 3; k >= 0; k -= 3) {
      const at = runs[k], n = runs[k + 1], old = runs[k + 2];
      if (stroke.layer === 'mask') this.hole += (old - data[at]) * n;
      data.fill(old, at, at + n);
    }
    this.dirty = union(this.dirty, box);
  }

  /** Add a record to the history; forget how to undo the oldest when memory runs short. */
  keep(record) {
    record.runs = new Uint32Array(record.runs);     // -1 survives: writing it back wraps again
    this.kept += record.runs.length;
    this.done.push(record);
    for (const old of this.done) {
      if (this.kept <= UNDO_LIMIT) break;
      this.kept -= old.runs?.length ?? 0;
      old.runs = null;
    }
  }

  drop() {
    const record = this.done.pop();
    this.kept -= record.runs.length;
    this.revert(record);
  }

  /** Make the layers equal to the first `position` strokes, from wherever they are now. */
  follow(strokes, position) {
    let n = 0;
    while (n < Math.min(this.done.length, position) && sameStroke(this.done[n].stroke, strokes[n])) {
      this.done[n].stroke = strokes[n];             // the same object next time: compared at once
      n++;
    }
    if (this.done.slice(n).some(record => !record.runs)) { this.reset(); n = 0; }
    while (this.done.length > n) this.drop();
    while (this.done.length < position) this.keep(this.draw(strokes[this.done.length]));
  }
}

/** 'bin 20-30 %' for a hole ratio; a bin holds lo < ratio <= hi. */
export function binText(ratio, bins) {
  const bin = bins.find(([lo, hi]) => lo < ratio && ratio <= hi);
  return bin ? `bin ${bin.map(v => Math.round(v * 100)).join('-')} %` : 'no bin';
}

// ---------------------------------------------------------------------------------------------
// 3 View: the picture's corner (x, y) and scale, in CSS pixels of the stage.

export function fitView(stage, size) {
  const scale = Math.min(stage[0] / size[0], stage[1] / size[1]);
  return holdView({ scale, x: 0, y: 0 }, stage, size);
}

/** Keep the picture on the stage: centred where it is smaller, covering it where it is larger. */
export function holdView({ scale, x, y }, stage, size) {
  const hold = (v, room, length) => length <= room ? (room - length) / 2 : clamp(v, room - length, 0);
  return { scale, x: hold(x, stage[0], size[0] * scale), y: hold(y, stage[1], size[1] * scale) };
}

/** Zoom by a factor; the picture's point under (px, py) stays there. */
export function zoomView(view, factor, [px, py], stage, size) {
  const least = Math.min(fitView(stage, size).scale, 1), most = Math.max(32, least);
  const scale = clamp(view.scale * factor, least, most), f = scale / view.scale;
  return holdView({ scale, x: px - (px - view.x) * f, y: py - (py - view.y) * f }, stage, size);
}

// ---------------------------------------------------------------------------------------------
// Small helpers for the page

/** An element: make('div.ip-bar', { label: 'for screen readers' }, child, ...).
    JupyterLab takes keys such as x (cut this cell) from whatever has the focus, unless that very
    element carries its mark: so every control does. */
function make(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split('.'), node = document.createElement(tag);
  node.classList.add(...classes);
  if (tag === 'button') node.type = 'button';
  if (['button', 'input', 'select', 'canvas'].includes(tag)) node.dataset.lmSuppressShortcuts = 'true';
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'label') node.setAttribute('aria-label', value);
    else if (name === 'onclick') node.addEventListener('click', event => { if (!isOff(node)) value(event); });
    else if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (value !== false) node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.filter(child => child));
  return node;
}

/** Off for now, but still there for the keyboard: a button that is `disabled` drops the focus. */
const switchOff = (node, off) => node.setAttribute('aria-disabled', !!off);
const isOff = node => node.getAttribute('aria-disabled') === 'true';

/** Make a part of the page anew; the focus stays with the control of the same name, or goes to `otherwise`. */
function rebuild(part, otherwise, work) {
  const nameOf = node => node.getAttribute('aria-label') || node.value || node.textContent;
  const held = part.contains(document.activeElement) && nameOf(document.activeElement);
  const again = work() ?? part;
  if (!held || part.contains(document.activeElement)) return;
  const heir = [...again.querySelectorAll('button, input')].find(node => nameOf(node) === held);
  (heir ?? otherwise).focus({ preventScroll: true });
}

/** Scroll no farther than it takes to see the node. */
function reveal(node) {
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  node.scrollIntoView({ block: 'nearest', behavior: still ? 'auto' : 'smooth' });
}

const ICONS = {  // 24 x 24, drawn with a round pen
  Brush: 'M14 10 19.5 4.5a1.8 1.8 0 0 1 2.5 2.5L15 13M14 10c-4-.5-6 1.5-6.4 4.5C7.3 17 6 18.5 3.5 19c3.5 2.5 10.5 2 11.5-6z',
  Eraser: 'M8.5 19.5 3.7 14.7a2 2 0 0 1 0-2.8l8.2-8.2a2 2 0 0 1 2.8 0l5.6 5.6a2 2 0 0 1 0 2.8l-7.4 7.4zm0 0H20M7.6 8.1l8.3 8.3',
  Line: 'M5.5 18.5l13-13M4 20h.01M20 4h.01',
  Rectangle: 'M4 6.5h16v11H4z',
  Lasso: 'M7.5 16.5C4.6 15.5 3 13.7 3 11.5 3 8 7 5 12 5s9 3 9 6.5-4 6.5-9 6.5c-1 0-2-.1-3-.4M8.5 19.5a2 2 0 1 1 .8-3.6M8 19.5c.5 1-.3 2-1.5 2',
  Pan: 'M12 3v18M3 12h18M9.5 5.5 12 3l2.5 2.5M9.5 18.5 12 21l2.5-2.5M5.5 9.5 3 12l2.5 2.5M18.5 9.5 21 12l-2.5 2.5',
  Undo: 'M8 5 4 9l4 4M4 9h10a5.5 5.5 0 0 1 0 11h-4',
  Redo: 'M16 5l4 4-4 4M20 9H10a5.5 5.5 0 0 0 0 11h4',
  Clear: 'M4 7h16M9.5 7V4.5h5V7M6 7l1 13h10l1-13M10.2 11v5.5M13.8 11v5.5',
  Invert: 'M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 0 0 0-17zM12 3.5v17M12 8h7.4M12 12h8.4M12 16h7.4',
  'Zoom in': 'M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5 21 21M7.5 10.5h6M10.5 7.5v6',
  'Zoom out': 'M10.5 4a6.5 6.5 0 1 0 0 13 6.5 6.5 0 0 0 0-13zM15.5 15.5 21 21M7.5 10.5h6',
  Fit: 'M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5',
  'Open picture': 'M4 5h16v14H4zM4 16l4.5-4.5 4 4 3-3L20 17M14.5 9h.01',
  'Open mask': 'M4 5h16v14H4zM12 8.5c3 0 4.5 1.5 4.5 3.5s-1.5 3.5-4.5 3.5-4.5-1.5-4.5-3.5S9 8.5 12 8.5z',
  'Random hole': 'M5 4h14v16H5zM9 8.5h.01M15 8.5h.01M12 12h.01M9 15.5h.01M15 15.5h.01',
  'Save mask': 'M12 3.5v9.5M8.5 9.5 12 13l3.5-3.5M6.5 11.5C4.8 12.3 4 13.4 4 14.5c0 2.8 3.5 5 8 5s8-2.2 8-5c0-1.1-.8-2.2-2.5-3',
  'Save result': 'M12 3.5V15M8 11l4 4 4-4M7 7.5H4v12.5h16V7.5h-3',
  Close: 'M6 6l12 12M18 6 6 18',
};

function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('viewBox', '0 0 24 24');
  svg.setAttribute('aria-hidden', 'true');
  svg.innerHTML = `<path d="${ICONS[name]}"/>`;
  return svg;
}

/** A button with an icon, a label for screen readers and tooltip, and visible words if `words`. */
function button(label, onclick, { keys = '', words = false, image = label, kind = '' } = {}) {
  return make(`button.ip-button${kind}`, { label, title: keys ? `${label} (${keys})` : label, onclick },
              icon(image), words && make('span.ip-words', {}, label));
}

const group = (label, ...children) => make('div.ip-group', { role: 'group', label: label }, ...children);
const plain = (label, kind, onclick, title = label) =>
  make(`button.${kind}`, { label, title, onclick }, label);

const isEmpty = bytes => !bytes?.byteLength;

/** The kernel's bytes arrive as a DataView; their first byte tells PNG from JPEG. */
function blobOf(bytes) {
  const view = new Uint8Array(bytes.buffer ?? bytes, bytes.byteOffset ?? 0, bytes.byteLength);
  return new Blob([view], { type: view[0] === 0x89 ? 'image/png' : 'image/jpeg' });
}

/** An unreadable picture is none: the widget goes on without it. */
const decode = bytes => isEmpty(bytes) ? null : createImageBitmap(blobOf(bytes)).catch(() => null);

/** A drawing context of its own, w x h. */
const sheet = (w, h) => make('canvas', { width: w, height: h }).getContext('2d', { willReadFrequently: true });
const pixels = (ctx, w, h) => new Uint32Array(ctx.getImageData(0, 0, w, h).data.buffer);

function download(blob, name) {
  const url = URL.createObjectURL(blob);
  make('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// ---------------------------------------------------------------------------------------------
// 4 Stage: the canvas. Three pictures make one frame: the backdrop (photograph, drawn again when the
// view moves), the overlay (one pixel for each image pixel, redrawn only where something changed),
// and the cursor, an element of its own.

const rgba = (r, g, b, a) => ((Math.round(a * 255) << 24) | (b << 16) | (g << 8) | r) >>> 0;
const INK = {
  hole: rgba(255, 45, 110, .58), faint: rgba(255, 45, 110, .22), paper: rgba(255, 255, 255, .82),
  pencil: rgba(20, 24, 40, 1), away: rgba(120, 170, 255, .8),
  light: rgba(255, 255, 255, .9), dark: rgba(0, 0, 0, .7),
  drawn: rgba(60, 205, 255, 1), erased: rgba(255, 150, 40, 1), swept: rgba(255, 150, 40, .4),
};
const LEGEND = { edges: [['found', '#fff'], ['drawn', '#3ccdff'], ['erased', '#ff9628']] };
const DIM = { mask: 0, edges: .62, sketch: .15, structure: 0 };
const ZOOM_STEP = 1.25;

/** For each layer: (mask, data, base, fresh, w) -> the overlay's colour at pixel i. What lies outside the
    hole never reaches a network, so it is shown fainter; in the hole, a base of another hole says nothing. */
const SHADES = {
  mask: mask => i => mask[i] ? INK.hole : 0,
  edges: (mask, data, base, fresh) => i => {
    const grey = base && (fresh || !mask[i]) ? base[i] & 255 : 0, edge = grey > 40;
    if (data[i]) return data[i] > 0 ? INK.drawn : edge ? INK.erased : INK.swept;
    return edge ? rgba(255, 255, 255, grey / 255 * (mask[i] ? 1 : .4)) : mask[i] ? INK.faint : 0;
  },
  sketch: (mask, data) => i => data[i] ? (mask[i] ? INK.pencil : INK.away) : mask[i] ? INK.paper : 0,
  structure: (mask, data, base, fresh, w) => i => {
    if (!mask[i]) return data[i] && (data[i] & 0xffffff | 0x70000000) >>> 0;
    const rim = !(mask[i - 1] && mask[i + 1] && mask[i - w] && mask[i + w]);
    if (rim) return (i % w + (i / w | 0)) & 4 ? INK.light : INK.dark;         // a dashed line around the hole
    return data[i] || (base && fresh ? base[i] : INK.faint);
  },
};

/** One pixel more on every side: a rim depends on its neighbours. */
const grown = (box, w, h) => box && { x0: Math.max(box.x0 - 1, 0), y0: Math.max(box.y0 - 1, 0),
                                      x1: Math.min(box.x1 + 1, w), y1: Math.min(box.y1 + 1, h) };

class Stage {
  constructor(app) {
    this.app = app;
    this.canvas = make('canvas.ip-canvas', { role: 'application', tabindex: 0, label: 'Painting area',
      'aria-description': 'Arrow keys move the pen, with Shift ten pixels; Enter puts it down or lifts it' });
    this.cursor = make('div.ip-cursor', { hidden: true });
    this.node = make('div.ip-stage', {}, this.canvas, this.cursor);
    this.ctx = this.canvas.getContext('2d');
    this.backdrop = make('canvas');
    this.overlay = make('canvas');
    this.view = { scale: 1, x: 0, y: 0 };
    this.fitted = true;
    this.bases = {};        // layer -> {under: pixels of what lies under it, mask_key: of the hole it was made for}
    this.pointers = new Map();
    this.listen();
  }

  zoomButtons() {
    return group('Zoom', button('Zoom out', () => this.zoom(1 / ZOOM_STEP), { keys: '-' }),
                 button('Zoom in', () => this.zoom(ZOOM_STEP), { keys: '+' }),
                 button('Fit', () => this.fit(), { keys: '0' }));
  }

  // ---- pictures

  async setPicture(bytes) {
    this.wanted = bytes;
    const bitmap = await decode(bytes);
    if (bytes !== this.wanted) return;              // a newer picture overtook this one
    this.bitmap = bitmap;
    this.invalidate();
  }

  async setBases(bases) {
    this.wantedBases = bases;
    const [w, h] = this.app.size, found = {};
    for (const [layer, { picture, mask_key }] of Object.entries(bases)) {
      const ctx = sheet(w, h), bitmap = await decode(picture);
      if (bitmap) ctx.drawImage(bitmap, 0, 0, w, h);
      found[layer] = { under: pixels(ctx, w, h), mask_key };
    }
    if (bases !== this.wantedBases) return;
    this.bases = found;
    this.invalidate();
  }

  /** Was what lies under the layer made for the present hole? (Where nothing does: yes.) */
  get fresh() {
    const base = this.bases[this.app.layer];
    return !base || base.mask_key === this.app.get('mask_key');
  }

  // ---- size and view

  get room() { return [this.node.clientWidth, this.node.clientHeight]; }
  get fitting() { return fitView(this.room, this.app.size); }

  /** The stage takes the picture's shape as far as the window's height allows. */
  resize() {
    const [w, h] = this.app.size, width = this.node.clientWidth, ratio = window.devicePixelRatio || 1;
    if (!width) return;                             // hidden, as in a scrolled-away notebook cell
    const most = clamp(window.innerHeight * .72, 260, 640);
    this.node.style.height = `${Math.round(clamp(width * h / w, 180, most))}px`;
    for (const canvas of [this.canvas, this.backdrop])
      Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(this.node.clientHeight * ratio) });
    this.ratio = ratio;
    this.setView(this.fitted ? this.fitting : holdView(this.view, this.room, this.app.size));
  }

  setView(view) {
    this.view = view;
    this.canvas.dataset.view = `${view.scale} ${view.x} ${view.y}`;
    this.stale = true;                              // the backdrop
    this.schedule();
    this.showCursor();
  }

  fit() { this.fitted = true; this.setView(this.fitting); }

  /** Returns whether anything moved, so that a wheel at the limit still scrolls the page. */
  zoom(factor, at = this.cross ? this.spotAt(this.cross) : this.room.map(v => v / 2)) {
    const before = this.view.scale;
    this.setView(zoomView(this.view, factor, at, this.room, this.app.size));
    this.fitted = this.view.scale <= this.fitting.scale * 1.0001;
    return this.view.scale !== before;
  }

  panBy(dx, dy) {
    const { scale, x, y } = this.view;
    this.setView(holdView({ scale, x: x + dx, y: y + dy }, this.room, this.app.size));
  }

  spotAt([x, y]) { const { view } = this; return [x * view.scale + view.x, y * view.scale + view.y]; }

  spotOf(event) {                                   // CSS pixels of the stage
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  pointOf(event) {                                  // pixels of the picture
    const [px, py] = this.spotOf(event), { scale, x, y } = this.view;
    return [round8((px - x) / scale), round8((py - y) / scale)];
  }

  // ---- drawing

  /** Everything has to be drawn anew: another picture, base or layer. */
  invalidate() {
    this.stale = true;
    this.app.board.dirty = this.app.board.whole;
    this.schedule();
  }

  schedule() { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.paint(); }); }

  /** Put image pixels on a canvas: whole pixels can be seen when they are large. */
  place(ctx, picture, quality) {
    const { view, ratio } = this, scale = view.scale * ratio;
    ctx.setTransform(scale, 0, 0, scale, view.x * ratio, view.y * ratio);
    ctx.imageSmoothingEnabled = scale < 2;
    ctx.imageSmoothingQuality = quality;
    ctx.drawImage(picture, 0, 0, ...this.app.size);
  }

  paint() {
    const { canvas, ctx } = this;
    if (!canvas.width || !this.ratio) return;
    if (this.stale) this.paintBackdrop();
    this.paintOverlay();
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, canvas.width, canvas.height);
    ctx.drawImage(this.backdrop, 0, 0);
    this.place(ctx, this.overlay, 'low');
    this.app.showHole();
  }

  paintBackdrop() {
    const ctx = this.backdrop.getContext('2d');
    this.stale = false;
    ctx.setTransform(1, 0, 0, 1, 0, 0);
    ctx.clearRect(0, 0, this.backdrop.width, this.backdrop.height);
    if (!this.bitmap) return;
    this.place(ctx, this.bitmap, 'high');
    ctx.fillStyle = `rgba(10, 12, 18, ${DIM[this.app.layer]})`;
    ctx.fillRect(0, 0, ...this.app.size);
  }

  /** Bring the overlay up to date inside the board's dirty box, a band of rows at a time. */
  paintOverlay() {
    const { board, layer } = this.app, { w, h } = board, { fresh } = this;
    if (fresh !== this.wasFresh) board.dirty = board.whole;
    this.wasFresh = fresh;
    if (this.overlay.width !== w || this.overlay.height !== h) Object.assign(this.overlay, { width: w, height: h });
    const box = grown(board.dirty, w, h), width = box && box.x1 - box.x0;
    if (!box) return;
    board.dirty = null;
    const ctx = this.overlay.getContext('2d');
    const shade = SHADES[layer](board.layer('mask'), board.layer(layer), this.bases[layer]?.under, fresh, w);
    for (let y = box.y0; y < box.y1; y += 256) {
      const rows = Math.min(256, box.y1 - y), band = new ImageData(width, rows);
      const out = new Uint32Array(band.data.buffer);
      for (let i = 0, k = 0; i < rows; i++)
        for (let at = (y + i) * w + box.x0, end = at + width; at < end;) out[k++] = shade(at++);
      ctx.putImageData(band, box.x0, y);
    }
  }

  /** The colour that is seen at a pixel: drawn, structure in the hole, or photograph. */
  colourAt([x, y]) {
    const [w, h] = this.app.size, { board } = this.app, [j, i] = [Math.floor(x), Math.floor(y)], at = i * w + j;
    if (j < 0 || i < 0 || j >= w || i >= h || !this.bitmap) return null;
    const ctx = sheet(1, 1);
    ctx.drawImage(this.bitmap, -j, -i, w, h);
    const base = board.layer('mask')[at] && this.fresh && this.bases.structure?.under[at];
    const pixel = board.layer('structure')[at] || base || pixels(ctx, 1, 1)[0];
    return '#' + [0, 8, 16].map(bits => (pixel >> bits & 255).toString(16).padStart(2, '0')).join('');
  }

  // ---- the stroke under way

  begin(point, erase = false) {
    const { app } = this, eraser = app.tool === 'eraser';
    const stroke = { layer: app.layer, tool: eraser ? 'brush' : app.tool, erase: erase || eraser,
                     width: app.width, points: [point] };
    if (app.layer === 'structure') stroke.color = app.colour;
    this.live = { stroke, runs: [], box: null };
    this.grow([point]);
  }

  /** The pen went on: a brush adds steps, the other shapes are drawn anew. */
  grow(more) {
    const { board } = this.app, { stroke } = this.live, { points, tool } = stroke;
    if (tool === 'brush') for (const point of more) {
      const last = points.at(-1);
      board.extend(this.live, last, point);
      if (point[0] !== last[0] || point[1] !== last[1]) points.push(point);
    } else {
      board.revert(this.live);
      if (tool === 'lasso') points.push(...more); else points[1] = more.at(-1);
      this.live = board.draw(stroke);
    }
    this.schedule();
  }

  finish() {
    const { live } = this;
    this.live = null;
    if (live) this.app.commit(live);
  }

  abandon() {
    if (this.live) this.app.board.revert(this.live);
    this.live = null;
    this.schedule();
    this.app.follow();
  }

  // ---- pointers: mouse, pen and fingers

  listen() {
    const on = (name, handler, options) => this.canvas.addEventListener(name, handler.bind(this), options);
    on('pointerdown', this.down);
    on('pointermove', this.move);
    on('pointerup', this.up);
    on('pointercancel', this.up);
    on('pointerleave', () => { this.hover = null; this.showCursor(); });
    on('wheel', this.wheel, { passive: false });
    on('keydown', this.key);
    on('keyup', event => { if (event.key === ' ') this.space(false); });
    on('focus', this.showCursor);
    on('blur', () => { this.space(false); this.showCursor(); });
  }

  down(event) {
    const { pointerType, pointerId, button: pressed } = event, { app } = this;
    if (pointerType === 'touch' && this.penId !== undefined) return;           // a resting palm
    this.canvas.focus({ preventScroll: true });
    this.canvas.setPointerCapture(pointerId);
    this.pointers.set(pointerId, this.spotOf(event));
    if (pointerType === 'pen') this.penId = pointerId;
    if (this.pointers.size > 1) { this.abandon(); this.mode = 'pinch'; }
    else if (pressed === 1 || this.spaceHeld || app.tool === 'pan') this.mode = 'pan';
    else if (event.altKey && app.layer === 'structure') app.setColour(this.colourAt(this.pointOf(event)));
    else if (pressed === 0 || pressed === 5) this.startDrawing(event);
    event.preventDefault();
  }

  startDrawing(event) {
    this.finish();                                  // a pen that the keyboard left down
    this.mode = 'draw';
    this.cross = null;
    this.begin(this.pointOf(event), event.shiftKey || event.button === 5);    // 5: a pen's eraser
  }

  move(event) {
    this.hover = event.pointerType === 'touch' ? null : this.pointOf(event);
    this.showCursor();
    const last = this.pointers.get(event.pointerId), spot = this.spotOf(event);
    if (!last) return;
    this.pointers.set(event.pointerId, spot);
    if (this.mode === 'draw' && this.live) this.grow(this.pointsOf(event));
    else if (this.mode === 'pan') this.panBy(spot[0] - last[0], spot[1] - last[1]);
    else if (this.mode === 'pinch') this.pinch(event.pointerId, last, spot);
  }

  /** Every position that the device reported since the last event. */
  pointsOf(event) {
    const events = event.getCoalescedEvents?.() ?? [];
    return (events.length ? events : [event]).map(each => this.pointOf(each));
  }

  /** One of two fingers moved: zoom about their middle, then follow it. */
  pinch(id, last, spot) {
    const other = [...this.pointers].find(([key]) => key !== id)?.[1];
    if (!other) return;
    const apart = p => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
    this.zoom(apart(spot) / apart(last), last.map((v, k) => (v + other[k]) / 2));
    this.panBy((spot[0] - last[0]) / 2, (spot[1] - last[1]) / 2);
  }

  up(event) {
    this.pointers.delete(event.pointerId);
    if (event.pointerId === this.penId) this.penId = undefined;
    if (this.mode === 'draw') this.finish();
    if (!this.pointers.size) this.mode = null;      // after a pinch the last finger draws nothing
  }

  wheel(event) {
    if (!event.ctrlKey && document.activeElement !== this.canvas) return;      // the page scrolls
    const step = event.deltaMode ? event.deltaY * 16 : event.deltaY;
    const moved = this.zoom(Math.exp(-clamp(step, -100, 100) / 300), this.spotOf(event));
    if (moved || event.ctrlKey) event.preventDefault();
  }

  // ---- keyboard on the canvas: a cross that moves, a pen that is up or down

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key in steps) this.moveCross(steps[event.key].map(v => v * (event.shiftKey ? 10 : 1)));
    else if (event.key === 'Enter') this.togglePen();
    else if (event.key === ' ') this.space(true);
    else if (event.key === 'Escape' && this.live) this.abandon();
    else return;
    event.preventDefault();
  }

  /** The first arrow key shows the cross, in the middle; the next ones move it. */
  moveCross(step) {
    const { size } = this.app;
    this.cross = this.cross ? this.cross.map((v, k) => clamp(v + step[k], .5, size[k] - .5))
                            : size.map(v => Math.floor(v / 2) + .5);
    if (this.live) this.grow([this.cross]);
    const { room } = this, margin = Math.min(24, ...room.map(v => v / 4));
    const off = this.spotAt(this.cross).map((v, k) => clamp(v, margin, room[k] - margin) - v);
    if (off[0] || off[1]) this.panBy(...off);       // the cross would leave the stage
    this.showCursor();
    this.app.showHole();
  }

  togglePen() {
    if (!this.cross) this.moveCross();
    if (this.live) this.finish();
    else if (this.app.tool !== 'pan') this.begin(this.cross);
    this.app.showHole();
  }

  space(held) {
    this.spaceHeld = held;
    this.canvas.classList.toggle('ip-grab', held || this.app.tool === 'pan');
  }

  /** The brush's outline at the mouse, or the keyboard's cross. */
  showCursor() {
    const cross = document.activeElement === this.canvas && this.cross, at = cross || this.hover;
    this.cursor.hidden = !at || (this.app.tool === 'pan' && !cross);
    if (this.cursor.hidden) return;
    const { scale } = this.view, spot = this.spotAt(at), round = ['brush', 'eraser', 'line'].includes(this.app.tool);
    const size = Math.max(round ? this.app.width * scale : 1, 3);
    this.cursor.classList.toggle('ip-cross', !!cross || !round);
    Object.assign(this.cursor.style, { width: `${size}px`, height: `${size}px`,
      transform: `translate(${spot[0] - size / 2}px, ${spot[1] - size / 2}px)` });
  }
}

// ---------------------------------------------------------------------------------------------
// 5 Panels: functions that build a part of the page and keep it true with `app.watch(names, update)`.
// 'view' among the names stands for the choices of this view: tool, width, colour, card, what is drawn.

const TOOLS = [['brush', 'Brush', 'b'], ['eraser', 'Eraser', 'e'], ['line', 'Line', 'l'],
               ['rect', 'Rectangle', 'r'], ['lasso', 'Lasso', 'o'], ['pan', 'Pan', 'p']];
const LAYERS = { mask: 'Hole', edges: 'Edges', sketch: 'Sketch', structure: 'Structure' };
const AWAITED = { edges: 'EdgeConnect', structure: 'StructureFlow' };
const OUTDATED = { edges: 'edges of an earlier mask: press Fill for new ones',
                   structure: 'structure of an earlier mask: press Fill for a new one' };

function toolPanel(app) {
  const tools = TOOLS.map(([name, label, key]) => [name, button(label, () => app.setTool(name), { keys: key })]);
  const undo = button('Undo', () => app.go(-1), { keys: 'Ctrl+Z' });
  const redo = button('Redo', () => app.go(1), { keys: 'Ctrl+Shift+Z' });
  const clear = button('Clear', () => app.whole('clear'), { keys: 'this layer' });
  const invert = button('Invert', () => app.whole('invert'), { keys: 'i' });
  tools[1][1].title = 'Eraser (e); Shift erases with every tool';
  app.watch('strokes position layer view', () => {
    for (const [name, node] of tools) node.setAttribute('aria-pressed', name === app.tool);
    switchOff(undo, app.position === 0);
    switchOff(redo, app.position >= app.strokes.length);
    switchOff(invert, app.layer !== 'mask');
  });
  return make('div.ip-bar', {}, group('Tools', ...tools.map(([, node]) => node)), widthPanel(app),
              group('History', undo, redo, clear, invert));
}

function widthPanel(app) {
  const slider = make('input', { type: 'range', min: 1, label: 'Brush width', title: 'Brush width ([ and ])',
                                 oninput: () => app.setWidth(+slider.value) });
  const value = make('output');
  app.watch('size layer view', () => {
    slider.max = app.widest;
    slider.value = app.width;
    value.textContent = `${app.width} px`;
  });
  return make('label.ip-width', {}, slider, value);
}

function layerPanel(app) {
  const set = make('div.ip-layers', { role: 'radiogroup', label: 'Layer' }), name = `ip-layer-${++views}`;
  const colour = make('input', { type: 'color', label: 'Colour', oninput: () => app.setColour(colour.value),
                                 title: 'Colour (Alt-click on the picture takes one from there)' });
  const choice = layer => {
    const ready = app.editable(layer), title = ready ? '' : `appears after the first fill with ${AWAITED[layer]}`;
    const radio = make('input', { type: 'radio', name, value: layer, disabled: !ready,
                                  onchange: () => app.setLayer(layer) });
    return make('label', { title }, radio, make('span', {}, LAYERS[layer]));
  };
  app.watch('layers bases', () => {
    const offered = ['mask', ...app.get('layers', []).filter(layer => layer !== 'mask')];
    set.hidden = offered.length < 2;
    rebuild(set, app.stage.canvas, () => set.replaceChildren(...offered.map(choice)));
  });
  app.watch('layers bases layer view', () => {
    for (const radio of set.querySelectorAll('input')) radio.checked = radio.value === app.layer;
    colour.hidden = app.layer !== 'structure';
    colour.value = app.colour;
  });
  return make('div.ip-pair', {}, colour, set);
}

function filePanel(app) {
  const opener = what => {
    const input = make('input', { type: 'file', accept: 'image/*', hidden: true, label: `${what} file`,
      onchange: () => { app.sendFile(what, input.files[0]); input.value = ''; } });
    return [input, button(`Open ${what}`, () => input.click(), { words: true })];
  };
  const saver = (what, key) => button(`Save ${what}`, () => app.save(what, key()), { words: true });
  const result = saver('result', () => app.selected);
  app.watch('cards view', () => { switchOff(result, !app.selected); });
  return make('div.ip-pair.ip-files', {}, ...opener('picture'), ...opener('mask'), saver('mask', () => ''), result);
}

/** Two halves that show while a file is dragged over the widget. */
function dropPanel(app) {
  const zone = what => make('div.ip-zone', { ondrop: event => app.sendFile(what, event.dataTransfer.files[0]) },
                            icon(`Open ${what}`), make('span', {}, `Drop here: ${what}`));
  const node = make('div.ip-drop', { hidden: true }, zone('picture'), zone('mask'));
  const claim = (name, hidden) => app.root.addEventListener(name, event => {
    if (![...(event.dataTransfer?.types ?? [])].includes('Files')) return;
    event.preventDefault();                         // or the browser would leave the page for the file
    event.stopPropagation();
    node.hidden = hidden;
  });
  claim('dragover', false);
  claim('drop', true);
  app.root.addEventListener('dragleave', event => {
    if (!app.root.contains(event.relatedTarget)) node.hidden = true;
  });
  return node;
}

function randomPanel(app) {
  const ratio = make('input', { type: 'number', min: 1, max: 60, value: 25, label: 'Hole ratio',
                                title: 'Hole ratio in per cent, 1 to 60', onchange: () => percent() });
  const percent = () => ratio.value = ratio.value ? clamp(+ratio.value, 1, 60) : 25;      // what is no number reads as ''
  const kind = make('select', { label: 'Kind of hole' },
    make('option', { value: 'free_form' }, 'free-form'), make('option', { value: 'block' }, 'block'));
  const draw = () => app.send({ do: 'random', kind: kind.value, ratio: percent() / 100 });
  return make('div.ip-random', {}, button('Random hole', draw, { words: true }), kind,
              make('span.ip-percent', {}, ratio, '%'));
}

function methodPanel(app) {
  const list = make('div.ip-methods', {});
  const boxes = () => [...list.querySelectorAll('input')];
  const choose = wanted => app.put({ chosen: boxes().filter(wanted).map(box => box.value) });
  const row = ({ name, title, paper = '', ready, why = '' }) => {
    const box = make('input', { type: 'checkbox', label: title, value: name,
                                onchange: () => choose(each => each.checked) });
    const year = paper.match(/^[^,(]*\d{4}/)?.[0] ?? '';          // 'Nazeri et al. 2019', all of it as tooltip
    return make('label.ip-method', { 'data-ready': `${!!ready}`, title: ready ? paper : why }, box,
      make('span.ip-name', {}, title), make('span.ip-paper', {}, year),
      !ready && make('span.ip-why', {}, why));
  };
  const all = () => {
    const ready = app.get('methods', []).filter(method => method.ready).map(method => method.name);
    choose(box => !ready.length || ready.includes(box.value));
  };
  app.watch('methods', () => list.replaceChildren(...app.get('methods', []).map(row)));
  app.watch('methods chosen', () => {
    for (const box of boxes()) box.checked = app.get('chosen', []).includes(box.value);
  });
  const none = () => choose(() => false);
  return make('fieldset.ip-box', {}, make('legend', {}, 'Methods'),
    make('div.ip-allnone', {}, plain('All', 'ip-link', all), plain('None', 'ip-link', none)), list);
}

function runPanel(app) {
  const fill = plain('Fill', 'ip-fill', () => app.run(), 'Fill the hole with the methods chosen');
  const cancel = plain('Cancel', 'ip-cancel', () => app.send({ do: 'cancel' }));
  for (const node of [fill, cancel])                // Enter held down would fill, cancel, fill ...
    node.addEventListener('keydown', event => { if (event.repeat) event.preventDefault(); });
  const text = make('span.ip-doing', { 'aria-live': 'polite' }), clock = make('span.ip-clock', {});
  const bar = make('progress', { max: 1, label: 'Progress' });
  const progress = make('div.ip-progress', {}, make('div', {}, text, clock), bar);
  let since, seen, timer;
  const tick = () => {
    const { expected } = app.get('status', {}), seconds = Math.max(0, Date.now() / 1000 - since);
    clock.textContent = `${seconds.toFixed(1)} s` + (expected > 0 ? ` of about ${expected.toPrecision(2)} s` : '');
    if (expected > 0) bar.value = Math.min(seconds / expected, .98); else bar.removeAttribute('value');
  };
  app.watch('status error', () => { app.asked = false; app.changed(); });
  app.watch('status chosen view', () => {
    const { state = 'ready', text: words = '', started = 0 } = app.get('status', {}), busy = state !== 'ready';
    // The kernel's clock may differ from ours: trust it only for a run that began before this view did.
    if (started !== seen) since = seen === undefined ? started : Date.now() / 1000;
    seen = started;
    clearInterval(timer);
    if (busy) { timer = setInterval(tick, 100); tick(); }
    text.textContent = words;
    const held = document.activeElement;
    clock.hidden = bar.hidden = !busy;
    cancel.classList.toggle('ip-away', !busy);      // its place stays: a double click on Fill must not reach it
    progress.hidden = !busy && !words;
    switchOff(cancel, state === 'cancelling');
    switchOff(fill, busy || app.asked || !app.get('chosen', []).length);
    if (busy && held === fill) cancel.focus(); else if (!busy && held === cancel) fill.focus();
    app.root.dataset.state = state;
  });
  app.closing(() => clearInterval(timer));
  return make('div.ip-run', {}, make('div.ip-pair', {}, fill, cancel), progress);
}

const COLOURED = ['offsets', 'flow'];   // views whose colour is a direction

/** Result cards. A card's element lives as long as the card is unchanged, so focus and view stay. */
class Cards {
  constructor(app) {
    this.app = app;
    this.parts = new Map();                         // key -> {card, seal, node, image, name of the view, views}
    this.node = make('section.ip-cards', { label: 'Results' });
    app.watch('cards', () => this.update());
    app.watch('cards mask_key view', () => this.mark());
    app.watch('shown', () => this.receive());
    app.watch('status', () => this.present());
    app.closing(() => this.parts.forEach(part => this.forget(part)));
  }

  seal(card) { return JSON.stringify({ ...card, picture: card.picture?.byteLength }); }

  build(card) {
    const { app } = this, id = `ip-card-${++views}`, title = make('h4.ip-title', { id }, card.title);
    const part = { card, seal: this.seal(card), name: 'result', views: new Map() };
    part.image = make('img.ip-picture', { draggable: 'false' });
    part.stale = make('span.ip-stale', { title: 'Made for an earlier mask' }, 'earlier mask');
    part.chips = ['result', ...card.views].map(name => make('button.ip-chip', { 'data-view': name,
      onclick: () => this.look(part, name) }, name.replaceAll('_', ' ')));
    part.wheel = make('span.ip-wheel', { role: 'img', label: 'colour = direction', title: 'colour = direction' });
    const save = button(`Download ${card.title}`, () => app.save('result', card.key),
                        { image: 'Save result', kind: '.ip-quiet' });
    const seconds = make('span.ip-seconds', {}, card.seconds > 0 ? `${card.seconds.toFixed(2)} s` : '');
    part.node = make('article.ip-card', { 'data-key': card.key, 'aria-labelledby': id },
      make('header', {}, title, seconds, !card.error && save),
      card.error ? make('p.ip-error', {}, card.error)
        : make('button.ip-look', { title: 'Compare', onclick: () => app.select(card.key) }, part.image, part.stale),
      card.note && make('p.ip-note', {}, card.note),
      card.views.length && make('div.ip-chips', { role: 'group', label: 'Views' }, ...part.chips, part.wheel));
    return part;
  }

  bytesOf(key) {
    const part = this.parts.get(key);
    return part && (part.name === 'result' ? part.card.picture : part.views.get(part.name));
  }

  show(part) {
    const bytes = this.bytesOf(part.card.key);
    part.node.setAttribute('aria-busy', isEmpty(bytes) && !part.card.error);
    part.wheel.hidden = !COLOURED.includes(part.name);
    for (const chip of part.chips) chip.setAttribute('aria-pressed', chip.dataset.view === part.name);
    if (isEmpty(bytes)) return;
    URL.revokeObjectURL(part.image.src);
    part.image.src = URL.createObjectURL(blobOf(bytes));
    part.image.alt = `${part.card.title}: ${part.name.replaceAll('_', ' ')}`;
    this.app.changed();
  }

  /** Another view of a card: the kernel makes it when it is first wanted. */
  look(part, name) {
    part.name = name;
    if (name !== 'result' && !part.views.has(name)) this.app.send({ do: 'view', key: part.card.key, name });
    this.show(part);
  }

  receive() {
    const { key, name, picture } = this.app.get('shown', {}), part = this.parts.get(key);
    if (!part || isEmpty(picture)) return;
    part.views.set(name, picture);
    if (part.name === name) this.show(part);
  }

  forget(part) { URL.revokeObjectURL(part.image.src); part.node.remove(); }

  /** Put a new or changed card at its place. */
  place(card, k) {
    const { app, parts, node } = this, old = parts.get(card.key), part = this.build(card);
    parts.set(card.key, part);
    this.show(part);
    if (!card.error && !app.pinned) app.selected = card.key;                  // the newest, until one is chosen
    rebuild(old?.node ?? part.node, app.stage.canvas, () => {
      node.insertBefore(part.node, old?.node ?? node.children[k] ?? null);
      if (old) this.forget(old);
      return part.node;
    });
    this.latest ??= part;
  }

  /** The person who pressed Fill here, and has done nothing since, gets to see what came of it. */
  async present() {
    const { app, latest } = this;
    if (!latest || app.get('status', {}).state !== 'ready') return;
    this.latest = null;
    await latest.image.decode().catch(() => null);  // its height; a card may have no picture
    if (app.looking) reveal(latest.node);
  }

  update() {
    const { app, parts, node } = this, cards = app.get('cards', []), keys = cards.map(card => card.key);
    for (const [key, part] of parts) if (!keys.includes(key)) {
      rebuild(part.node, app.stage.canvas, () => this.forget(part));
      parts.delete(key);
    }
    cards.forEach((card, k) => { if (parts.get(card.key)?.seal !== this.seal(card)) this.place(card, k); });
    if (!this.titles().some(([key]) => key === app.selected)) Object.assign(app, { selected: '', pinned: false });
    node.hidden = !cards.length;
    app.changed();
  }

  mark() {
    for (const { card, node, stale } of this.parts.values()) {
      stale.hidden = !card.mask_key || card.mask_key === this.app.get('mask_key');
      node.classList.toggle('ip-selected', card.key === this.app.selected);
    }
  }

  /** [key, title] of the cards that have a picture, with the view that each shows. */
  titles() {
    return [...this.parts.values()].filter(({ card }) => !card.error).map(({ card, name }) =>
      [card.key, card.title + (name === 'result' ? '' : ` · ${name.replaceAll('_', ' ')}`)]);
  }
}

/** Two pictures over each other, parted by a line that follows the pointer. */
function comparePanel(app) {
  const pictures = [make('canvas'), make('canvas')];
  const left = make('select', { label: 'Left picture', onchange: () => app.changed() });
  const right = make('select', { label: 'Right picture', onchange: () => app.pick(right.value) });
  const range = make('input', { type: 'range', min: 0, max: 100, step: .5, value: 50, label: 'Wipe',
                                oninput: () => wipe() });
  const frame = make('div.ip-wipe', {}, ...pictures, make('div.ip-wipeline', { 'aria-hidden': 'true' }));
  const node = make('section.ip-compare', { label: 'Compare' }, make('div.ip-bar', {}, left, range, right), frame);

  const wipe = () => frame.style.setProperty('--ip-wipe', `${range.value}%`);
  const drag = event => {
    if (!(event.buttons & 1)) return;
    const box = frame.getBoundingClientRect();
    range.value = clamp((event.clientX - box.left) / box.width * 100, 0, 100);
    wipe();
  };
  frame.addEventListener('pointerdown', event => { frame.setPointerCapture(event.pointerId); drag(event); });
  frame.addEventListener('pointermove', drag);

  const offer = (select, options, value) => {
    select.replaceChildren(...options.map(([key, title]) => make('option', { value: key }, title)));
    select.value = options.some(([key]) => key === value) ? value : 'input';
  };
  app.watch('size view', () => {
    const cards = app.cards.titles(), [w, h] = app.size;
    const options = [['input', 'input'], ['masked', 'masked'], ...cards];
    node.hidden = !cards.length || !app.stage.bitmap;
    offer(left, options, left.value);
    offer(right, options, app.picked || app.selected);
    frame.style.width = `min(100%, ${Math.round(460 * w / h)}px)`;
    if (!node.hidden) [left, right].forEach((select, k) => paintSide(app, pictures[k], select.value));
  });
  wipe();
  return node;
}

/** Draw one side of the comparison, at most 1024 pixels long: enough for a cell. Drawn again only if
    its source changed; `masked` follows the mask. */
async function paintSide(app, canvas, key) {
  const [w, h] = app.size, scale = Math.min(1, 1024 / Math.max(w, h)), bytes = app.cards.bytesOf(key);
  const source = key === 'masked' ? {} : bytes ?? app.stage.bitmap;
  if (canvas.source === source) return;
  canvas.source = source;
  const bitmap = (bytes && await decode(bytes)) || app.stage.bitmap;
  if (canvas.source !== source) return;             // the choice changed meanwhile
  const width = Math.max(1, Math.round(w * scale)), height = Math.max(1, Math.round(h * scale));
  Object.assign(canvas, { width, height });
  const ctx = canvas.getContext('2d', { willReadFrequently: true });
  const fit = Math.min(width / bitmap.width, height / bitmap.height);
  const [bw, bh] = [bitmap.width * fit, bitmap.height * fit];                 // a view may have another shape
  ctx.imageSmoothingQuality = 'high';
  ctx.drawImage(bitmap, (width - bw) / 2, (height - bh) / 2, bw, bh);
  if (key === 'masked') greyHole(ctx, app.board, width, height);
}

function greyHole(ctx, board, width, height) {
  const image = ctx.getImageData(0, 0, width, height), out = new Uint32Array(image.data.buffer);
  const mask = board.layer('mask');
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const i = Math.floor((y + .5) * board.h / height) * board.w + Math.floor((x + .5) * board.w / width);
    if (mask[i]) out[y * width + x] = rgba(200, 200, 204, 1);
  }
  ctx.putImageData(image, 0, 0);
}

// ---------------------------------------------------------------------------------------------
// 6 App

const PIECE = 512 * 1024;   // bytes of a file in one message: small enough for every proxy
const BUSY = 2500;          // milliseconds without an answer before the kernel is called busy
const PATIENCE = 10000;     // and before help is offered; `data-patience` of the root counts instead
const CLOSED = ': its connection is closed.';
const LIFE = 'heard status shown cards';            // what only the kernel changes
let views = 0;              // radio buttons, and titles, of two views must not share a name

class App {
  constructor(model, el) {
    Object.assign(this, { model, tool: 'brush', colour: '#b0a090', widths: {}, selected: '', picked: '', saving: new Set() });
    this.root = make('div.ip-painter', { 'data-lm-suppress-shortcuts': 'true', tabindex: -1 });
    this.root.ipPainter = { layer: name => this.board.layer(name), strokes: () => this.strokes.length };  // for tests
    this.board = new Board(...this.size);
    this.viewers = [];
    this.endings = [];
    this.wire();
    this.build();
    el.append(this.root);
  }

  // ---- the model

  get(name, otherwise) { return this.model.get(name) ?? otherwise; }
  get size() { const size = this.get('size', []); return size.length === 2 ? size : [1, 1]; }
  get strokes() { return this.get('strokes', []); }
  /** Strokes and position may arrive one after the other: never more than there are. */
  get position() { return Math.min(this.get('position', 0), this.strokes.length); }
  get layer() { const layer = this.get('layer', 'mask'); return this.editable(layer) ? layer : 'mask'; }
  editable(layer) { return ['mask', 'sketch'].includes(layer) || layer in this.get('bases', {}); }

  put(values) {
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.model.save_changes();
  }

  send(message, buffers = [], callbacks) {
    this.expect();
    try { this.model.send(message, callbacks, buffers); }
    catch (error) { console.warn(error); this.lose(CLOSED); }
  }

  /** Something was said that needs an answer; the oldest question counts. Only what the kernel's half of this
      widget changes is one: a restarted kernel takes every message and says nothing. */
  expect() {
    const patience = +this.root.dataset.patience || PATIENCE;
    this.waits ??= [setTimeout(() => { this.late = true; this.showHole(); }, Math.min(BUSY, patience)),
                    setTimeout(() => this.lose(` for ${patience / 1000} s.`), patience)];
  }

  stopWaiting() {
    this.waits?.forEach(timer => clearTimeout(timer));
    this.waits = this.late = null;
  }

  answered() {
    this.stopWaiting();
    if (this.lost) { this.lost = ''; this.showAlert(); }
    this.showHole();
  }

  lose(how) {
    this.stopWaiting();
    this.asked = false;
    this.lost = `no answer from the kernel${how} If it was restarted, run the cell again; your drawing can be copied first:`;
    this.showAlert();
    this.changed();
  }

  on(event, handler) {
    this.model.on(event, handler);
    this.closing(() => this.model.off(event, handler));
  }

  /** Call the handler now and after each change, once the model has settled, however much changed. */
  watch(names, handler) {
    let due = false;
    const run = () => { due = false; if (!this.closed) handler(); };
    const soon = () => { if (!due) queueMicrotask(run); due = true; };
    for (const name of names.split(' '))
      if (name === 'view') this.viewers.push(soon); else this.on(`change:${name}`, soon);
    soon();
  }

  changed() { for (const soon of this.viewers) soon(); }
  closing(ending) { this.endings.push(ending); }

  // ---- the page

  wire() {
    this.watch('size picture', () => this.renew());
    this.watch('strokes position', () => this.follow());
    this.watch('bases', () => this.stage.setBases(this.get('bases', {})));
    this.watch('layer bases', () => this.showLayer());
    this.watch('mask_key', () => this.stage.schedule());
    this.watch('error', () => { if (this.get('error')) this.answered(); this.showAlert(); });
    this.watch(LIFE, () => this.answered());
    this.on('comm_live_update', () => {             // Jupyter marks the view while there is nobody to talk to
      if (this.root.closest('.jupyter-widgets-disconnected')) this.lose(CLOSED);
    });                                             // without the mark it is no answer: Voila's restarts end here too
    this.watch('heard status', () => this.hear());
    this.watch('title size', () =>
      this.title.replaceChildren(this.get('title') || 'Picture', make('small', {}, this.size.join(' × '))));
    this.watch('bins view', () => { this.showHole(); this.stage.showCursor(); });
    this.on('msg:custom', (message, buffers) => this.receive(message, buffers));
    this.root.addEventListener('keydown', event => this.key(event));
  }

  build() {
    this.stage = new Stage(this);
    this.cards = new Cards(this);
    this.title = make('span.ip-heading', {});
    this.alert = make('div.ip-alert', { role: 'alert', hidden: true });
    this.line = make('span.ip-line', { role: 'status', 'aria-live': 'polite' });
    this.legend = make('span.ip-legend', {});
    this.stage.node.append(dropPanel(this));
    this.root.append(this.alert,
      make('div.ip-bar.ip-top', {}, this.title, filePanel(this)),
      make('div.ip-bar.ip-toolbar', {}, toolPanel(this), layerPanel(this)),
      make('div.ip-main', {},
        make('div.ip-left', {}, this.stage.node,
          make('div.ip-bar.ip-under', {}, this.line, this.legend, this.stage.zoomButtons())),
        make('div.ip-side', {}, methodPanel(this), randomPanel(this), runPanel(this))),
      this.cards.node, comparePanel(this));
    this.watchSize();
    this.watchPerson();
  }

  /** Whoever scrolls, points or types after Fill is busy elsewhere. */
  watchPerson() {
    const busy = event => { if (event.type !== 'scroll' || event.target.contains(this.root)) this.looking = false; };
    const gone = new AbortController(), how = { capture: true, passive: true, signal: gone.signal };
    for (const name of ['scroll', 'wheel', 'pointerdown', 'keydown']) window.addEventListener(name, busy, how);
    this.closing(() => gone.abort());
  }

  /** The cell's width, and the screen's resolution: each media query watches one value of it. */
  watchSize() {
    const observer = new ResizeObserver(() => this.stage.resize());
    observer.observe(this.stage.node);
    let media;
    const next = () => {
      media?.removeEventListener('change', next);
      media = matchMedia(`(resolution: ${window.devicePixelRatio}dppx)`);
      media.addEventListener('change', next);
      this.stage.resize();
    };
    next();
    this.closing(() => { observer.disconnect(); media.removeEventListener('change', next); });
  }

  // ---- history

  /** A finished stroke: cut what was undone, append, tell the kernel. */
  commit(record) {
    const strokes = [...this.strokes.slice(0, this.position), record.stroke];
    if (this.board.done.length === this.position && !this.behind) this.board.keep(record);
    else this.board.revert(record);                 // the history moved under the pen: `follow` draws it
    this.ask({ strokes, position: strokes.length });
  }

  /** Clear or invert the layer. */
  whole(tool) {
    if (tool === 'invert' && this.layer !== 'mask') return;
    this.stage.finish();
    this.commit(this.board.draw({ layer: this.layer, tool, erase: false, width: 1, points: [] }));
  }

  /** Undo and redo. */
  go(step) {
    const position = this.position + step;
    if (position >= 0 && position <= this.strokes.length && !this.stage.live) this.ask({ position });
  }

  /** A change that the kernel will answer with `heard`. */
  ask(values) {
    clearTimeout(this.doubt);
    this.sentAt = performance.now();
    this.expect();
    this.put(values);
  }

  hear() {
    const { n, position, hole } = this.get('heard', {}), { dataset } = this.root;
    Object.assign(dataset, { heard: hole ?? '', heardPosition: position ?? '' });
    if (this.sentAt && n === this.strokes.length && position === this.position) {
      dataset.roundTrip = (performance.now() - this.sentAt).toFixed(1);
      this.sentAt = null;
    }
    clearTimeout(this.doubt);
    if (!this.agreed) this.doubt = setTimeout(() => this.insist(), 800);
  }

  /** Does the kernel have the history that is seen here? */
  get agreed() {
    const { n, position, hole } = this.get('heard', {});
    return n === this.strokes.length && position === this.position && (hole === this.board.hole || !!this.stage.live);
  }

  /** Both sides drew at the same moment, each unaware of the other, and nothing has moved since: what is seen here counts. */
  insist() { if (!this.agreed) this.send({ do: 'history', strokes: this.strokes, position: this.position }); }

  /** The history moved: bring the board along, unless a stroke is under way (then at its end). */
  follow() {
    this.behind = !!this.stage.live;
    if (this.behind) return;
    if (this.board.w !== this.size[0] || this.board.h !== this.size[1]) this.board = new Board(...this.size);
    this.board.follow(this.strokes, this.position);
    this.stage.schedule();
    this.changed();
  }

  /** Another picture, perhaps of another size. */
  async renew() {
    const { board, stage } = this, [w, h] = this.size;
    if (board.w !== w || board.h !== h) Object.assign(stage, { live: null, cross: null, fitted: true });
    this.follow();
    stage.resize();
    await stage.setPicture(this.get('picture'));
    this.changed();
  }

  // ---- messages

  run() {
    this.stage.finish();
    this.cards.latest = null;
    Object.assign(this, { asked: true, looking: true });
    this.changed();
    this.send({ do: 'run', methods: this.get('chosen', []), strokes: this.strokes, position: this.position });
  }

  /** The kernel's answer goes to every view: only the one that asked for it makes a file. */
  save(what, key) {
    const id = Math.random().toString(36).slice(2);
    this.saving.add(id);
    this.send({ do: 'save', what, key, id });
  }

  async sendFile(what, file) {
    if (!file) return;
    const of = Math.max(1, Math.ceil(file.size / PIECE));
    for (let index = 0; index < of; index++) {
      const piece = await file.slice(index * PIECE, (index + 1) * PIECE).arrayBuffer();
      this.send({ do: 'piece', what, name: file.name, index, of }, [piece],    // the same file again changes nothing
                { iopub: { status: () => this.stopWaiting() } });
    }
  }

  receive(message, buffers) {
    this.answered();
    if (message?.did === 'save' && this.saving.delete(message.id)) download(blobOf(buffers[0]), message.name);
  }

  /** The strokes that count, for `painter.strokes = json.loads(...)` in a new kernel. */
  async copyDrawing(node) {
    const text = JSON.stringify(this.strokes.slice(0, this.position));
    const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);   // it may not be allowed
    if (!copied) download(new Blob([text], { type: 'application/json' }), 'painter.json');
    node.ariaLabel = node.textContent = copied ? 'Copied' : 'Saved as painter.json';
  }

  // ---- choices of this view

  setTool(tool) { this.stage.finish(); this.tool = tool; this.stage.space(false); this.changed(); }
  setColour(colour) { if (colour) this.colour = colour; this.changed(); }
  setLayer(layer) { this.stage.finish(); this.put({ layer }); }
  setWidth(width) { this.widths[this.widthKey] = clamp(Math.round(width), 1, this.widest); this.changed(); }

  /** Each layer, and its eraser, remembers its own width. */
  get widthKey() { return this.layer + (this.tool === 'eraser' ? '-eraser' : ''); }
  get widest() { return Math.max(64, Math.round(Math.min(...this.size) / 2)); }
  get width() {
    const short = Math.min(...this.size);
    const first = { mask: short / 14, 'mask-eraser': short / 14, edges: 1, sketch: 2 }[this.widthKey] ?? short / 24;
    return this.widths[this.widthKey] ?? Math.max(1, Math.round(first));
  }

  /** The right side of the comparison: a card, which is then the one that 'Save result' saves, or the input. */
  pick(key) {
    const card = !isEmpty(this.cards.bytesOf(key));
    Object.assign(this, card ? { selected: key, pinned: true, picked: '' } : { picked: key });
    this.changed();
  }

  select(key) {
    this.pick(key);
    const panel = this.root.querySelector('.ip-compare');
    queueMicrotask(() => reveal(panel));
  }

  // ---- what is shown

  showLayer() {
    const { layer } = this;
    this.root.dataset.layer = layer;
    this.legend.replaceChildren(...(LEGEND[layer] ?? []).map(([text, colour]) =>
      make('span', {}, make('i', { style: `background:${colour}` }), text)));
    this.stage.invalidate();
    this.changed();
  }

  /** The status line: read out when it rests, silent while the pointer draws. */
  showHole() {
    const { board, stage, root, line } = this, ratio = board.hole / (board.w * board.h);
    Object.assign(root.dataset, { hole: board.hole, position: this.position });
    const parts = [`hole ${(ratio * 100).toFixed(1)} %`,
                   board.hole ? binText(ratio, this.get('bins', [])) : 'paint what is to be filled'];
    if (stage.cross) parts.push(`at ${stage.cross.map(Math.floor).join(', ')}${stage.live ? ', pen down' : ''}`);
    if (!stage.fresh) parts.push(OUTDATED[this.layer]);
    if (this.late) parts.push('the kernel is busy, drawing goes on');
    line.classList.toggle('ip-warn', !stage.fresh);
    const text = parts.join(' · ');
    line.setAttribute('aria-busy', !!stage.live && stage.mode === 'draw');
    if (line.textContent !== text) line.textContent = text;
  }

  showAlert() {
    const { lost, stage } = this, text = lost || this.get('error', '');
    const copy = () => plain('Copy drawing', 'ip-copy', event => this.copyDrawing(event.target), 'Its strokes as JSON');
    const dismiss = () => button('Dismiss', () => this.put({ error: '' }), { image: 'Close', kind: '.ip-quiet' });
    const parts = text ? [make('span', {}, text), lost ? copy() : dismiss()] : [];
    rebuild(this.alert, stage.canvas, () => this.alert.replaceChildren(...parts));
    this.alert.hidden = !text;
  }

  // ---- keys, wherever the focus is inside the widget

  key(event) {
    const key = event.key.toLowerCase(), command = event.ctrlKey || event.metaKey;
    if (event.altKey || event.target.matches('select, input[type=number]')) return;
    const act = command ? { z: () => this.go(event.shiftKey ? 1 : -1), y: () => this.go(1) }[key] : this.action(key);
    if (!act) return;
    act();
    event.preventDefault();
    event.stopPropagation();
  }

  action(key) {
    const tool = TOOLS.find(each => each[2] === key)?.[0], step = Math.max(1, Math.round(this.width / 10));
    if (tool) return () => this.setTool(tool);
    return { '[': () => this.setWidth(this.width - step), ']': () => this.setWidth(this.width + step),
             '+': () => this.stage.zoom(ZOOM_STEP), '=': () => this.stage.zoom(ZOOM_STEP),
             '-': () => this.stage.zoom(1 / ZOOM_STEP), 0: () => this.stage.fit(),
             i: () => this.whole('invert') }[key];
  }

  close() {
    this.closed = true;
    for (const ending of this.endings) ending();
    this.stopWaiting();
    clearTimeout(this.doubt);
    cancelAnimationFrame(this.stage.frame);
    this.root.remove();
  }
}

function render({ model, el }) {
  const app = new App(model, el);
  return () => app.close();
}

export default { render };
