// The blocks of a sequence as a strip, a row for each CSA layer; the chosen ones are lit.

const RULER = 12; // pixels of the line above the rows that shows what is prompt and what is answer
const LABEL = 34; // pixels left of the rows, for the layers' numbers
const GAP = 1;

const rowHeight = (rows) => (rows <= 6 ? 22 : rows <= 24 ? 13 : 8);

/** A canvas that shows blocks; `pick(layer, block)` and `hover(event, layer, block)` are called. */
export class BlockStrip {
  constructor(canvas, { pick, hover }) {
    this.canvas = canvas;
    this.view = null;
    canvas.addEventListener('click', (event) => {
      const found = this.#under(event);
      if (found) pick(found.layer, found.block);
    });
    canvas.addEventListener('pointermove', (event) => {
      const found = this.#under(event);
      hover(event, found?.layer, found?.block);
    });
    canvas.addEventListener('pointerleave', (event) => hover(event));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /**
   * Show a view: { blocks, ratio, prompt, cached, tokens, layers, layer, seen }. `layers` holds for each layer how
   * bright each block is, a Map from block to 0..1; blocks from `seen` on did not exist yet.
   */
  show(view) {
    this.view = view;
    const rows = view.layers.length;
    this.canvas.style.height = `${RULER + 4 + rows * (rowHeight(rows) + GAP)}px`;
    this.draw();
  }

  /** Draw again, in the colours of the theme. */
  draw() {
    const { canvas, view } = this;
    const { clientWidth, clientHeight } = canvas;
    if (!view || !clientWidth) return;
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(clientWidth * scale);
    canvas.height = Math.round(clientHeight * scale);
    const context = canvas.getContext('2d');
    context.scale(scale, scale);
    const colour = this.#colours();
    const x = (position) => LABEL + ((clientWidth - LABEL) * position) / (view.blocks * view.ratio);
    const band = (from, to, y, height) => context.fillRect(x(from), y, Math.max(x(to) - x(from), 1), height);

    for (const [from, to, fill] of [
      [0, view.cached, colour.cached],
      [view.cached, view.prompt, colour.fresh],
      [view.prompt, view.tokens, colour.answer],
    ]) {
      context.fillStyle = fill;
      if (to > from) band(from, to, 2, RULER - 6);
    }

    const height = rowHeight(view.layers.length);
    const width = (clientWidth - LABEL) / view.blocks;
    const gap = width >= 4 ? 1 : 0;
    context.font = `${Math.min(height - 1, 11)}px sans-serif`;
    context.textAlign = 'right';
    context.textBaseline = 'middle';
    view.layers.forEach((lit, layer) => {
      const y = RULER + layer * (height + GAP);
      const active = layer === view.layer;
      context.fillStyle = active ? colour.ink : colour.muted;
      if (height > 9 || active) context.fillText(String(layer), LABEL - 8, y + height / 2);
      context.fillStyle = colour.empty;
      band(0, view.seen * view.ratio, y, height);
      context.fillStyle = active ? colour.lit : colour.dim;
      for (const [block, bright] of lit) {
        context.globalAlpha = Math.max(bright, 0.12);
        context.fillRect(LABEL + block * width, y, Math.max(width - gap, 1), height);
      }
      context.globalAlpha = 1;
      if (active) {
        context.strokeStyle = colour.ink;
        context.strokeRect(LABEL - 0.5, y - 0.5, clientWidth - LABEL, height + 1);
      }
    });
    if (view.at !== null) {
      context.fillStyle = colour.ink;
      context.fillRect(x(view.at) - 0.75, 0, 1.5, clientHeight);
    }
  }

  #colours() {
    // a canvas does not know CSS variables: let an element resolve them
    const names = { cached: '--cached', fresh: '--fresh', answer: '--answer', ink: '--ink', muted: '--muted',
      empty: '--raised', lit: '--lit', dim: '--lit-dim' };
    const probe = document.createElement('i');
    this.canvas.parentElement.append(probe);
    const colours = {};
    for (const [name, variable] of Object.entries(names)) {
      probe.style.color = `var(${variable})`;
      colours[name] = getComputedStyle(probe).color;
    }
    probe.remove();
    return colours;
  }

  #under({ offsetX, offsetY }) {
    const { view } = this;
    if (!view) return null;
    const block = Math.floor(((offsetX - LABEL) / (this.canvas.clientWidth - LABEL)) * view.blocks);
    const layer = Math.floor((offsetY - RULER) / (rowHeight(view.layers.length) + GAP));
    const inside = block >= 0 && block < view.blocks && layer >= 0 && layer < view.layers.length;
    return inside ? { layer, block } : null;
  }
}
