// The messages of a conversation as the reader sees them.
import { copyButton, h, icon, iconButton } from './dom.js';
import { count, plural, seconds } from './format.js';
import { Prose } from './markdown.js';
import { usageBar } from './meter.js';

const ENDINGS = {
  length: 'Cut off: the answer reached the most tokens it may have.',
  insufficient_system_resource: 'Cut off: the server ran out of room.',
  content_filter: 'Cut off by the server.',
};
const AT_BOTTOM = 48; // pixels that still count as the bottom

const wordsIn = (text) => text.split(/\s+/).filter(Boolean).length;

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

/** Read a text area's Enter as "done", Shift+Enter as a new line; not while an input method composes. */
export function onEnter(area, act) {
  area.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    act();
  });
}

/** Make a text area as high as its text. */
export function fit(area) {
  area.style.height = 'auto';
  area.style.height = `${area.scrollHeight + 2}px`;
}

class UserView {
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    this.el = h('article', { class: 'message user' });
    this.rest();
  }

  rest() {
    const { content } = this.message;
    this.editing = false;
    this.edit = iconButton('edit', 'Edit this message', () => this.begin());
    this.el.replaceChildren(
      h('h2', { class: 'sr-only' }, 'You'),
      h('div', { class: 'bubble', tabIndex: content.length > 1200 ? 0 : -1 }, content),
      h('div', { class: 'actions' }, copyButton('Copy this message', () => content), this.edit),
    );
  }

  begin() {
    const area = h('textarea', { 'aria-label': 'Edit your message', value: this.message.content, rows: 1 });
    const send = () => {
      if (area.value.trim()) this.acts.edit(this.message, area.value);
    };
    const cancel = () => {
      this.rest();
      this.edit.focus();
    };
    area.addEventListener('input', () => fit(area));
    area.addEventListener('keydown', (event) => {
      if (event.key !== 'Escape') return;
      event.stopPropagation();
      cancel();
    });
    onEnter(area, send);
    this.editing = true;
    this.el.replaceChildren(h(
      'div',
      { class: 'editor' },
      area,
      h('p', { class: 'hint' }, 'What came after this message is dropped.'),
      h(
        'div',
        { class: 'actions-row' },
        h('button', { type: 'button', class: 'button', onclick: cancel }, 'Cancel'),
        h('button', { type: 'button', class: 'button primary', onclick: send }, 'Send'),
      ),
    ));
    fit(area);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }

  update({ running }) {
    if (running && this.editing) this.rest();
    this.edit.disabled = running;
  }
}

class CallCard {
  constructor(call, acts) {
    this.acts = acts;
    this.el = h('section', { class: 'call' });
    this.shown = '';
  }

  /** `result` is the tool's message or null; `open` says that the reader may give one. */
  update(call, result, open) {
    const state = result ? (result.failed ? 'failed' : 'done') : open ? 'open' : 'coming';
    const shown = JSON.stringify([call, result?.content, state]);
    if (shown === this.shown) return; // what the reader types into the card stays
    this.shown = shown;
    const { name, arguments: given } = call.function;
    const badge = { failed: 'failed', done: 'done', open: 'waits for you', coming: 'calling' }[state];
    this.el.setAttribute('aria-label', `Call of ${name}`);
    this.el.replaceChildren(
      h('header', {}, icon('tool'), h('code', {}, name), h('span', { class: `badge ${state}` }, badge)),
      h('pre', { class: 'arguments', tabIndex: 0, 'aria-label': 'Arguments' }, pretty(given) || '{}'),
      ...(result ? [h('pre', { class: 'result', tabIndex: 0, 'aria-label': 'Result' }, pretty(result.content))] : []),
      ...(state === 'open' ? [this.#form(call)] : []),
    );
  }

  #form(call) {
    const area = h('textarea', { 'aria-label': `Result of ${call.function.name}`, rows: 2, placeholder: 'The result' });
    const give = (event) => {
      event.preventDefault();
      this.acts.result(call, area.value);
    };
    area.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) give(event);
    });
    return h(
      'form',
      { class: 'give', onsubmit: give },
      area,
      h('button', { class: 'button primary', title: 'Ctrl+Enter' }, 'Give the result'),
    );
  }
}

class AnswerView {
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    this.cards = [];
    this.touched = false; // the reader folded or unfolded the thinking
    this.thinkingWords = h('span');
    this.thinkingText = document.createTextNode('');
    this.thinking = h(
      'details',
      { class: 'thinking', hidden: true },
      h('summary', { onclick: () => { this.touched = true; } }, icon('chevron'), this.thinkingWords),
      h('div', { class: 'thoughts' }, this.thinkingText),
    );
    this.prose = new Prose();
    this.calls = h('div', { class: 'calls' });
    this.note = h('p', { class: 'note', hidden: true });
    this.status = h('p', { class: 'status', hidden: true });
    this.foot = h('footer', { class: 'foot', hidden: true });
    this.el = h(
      'article',
      { class: 'message answer' },
      h('h2', { class: 'sr-only' }, 'Answer'),
      this.thinking, this.prose.el, this.calls, this.note, this.status, this.foot,
    );
  }

  /** Show the message as it is now; `results` are the tools' messages by call. */
  update({ running, last, results, callsOpen }) {
    const { message } = this;
    const live = message.state === 'running';
    this.#updateThinking(live);
    this.prose.show(message.content);
    message.calls.forEach((call, i) => {
      if (!this.cards[i]) {
        this.cards[i] = new CallCard(call, this.acts);
        this.calls.append(this.cards[i].el);
      }
      this.cards[i].update(call, results.get(call.id) ?? null, callsOpen && last);
    });
    while (this.cards.length > message.calls.length) this.cards.pop().el.remove();
    this.#updateNote();
    this.#updateStatus(live);
    this.foot.hidden = live;
    if (!live) this.#updateFoot(last && !running);
  }

  #updateThinking(live) {
    const { message } = this;
    this.thinking.hidden = !message.reasoning;
    if (!message.reasoning) return;
    const now = live && message.thoughtTo === null;
    const shown = this.thinkingText.data.length;
    if (message.reasoning.length > shown) this.thinkingText.appendData(message.reasoning.slice(shown));
    const took = (message.thoughtTo ?? (Date.now() - message.began) / 1000) - (message.thoughtFrom ?? 0);
    const tokens = message.usage?.reasoning;
    const size = tokens ? plural(tokens, 'token') : plural(wordsIn(message.reasoning), 'word');
    this.thinkingWords.textContent = `${now ? 'Thinking' : 'Thought'} for ${seconds(took)}, ${size}`;
    this.thinking.classList.toggle('live', now);
    const open = !message.content && !message.calls.length; // as long as there is nothing else to read
    if (!this.touched && this.thinking.open !== open) this.thinking.open = open;
  }

  #updateNote() {
    const { message } = this;
    const text = message.state === 'failed' ? message.error
      : message.state === 'stopped' ? 'Stopped.' : ENDINGS[message.finish] ?? '';
    this.note.hidden = !text;
    this.note.textContent = text;
    this.note.classList.toggle('failed', message.state === 'failed');
  }

  #updateStatus(live) {
    const { message } = this;
    const waits = live && message.first === null;
    this.status.hidden = !waits;
    if (waits) this.status.textContent = `Reading the prompt, ${seconds((Date.now() - message.began) / 1000)}`;
  }

  #updateFoot(mayRepeat) {
    const { message } = this;
    const { usage } = message;
    const facts = [];
    if (usage) {
      const speed = (usage.answer - 1) / (message.seconds - message.first);
      facts.push(
        h('span', { class: 'foot-bar' }, usageBar(usage, usage.prompt + usage.answer)),
        h('span', {}, `${count(usage.prompt)} prompt (${count(usage.cached)} cached) + ${count(usage.answer)} answer`),
        h('span', {}, seconds(message.seconds)),
      );
      if (usage.answer > 1 && message.first !== null && Number.isFinite(speed)) {
        facts.push(h('span', {}, `${speed < 10 ? speed.toFixed(1) : count(Math.round(speed))} tokens/s`));
      }
    }
    for (const text of message.notes) facts.push(h('span', { class: 'foot-note' }, text));
    const actions = [];
    if (message.content) actions.push(copyButton('Copy this answer', () => message.content));
    if (mayRepeat) actions.push(iconButton('again', 'Answer again', this.acts.again));
    if (message.trace) {
      actions.push(h(
        'a',
        { class: 'icon-button', href: `trace?id=${encodeURIComponent(message.trace)}`, title: 'Trace of this answer',
          'aria-label': 'Trace of this answer' },
        icon('trace'),
      ));
    }
    this.foot.replaceChildren(h('div', { class: 'actions' }, ...actions), h('div', { class: 'facts' }, ...facts));
  }
}

/**
 * The scrolled list of messages. Changes are gathered and drawn once a frame; the bottom is followed unless the reader
 * has scrolled up.
 */
export class MessageList {
  constructor(log, root, latest, acts) {
    this.log = log;
    this.root = root;
    this.acts = acts;
    this.views = new Map();
    this.dirty = new Set();
    this.follows = true;
    this.frame = 0;
    this.top = 0; // and the height: to tell in which direction the reader scrolls
    this.height = 0;
    this.latest = latest;
    log.addEventListener('scroll', () => this.#scrolled(), { passive: true });
    latest.addEventListener('click', () => {
      this.toBottom();
      log.focus({ preventScroll: true });
    });
  }

  /** Show a conversation: `state` is { messages, running, callsOpen }. */
  show(state) {
    if (state.messages !== this.state?.messages) {
      this.views.clear();
      this.root.replaceChildren();
      this.follows = true;
    }
    this.state = state;
    this.dirty = new Set(state.messages);
    this.#soon();
  }

  /** Draw one message again, soon. */
  changed(message) {
    this.dirty.add(message);
    this.#soon();
  }

  /** Follow the bottom from now on. */
  toBottom() {
    this.follows = true;
    this.#soon();
  }

  #soon() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const { messages, running, callsOpen } = this.state;
    const results = new Map();
    for (const message of messages) if (message.role === 'tool') results.set(message.tool_call_id, message);
    const shown = messages.filter((message) => message.role !== 'tool');
    const lastAnswer = shown.findLast((message) => message.role === 'assistant');
    for (const [message, view] of this.views) {
      if (shown.includes(message)) continue;
      view.el.remove();
      this.views.delete(message);
    }
    for (const message of shown) {
      let view = this.views.get(message);
      if (!view) {
        view = message.role === 'user' ? new UserView(message, this.acts) : new AnswerView(message, this.acts);
        this.views.set(message, view);
        this.root.append(view.el); // messages only ever grow at the end
        this.dirty.add(message);
      }
      if (this.dirty.has(message)) view.update({ running, callsOpen, results, last: message === lastAnswer });
    }
    this.dirty.clear();
    if (this.follows) {
      this.log.scrollTop = this.log.scrollHeight;
      this.#remember();
    }
    this.#offerLatest();
  }

  #scrolled() {
    const { scrollTop, scrollHeight } = this.log;
    const shrank = scrollHeight < this.height; // thinking that folds moves the text, not the reader
    // even a little way up is the reader's wish; only scrolling down to the bottom takes it back
    if (scrollTop < this.top) this.follows &&= shrank;
    else if (this.#belowView() <= AT_BOTTOM) this.follows = true;
    this.#remember();
    this.#offerLatest();
  }

  #remember() {
    this.top = this.log.scrollTop;
    this.height = this.log.scrollHeight;
  }

  #belowView() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight;
  }

  #offerLatest() {
    this.latest.hidden = this.follows || this.#belowView() <= AT_BOTTOM;
  }
}
