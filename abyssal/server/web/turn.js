// A turn: ask the model, run the browser's tools, and ask again, until it is the reader's move.
import { startChat } from './api.js';
import { newAnswer } from './store.js';
import { runHere, toolsOf } from './tools.js';

const ROUNDS = 16; // of tool calls without the reader, against a model that calls forever
const SKIPPED = 'Not run: the user went on without it.';

/** The calls of the last answer that have no result yet. */
export function openCalls(chat) {
  const at = chat.messages.findLastIndex((message) => message.role === 'assistant');
  if (at < 0) return [];
  const answered = new Set(chat.messages.slice(at + 1).map((message) => message.tool_call_id));
  return chat.messages[at].calls.filter((call) => !answered.has(call.id));
}

/** Whether the conversation ends in something that the model has not answered. */
export function isUnanswered(chat) {
  const last = chat.messages.at(-1);
  return last !== undefined && last.role !== 'assistant' && openCalls(chat).length === 0;
}

/** Answer a call of the last answer. */
export function addResult(chat, call, content, failed = false) {
  chat.messages.push({ role: 'tool', tool_call_id: call.id, content, failed });
}

/** Say of each call without a result that there will be none. */
export function skipOpenCalls(chat) {
  for (const call of openCalls(chat)) addResult(chat, call, SKIPPED, true);
}

function wireMessage(message) {
  if (message.role === 'user') return { role: 'user', content: message.content };
  if (message.role === 'tool') {
    return { role: 'tool', tool_call_id: message.tool_call_id, content: message.content };
  }
  const { content, reasoning, calls } = message;
  return { role: 'assistant', content, reasoning_content: reasoning, ...(calls.length ? { tool_calls: calls } : {}) };
}

function bodyOf(chat, model, messages) {
  const { effort, system, temperature, maxTokens } = chat.settings;
  const said = messages.filter((m) => m.role !== 'assistant' || m.content || m.reasoning || m.calls.length);
  const tools = toolsOf(chat.settings);
  return {
    model: model.id,
    messages: [...(system.trim() ? [{ role: 'system', content: system }] : []), ...said.map(wireMessage)],
    stream: true,
    stream_options: { include_usage: true },
    thinking: { type: effort === 'off' ? 'disabled' : 'enabled' },
    ...(effort === 'off' ? {} : { reasoning_effort: effort }),
    ...(tools.length ? { tools } : {}),
    ...(temperature === null ? {} : { temperature }),
    ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
  };
}

function addCalls(answer, parts) {
  for (const part of parts) {
    const call = (answer.calls[part.index] ??= { id: '', type: 'function', function: { name: '', arguments: '' } });
    call.id ||= part.id ?? '';
    call.function.name += part.function?.name ?? '';
    call.function.arguments += part.function?.arguments ?? '';
  }
}

/** Take a chunk into an answer, `now` seconds after it began. */
function absorb(answer, chunk, now) {
  if (chunk.usage) {
    answer.usage = {
      prompt: chunk.usage.prompt_tokens,
      cached: chunk.usage.prompt_cache_hit_tokens ?? 0,
      answer: chunk.usage.completion_tokens,
      reasoning: chunk.usage.completion_tokens_details?.reasoning_tokens ?? 0,
    };
  }
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { reasoning_content: reasoning, content, tool_calls: calls } = choice.delta ?? {};
  if (reasoning || content || calls) answer.first ??= now;
  if (reasoning) {
    answer.thoughtFrom ??= now;
    answer.reasoning += reasoning;
  }
  if ((content || calls) && answer.thoughtFrom !== null) answer.thoughtTo ??= now;
  if (content) answer.content += content;
  if (calls) addCalls(answer, calls);
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}

const names = (headers, name) => (headers.get(name) ?? '').split(',').map((part) => part.trim()).filter(Boolean);

function isWhole(call) {
  try {
    JSON.parse(call.function.arguments);
    return true;
  } catch {
    return false;
  }
}

async function ask(answer, body, signal, changed) {
  const now = () => (Date.now() - answer.began) / 1000;
  try {
    const { headers, chunks } = await startChat(body, signal);
    answer.trace = headers.get('x-request-id') ?? '';
    answer.notes = [
      ...names(headers, 'x-abyssal-notes'),
      ...names(headers, 'x-abyssal-repaired').map((name) => `repaired: ${name}`),
    ];
    for await (const chunk of chunks) {
      absorb(answer, chunk, now());
      changed(answer);
    }
    answer.state = 'done';
  } catch (error) {
    answer.state = signal.aborted ? 'stopped' : 'failed';
    if (!signal.aborted) answer.error = error.message;
    answer.calls = answer.calls.filter((call) => call && isWhole(call)); // no call whose arguments were cut off
  }
  answer.seconds = now();
  if (answer.thoughtFrom !== null) answer.thoughtTo ??= answer.seconds;
  changed(answer);
}

/**
 * Go on with a conversation until its last answer is final, or calls wait for the reader.
 * `changed(message)` is called for each message that is new or has grown.
 */
export async function runTurn(chat, model, signal, changed) {
  for (let round = 0; round < ROUNDS; round++) {
    const body = bodyOf(chat, model, chat.messages);
    const answer = newAnswer();
    chat.messages.push(answer);
    changed(answer);
    await ask(answer, body, signal, changed);
    if (answer.state !== 'done') skipOpenCalls(chat);
    else {
      for (const call of answer.calls) {
        const result = runHere(call.function);
        if (result) addResult(chat, call, result.content, result.failed);
      }
    }
    changed(answer);
    if (answer.state !== 'done' || !answer.calls.length || openCalls(chat).length) return;
  }
}
