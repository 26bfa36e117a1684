// Building blocks of the page. Text from outside only ever becomes text nodes.

const ICONS = new URL('icons.svg', import.meta.url).pathname;
const SVG = 'http://www.w3.org/2000/svg';

/** The element of the page with an id. */
export const byId = (id) => document.getElementById(id);

/** A new element; `on…` functions listen, names with a dash and unknown ones become attributes. */
export function h(tag, props = {}, ...children) {
  const el = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith('on')) el.addEventListener(name.slice(2), value);
    else if (name === 'class') el.className = value;
    else if (name in el) el[name] = value;
    else el.setAttribute(name, value);
  }
  el.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return el;
}

/** An icon of the sprite, without a name for screen readers. */
export function icon(name) {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('class', 'icon');
  svg.setAttribute('aria-hidden', 'true');
  const use = document.createElementNS(SVG, 'use');
  use.setAttribute('href', `${ICONS}#${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows an icon alone. */
export function iconButton(name, label, onclick) {
  return h('button', { type: 'button', class: 'icon-button', title: label, 'aria-label': label, onclick }, icon(name));
}

/** A button that copies what `text()` gives, and shows that it did. */
export function copyButton(label, text) {
  const button = iconButton('copy', label, async () => {
    let done = true;
    try {
      await navigator.clipboard.writeText(text());
    } catch {
      done = false; // no clipboard without https or the user's leave
    }
    button.replaceChildren(icon(done ? 'check' : 'close'));
    announce(done ? 'Copied' : 'The browser does not allow copying here');
    setTimeout(() => button.replaceChildren(icon('copy')), 1500);
  });
  return button;
}

/** Have a screen reader say a text. */
export function announce(text) {
  // the same text twice is said twice only if the region changes
  byId('announcer').replaceChildren(h('p', {}, text));
}

/** A message at the edge of the page for some seconds, with an action if one is given. */
export function notify(text, action = null, seconds = 10) {
  const close = () => toast.remove();
  const toast = h('div', { class: 'toast' }, h('span', {}, text));
  if (action) {
    const act = () => {
      close();
      action.run();
    };
    toast.append(h('button', { type: 'button', class: 'button', onclick: act }, action.label));
  }
  toast.append(iconButton('close', 'Dismiss', close));
  byId('toasts').append(toast);
  setTimeout(close, seconds * 1000);
}
