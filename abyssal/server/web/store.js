// Conversations: their shape, and how they are kept in the browser, one entry each.
import { local } from './storage.js';

const PREFIX = 'abyssal.chat.';
const CURRENT = 'abyssal.current';
const SETTINGS = 'abyssal.settings';

const isObject = (value) => value !== null && typeof value === 'object' && !Array.isArray(value);
const text = (value, otherwise = '') => (typeof value === 'string' ? value : otherwise);
const number = (value) => (Number.isFinite(value) ? value : null);
const list = (value) => (Array.isArray(value) ? value : []);

/** Settings from anything: what is missing or malformed takes its default. */
function settingsFrom(value) {
  const given = isObject(value) ? value : {};
  return {
    effort: text(given.effort, 'high'),
    system: text(given.system),
    temperature: number(given.temperature),
    maxTokens: number(given.maxTokens),
    tools: list(given.tools).filter((name) => typeof name === 'string'),
    customTools: text(given.customTools),
  };
}

function callFrom(value) {
  if (!isObject(value) || !isObject(value.function)) return null;
  return {
    id: text(value.id),
    type: 'function',
    function: { name: text(value.function.name), arguments: text(value.function.arguments) },
  };
}

function usageFrom(value) {
  if (!isObject(value)) return null;
  const { prompt, cached, answer, reasoning } = value;
  return [prompt, cached, answer, reasoning].every(Number.isFinite) ? { prompt, cached, answer, reasoning } : null;
}

function messageFrom(value) {
  if (!isObject(value)) return null;
  const content = text(value.content);
  if (value.role === 'user') return { role: 'user', content };
  if (value.role === 'tool') {
    return { role: 'tool', tool_call_id: text(value.tool_call_id), content, failed: value.failed === true };
  }
  if (value.role !== 'assistant') return null;
  return {
    ...newAnswer(),
    content,
    reasoning: text(value.reasoning),
    calls: list(value.calls).map(callFrom).filter(Boolean),
    // an answer that was stored while it ran was cut off by the end of its page
    state: ['done', 'failed'].includes(value.state) ? value.state : 'stopped',
    finish: text(value.finish),
    error: text(value.error),
    usage: usageFrom(value.usage),
    trace: text(value.trace),
    notes: list(value.notes).filter((note) => typeof note === 'string'),
    began: number(value.began) ?? 0,
    thoughtFrom: number(value.thoughtFrom),
    thoughtTo: number(value.thoughtTo),
    first: number(value.first),
    seconds: number(value.seconds) ?? 0,
  };
}

function chatFrom(value) {
  if (!isObject(value) || typeof value.id !== 'string' || !Array.isArray(value.messages)) return null;
  return {
    id: value.id,
    title: text(value.title, 'Untitled'),
    updated: number(value.updated) ?? 0,
    settings: settingsFrom(value.settings),
    messages: value.messages.map(messageFrom).filter(Boolean),
  };
}

function chatIn(key) {
  try {
    const chat = chatFrom(JSON.parse(local.get(key)));
    return chat && PREFIX + chat.id === key ? chat : null;
  } catch {
    return null;
  }
}

/**
 * An answer before its first token. Times are seconds since `began` (ms); `calls`, `reasoning` and `content` become
 * the API's fields when the answer is sent back.
 */
export function newAnswer() {
  return {
    role: 'assistant', content: '', reasoning: '', calls: [], state: 'running', finish: '', error: '', usage: null,
    trace: '', notes: [], began: Date.now(), thoughtFrom: null, thoughtTo: null, first: null, seconds: 0,
  };
}

/** The conversations of this browser. */
export class Store {
  constructor() {
    this.chats = new Map();
    this.unreadable = 0;
    for (const key of local.keys().filter((name) => name.startsWith(PREFIX))) {
      const chat = chatIn(key);
      if (chat) this.chats.set(chat.id, chat);
      else this.unreadable += 1;
    }
  }

  /** Take over what another tab wrote under a key of the storage, unless `mine(id)`; whether anything changed. */
  follow(key, mine) {
    if (!key?.startsWith(PREFIX)) return false;
    const id = key.slice(PREFIX.length);
    if (mine(id)) return false;
    const chat = chatIn(key);
    if (chat) this.chats.set(id, chat);
    else this.chats.delete(id);
    return true;
  }

  /** The newest first. */
  list() {
    return [...this.chats.values()].sort((a, b) => b.updated - a.updated);
  }

  /** An empty conversation with the settings used last; it is kept from its first `save` on. */
  fresh() {
    let settings;
    try {
      settings = JSON.parse(local.get(SETTINGS));
    } catch {
      settings = null;
    }
    const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
    return { id, title: 'New conversation', updated: 0, settings: settingsFrom(settings), messages: [] };
  }

  /** Whether the conversation could be stored; it stays in memory anyway. */
  save(chat) {
    this.chats.set(chat.id, chat);
    return local.set(PREFIX + chat.id, JSON.stringify(chat));
  }

  remove(chat) {
    this.chats.delete(chat.id);
    local.remove(PREFIX + chat.id);
  }

  /** Begin the next conversation with these settings. */
  remember(settings) {
    local.set(SETTINGS, JSON.stringify(settings));
  }

  get current() {
    return this.chats.get(local.get(CURRENT)) ?? null;
  }

  set current(chat) {
    local.set(CURRENT, chat.id);
  }
}
