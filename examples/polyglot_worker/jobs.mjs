// What this worker can do, by the names that jobs.py gives it. Each takes positional and keyword arguments, and a
// context with `progress(fraction, message)` and `cancelled`.

export const functions = {
  "jobs:word_count": ([text]) => {
    const counts = {};
    for (const word of text.toLowerCase().match(/\p{L}+/gu) ?? []) counts[word] = (counts[word] ?? 0) + 1;
    return counts;
  },

  "jobs:sum_of_squares": async ([numbers], { scale = 1 }, { progress }) => {
    let sum = 0;
    for (const [index, number] of numbers.entries()) {
      if (index === Math.floor(numbers.length / 2)) await progress(0.5, "half way");
      sum += number * number;
    }
    return sum * scale;
  },

  "jobs:nap": async ([seconds], keywords, context) => {
    const end = Date.now() + 1000 * seconds;
    while (Date.now() < end && !context.cancelled) {
      await new Promise((resolve) => setTimeout(resolve, 50));
      await context.progress(null);
    }
    return "rested";
  },

  "jobs:divide": ([a, b]) => {
    if (b === 0) throw new RangeError("division by zero, says Node.js");
    return a / b;
  },
};
