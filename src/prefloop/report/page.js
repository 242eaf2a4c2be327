"use strict";
// The theme button and the sample browser. Text of models goes into the page as text nodes only, never as mark-up.

const PAGE = 50; // samples in the document at a time
const CLAMP = 1200; // characters from which an answer is folded
const CELLS = 250000; // largest table of the word comparison; beyond it, words are looked up instead

const at = (id) => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const runs = data.runs.length;

at("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

// Rows are arrays, to keep the page small; samples.py says what is where (ANSWER, PAIR).
// A sample: {prompt, category, left, right, note}; a side: {name, text, cut, score}.

function beforeAndAfter() {
  const run = Number(at("of-run").value), before = Number(at("before").value), after = Number(at("after").value);
  return data.answers.filter((row) => row[0] === run && row[2][before] && row[2][after]).map(([, prompt, answers]) => {
    const side = (i) => ({ name: data.models[run][i], text: answers[i][0], cut: answers[i][1], score: null });
    // p is against the first model, the start or the other side.
    return { prompt, left: side(before), right: side(after), p: before === 0 && after !== 0 ? answers[after][2] : null };
  });
}

function trainingPairs() {
  const run = Number(at("of-run").value), round = at("round").value, source = at("source").value;
  return data.pairs
    .filter((row) => row[0] === run && row[1] === round && (source === "" || row[8] === Number(source)))
    .map(([, , prompt, chosen, rejected, chosenScore, rejectedScore, p, generated]) => ({
      prompt,
      left: { name: "chosen", text: chosen, cut: 0, score: chosenScore },
      right: { name: "rejected", text: rejected, cut: 0, score: rejectedScore },
      p: p === 1 ? null : p,
      source: generated ? "generated" : "offline",
    }));
}

const VIEWS = { answers: beforeAndAfter, pairs: trainingPairs };
const OUTCOMES = {
  "": () => true,
  won: (s) => s.p !== null && s.p > 0.5,
  lost: (s) => s.p !== null && s.p < 0.5,
  tie: (s) => s.p === 0.5,
  none: (s) => s.p === null,
};
const gap = (s) => s.left.score === null || s.right.score === null ? -Infinity : s.left.score - s.right.score;
const growth = (s) => s.right.text.length - s.left.text.length;
const ORDERS = {
  "": null,
  "score gap, largest first": (a, b) => gap(b) - gap(a),
  "score gap, smallest first": (a, b) => gap(a) - gap(b),
  "right is longer, most first": (a, b) => growth(b) - growth(a),
  "right is shorter, most first": (a, b) => growth(a) - growth(b),
};

let found = [];
let first = 0;

function options(id, entries) {
  // Fills a select with [value, text]; hidden where there is nothing to choose.
  const select = at(id), before = select.value;
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
  if (entries.some(([value]) => String(value) === before)) select.value = before;
  select.parentElement.hidden = entries.length < 2;
}

function setUp() {
  // What can be chosen depends on the view and the run.
  const run = Number(at("of-run").value), pairs = at("view").value === "pairs";
  const models = data.models[run].map((name, i) => [i, name]);
  const rows = (pairs ? data.pairs : data.answers).filter((row) => row[0] === run);
  if (at("before").dataset.run !== String(run)) {
    // The last model against the first; of an online run the last evaluation, which was judged.
    options("before", models);
    options("after", models);
    at("before").dataset.run = run;
    at("before").value = 0;
    at("after").value = models.length - 1;
  }
  for (const id of ["before", "after"]) at(id).parentElement.hidden = pairs || models.length < 2;
  options("round", pairs ? [...new Set(rows.map((row) => row[1]))].map((name) => [name, name]) : []);
  const mixed = pairs && new Set(rows.map((row) => row[8])).size > 1;
  options("source", mixed ? [["", "all"], [1, "generated"], [0, "offline"]] : []);
  const judged = !pairs && rows.some((row) => row[2].some((answer) => answer && answer[2] !== null));
  options("outcome", judged ? [["", "all"], ["won", "right preferred"], ["lost", "left preferred"],
    ["tie", "tie"], ["none", "not judged"]] : []);
  const categories = [...new Set(rows.map((row) => data.prompts[row[pairs ? 2 : 1]][1]))].filter(Boolean).sort();
  options("category", categories.length > 1 ? [["", "all"], ...categories.map((name) => [name, name])] : []);
  const scored = pairs && rows.some((row) => row[5] !== null);
  options("order", Object.keys(ORDERS).filter((name) => scored || !name.includes("score"))
    .map((name) => [name, name || "as made"]));
}

function search() {
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const category = at("category").value;
  found = VIEWS[at("view").value]().filter((sample) => {
    const [text, kind] = data.prompts[sample.prompt];
    if (category && kind !== category || !OUTCOMES[at("outcome").value](sample)) return false;
    if (!words.length) return true;
    const all = `${text}\n${sample.left.text}\n${sample.right.text}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
  const order = ORDERS[at("order").value];
  if (order) found.sort(order);
  first = 0;
  show();
}

function show() {
  const shown = found.slice(first, first + PAGE);
  at("list").replaceChildren(...shown.map(card));
  const pairs = at("view").value === "pairs", kept = (pairs ? data.pairs : data.answers).length;
  const all = data.of[pairs ? 1 : 0];
  const file = pairs && data.files[`${at("of-run").value} ${at("round").value}`];
  at("found").textContent = `${found.length} found` +
    (kept < all ? `; the page holds ${kept} of ${all}, evenly drawn` : "") + (file ? `; all are in ${file}` : "");
  at("place").textContent = found.length ? `${first + 1} to ${first + shown.length} of ${found.length}` : "";
  at("previous").disabled = first === 0;
  at("next").disabled = first + PAGE >= found.length;
  at("previous").parentElement.hidden = found.length <= PAGE;
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children); // strings become text nodes
  return made;
}

function card(sample) {
  const [text, category] = data.prompts[sample.prompt];
  const pairs = at("view").value === "pairs";
  const notes = [category, sample.source].filter(Boolean);
  if (sample.p !== null) {
    const who = pairs ? "" : `${data.judged[Number(at("of-run").value)]}: `;
    notes.push(`${who}P(${pairs ? "chosen" : "right"} preferred) = ${sample.p}`);
  }
  const [left, right] = at("mark").checked ? differing(sample.left.text, sample.right.text) : [null, null];
  return element("article", "sample",
    element("p", "prompt", text),
    // The colour of what is new or chosen, and of what was or is rejected.
    element("div", pairs ? "sides" : "sides turned", side(sample.left, "left", left), side(sample.right, "right", right)),
    element("p", "quiet more", notes.join(" · ")));
}

function side(answer, where, marked) {
  const facts = [` ${answer.text.length} characters`];
  if (answer.score !== null) facts.push(`score ${answer.score}`);
  if (answer.cut) facts.push("cut at the limit");
  const body = element("div", "answer", ...(marked ? pieces(marked) : [answer.text || "(empty)"]));
  const made = element("div", `side ${where}`, element("h4", "", element("b", "", answer.name), facts.join(", ")), body);
  if (answer.text.length > CLAMP) {
    body.classList.add("clamped");
    const button = element("button", "more", "Show all");
    button.addEventListener("click", () => { body.classList.remove("clamped"); button.remove(); });
    made.append(button);
  }
  return made;
}

// Words that differ. Texts are cut into words with the space after them; a word is marked when it is on no longest
// common subsequence of both texts.

function pieces(words) {
  const made = [];
  for (let i = 0; i < words.length;) {
    let j = i, text = "";
    while (j < words.length && words[j][1] === words[i][1]) text += words[j++][0];
    // The space behind the last marked word stays unmarked.
    made.push(...(words[i][1] ? [element("mark", "", text.trimEnd()), text.slice(text.trimEnd().length)] : [text]));
    i = j;
  }
  return made.length ? made : ["(empty)"];
}

function differing(left, right) {
  const a = left.match(/\S+\s*/g) || [], b = right.match(/\S+\s*/g) || [];
  const same = a.length * b.length <= CELLS ? subsequence(a.map((w) => w.trim()), b.map((w) => w.trim())) : shared(a, b);
  return [a.map((word, i) => [word, !same[0].has(i)]), b.map((word, j) => [word, !same[1].has(j)])];
}

function subsequence(a, b) {
  const width = b.length + 1, length = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i * width + j] = a[i] === b[j] ? length[(i + 1) * width + j + 1] + 1
        : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const inA = new Set(), inB = new Set();
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    if (a[i] === b[j]) { inA.add(i++); inB.add(j++); }
    else if (length[(i + 1) * width + j] >= length[i * width + j + 1]) i++;
    else j++;
  }
  return [inA, inB];
}

function shared(a, b) {
  // Texts of thousands of words: a word that the other text has anywhere counts as the same.
  const held = (words, other) => {
    const known = new Set(other.map((word) => word.trim()));
    return new Set([...words.keys()].filter((i) => known.has(words[i].trim())));
  };
  return [held(a, b), held(b, a)];
}

const views = [];
if (data.answers.length) views.push(["answers", "before and after"]);
if (data.pairs.length) views.push(["pairs", "training pairs"]);
if (views.length) {
  at("browser").hidden = false;
  options("view", views);
  options("of-run", data.runs.map((name, i) => [i, name]));
  setUp();
  for (const id of ["view", "of-run"]) at(id).addEventListener("change", () => { setUp(); search(); });
  for (const id of ["before", "after", "round", "source", "outcome", "category", "order"])
    at(id).addEventListener("change", search);
  at("mark").addEventListener("change", show);
  let waiting;
  at("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 120); });
  for (const [id, by] of [["previous", -PAGE], ["next", PAGE]]) {
    at(id).addEventListener("click", () => { first += by; show(); at("samples").scrollIntoView(); });
  }
  search();
} else {
  at("samples").append(element("p", "quiet", "The run has no samples yet."));
}
