"use strict";
// Shows a match, sends a vote, shows the next. Texts of models go into the page as text nodes only, never as mark-up.

const KEYS = { 1: "1", 2: "2", t: "tie", b: "both bad", s: "skip" };
const NAMES = { 1: "Answer 1", 2: "Answer 2", tie: "Tie", "both bad": "Both bad", skip: "Skipped" };

const at = (id) => document.getElementById(id);
const kept = (name, value) => {
  // What is remembered by the browser; one that keeps nothing asks again.
  try {
    if (value === undefined) return localStorage.getItem("arena " + name) || "";
    localStorage.setItem("arena " + name, value);
  } catch { /* not allowed to keep anything */ }
  return value || "";
};

let token = decodeURIComponent(location.hash.slice(1)) || kept("token");
let rater = kept("rater");
let shown = null; // the match on the page
let waiting = false; // for the server: nothing can be chosen meanwhile
let failed = null; // what to send again

async function ask(path, data, said) {
  if (waiting) return;
  waiting = true;
  failed = null;
  enable();
  try {
    const response = await fetch("api/" + path, {
      method: "POST",
      headers: { "Content-Type": "application/json", ...(token && { Authorization: "Bearer " + token }) },
      body: JSON.stringify({ rater, ...data }),
    });
    const answer = await response.json();
    waiting = false;
    if (response.status === 401) return enter(true);
    if (response.status === 409) return ask("next", {}, answer.error);
    if (!response.ok) return fail(answer.error, path, data, said);
    show(answer, said);
  } catch {
    waiting = false;
    fail("The server does not answer. Your last click was not saved.", path, data, said);
  }
}

function fail(why, path, data, said) {
  failed = () => ask(path, data, said);
  at("message").firstElementChild.textContent = why;
  at("message").hidden = false;
  at("bar").hidden = false;
  enable();
}

function show(answer, said) {
  shown = answer.shown;
  at("enter").hidden = at("message").hidden = true;
  at("match").hidden = !shown;
  at("end").hidden = Boolean(shown);
  at("bar").hidden = at("head").hidden = at("progress").hidden = false;
  at("rater").textContent = rater;
  at("place").textContent = `${answer.done} of ${answer.of}`;
  at("progress").setAttribute("aria-valuenow", answer.done);
  at("progress").setAttribute("aria-valuemax", answer.of);
  at("progress").firstElementChild.style.width = `${(100 * answer.done) / (answer.of || 1)}%`;
  at("said").textContent = said || "";
  at("undo").dataset.none = answer.done ? "" : "1";
  if (shown) {
    at("prompt").replaceChildren(...shown.prompt.flatMap(turn));
    shown.answers.forEach((text, i) => {
      const box = at(`answer-${i + 1}`);
      box.textContent = text.trim() || "(an empty answer)";
      box.classList.toggle("empty", !text.trim());
    });
  }
  enable();
  scrollTo(0, 0);
}

function turn(message, i, all) {
  // The prompt is one user turn as a rule; a conversation names who speaks.
  const text = Object.assign(document.createElement("div"), { textContent: message.content.trim(), dir: "auto" });
  if (all.length === 1) return [text];
  return [Object.assign(document.createElement("h3"), { textContent: message.role }), text];
}

function enable() {
  for (const button of document.querySelectorAll("#choices button, #below button")) {
    button.disabled = waiting || (button.id === "undo" ? at("undo").dataset.none === "1" : !shown);
  }
}

function vote(choice) {
  if (shown && !waiting) ask("vote", { match: shown.match, choice }, `Last: ${NAMES[choice]}`);
}

function undo() {
  if (!waiting && at("undo").dataset.none !== "1") ask("undo", {}, "Taken back: choose again");
}

function enter(needsToken) {
  shown = null;
  at("match").hidden = at("end").hidden = at("bar").hidden = at("head").hidden = at("progress").hidden = true;
  at("enter").hidden = false;
  if (needsToken) at("ask-token").hidden = false;
  at("token").required = needsToken;
  at("name").value = rater;
  at(needsToken && rater ? "token" : "name").focus();
}

at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = kept("rater", at("name").value.trim().replace(/\s+/g, " "));
  if (at("token").value) token = kept("token", at("token").value.trim());
  ask("next", {});
});
at("bar").addEventListener("click", (event) => {
  const choice = event.target.closest("button")?.dataset.choice;
  if (choice) vote(choice);
});
at("undo").addEventListener("click", undo);
at("again").addEventListener("click", () => failed?.());
at("rater").addEventListener("click", () => enter(false));
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input")) return;
  const key = event.key.toLowerCase();
  if (at("bar").hidden) return;
  if (key in KEYS) vote(KEYS[key]);
  else if (key === "u") undo();
});

if (location.hash) {
  kept("token", token);
  history.replaceState(null, "", location.pathname); // the token need not stay in sight
}
if (rater) ask("next", {});
else enter(false);
