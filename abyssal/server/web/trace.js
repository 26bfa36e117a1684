// The trace page: recent requests, and one of them token by token.
import { getJson } from './api.js';
import { byId, h, notify } from './dom.js';
import { clock, count, percent, plural, seconds } from './format.js';
import { usageBar, usageKey } from './meter.js';
import { BlockStrip } from './strip.js';
import { onTheme } from './theme.js';
import { isSpecial, TokenFlow, visible } from './tokens.js';

const CHOSEN = 60; // chosen blocks that are listed before the rest is asked for
const KINDS = { reasoning: 'thinking', content: 'content' };

let traces = [];
let shown = null; // the open trace, and what the reader chose in it

const strip = new BlockStrip(byId('strip'), {
  pick(layer, block) {
    setLayer(layer);
    goTo(block * shown.trace.ratio);
  },
  hover(event, layer, block) {
    if (block === undefined) hideTip();
    else showTip(`CSA layer ${layer}, block ${count(block)}: ${blockText(block)}`, event.clientX, event.clientY);
  },
});

// ---- the list -----------------------------------------------------------------------------------------------------

async function loadList() {
  try {
    ({ traces } = await getJson('traces'));
  } catch (error) {
    notify(error.message, { label: 'Try again', run: loadList });
  }
  showList();
}

function showList() {
  byId('requests').replaceChildren(...traces.map((trace) => {
    const current = trace.id === wantedId();
    const open = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a new tab or window
      event.preventDefault();
      history.pushState(null, '', `?id=${encodeURIComponent(trace.id)}`);
      showWanted();
    };
    return h('li', {}, h(
      'a',
      { href: `?id=${encodeURIComponent(trace.id)}`, 'aria-current': current ? 'true' : null, onclick: open },
      h('span', { class: 'when' }, clock(trace.created), h('span', {}, trace.finish_reason ?? 'aborted')),
      h('span', {}, `${count(trace.prompt_tokens)} + ${plural(trace.completion_tokens, 'token')}, ${seconds(trace.seconds)}`),
      usageBar(
        { prompt: trace.prompt_tokens, cached: trace.cached_tokens, answer: trace.completion_tokens },
        Math.max(trace.prompt_tokens + trace.completion_tokens, 1),
      ),
    ));
  }));
}

const wantedId = () => new URLSearchParams(location.search).get('id');

async function showWanted() {
  const id = wantedId();
  showList();
  if (!id) {
    say(traces.length ? 'Choose a request to see its tokens.'
      : 'No request is kept yet. Ask something in the chat, or send a request to the API, then reload the list.');
    return;
  }
  if (shown?.trace.id === id) return;
  say('Loading…');
  try {
    const trace = await getJson(`traces/${encodeURIComponent(id)}`);
    if (wantedId() === id) show(trace);
  } catch (error) {
    const gone = `The server keeps no trace ${id} any more: it remembers the last few requests.`;
    say(error.status === 404 ? gone : error.message);
  }
}

function say(text) {
  shown = null;
  byId('message').textContent = text;
  byId('message').hidden = false;
  byId('trace').hidden = true;
  byId('panel').hidden = true;
}

// ---- one trace ----------------------------------------------------------------------------------------------------

function show(trace) {
  byId('message').hidden = true;
  byId('trace').hidden = false;
  byId('panel').hidden = false;
  const promptFlow = new TokenFlow(byId('prompt'), 'Prompt tokens', {
    start: 0,
    texts: trace.prompt.texts,
    dress: (chip, i) => chip.classList.add(i < trace.prompt.cached ? 'cached' : 'fresh'),
    select,
  });
  shown = { trace, start: trace.prompt.tokens, promptFlow, layer: 0, selected: null, lit: [] };
  showFacts();
  byId('prompt-key').replaceChildren(
    sample('cached', 'from the cache'), sample('fresh', 'read anew'), sample('special', 'special token'),
    sample('lit', 'in a chosen block'),
  );
  byId('choice-label').hidden = trace.answers.length < 2;
  const choices = trace.answers.map((answer, i) => h('option', { value: i }, String(answer.choice + 1)));
  byId('choice').replaceChildren(...choices);
  showAnswer(0);
}

const sample = (look, words) => h('span', { class: 'key' }, h('i', { class: `chip ${look}` }), words);

function showFacts() {
  const { trace } = shown;
  const { prompt } = trace;
  const usage = { prompt: prompt.tokens, cached: prompt.cached, answer: trace.completion_tokens };
  const after = trace.seconds - (trace.first_token_s ?? trace.seconds);
  const later = usage.answer - trace.answers.length; // tokens behind the first of each answer
  const speed = after > 0 && later > 0 ? `${(later / after).toFixed(1)} tokens/s` : null;
  const held = usage.prompt + usage.answer;
  const facts = [
    ['Request', `${trace.id}, ${clock(trace.created)}`],
    ['Route', trace.route],
    ['Model', `${trace.model}, prompt format ${trace.snapshot}`],
    ['Thinking', trace.thinking ? trace.effort ?? 'default effort' : 'off'],
    ['Finished', trace.finish_reason ?? 'aborted'],
    ['First token', trace.first_token_s === null ? 'none' : seconds(trace.first_token_s)],
    ['Whole answer', [seconds(trace.seconds), speed].filter(Boolean).join(', ')],
    ['Context', `${count(held)} of ${count(trace.context)} tokens (${percent(held / trace.context)})`],
    ['Why not more was reused', prompt.reason],
    ...trace.answers.flatMap(({ choice, repairs }) => repairs.map(({ name, detail }) => [
      `Repaired${trace.answers.length > 1 ? ` in answer ${choice + 1}` : ''}`,
      detail ? `${name}: ${detail}` : name,
    ])),
  ].filter(([, value]) => value);
  byId('facts').replaceChildren(
    usageBar(usage, Math.max(held, 1)),
    h('p', { class: 'legend' }, ...usageKey(usage)),
    h('dl', { class: 'facts' }, ...facts.map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, value)))),
  );
}

function showAnswer(index) {
  const { trace } = shown;
  shown.answer = trace.answers[index] ?? { tokens: [], repairs: [] };
  const { tokens } = shown.answer;
  const { start } = shown;
  shown.counts = countBlocks(tokens);
  shown.answerFlow = new TokenFlow(byId('answer'), 'Sampled tokens', {
    start,
    texts: tokens.map((token) => token.text),
    dress(chip, i) {
      chip.classList.add('sampled', tokens[i].kind);
      chip.style.setProperty('--p', `${100 * Math.exp(tokens[i].logprob)}%`);
    },
    select,
  });
  byId('answer-key').replaceChildren(
    h('span', { class: 'key' }, '0%', h('i', { class: 'scale' }), '100% likely'),
    ...(tokens.some((token) => token.kind === 'reasoning') ? [sample('sampled reasoning', 'thinking')] : []),
  );
  const layers = shown.counts.length;
  byId('layer').replaceChildren(...shown.counts.map((_, i) => h('option', { value: i }, `CSA layer ${i}`)));
  byId('layer-label').hidden = layers < 2;
  byId('strip').hidden = !layers;
  byId('strip-key').hidden = !layers;
  setLayer(0);
  select(tokens.length ? start : 0);
}

/** For each layer, how many sampled tokens chose each block. */
function countBlocks(tokens) {
  const counts = [];
  for (const { blocks } of tokens) {
    blocks.forEach((chosen, layer) => {
      const found = (counts[layer] ??= new Map());
      for (const block of chosen) found.set(block, (found.get(block) ?? 0) + 1);
    });
  }
  return counts;
}

// ---- the selected token -------------------------------------------------------------------------------------------

const flowOf = (position) => (shown.answerFlow.holds(position) ? shown.answerFlow : shown.promptFlow);
const tokenAt = (position) => shown.answer.tokens[position - shown.answerFlow.start];

/** Blocks that the selected token's query read in a layer, or null where that is not known. */
function chosenBlocks(layer) {
  return tokenAt(shown.selected)?.blocks[layer] ?? null;
}

function select(position, scroll = false) {
  if (!shown.promptFlow.holds(position) && !shown.answerFlow.holds(position)) return;
  const flow = flowOf(position);
  flow.reveal(position);
  const old = shown.selected === null ? null : flowOf(shown.selected).chip(shown.selected);
  old?.setAttribute('aria-selected', 'false');
  shown.selected = position;
  const chip = flow.chip(position);
  chip.setAttribute('aria-selected', 'true');
  for (const other of [shown.promptFlow, shown.answerFlow]) {
    if (other === flow) other.el.setAttribute('aria-activedescendant', chip.id);
    else other.el.removeAttribute('aria-activedescendant');
  }
  if (scroll) chip.scrollIntoView({ block: 'nearest' });
  showPanel();
  showBlocks();
}

/** Select a position and bring it into view, with the keyboard's focus. */
function goTo(position) {
  select(position);
  const flow = flowOf(position);
  flow.el.focus({ preventScroll: true });
  flow.chip(position)?.scrollIntoView({ block: 'center' });
}

function setLayer(layer) {
  shown.layer = layer;
  byId('layer').value = layer;
  if (shown.selected !== null) showBlocks();
}

function showPanel() {
  const { trace, selected } = shown;
  const token = tokenAt(selected);
  const inPrompt = !token;
  const text = inPrompt ? trace.prompt.texts[selected] : token.text;
  const rows = [
    ['Position', count(selected)],
    ['Id', inPrompt ? trace.prompt.ids[selected] : token.id],
    ['Part', token ? KINDS[token.kind] : selected < trace.prompt.cached ? 'prompt, cached' : 'prompt, read anew'],
    ['Block', count(Math.floor(selected / trace.ratio))],
  ].map(([name, value]) => h('div', {}, h('dt', {}, name), h('dd', {}, String(value))));
  byId('panel').replaceChildren(
    h(
      'div',
      { class: 'panel-token' },
      h('h2', {}, inPrompt ? 'Prompt token' : 'Sampled token'),
      h('p', { class: `big chip ${isSpecial(text) ? 'special' : ''}` }, visible(text)),
      text.includes('\uFFFD') && h('p', { class: 'hint' }, 'Part of a character; the rest is in a token beside.'),
      ...(token ? probability(token) : []),
    ),
    token ? alternatives(token) : '',
    h('dl', { class: 'rows' }, ...rows),
    h('p', { class: 'hint keys' }, 'Arrow keys move the selection.'),
  );
}

function probability({ id, logprob, top }) {
  const rank = top.findIndex(([other]) => other === id) + 1;
  const likely = rank ? ` likely, choice ${rank}` : ' likely';
  const bits = (Math.max(-logprob, 0) / Math.LN2).toFixed(2);
  return [
    h('p', { class: 'probability' }, h('strong', {}, percent(Math.exp(logprob))), likely),
    h('p', { class: 'hint' }, `log-probability ${logprob.toFixed(3)}, ${bits} bits`),
  ];
}

function alternatives({ id: chosen, text: own, logprob: ownLogprob, top }) {
  const all = top.some(([id]) => id === chosen) ? top : [...top, [chosen, own, ownLogprob]];
  const rest = 1 - all.reduce((sum, [, , logprob]) => sum + Math.exp(logprob), 0);
  const line = (text, share, mine) => {
    const fill = h('i');
    fill.style.width = `${100 * share}%`;
    return h(
      'li',
      { class: mine ? 'mine' : '' },
      h('code', { title: text }, text),
      h('span', { class: 'level' }, fill),
      h('span', { class: 'share' }, percent(share)),
    );
  };
  return h(
    'ol',
    { class: 'alternatives', 'aria-label': 'Likeliest tokens' },
    ...all.map(([id, text, logprob]) => line(visible(text), Math.exp(logprob), id === chosen)),
    rest > 0.0005 && line('all others', rest, false),
  );
}

// ---- blocks -------------------------------------------------------------------------------------------------------

function blockText(block) {
  const { trace, start, answer } = shown;
  const at = block * trace.ratio;
  const end = Math.min(at + trace.ratio, start + answer.tokens.length);
  let text = '';
  for (let i = at; i < end; i++) text += trace.prompt.texts[i] ?? tokenAt(i)?.text ?? '';
  return `positions ${count(at)} to ${count(end - 1)}, “${visible(text)}”`;
}

function showBlocks() {
  const { trace, start, layer, selected, counts, answer } = shown;
  for (const chip of shown.lit) chip.classList.remove('lit');
  shown.lit = [];
  const words = byId('blocks-words');
  if (!counts.length) {
    words.textContent = 'No choice of blocks was kept: the model has no CSA layers, or another engine answered.';
    byId('blocks-chosen').replaceChildren();
    return;
  }
  const tokens = start + answer.tokens.length;
  const token = tokenAt(selected);
  const chosen = chosenBlocks(layer);
  // the query that sampled a token stood one before it, and saw the blocks that were whole by then
  const seen = Math.floor((token ? selected : tokens) / trace.ratio);
  const layers = counts.map((found, i) => {
    if (token) return new Map((chosenBlocks(i) ?? []).map((block) => [block, 1]));
    return new Map([...found].map(([block, n]) => [block, n / answer.tokens.length]));
  });
  strip.show({
    blocks: Math.ceil(tokens / trace.ratio), ratio: trace.ratio, tokens, layers, layer, seen, at: selected,
    prompt: start, cached: trace.prompt.cached,
  });
  byId('strip-key').replaceChildren(
    ...usageKey(),
    h('span', { class: 'key' }, h('i', { class: 'is-lit' }), token ? 'chosen' : 'chosen, by many the brighter'),
  );
  if (!token) {
    const block = Math.floor(selected / trace.ratio);
    const times = counts[layer]?.get(block) ?? 0;
    words.textContent = `Block ${count(block)} was chosen in layer ${layer} by ${count(times)} of `
      + `${plural(answer.tokens.length, 'sampled token')}. Select a sampled token to see all that it chose.`;
    byId('blocks-chosen').replaceChildren();
    return;
  }
  if (!chosen) {
    words.textContent = 'The blocks of this token were not kept.';
    byId('blocks-chosen').replaceChildren();
    return;
  }
  words.textContent = `For this token, CSA layer ${layer} read ${count(chosen.length)} of the ${plural(seen, 'block')} of `
    + `${trace.ratio} tokens that were there.`;
  light(chosen);
  listChosen(chosen);
}

function light(blocks) {
  const { ratio } = shown.trace;
  for (const block of blocks) {
    for (let position = block * ratio; position < (block + 1) * ratio; position++) {
      const chip = shown.promptFlow.chip(position) ?? shown.answerFlow.chip(position);
      if (!chip) continue;
      chip.classList.add('lit');
      shown.lit.push(chip);
    }
  }
}

function listChosen(blocks, limit = CHOSEN) {
  const sorted = [...blocks].sort((a, b) => a - b);
  const buttons = sorted.slice(0, limit).map((block) => h(
    'button',
    { type: 'button', class: 'block', title: blockText(block), 'aria-label': `Block ${block}, ${blockText(block)}`,
      onclick: () => goTo(block * shown.trace.ratio) },
    count(block),
  ));
  if (sorted.length > limit) {
    const all = () => listChosen(blocks, Infinity);
    buttons.push(h('button', { type: 'button', class: 'button', onclick: all }, `${count(sorted.length - limit)} more`));
  }
  byId('blocks-chosen').replaceChildren(...buttons);
}

// ---- hovering -----------------------------------------------------------------------------------------------------

const tip = byId('tip');

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(x + 12, innerWidth - width - 8))}px`;
  tip.style.top = `${y + 20 + height > innerHeight ? y - height - 12 : y + 20}px`;
}

function hideTip() {
  tip.hidden = true;
}

function chipWords(chip) {
  const position = Number(chip.dataset.position);
  const token = tokenAt(position);
  const id = token ? token.id : shown.trace.prompt.ids[position];
  return `position ${count(position)}, id ${id}${token ? `, ${percent(Math.exp(token.logprob))}` : ''}`;
}

byId('trace').addEventListener('pointerover', (event) => {
  const chip = event.target.closest('.flow .chip');
  if (chip) showTip(chipWords(chip), event.clientX, event.clientY);
  else if (event.target.id !== 'strip') hideTip();
});
byId('trace').addEventListener('pointerleave', hideTip);

// ---- keys ---------------------------------------------------------------------------------------------------------

function moved(key) {
  const { selected } = shown;
  const flow = flowOf(selected);
  switch (key) {
    case 'ArrowLeft': return Math.max(selected - 1, flow.start);
    case 'ArrowRight': return Math.min(selected + 1, flow.end - 1);
    case 'ArrowUp': return flow.beside(selected, -1);
    case 'ArrowDown': return flow.beside(selected, 1);
    case 'Home': return flow.start;
    case 'End': return flow.end - 1;
    default: return null;
  }
}

document.addEventListener('keydown', (event) => {
  const { target } = event;
  const flow = target.closest('.flow');
  if (shown?.selected == null || event.ctrlKey || event.metaKey || event.altKey) return;
  if (target !== flow && target !== document.body && target !== byId('main')) return; // selects, links, buttons
  const to = moved(event.key);
  if (to === null) return;
  event.preventDefault();
  select(to, true);
  const chip = flowOf(to).chip(to);
  const { left, bottom } = chip.getBoundingClientRect();
  showTip(chipWords(chip), left - 12, bottom - 14);
});

for (const box of [byId('prompt'), byId('answer')]) {
  box.addEventListener('focusin', ({ target }) => {
    // the arrow keys go on where the focus is
    const flow = shown && [shown.promptFlow, shown.answerFlow].find(({ el }) => el === target);
    if (flow?.texts.length && !flow.holds(shown.selected)) select(flow.start);
  });
  box.addEventListener('focusout', hideTip);
}

byId('layer').addEventListener('change', ({ target }) => setLayer(Number(target.value)));
byId('choice').addEventListener('change', ({ target }) => showAnswer(Number(target.value)));
byId('reload').addEventListener('click', async () => {
  await loadList();
  showWanted();
});
window.addEventListener('popstate', showWanted);
onTheme(() => strip.draw());

await loadList();
showWanted();
