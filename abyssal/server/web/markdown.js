// Markdown to DOM nodes: the part of it that models write. HTML in the text stays text.
import { copyButton, h } from './dom.js';

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?$/;
const NESTING = 12; // of lists, quotes and emphasis; deeper ones are shown as text

// ---- blocks -------------------------------------------------------------------------------------------------------

const isBlank = (line) => line.trim() === '';
const indentOf = (line) => line.length - line.trimStart().length;

function startsTable(lines, at) {
  return lines[at].includes('|') && TABLE_RULE.test(lines[at + 1]?.trim() ?? '');
}

/** Whether a line ends a paragraph before it. */
function interrupts(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line)
    || startsTable(lines, at);
}

function fenceEnd(lines, at) {
  const mark = FENCE.exec(lines[at])[1];
  const closing = new RegExp(`^ {0,3}\\${mark[0]}{${mark.length},}\\s*$`);
  let end = at + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  return end;
}

/** The items of the list that begins at `at`, each with its lines freed of the item's indent, and where it ends. */
function readList(lines, at) {
  const base = indentOf(lines[at]);
  const items = [];
  let fence = ''; // of an open code block, in which nothing is an item
  let end = at;
  for (; end < lines.length; end++) {
    const line = lines[end];
    const found = fence ? null : ITEM.exec(line);
    // two more spaces than the first item make a list inside it
    const isItem = found && found[1].length < base + 2;
    if (!fence && !isItem && !isBlank(line) && indentOf(line) <= base) {
      if (isBlank(lines[end - 1]) || interrupts(lines, end)) break;
    }
    if (isItem) items.push({ width: found[0].length, mark: found[2], lines: [line.slice(found[0].length)] });
    else items.at(-1).lines.push(line.slice(Math.min(indentOf(line), items.at(-1).width)));
    const inner = items.at(-1).lines.at(-1).trimStart();
    if (fence) fence = inner.startsWith(fence) ? '' : fence;
    else fence = FENCE.exec(inner)?.[1] ?? '';
  }
  return { items, end };
}

/** Cut lines into blocks: what each is, and its own lines. */
function blocksOf(lines) {
  const blocks = [];
  let at = 0;
  const add = (kind, end) => {
    blocks.push({ kind, lines: lines.slice(at, end) });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (isBlank(line)) at += 1;
    else if (FENCE.test(line)) add('code', Math.min(fenceEnd(lines, at) + 1, lines.length));
    else if (HEADING.test(line)) add('heading', at + 1);
    else if (RULE.test(line)) add('rule', at + 1);
    else if (QUOTE.test(line)) {
      let end = at + 1;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      add('quote', end);
    } else if (ITEM.test(line)) add('list', readList(lines, at).end);
    else if (startsTable(lines, at)) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes('|')) end += 1;
      add('table', end);
    } else {
      let end = at + 1;
      while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines, end)) end += 1;
      add('paragraph', end);
    }
  }
  return blocks;
}

function codeBlock(lines) {
  const [, mark, info] = FENCE.exec(lines[0]);
  const last = lines.at(-1).trim();
  const closed = lines.length > 1 && last.startsWith(mark) && last === mark[0].repeat(last.length);
  const code = h('code', {}, lines.slice(1, closed ? -1 : undefined).join('\n'));
  const language = info.trim().split(/\s+/)[0];
  return h(
    'figure',
    { class: 'code' },
    h('figcaption', {}, h('span', {}, language || 'text'), copyButton('Copy the code', () => code.textContent)),
    h('pre', { tabIndex: 0 }, code),
  );
}

function cellsOf(line) {
  const inner = line.trim().replace(/^\|/, '').replace(/(?<!\\)\|$/, '');
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'));
}

function table(lines) {
  const sides = cellsOf(lines[1]).map((rule) => {
    if (!rule.endsWith(':')) return 'start';
    return rule.startsWith(':') ? 'center' : 'end';
  });
  const row = (line, tag) => {
    const cells = cellsOf(line).slice(0, sides.length);
    return h('tr', {}, ...cells.map((cell, i) => h(tag, { class: `to-${sides[i]}` }, ...inline(cell))));
  };
  return h(
    'div',
    { class: 'table', tabIndex: 0, role: 'region', 'aria-label': 'Table' },
    h(
      'table',
      {},
      h('thead', {}, row(lines[0], 'th')),
      h('tbody', {}, ...lines.slice(2).map((line) => row(line, 'td'))),
    ),
  );
}

function list(lines, depth) {
  const { items } = readList(lines, 0);
  const ordered = /\d/.test(items[0].mark);
  const made = items.map((item) => {
    const nodes = render(item.lines, depth + 1);
    // a single line needs no paragraph, and gets no paragraph's distances
    if (nodes[0]?.tagName === 'P') nodes.splice(0, 1, ...nodes[0].childNodes);
    return h('li', {}, ...nodes);
  });
  return ordered ? h('ol', { start: parseInt(items[0].mark, 10) }, ...made) : h('ul', {}, ...made);
}

function block({ kind, lines }, depth) {
  if (kind === 'code') return codeBlock(lines);
  if (kind === 'rule') return h('hr');
  if (kind === 'table') return table(lines);
  if (kind === 'heading') {
    const [, marks, title] = HEADING.exec(lines[0]);
    // the page's own headings are h1 and h2
    return h(`h${Math.min(marks.length + 2, 6)}`, { class: `size-${marks.length}` }, ...inline(title));
  }
  if (kind !== 'paragraph' && depth < NESTING) {
    if (kind === 'list') return list(lines, depth);
    return h('blockquote', {}, ...render(lines.map((line) => line.replace(QUOTE, '')), depth + 1));
  }
  return h('p', {}, ...inline(lines.map((line) => line.trim()).join('\n')));
}

function render(lines, depth) {
  return blocksOf(lines).map((part) => block(part, depth));
}

// ---- inline -------------------------------------------------------------------------------------------------------

const MARKS = [['**', 'strong'], ['__', 'strong'], ['~~', 'del'], ['*', 'em'], ['_', 'em']];
const ADDRESS = /https?:\/\/[^\s<>"'`\\]+/y;
const LINK_TEXT = 1000; // most characters of a link's text, and of its address

const isSpace = (character) => character === undefined || /\s/.test(character);
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

function link(address, ...children) {
  return h('a', { href: address, target: '_blank', rel: 'noopener noreferrer' }, ...children);
}

/** `address` if it may be followed: http and https alone. */
function safeAddress(address) {
  try {
    const { protocol } = new URL(address);
    return protocol === 'http:' || protocol === 'https:' ? address : null;
  } catch {
    return null;
  }
}

/** A run of inline text, read from left to right. */
class Inline {
  constructor(text, depth) {
    this.text = text;
    this.depth = depth;
    this.nodes = [];
    this.plain = '';
    this.hopeless = new Set(); // marks without a partner further on, so that each is sought in vain once
  }

  read() {
    const { text } = this;
    let at = 0;
    while (at < text.length) {
      const end = this.special(at);
      if (end > at) at = end;
      else this.plain += text[at++];
    }
    this.flush();
    return this.nodes;
  }

  flush() {
    if (this.plain) this.nodes.push(document.createTextNode(this.plain));
    this.plain = '';
  }

  add(node, end) {
    this.flush();
    this.nodes.push(node);
    return end;
  }

  /** The end of the construct that begins at `at`, or `at` if none does. */
  special(at) {
    switch (this.text[at]) {
      case '\n': return this.add(h('br'), at + 1);
      case '\\': return this.escape(at);
      case '`': return this.code(at);
      case '!': return this.text[at + 1] === '[' ? this.link(at, at + 1) : at;
      case '[': return this.link(at, at);
      case '*': case '_': case '~': return this.emphasis(at);
      case 'h': return this.bareLink(at);
      default: return at;
    }
  }

  escape(at) {
    const next = this.text[at + 1];
    if (!next || !/[!-/:-@[-`{-~]/.test(next)) return at;
    this.plain += next;
    return at + 2;
  }

  /** The end of the code span at `at`, or -1. */
  codeEnd(at) {
    let length = 1;
    while (this.text[at + length] === '`') length += 1;
    const key = `code${length}`;
    if (this.hopeless.has(key)) return -1;
    const mark = '`'.repeat(length);
    for (let end = at + length; (end = this.text.indexOf(mark, end)) >= 0; ) {
      let run = length;
      while (this.text[end + run] === '`') run += 1;
      if (run === length) return end + length;
      end += run;
    }
    this.hopeless.add(key);
    return -1;
  }

  code(at) {
    const end = this.codeEnd(at);
    let length = 1;
    while (this.text[at + length] === '`') length += 1;
    if (end < 0) {
      this.plain += this.text.slice(at, at + length);
      return at + length;
    }
    let inner = this.text.slice(at + length, end - length).replaceAll('\n', ' ');
    if (inner.startsWith(' ') && inner.endsWith(' ') && inner.trim()) inner = inner.slice(1, -1);
    return this.add(h('code', {}, inner), end);
  }

  emphasis(at) {
    if (this.depth >= NESTING) return at;
    const found = MARKS.find(([mark]) => this.text.startsWith(mark, at));
    if (!found) return at;
    const [mark, tag] = found;
    const from = at + mark.length;
    if (isSpace(this.text[from]) || (mark[0] === '_' && isWord(this.text[at - 1]))) return at;
    const end = this.partner(mark, from);
    if (end < 0) return at;
    const inner = new Inline(this.text.slice(from, end), this.depth + 1).read();
    return this.add(h(tag, {}, ...inner), end + mark.length);
  }

  /** Where the mark that closes `mark` stands, or -1. */
  partner(mark, from) {
    if (this.hopeless.has(mark)) return -1;
    const { text } = this;
    let at = from;
    while (at < text.length) {
      if (text[at] === '\\') at += 2;
      else if (text[at] === '`') {
        const end = this.codeEnd(at);
        if (end > 0) at = end;
        else while (text[at] === '`') at += 1;
      } else if (text[at] === mark[0]) {
        let run = 1;
        while (text[at + run] === mark[0]) run += 1;
        // of ***, the last one or two close
        const fits = mark.length === 2 ? run >= 2 : run !== 2;
        const closes = fits && !isSpace(text[at - 1]) && (mark[0] !== '_' || !isWord(text[at + run]));
        if (closes && at > from) return at + run - mark.length;
        at += run;
      } else at += 1;
    }
    this.hopeless.add(mark);
    return -1;
  }

  /** A link, or an image, which becomes a link: pages of strangers are not loaded. */
  link(at, bracket) {
    if (this.depth >= NESTING || this.hopeless.has('](')) return at;
    const middle = this.text.indexOf('](', bracket);
    if (middle < 0) this.hopeless.add('](');
    if (middle < 0 || middle - bracket > LINK_TEXT) return at;
    let end = middle + 2;
    for (let open = 1; end < this.text.length && end - middle < LINK_TEXT; end++) {
      if (/\s/.test(this.text[end])) return at;
      if (this.text[end] === '(') open += 1;
      else if (this.text[end] === ')' && --open === 0) break;
    }
    if (this.text[end] !== ')') return at;
    const label = this.text.slice(bracket + 1, middle);
    const address = safeAddress(this.text.slice(middle + 2, end));
    if (!address || label.includes('[')) return at;
    const inner = label ? new Inline(label, NESTING).read() : [address]; // a link holds no links
    return this.add(link(address, ...inner), end + 1);
  }

  bareLink(at) {
    if (this.depth >= NESTING || isWord(this.text[at - 1])) return at;
    ADDRESS.lastIndex = at;
    const found = ADDRESS.exec(this.text);
    if (!found) return at;
    let address = found[0].replace(/[.,;:!?*_~]+$/, '');
    if (address.endsWith(')') && !address.includes('(')) address = address.slice(0, -1);
    if (!safeAddress(address)) return at;
    return this.add(link(address, address), at + address.length);
  }
}

function inline(text) {
  return new Inline(text, 0).read();
}

// ---- growing text -------------------------------------------------------------------------------------------------

/** Markdown that grows: only the blocks that have changed are made anew. */
export class Prose {
  constructor() {
    this.el = h('div', { class: 'prose' });
    this.sources = [];
  }

  /** Show a text. */
  show(text) {
    const blocks = blocksOf(text.replaceAll('\r\n', '\n').split('\n'));
    const sources = blocks.map((part) => part.lines.join('\n'));
    blocks.forEach((part, i) => {
      if (sources[i] === this.sources[i]) return;
      const node = block(part, 0);
      const old = this.el.children[i];
      if (old) old.replaceWith(node);
      else this.el.append(node);
    });
    while (this.el.children.length > blocks.length) this.el.lastChild.remove();
    this.sources = sources;
  }
}
