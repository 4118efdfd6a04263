// The tasks of this worker, by the names under which hosts call them:
//
//     pool.submit(wove_ws_sync.named("add"), 1, 2)
//
// A task gets the call: its `positional` arguments, its named ones in `args`, an AbortSignal that
// tells of a cancel, and `progress(done, total, message)` and `log(level, message)`. What it returns,
// or what its promise resolves to, travels back as JSON.

import { setTimeout as sleep } from "node:timers/promises";

export default {
  add: ({ positional: [a, b] }) => a + b,

  greet: ({ args: { name } }) => `Hello, ${name}!`,

  echo: ({ positional, args }) => ({ positional, args }),

  fail: ({ args: { text } }) => {
    throw new RangeError(text);
  },

  // Stops when it is cancelled, which sleep() does by itself.
  wait: async ({ positional: [seconds], signal }) => {
    await sleep(seconds * 1000, null, { signal });
    return "rested";
  },

  count: async ({ positional: [total], progress, log }) => {
    for (let done = 1; done <= total; done++) {
      progress(done, total, `step ${done}`);
      await sleep(1);
    }
    log("WARNING", `counted to ${total}`);
    return total;
  },

  // Not JSON: the host gets an error that says so.
  nothing: () => NaN,
};
