// The settings of a conversation: system prompt, sampling, tools.
import { byId, h } from './dom.js';
import { BUILT_IN, customTools } from './tools.js';

function problemIn(settings) {
  try {
    customTools(settings.customTools);
    return '';
  } catch (error) {
    return error.message;
  }
}

/** The sheet with the settings of the conversation that `settings()` gives; `changed()` is called after each change. */
export class SettingsSheet {
  constructor(settings, changed) {
    this.settings = settings;
    this.changed = changed;
    this.dialog = byId('settings');
    this.system = byId('system');
    this.temperature = byId('temperature');
    this.maxTokens = byId('max-tokens');
    this.custom = byId('custom-tools');
    this.checks = Object.entries(BUILT_IN).map(([name, tool]) => this.#check(name, tool));
    byId('built-in-tools').append(...this.checks.map((box) => box.parentElement));
    byId('close-settings').addEventListener('click', () => this.dialog.close());
    this.dialog.addEventListener('click', (event) => {
      if (event.target === this.dialog) this.dialog.close(); // the backdrop
    });
    this.dialog.addEventListener('input', () => this.#read());
  }

  #check(name, { label, description }) {
    const box = h('input', { type: 'checkbox', name });
    h('label', { class: 'check' }, box, h('span', {}, label, h('span', { class: 'hint' }, description)));
    return box;
  }

  open() {
    const settings = this.settings();
    this.system.value = settings.system;
    this.temperature.value = settings.temperature ?? '';
    this.maxTokens.value = settings.maxTokens ?? '';
    this.custom.value = settings.customTools;
    for (const box of this.checks) box.checked = settings.tools.includes(box.name);
    this.#complain();
    this.dialog.showModal();
  }

  /** Whether the settings can be used; if not, the sheet opens at what is wrong. */
  check() {
    if (!problemIn(this.settings())) return true;
    this.open();
    this.custom.focus();
    return false;
  }

  #read() {
    const settings = this.settings();
    settings.system = this.system.value;
    if (this.temperature.validity.valid) settings.temperature = this.#number(this.temperature);
    if (this.maxTokens.validity.valid) settings.maxTokens = this.#number(this.maxTokens);
    settings.tools = this.checks.filter((box) => box.checked).map((box) => box.name);
    settings.customTools = this.custom.value;
    this.#complain();
    this.changed();
  }

  #number(input) {
    return input.value === '' ? null : input.valueAsNumber;
  }

  #complain() {
    const show = (line, text) => {
      line.hidden = !text;
      line.textContent = text;
    };
    for (const input of [this.temperature, this.maxTokens]) {
      input.setAttribute('aria-invalid', String(!input.validity.valid));
    }
    const wrong = [this.temperature, this.maxTokens].find((input) => !input.validity.valid);
    show(byId('sampling-problem'), wrong ? `${wrong.labels[0].textContent}: ${wrong.validationMessage}` : '');
    const problem = problemIn(this.settings());
    this.custom.setAttribute('aria-invalid', String(Boolean(problem)));
    show(byId('custom-problem'), problem);
  }
}
