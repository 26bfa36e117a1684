// Arithmetic by recursive descent; nothing of the text is ever run as a program.

const CONSTANTS = { pi: Math.PI, e: Math.E, tau: 2 * Math.PI };

const FUNCTIONS = {
  abs: Math.abs, ceil: Math.ceil, cos: Math.cos, exp: Math.exp, floor: Math.floor, ln: Math.log,
  log: Math.log, log10: Math.log10, log2: Math.log2, max: Math.max, min: Math.min, pow: Math.pow,
  round: Math.round, sin: Math.sin, sqrt: Math.sqrt, tan: Math.tan,
};

const TOKEN = /\s*(?:((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)|([a-z][a-z0-9]*)|(\*\*|[-+*/%^(),!]))/iy;
const DEPTH = 200; // of parentheses and signs; deeper ones would fill the stack

function tokensOf(text) {
  const tokens = [];
  TOKEN.lastIndex = 0;
  while (TOKEN.lastIndex < text.trimEnd().length) {
    const at = TOKEN.lastIndex;
    const found = TOKEN.exec(text);
    if (!found) throw new Error(`unexpected ${JSON.stringify(text.slice(at).trim()[0])}`);
    const [, number, name, sign] = found;
    tokens.push(number ? { number: Number(number) } : name ? { name: name.toLowerCase() } : { sign });
  }
  return tokens;
}

function factorial(n) {
  if (!Number.isInteger(n) || n < 0) throw new Error('the factorial of a number that is no natural one');
  let product = 1;
  for (let i = 2; i <= n && product < Infinity; i++) product *= i;
  return product;
}

class Parser {
  constructor(tokens) {
    this.tokens = tokens;
    this.at = 0;
    this.depth = 0;
  }

  take(...signs) {
    const sign = this.tokens[this.at]?.sign;
    if (!sign || !signs.includes(sign)) return null;
    this.at += 1;
    return sign;
  }

  expect(sign) {
    if (!this.take(sign)) throw new Error(`expected "${sign}"`);
  }

  sum() {
    if (++this.depth > DEPTH) throw new Error('nested too deeply');
    let value = this.product();
    for (let sign; (sign = this.take('+', '-')); ) {
      const right = this.product();
      value = sign === '+' ? value + right : value - right;
    }
    this.depth -= 1;
    return value;
  }

  product() {
    let value = this.signed();
    for (let sign; (sign = this.take('*', '/', '%')); ) {
      const right = this.signed();
      if (sign !== '*' && right === 0) throw new Error('division by zero');
      value = sign === '*' ? value * right : sign === '/' ? value / right : value % right;
    }
    return value;
  }

  /** A sign binds weaker than a power: -2^2 is -4. */
  signed() {
    let factor = 1;
    for (let sign; (sign = this.take('-', '+')); ) if (sign === '-') factor = -factor;
    return factor * this.power();
  }

  power() {
    let base = this.atom();
    while (this.take('!')) base = factorial(base);
    if (!this.take('^', '**')) return base;
    if (++this.depth > DEPTH) throw new Error('nested too deeply');
    const exponent = this.signed();
    this.depth -= 1;
    return base ** exponent;
  }

  atom() {
    const token = this.tokens[this.at];
    if (!token) throw new Error('the expression ends too early');
    if (token.number !== undefined) {
      this.at += 1;
      return token.number;
    }
    if (this.take('(')) {
      const value = this.sum();
      this.expect(')');
      return value;
    }
    if (!token.name) throw new Error(`unexpected "${token.sign}"`);
    this.at += 1;
    return this.named(token.name);
  }

  named(name) {
    if (Object.hasOwn(CONSTANTS, name)) return CONSTANTS[name];
    if (!Object.hasOwn(FUNCTIONS, name)) throw new Error(`unknown name "${name}"`);
    this.expect('(');
    const values = [this.sum()];
    while (this.take(',')) values.push(this.sum());
    this.expect(')');
    return FUNCTIONS[name](...values);
  }
}

/** The value of an arithmetic expression as text. Throws an Error that says what is wrong with it. */
export function calculate(text) {
  const parser = new Parser(tokensOf(text));
  const value = parser.sum();
  if (parser.at < parser.tokens.length) {
    const { number, name, sign } = parser.tokens[parser.at];
    throw new Error(`unexpected "${number ?? name ?? sign}"`);
  }
  if (!Number.isFinite(value)) throw new Error('the result is no finite number');
  return String(Number(value.toPrecision(15))); // 0.1 + 0.2 is 0.3
}
