// The browser's storage, which may be forbidden, full, or hold anything.

function area(name) {
  return {
    /** The text under a key, or null. */
    get(key) {
      try {
        return window[name].getItem(key);
      } catch {
        return null;
      }
    },
    /** Whether the text could be stored. */
    set(key, text) {
      try {
        window[name].setItem(key, text);
        return true;
      } catch {
        return false;
      }
    },
    remove(key) {
      try {
        window[name].removeItem(key);
      } catch {
        // what cannot be read needs no removing
      }
    },
    keys() {
      try {
        return Object.keys(window[name]);
      } catch {
        return [];
      }
    },
  };
}

export const local = area('localStorage');
export const session = area('sessionStorage');
