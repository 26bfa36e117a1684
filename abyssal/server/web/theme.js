// Light or dark: as the system says, until the reader switches.
import { local } from './storage.js';

const KEY = 'abyssal.theme';
const system = matchMedia('(prefers-color-scheme: dark)');
const listeners = [];

function isDark() {
  const chosen = local.get(KEY);
  return chosen === 'dark' || (chosen !== 'light' && system.matches);
}

function apply() {
  const dark = isDark();
  const chosen = dark !== system.matches;
  const root = document.documentElement;
  root.toggleAttribute('data-dark', dark);
  if (chosen) root.dataset.theme = dark ? 'dark' : 'light';
  else delete root.dataset.theme;
  for (const button of document.querySelectorAll('.theme-switch')) {
    const label = dark ? 'Switch to the light theme' : 'Switch to the dark theme';
    button.setAttribute('aria-label', label);
    button.title = label;
  }
  for (const listener of listeners) listener();
}

/** Call `listener` after each change of colours. */
export function onTheme(listener) {
  listeners.push(listener);
}

apply();
system.addEventListener('change', apply);
window.addEventListener('storage', apply);
for (const button of document.querySelectorAll('.theme-switch')) {
  button.addEventListener('click', () => {
    const dark = !isDark();
    // back at the system's choice, the page follows the system again
    if (dark === system.matches) local.remove(KEY);
    else local.set(KEY, dark ? 'dark' : 'light');
    apply();
  });
}
