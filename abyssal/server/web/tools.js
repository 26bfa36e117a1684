// The tools that a conversation offers: two that run here, and the reader's own.
import { calculate } from './calculator.js';

const NAME = /^[A-Za-z0-9_-]{1,64}$/;

function currentTime({ time_zone: timeZone }) {
  const now = new Date();
  const zone = timeZone || Intl.DateTimeFormat().resolvedOptions().timeZone;
  const shown = new Intl.DateTimeFormat('en-GB', { dateStyle: 'full', timeStyle: 'long', timeZone: zone }).format(now);
  return JSON.stringify({ time: shown, time_zone: zone, utc: now.toISOString() });
}

/** Tools that run in the browser, by name: a label, what the model is told, and what they do. */
export const BUILT_IN = {
  calculator: {
    label: 'Calculator',
    description: 'Evaluates an arithmetic expression: + - * / % ^, parentheses, factorials, pi, e, and functions such '
      + 'as sqrt, round, min, max, log, sin.',
    parameters: {
      type: 'object',
      properties: { expression: { type: 'string', description: 'For example (3 + 4) * sqrt(2)' } },
      required: ['expression'],
    },
    run({ expression }) {
      if (typeof expression !== 'string' && typeof expression !== 'number') throw new Error('expression is missing');
      return calculate(String(expression));
    },
  },
  current_time: {
    label: 'Current time',
    description: 'Tells the current date and time.',
    parameters: {
      type: 'object',
      properties: {
        time_zone: { type: 'string', description: 'An IANA name such as Europe/Oslo; the user’s own if left out' },
      },
    },
    run: currentTime,
  },
};

/** The reader's own tools from their JSON text. Throws an Error that says what is wrong. */
export function customTools(text) {
  if (!text.trim()) return [];
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is no JSON: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error('Give a list of tools: [ … ]');
  const names = new Set(Object.keys(BUILT_IN));
  tools.forEach((tool, i) => {
    const name = tool?.function?.name;
    const where = `Tool ${i + 1}`;
    if (tool?.type !== 'function' || typeof name !== 'string') {
      throw new Error(`${where} is not of the form {"type": "function", "function": {"name": …}}`);
    }
    if (!NAME.test(name)) throw new Error(`${where}: use letters, digits, _ and - in the name`);
    if (names.has(name)) throw new Error(`${where}: the name ${name} is taken`);
    names.add(name);
  });
  return tools;
}

/** The tools that go with a request, in the API's form. */
export function toolsOf(settings) {
  const chosen = Object.entries(BUILT_IN).filter(([name]) => settings.tools.includes(name));
  const own = chosen.map(([name, { description, parameters }]) => ({
    type: 'function',
    function: { name, description, parameters },
  }));
  return [...own, ...customTools(settings.customTools)];
}

/** The result of a call that the browser can run, or null for a tool of the reader's. */
export function runHere({ name, arguments: text }) {
  if (!Object.hasOwn(BUILT_IN, name)) return null;
  try {
    let given;
    try {
      given = JSON.parse(text || '{}');
    } catch {
      throw new Error('the arguments are no JSON');
    }
    if (given === null || typeof given !== 'object') throw new Error('the arguments are no object');
    return { content: BUILT_IN[name].run(given), failed: false };
  } catch (error) {
    return { content: `Error: ${error.message}`, failed: true };
  }
}
