// What the context holds: tokens reused from the cache, read anew, and sampled.
import { h } from './dom.js';
import { count, percent } from './format.js';

const PARTS = [
  ['is-cached', 'cached', (usage) => usage.cached],
  ['is-fresh', 'new', (usage) => usage.prompt - usage.cached],
  ['is-answer', 'answer', (usage) => usage.answer],
];

const total = (usage) => usage.prompt + usage.answer;

function words(usage) {
  return PARTS.map(([, name, part]) => `${count(part(usage))} ${name}`).join(', ');
}

/** A bar of the three parts, as a share of `whole` tokens. */
export function usageBar(usage, whole) {
  const bar = h('span', { class: 'bar', role: 'img', 'aria-label': `${count(total(usage))} tokens: ${words(usage)}` });
  for (const [look, , part] of PARTS) {
    if (!part(usage)) continue;
    const segment = h('i', { class: look });
    segment.style.width = `${(100 * part(usage)) / whole}%`;
    bar.append(segment);
  }
  return bar;
}

/** A key of the three colours. */
export function usageKey(numbers = null) {
  return PARTS.map(([look, name, part]) =>
    h('span', { class: 'key' }, h('i', { class: look }), numbers ? `${count(part(numbers))} ${name}` : name));
}

/** The context's use, now and by request. */
export class ContextMeter {
  constructor(root, now, turns) {
    this.root = root;
    this.now = now;
    this.turns = turns;
    now.addEventListener('click', () => {
      turns.hidden = !turns.hidden;
      now.setAttribute('aria-expanded', String(!turns.hidden));
    });
  }

  /** Show the requests of a conversation against a context length, which may be unknown. */
  show(messages, length) {
    const used = messages.map((message) => message.usage).filter(Boolean);
    this.root.hidden = !used.length;
    if (!used.length) return;
    const last = used.at(-1);
    const share = length ? ` of ${count(length)} tokens (${percent(total(last) / length)})` : ' tokens';
    this.now.replaceChildren(
      usageBar(last, length || total(last)),
      h('span', { class: 'context-words' }, h('span', {}, `${count(total(last))}${share}`), ...usageKey(last)),
    );
    this.turns.replaceChildren(this.#table(used));
  }

  #table(used) {
    const most = Math.max(...used.map(total));
    const head = ['Cached', 'New', 'Answer', 'Reused'];
    const rows = used.map((usage, i) => h(
      'tr',
      {},
      h('th', { scope: 'row' }, String(i + 1)),
      h('td', { class: 'wide' }, usageBar(usage, most)),
      ...PARTS.map(([, , part]) => h('td', {}, count(part(usage)))),
      h('td', {}, percent(usage.cached / usage.prompt)),
    ));
    return h(
      'table',
      {},
      h('caption', {}, 'What each request read and wrote'),
      h('thead', {}, h(
        'tr',
        {},
        h('th', { scope: 'col' }, 'Request'),
        h('th', { scope: 'col', class: 'wide' }, 'Tokens'),
        ...head.map((name) => h('th', { scope: 'col' }, name)),
      )),
      h('tbody', {}, ...rows),
    );
  }
}
