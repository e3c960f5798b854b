// One answer: its tokens, where they are shown, and the figures of them.

const STEPS = 6; // colours of the scale; page.css has as many
// Chunks that waited for the page are read in one go, each in less ms than this: they came together.
const TOGETHER = 0.25;

/** The step of the scale, from 1; the last one is full depth's alone. */
export function stepOf(run, blocks) {
  if (run >= blocks) return STEPS;
  return 1 + Math.floor(((Math.max(run, 1) - 1) * (STEPS - 1)) / Math.max(blocks - 1, 1));
}

/** Blocks of each step that a model of so many has, as [step, first, last]. */
export function stepsOf(blocks) {
  const steps = new Map();
  for (let run = 1; run <= blocks; run += 1) {
    const step = stepOf(run, blocks);
    steps.set(step, [steps.get(step)?.[0] ?? run, run]);
  }
  return [...steps].map(([step, [first, last]]) => [step, first, last]);
}

/** Text with its spaces and line ends made visible. */
export function visible(text) {
  if (text === "") return "no text yet";
  return `“${text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣")}”`;
}

export class Answer {
  /**
   * @param {HTMLElement} box Shows the tokens.
   * @param {number} blocks Of full depth.
   * @param {string} prompt Written before them; empty for a chat.
   */
  constructor(box, blocks, prompt) {
    this.box = box;
    this.blocks = blocks;
    this.tokens = [];
    this.spans = [];
    this.arrivals = []; // how many tokens came, and ms since those before
    this.last = performance.now();
    this.waiting = [];
    box.replaceChildren();
    if (prompt) box.append(piece("prompt", prompt));
  }

  /** Takes tokens that came together. */
  take(tokens, now) {
    const count = tokens.filter((token) => !token.trailing).length;
    const ms = now - this.last;
    const before = this.arrivals.at(-1);
    if (before && ms < TOGETHER) {
      before.count += count;
      before.ms += ms;
    } else {
      this.arrivals.push({ count, ms });
    }
    this.last = now;
    this.waiting.push(...tokens);
  }

  /** Shows what came since it was last called. */
  show() {
    const spans = this.waiting.map((token) => this.#span(token));
    this.box.append(...spans);
    this.waiting = [];
  }

  #span(token) {
    if (token.trailing) return piece("trailing", token.text);
    const span = piece(`token step-${stepOf(token.blocks_run, this.blocks)}`, token.text);
    span.classList.toggle("drafted", Boolean(token.drafted));
    span.classList.toggle("line-end", /^\n+$/.test(token.text));
    span.dataset.place = this.tokens.length;
    span.dataset.blocks = token.blocks_run;
    this.tokens.push(token);
    this.spans.push(span);
    span.title = this.about(this.tokens.length - 1);
    return span;
  }

  /** What is known of a token, in words. */
  about(place) {
    const token = this.tokens[place];
    const parts = [
      `Token ${place + 1}, ${visible(token.text)}: ${token.blocks_run} of ${this.blocks} blocks`,
    ];
    if (token.confidence !== null) parts.push(`confidence ${percent(token.confidence)}`);
    if (token.drafted) parts.push("drafted, then checked");
    return `${parts.join(", ")}.${this.spans[place].dataset.differs ?? ""}`;
  }

  /** Marks a token that the other answer doesn't have at its place. */
  mark(place, words) {
    const span = this.spans[place];
    span.classList.add("differs");
    span.dataset.differs = ` ${words}`;
    span.title = this.about(place);
  }

  /** ms of each token but the first ones; those that came together have equal shares. */
  get paces() {
    return this.arrivals.slice(1).flatMap(({ count, ms }) => Array(count).fill(ms / count));
  }

  get figures() {
    const blocks = this.tokens.reduce((sum, token) => sum + token.blocks_run, 0);
    const count = this.tokens.length;
    return {
      pace: median(this.paces)?.toFixed(2) ?? "–",
      first: this.arrivals[0]?.ms.toFixed(0) ?? "–",
      blocks: count > 0 ? `${(blocks / count).toFixed(1)} of ${this.blocks}` : "–",
      early: count > 0 ? `${this.early} of ${count}` : "–",
    };
  }

  get early() {
    return this.tokens.filter((token) => token.blocks_run < this.blocks).length;
  }

  /** How many tokens each step of the scale has. */
  get counts() {
    const counts = new Map();
    for (const token of this.tokens) {
      const step = stepOf(token.blocks_run, this.blocks);
      counts.set(step, (counts.get(step) ?? 0) + 1);
    }
    return counts;
  }
}

/** Marks where answers differ, from a place on; returns the place where to go on. */
export function markDifferences(one, other, from) {
  const most = Math.min(one.tokens.length, other.tokens.length);
  for (let place = from; place < most; place += 1) {
    const [here, there] = [one.tokens[place], other.tokens[place]];
    if (here.id === there.id) continue;
    one.mark(place, `Full depth has ${visible(there.text)} here.`);
    other.mark(place, `The answer has ${visible(here.text)} here.`);
  }
  return most;
}

/** Marks what only the longer of two answers has. */
export function markRest(one, other) {
  const most = Math.min(one.tokens.length, other.tokens.length);
  for (let place = most; place < one.tokens.length; place += 1) {
    one.mark(place, "Full depth has ended before.");
  }
  for (let place = most; place < other.tokens.length; place += 1) {
    other.mark(place, "The answer has ended before.");
  }
}

/** How far two answers agree, in words: the figure, and what is to be known of it. */
export function agreementOf(one, other) {
  const all = Math.max(one.tokens.length, other.tokens.length);
  const differ = one.tokens.map((token, place) => token.id !== other.tokens[place]?.id);
  const same = differ.filter((each) => !each).length;
  if (same === all) return [`All ${all} tokens agree.`, ""];
  const first = differ.includes(true) ? differ.indexOf(true) : one.tokens.length;
  return [
    `${same} of ${all} tokens agree; token ${first + 1} is the first that differs.`,
    "From there on the two answers go on from different texts: this is no measure of the promise.",
  ];
}

export function percent(share) {
  return `${Number((share * 100).toPrecision(share < 0.1 ? 2 : 3))}%`;
}

function piece(className, text) {
  const span = document.createElement("span");
  span.className = className;
  span.textContent = text; // a model wrote it: never as HTML
  return span;
}

function median(values) {
  if (values.length === 0) return undefined;
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
