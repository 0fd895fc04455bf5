// The heat map: a cell for each routed expert, brighter the more it is used, white for a moment when it is chosen.

const GLOW_MS = 500; // in which a flash fades to a third
const DENSE = 0.35; // the glow of a flash where half of a layer is chosen at once
const FAINT = 0.03; // a glow that is not worth drawing
const COLD = 0.12; // how far from the background a cell is that was never chosen

/** Draws on `canvas`; `onPoint(cell)` is told the cell under the pointer or the keys, or null. */
export class HeatMap {
  constructor(canvas, onPoint) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d", { alpha: false });
    this.onPoint = onPoint;
    this.rows = this.columns = 0; // layers, experts
    this.glowing = new Set();
    this.pointed = null;
    this.moment = 0;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
    canvas.addEventListener("pointermove", (event) => this.#point(this.#cellAt(event.offsetX, event.offsetY)));
    canvas.addEventListener("pointerleave", () => this.#point(null));
    canvas.addEventListener("blur", () => this.#point(null));
    canvas.addEventListener("keydown", (event) => this.#move(event));
  }

  /** `heat` and `places`: a byte for each expert, layer by layer, `perToken` of whom are chosen at once. */
  show(layers, experts, heat, places, perToken) {
    this.bright = Math.max(DENSE, 1 - 2 * perToken / experts);
    if (this.rows !== layers || this.columns !== experts) {
      [this.rows, this.columns] = [layers, experts];
      this.glow = new Float32Array(layers * experts);
      this.glowing.clear();
    }
    [this.heat, this.places] = [heat, places];
    this.draw();
  }

  /** These were chosen just now. */
  flash(cells) {
    if (this.calm.matches || !this.glow) return;
    const idle = this.glowing.size === 0;
    for (const cell of cells) {
      this.glow[cell] = this.bright;
      this.glowing.add(cell);
    }
    if (idle && cells.length) {
      this.moment = performance.now();
      requestAnimationFrame((now) => this.#fade(now));
    }
  }

  /** Everything, at the size that there is room for. */
  draw() {
    const frame = getComputedStyle(this.canvas.parentElement);
    const padding = parseFloat(frame.paddingLeft) + parseFloat(frame.paddingRight);
    const width = this.canvas.parentElement.clientWidth - padding;
    if (!this.rows || !(width > 0)) return;
    const long = Math.max(this.rows, this.columns);
    this.across = (width / long >= 2) === (this.columns === long) ? this.columns : this.rows;
    this.turned = this.across !== this.columns; // experts go down, not across
    this.down = this.turned ? this.columns : this.rows;
    const scale = devicePixelRatio;
    const height = this.down * Math.min(26, Math.max(3, Math.round(300 / this.down)));
    [this.canvas.width, this.canvas.height] = [width * scale, height * scale];
    [this.canvas.style.width, this.canvas.style.height] = [`${width}px`, `${height}px`];
    [this.stepX, this.stepY] = [this.canvas.width / this.across, this.canvas.height / this.down];
    const least = Math.min(this.stepX, this.stepY);
    this.gap = least >= 5 * scale ? Math.round(scale) : Number(least >= 3);
    this.colours = this.#readColours();
    this.pen.fillStyle = `rgb(${this.colours.ground})`;
    this.pen.fillRect(0, 0, this.canvas.width, this.canvas.height);
    for (let cell = 0; cell < this.rows * this.columns; cell++) this.#drawCell(cell);
  }

  #readColours() {
    const style = getComputedStyle(this.canvas);
    const numbers = (name) => {
      this.canvas.style.color = `var(${name})`;
      return style.color.match(/[\d.]+/g).slice(0, 3).map(Number);
    };
    const places = ["--place-ram", "--place-card", "--place-drive"].map(numbers);
    return { ground: numbers("--night"), flash: numbers("--flash"), places };
  }

  #drawCell(cell) {
    const { ground, flash, places } = this.colours;
    const share = COLD + (1 - COLD) * this.heat[cell] / 255;
    const glow = this.glow[cell];
    const place = places[this.places[cell]];
    this.pen.fillStyle = `rgb(${ground.map((part, i) => mix(mix(part, place[i], share), flash[i], glow))})`;
    const [x, y] = this.#corner(cell);
    const [left, top] = [Math.round(x * this.stepX), Math.round(y * this.stepY)];
    const width = Math.round((x + 1) * this.stepX) - left - this.gap;
    const height = Math.round((y + 1) * this.stepY) - top - this.gap;
    this.pen.fillRect(left, top, width, height);
    if (cell !== this.pointed) return;
    const line = Math.min(2 * devicePixelRatio, width / 2, height / 2); // inside, so that neighbours stay as they are
    this.pen.strokeStyle = `rgb(${flash})`;
    this.pen.lineWidth = line;
    this.pen.strokeRect(left + line / 2, top + line / 2, width - line, height - line);
  }

  #fade(now) {
    const factor = Math.exp((this.moment - now) / GLOW_MS);
    this.moment = now;
    for (const cell of this.glowing) {
      this.glow[cell] *= factor;
      if (this.glow[cell] < FAINT) {
        this.glow[cell] = 0;
        this.glowing.delete(cell);
      }
      this.#drawCell(cell);
    }
    if (this.glowing.size) requestAnimationFrame((then) => this.#fade(then));
  }

  // -- pointing -----------------------------------------------------------------------------------------------------

  /** Column and row of the canvas at which a cell is. */
  #corner(cell) {
    const [row, column] = [Math.floor(cell / this.columns), cell % this.columns];
    return this.turned ? [row, column] : [column, row];
  }

  #cellOf(x, y) {
    return this.turned ? x * this.columns + y : y * this.columns + x;
  }

  #cellAt(left, top) {
    const x = Math.floor(left * devicePixelRatio / this.stepX);
    const y = Math.floor(top * devicePixelRatio / this.stepY);
    return x >= 0 && y >= 0 && x < this.across && y < this.down ? this.#cellOf(x, y) : null;
  }

  #point(cell) {
    if (cell === this.pointed || !this.rows) return;
    const before = this.pointed;
    this.pointed = cell;
    for (const each of [before, cell]) if (each !== null) this.#drawCell(each);
    this.onPoint(cell, cell === null ? null : this.#middle(cell));
  }

  /** Where a cell is on the page, from the corner of the canvas. */
  #middle(cell) {
    const [x, y] = this.#corner(cell);
    return [(x + 0.5) * this.stepX / devicePixelRatio, (y + 0.5) * this.stepY / devicePixelRatio];
  }

  #move(event) {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step || !this.rows) return;
    event.preventDefault();
    const [x, y] = this.pointed === null ? [-step[0], -step[1]] : this.#corner(this.pointed);
    this.#point(this.#cellOf(clamp(x + step[0], this.across), clamp(y + step[1], this.down)));
  }
}

const mix = (from, to, share) => from + (to - from) * share;
const clamp = (at, size) => Math.min(size - 1, Math.max(0, at));
