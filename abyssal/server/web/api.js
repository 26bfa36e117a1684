// The server's HTTP API: requests with the reader's key, and streams of chunks.
import { h } from './dom.js';
import { session } from './storage.js';

const ROOT = new URL('../', import.meta.url);
const KEY = 'abyssal.key';

let key = session.get(KEY);
let asking = null; // the open question for a key, which all waiting requests share

/** A request that failed; `status` is 0 where there was no answer. */
export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  for (;;) {
    const sent = key;
    const headers = new Headers(options.headers);
    if (sent) headers.set('Authorization', `Bearer ${sent}`);
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError('The server does not answer. Is “abyssal serve” running?', 0);
    }
    if (response.ok) return response;
    const message = await messageOf(response);
    if (response.status !== 401 || !(await newKey(message, sent))) throw new ApiError(message, response.status);
  }
}

async function messageOf(response) {
  try {
    const { error } = await response.json();
    if (typeof error?.message === 'string') return error.message;
  } catch {
    // not the API's own error, but a proxy's page
  }
  return `The server answered ${response.status} ${response.statusText}`.trim();
}

async function newKey(message, sent) {
  if (key !== sent) return true; // given meanwhile, for another request
  asking ??= askForKey(sent ? message : 'This server asks for an API key.').finally(() => {
    asking = null;
  });
  return asking;
}

function askForKey(message) {
  return new Promise((resolve) => {
    const input = h('input', { type: 'password', id: 'api-key', autocomplete: 'off', required: true });
    const dialog = h(
      'dialog',
      { 'aria-labelledby': 'key-title' },
      h(
        'form',
        { method: 'dialog' },
        h('h2', { id: 'key-title' }, 'API key'),
        h('p', {}, message),
        h('div', { class: 'field' }, h('label', { htmlFor: 'api-key' }, 'Key'), input),
        h('p', { class: 'hint' }, 'Kept until you close this tab.'),
        h(
          'div',
          { class: 'actions-row' },
          h('button', { type: 'button', class: 'button', onclick: () => dialog.close() }, 'Cancel'),
          h('button', { class: 'button primary', value: 'use' }, 'Use it'),
        ),
      ),
    );
    dialog.addEventListener('close', () => {
      const given = dialog.returnValue === 'use' && input.value.trim();
      if (given) {
        key = given;
        session.set(KEY, key);
      }
      dialog.remove();
      resolve(Boolean(given));
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

/** The JSON behind a path. */
export async function getJson(path) {
  return (await request(path)).json();
}

/** Begin a streamed answer: its headers, and its chunks as they come. */
export async function startChat(body, signal) {
  const response = await request('v1/chat/completions', {
    method: 'POST',
    headers: { 'Content-Type': 'application/json' },
    body: JSON.stringify(body),
    signal,
  });
  return { headers: response.headers, chunks: chunksOf(response.body, signal) };
}

async function* chunksOf(stream, signal) {
  for await (const data of eventsOf(stream, signal)) {
    if (data === '[DONE]') return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError('The server sent an event that is no JSON', 0);
    }
    if (chunk.error) throw new ApiError(chunk.error.message ?? 'Generation failed', 500);
    yield chunk;
  }
  throw new ApiError('The connection ended before the answer did', 0);
}

/** The data of server-sent events; comments keep the connection open and are dropped. */
async function* eventsOf(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split('\n');
      rest = lines.pop();
      for (const whole of lines) {
        const line = whole.endsWith('\r') ? whole.slice(0, -1) : whole;
        if (line.startsWith('data:')) data.push(line.slice(line[5] === ' ' ? 6 : 5));
        else if (line === '' && data.length) {
          yield data.join('\n');
          data = [];
        }
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError('The connection to the server was lost', 0);
  } finally {
    reader.cancel().catch(() => {}); // a reader that failed has nothing left to cancel
  }
}
