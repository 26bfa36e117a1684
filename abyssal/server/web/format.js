// Numbers and times for people.

const numbers = new Intl.NumberFormat('en');

/** 12345 as 12,345. */
export const count = (n) => numbers.format(n);

/** "1 token", "2 tokens". */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? '' : 's'}`;

/** Seconds as 0.42 s, 3.1 s, 42 s or 2 min 5 s. */
export function seconds(s) {
  if (s < 0.995) return `${s.toFixed(2)} s`;
  if (s < 9.95) return `${s.toFixed(1)} s`;
  if (s < 59.5) return `${Math.round(s)} s`;
  const whole = Math.round(s);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** A share as 0.03%, 4.2% or 42%. */
export function percent(share) {
  const value = share * 100;
  if (value === 0 || value >= 10) return `${value >= 99.95 || value === 0 ? value.toFixed(0) : value.toFixed(1)}%`;
  return value >= 0.01 ? `${value.toPrecision(2)}%` : `${value.toExponential(1)}%`;
}

/** The time of day of a Unix time in seconds, with the date unless it is today. */
export function clock(unix) {
  const date = new Date(unix * 1000);
  const today = date.toDateString() === new Date().toDateString();
  const time = date.toLocaleTimeString([], { hour: '2-digit', minute: '2-digit', second: '2-digit' });
  return today ? time : `${date.toLocaleDateString()} ${time}`;
}
