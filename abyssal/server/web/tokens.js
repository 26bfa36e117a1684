// A long run of tokens as chips: the ends are shown, the middle on demand.
import { h } from './dom.js';
import { count } from './format.js';

const CHUNK = 500; // tokens that are made at once
const ENDS = 1000; // tokens shown at each end
const MORE = 4; // chunks that a press on the fold adds

/** Whether a text is a special token of the prompt format. */
export const isSpecial = (text) => /^<｜.*｜>$|^<\/?think>$|^｜DSML｜$/.test(text);

/** A token's text with its white space made visible; never empty. */
export function visible(text) {
  if (!text) return '∅';
  // many fonts lack the bars and underscores of the special tokens
  if (isSpecial(text)) return text.replaceAll('｜', '|').replaceAll('▁', '_');
  return text.replaceAll(' ', '·').replaceAll('\t', '⇥').replaceAll('\r', '␍').replaceAll('\n', '⏎');
}

/**
 * Chips for `texts`, whose first stands at position `start` of the sequence. `dress(chip, i)` colours a chip;
 * `select(position)` is called when the reader chooses one.
 */
export class TokenFlow {
  constructor(box, label, { start, texts, dress, select }) {
    this.start = start;
    this.texts = texts;
    this.dress = dress;
    this.chips = new Map();
    this.el = h('div', {
      class: 'flow', role: 'listbox', tabIndex: 0, 'aria-label': label, 'aria-orientation': 'horizontal',
    });
    this.el.addEventListener('click', (event) => {
      const chip = event.target.closest('.chip');
      if (chip) select(Number(chip.dataset.position));
    });
    this.open = new Set();
    const chunks = Math.ceil(texts.length / CHUNK);
    for (let i = 0; i < chunks; i++) {
      if (i * CHUNK < ENDS || (i + 1) * CHUNK > texts.length - ENDS) this.open.add(i);
    }
    this.parts = Array.from({ length: chunks }, () => null); // the element of each open chunk
    box.replaceChildren(this.el);
    this.#arrange();
  }

  get end() {
    return this.start + this.texts.length;
  }

  holds(position) {
    return position >= this.start && position < this.end;
  }

  /** The chip at a position, or undefined while it is folded away. */
  chip(position) {
    return this.chips.get(position);
  }

  /** Bring a position's chunk out of the fold. */
  reveal(position) {
    const chunk = Math.floor((position - this.start) / CHUNK);
    if (this.open.has(chunk)) return;
    this.open.add(chunk);
    this.#arrange();
  }

  /** The position one line above (-1) or below (1). */
  beside(position, direction) {
    const from = this.chip(position);
    const left = from.offsetLeft;
    let best = position;
    let line = null;
    for (let at = position + direction; this.holds(at) && this.chip(at); at += direction) {
      const { offsetTop, offsetLeft } = this.chip(at);
      if (offsetTop === from.offsetTop) continue;
      line ??= offsetTop;
      if (offsetTop !== line) break;
      const nearer = Math.abs(offsetLeft - left) < Math.abs(this.chip(best).offsetLeft - left);
      if (best === position || nearer) best = at;
    }
    return best;
  }

  #arrange() {
    const children = [];
    for (let chunk = 0; chunk < this.parts.length; chunk++) {
      if (this.open.has(chunk)) {
        children.push(this.parts[chunk] ??= this.#make(chunk));
        continue;
      }
      let last = chunk;
      while (last + 1 < this.parts.length && !this.open.has(last + 1)) last += 1;
      children.push(this.#fold(chunk, last));
      chunk = last;
    }
    this.el.replaceChildren(...children);
  }

  #make(chunk) {
    const part = h('span', { class: 'chunk', role: 'presentation' });
    const stop = Math.min((chunk + 1) * CHUNK, this.texts.length);
    for (let i = chunk * CHUNK; i < stop; i++) {
      const text = this.texts[i];
      const position = this.start + i;
      const props = { class: 'chip', role: 'option', id: `token-${position}`, 'aria-selected': 'false' };
      const chip = h('span', props, visible(text));
      chip.dataset.position = position;
      if (isSpecial(text)) chip.classList.add('special');
      if (text.includes('\uFFFD')) chip.classList.add('partial');
      this.dress(chip, i);
      this.chips.set(position, chip);
      part.append(chip);
      if (text.includes('\n')) part.append(h('br'));
    }
    return part;
  }

  #fold(first, last) {
    const from = first * CHUNK;
    const to = Math.min((last + 1) * CHUNK, this.texts.length);
    const show = (chunks) => () => {
      for (const chunk of chunks) this.open.add(chunk);
      this.#arrange();
      this.el.focus({ preventScroll: true });
    };
    const all = Array.from({ length: last - first + 1 }, (_, i) => first + i);
    const button = (words, chunks) => h('button', { type: 'button', class: 'button', onclick: show(chunks) }, words);
    const buttons = all.length <= MORE ? [button('Show them', all)] : [
      button(`Show the first ${count(MORE * CHUNK)} of them`, all.slice(0, MORE)),
      button(`Show the last ${count(MORE * CHUNK)}`, all.slice(-MORE)),
      button('Show all', all),
    ];
    return h(
      'div',
      { class: 'fold', role: 'presentation' },
      `${count(to - from)} tokens, positions ${count(this.start + from)} to ${count(this.start + to - 1)}`,
      ...buttons,
    );
  }
}
