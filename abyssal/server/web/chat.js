// The chat page: which conversation is shown, and what its buttons do.
import { getJson } from './api.js';
import { announce, byId, h, icon, notify } from './dom.js';
import { count, plural } from './format.js';
import { fit, MessageList, onEnter } from './messages.js';
import { ContextMeter } from './meter.js';
import { SettingsSheet } from './settings.js';
import { Sidebar } from './sidebar.js';
import { Store } from './store.js';
import { addResult, isUnanswered, openCalls, runTurn, skipOpenCalls } from './turn.js';
import { toolsOf } from './tools.js';

const EFFORTS = ['low', 'high', 'max'];
const SAVE_MS = 1000; // between saves of an answer that grows
const TICK_MS = 250; // between updates of a running clock
const TITLE = 60;
const SAID = 1200; // most characters of an answer that are announced

const store = new Store();
const runs = new Map(); // by conversation: what stops its answer
const drafts = new Map(); // by conversation: what is typed and not sent
let chat = store.current ?? store.fresh();
let model = null;
let full = false; // the storage refused the last save

const text = byId('text');
const isRunning = (which) => runs.has(which.id);

const list = new MessageList(byId('log'), byId('messages'), byId('latest'), { edit, again, result: giveResult });
const meter = new ContextMeter(byId('context'), byId('context-now'), byId('context-turns'));
const sheet = new SettingsSheet(() => chat.settings, keepSettings);
const sidebar = new Sidebar(byId('sidebar'), byId('conversations'), byId('backdrop'), byId('open-sidebar'), {
  choose,
  remove,
  rename(which, title) {
    which.title = title;
    save(which);
    refresh();
  },
});

// ---- keeping ------------------------------------------------------------------------------------------------------

function save(which) {
  const stored = store.save(which);
  if (!stored && !full) {
    notify('This browser’s storage is full or closed: the conversation lasts until you leave. Delete others for room.');
  }
  full = !stored;
}

function touch(which) {
  which.updated = Date.now();
  save(which);
}

function keepSettings() {
  store.remember(chat.settings);
  if (store.chats.has(chat.id)) save(chat);
  showTools();
}

// ---- showing ------------------------------------------------------------------------------------------------------

function refresh() {
  const running = isRunning(chat);
  const open = running ? [] : openCalls(chat);
  document.title = chat.messages.length ? `${chat.title} – abyssal` : 'abyssal';
  byId('title').textContent = chat.title;
  byId('empty').hidden = chat.messages.length > 0;
  showSend(running);
  const unanswered = !running && isUnanswered(chat);
  byId('waiting').hidden = !open.length && !unanswered;
  byId('continue').hidden = !unanswered;
  byId('waiting-text').textContent = open.length
    ? `${plural(open.length, 'call')} above ${open.length === 1 ? 'waits' : 'wait'} for your result.`
    : 'The last message has no answer.';
  list.show({ messages: chat.messages, running, callsOpen: !running });
  meter.show(chat.messages, model?.context_length);
  sidebar.show(store.list(), chat, isRunning);
  showEffort();
  showTools();
}

function showSend(running) {
  // one button, so that the focus stays where it is
  const button = byId('send');
  button.classList.toggle('stop', running);
  button.setAttribute('aria-label', running ? 'Stop' : 'Send');
  button.title = running ? 'Stop (Esc)' : 'Send (Enter)';
  button.replaceChildren(icon(running ? 'stop' : 'send'));
}

function showModel() {
  byId('model').textContent = model?.id ?? '';
  const length = model?.context_length;
  byId('empty-model').textContent = model
    ? `${model.id} is loaded${length ? ` and holds ${count(length)} tokens of context` : ''}.` : '';
  const efforts = ['off', ...(model?.efforts ?? EFFORTS)];
  const legend = byId('efforts').querySelector('legend');
  byId('efforts').replaceChildren(legend, ...efforts.map((effort) => {
    const radio = h('input', { type: 'radio', name: 'effort', value: effort, class: 'sr-only' });
    radio.addEventListener('change', () => {
      chat.settings.effort = effort;
      keepSettings();
    });
    return h('label', {}, radio, h('span', {}, effort === 'off' ? 'Non-think' : effort));
  }));
  showEffort();
}

function showEffort() {
  const radios = [...byId('efforts').querySelectorAll('input')];
  const known = radios.map((radio) => radio.value);
  // another model may not know the effort that the conversation was begun with
  if (model && !known.includes(chat.settings.effort)) {
    chat.settings.effort = known.includes('high') ? 'high' : known.at(-1);
  }
  for (const radio of radios) radio.checked = radio.value === chat.settings.effort;
}

function showTools() {
  const button = byId('tools-on');
  let label;
  try {
    const tools = toolsOf(chat.settings);
    label = tools.length ? plural(tools.length, 'tool') : '';
    button.title = tools.map((tool) => tool.function.name).join(', ');
  } catch {
    label = 'Tools: see settings';
  }
  button.hidden = !label;
  button.textContent = label;
}

// ---- asking -------------------------------------------------------------------------------------------------------

async function loadModel() {
  try {
    const { data } = await getJson('v1/models');
    [model] = data;
    showModel();
    refresh();
  } catch (error) {
    notify(error.message, { label: 'Try again', run: loadModel }, 600);
  }
}

async function run(which) {
  if (!model) await loadModel();
  if (isRunning(which)) return;
  if (!model || !sheet.check()) {
    refresh();
    return;
  }
  const controller = new AbortController();
  runs.set(which.id, controller);
  let saved = Date.now();
  const clockwork = setInterval(() => which === chat && list.changed(chat.messages.at(-1)), TICK_MS);
  const changed = (message) => {
    if (which === chat) list.changed(message);
    if (Date.now() - saved < SAVE_MS) return;
    saved = Date.now();
    save(which);
  };
  touch(which);
  refresh();
  list.toBottom();
  try {
    await runTurn(which, model, controller.signal, changed);
  } finally {
    clearInterval(clockwork);
    runs.delete(which.id);
    if (store.chats.has(which.id)) touch(which); // it may have been deleted meanwhile
    refresh();
  }
  tell(which);
}

function tell(which) {
  const answer = which.messages.findLast((message) => message.role === 'assistant');
  const open = openCalls(which);
  if (answer.state === 'failed') announce(`The answer failed. ${answer.error}`);
  else if (answer.state === 'stopped') announce('Stopped.');
  else if (open.length) announce(`Waiting for your result of ${open.map((call) => call.function.name).join(', ')}`);
  else announce(`Answer: ${answer.content.slice(0, SAID)}`);
}

function titleFrom(content) {
  const line = content.trim().split('\n', 1)[0];
  return line.length <= TITLE ? line : `${line.slice(0, TITLE).replace(/\s\S*$/, '')}…`;
}

function send() {
  const said = text.value.trim();
  if (!said || isRunning(chat)) return;
  skipOpenCalls(chat);
  if (!chat.messages.length) chat.title = titleFrom(said);
  chat.messages.push({ role: 'user', content: said });
  text.value = '';
  fit(text);
  store.current = chat;
  touch(chat);
  run(chat);
}

function stop() {
  runs.get(chat.id)?.abort();
}

function again() {
  if (isRunning(chat)) return;
  const at = chat.messages.findLastIndex((message) => message.role === 'user');
  chat.messages.splice(at + 1);
  run(chat);
}

function edit(message, content) {
  if (isRunning(chat)) return;
  const at = chat.messages.indexOf(message);
  if (at === 0 && chat.title === titleFrom(message.content)) chat.title = titleFrom(content);
  chat.messages.splice(at, Infinity, { role: 'user', content });
  run(chat);
  focusText();
}

function giveResult(call, content) {
  if (isRunning(chat)) return;
  addResult(chat, call, content);
  touch(chat);
  if (openCalls(chat).length) refresh();
  else run(chat);
}

// ---- conversations ------------------------------------------------------------------------------------------------

function focusText() {
  if (matchMedia('(hover: hover)').matches) text.focus(); // elsewhere it would raise the keyboard
}

function choose(which) {
  drafts.set(chat.id, text.value);
  chat = which;
  store.current = chat;
  text.value = drafts.get(chat.id) ?? '';
  fit(text);
  refresh();
  sidebar.close();
  focusText();
}

function remove(which) {
  const wasShown = which === chat;
  runs.get(which.id)?.abort();
  store.remove(which);
  notify(`“${which.title}” is deleted.`, {
    label: 'Undo',
    run() {
      save(which);
      if (wasShown) choose(which);
      else refresh();
    },
  });
  if (wasShown) choose(store.list()[0] ?? store.fresh());
  else refresh();
}

// ---- wiring -------------------------------------------------------------------------------------------------------

byId('send').addEventListener('click', ({ detail }) => {
  if (detail > 1) return; // the second click of a double click would stop at once
  if (isRunning(chat)) stop();
  else send();
});
onEnter(text, send);
text.addEventListener('input', () => fit(text));
byId('continue').addEventListener('click', () => run(chat));
byId('new-chat').addEventListener('click', () => choose(store.fresh()));
byId('close-sidebar').addEventListener('click', () => sidebar.close());
byId('open-settings').addEventListener('click', () => sheet.open());
byId('tools-on').addEventListener('click', () => sheet.open());
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && !document.querySelector('dialog[open]')) stop();
});
window.addEventListener('storage', ({ key }) => {
  if (!store.follow(key, (id) => runs.has(id))) return;
  chat = store.chats.get(chat.id) ?? chat;
  refresh();
});
window.addEventListener('pagehide', () => {
  for (const id of runs.keys()) if (store.chats.has(id)) store.save(store.chats.get(id));
});

if (store.unreadable) notify(`Could not read ${plural(store.unreadable, 'stored conversation')}; nothing was deleted.`);
showModel();
refresh();
loadModel();
focusText();
