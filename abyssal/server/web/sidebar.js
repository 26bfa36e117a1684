// The list of conversations: choose, rename, delete.
import { h, iconButton } from './dom.js';

/** The side list; on narrow screens a drawer. */
export class Sidebar {
  constructor(root, list, backdrop, opener, acts) {
    this.root = root;
    this.list = list;
    this.opener = opener;
    this.acts = acts;
    opener.addEventListener('click', () => this.open());
    backdrop.addEventListener('click', () => this.close());
    root.addEventListener('keydown', (event) => {
      if (event.key === 'Escape' && this.isOpen) {
        event.stopPropagation();
        this.close();
      }
    });
  }

  get isOpen() {
    return document.body.classList.contains('drawer-open');
  }

  open() {
    document.body.classList.add('drawer-open');
    this.opener.setAttribute('aria-expanded', 'true');
    this.root.querySelector('[aria-current], button')?.focus();
  }

  close() {
    if (!this.isOpen) return;
    document.body.classList.remove('drawer-open');
    this.opener.setAttribute('aria-expanded', 'false');
    this.opener.focus();
  }

  /** Show the conversations; `isRunning(chat)` marks those that are being answered. */
  show(chats, current, isRunning) {
    const focused = this.list.contains(document.activeElement) ? document.activeElement.dataset.chat : null;
    this.list.replaceChildren(...chats.map((chat) => this.#item(chat, chat === current, isRunning(chat))));
    if (focused) this.list.querySelector(`[data-chat="${CSS.escape(focused)}"]`)?.focus();
  }

  #item(chat, isCurrent, isRunning) {
    const item = h('li', { class: isCurrent ? 'current' : '' });
    const choose = h(
      'button',
      { type: 'button', class: 'choose', title: chat.title, 'aria-current': isCurrent ? 'true' : null,
        onclick: () => this.acts.choose(chat) },
      h('span', {}, chat.title),
      isRunning && h('span', { class: 'pulse' }, h('span', { class: 'sr-only' }, 'is being answered')),
    );
    choose.dataset.chat = chat.id;
    item.append(
      choose,
      iconButton('edit', `Rename ${chat.title}`, () => this.#rename(item, chat)),
      iconButton('trash', `Delete ${chat.title}`, () => this.acts.remove(chat)),
    );
    return item;
  }

  #rename(item, chat) {
    const input = h('input', { type: 'text', value: chat.title, maxLength: 120, 'aria-label': 'New title' });
    let over = false; // taking the field away blurs it
    const finish = (title) => {
      if (over) return;
      over = true;
      this.acts.rename(chat, title.trim() || chat.title);
      this.list.querySelector(`[data-chat="${CSS.escape(chat.id)}"]`)?.focus();
    };
    input.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.isComposing) finish(input.value);
      if (event.key !== 'Escape') return;
      event.stopPropagation();
      finish(chat.title);
    });
    input.addEventListener('blur', () => finish(input.value));
    item.replaceChildren(input);
    input.select();
  }
}
