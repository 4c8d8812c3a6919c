"use strict";
// The page knows numbers and sides only; which model stands where is in the key that the page's author keeps.
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const comparisons = data.comparisons;
const players = [byId("left"), byId("right")];
const QUESTIONS = {
  overall: "Which video is better, all in all?",
  VQ: "Which video looks better: sharpness, detail, no flaws?",
  MQ: "Which video moves better: natural, stable, enough?",
  TA: "Which video is closer to the text?",
};
const CHOICES = ["left", "tie", "right"];
const SLOW = 0.25;
const PAUSE = 350; // milliseconds between two rounds
const STORE = "voting-" + data.page;

// votes: {comparison: "1", question, choice} in the order they were given.
const state = { voter: newVoter(), name: "", more: false, votes: [] };
let at = 0;
let question = "overall";
let slow = false;
let round = 0; // counts what is shown, so that what comes late is known as such
let ready = 0;

function newVoter() {
  const bytes = crypto.getRandomValues(new Uint8Array(4));
  return "voter " + Array.from(bytes, (b) => b.toString(16).padStart(2, "0")).join("");
}

const counted = (number) => number + (number === 1 ? " vote" : " votes");

function note(text) {
  byId("note").textContent = text;
}

// --- votes ---

const asked = () => (state.more ? Object.keys(QUESTIONS) : ["overall"]);
const find = (i, q) => state.votes.find((v) => v.comparison === String(i + 1) && v.question === q);
const openQuestion = (i) => asked().find((q) => !find(i, q));

function valid(vote) {
  return vote !== null && typeof vote === "object" && Object.hasOwn(QUESTIONS, vote.question) &&
    CHOICES.includes(vote.choice) && comparisons.some((_, i) => String(i + 1) === vote.comparison);
}

// Votes of a file or the store; a later one on the same counts.
function add(votes) {
  for (const { comparison, question, choice } of votes.filter(valid)) {
    state.votes = state.votes.filter((v) => v.comparison !== comparison || v.question !== question);
    state.votes.push({ comparison, question, choice });
  }
}

function vote(choice) {
  if (ready < 2 || byId("voting").hidden) return;
  add([{ comparison: String(at + 1), question, choice }]);
  save();
  const rest = asked().slice(asked().indexOf(question) + 1).find((q) => !find(at, q));
  if (rest) ask(rest);
  else next();
}

function undo() {
  const last = state.votes.pop();
  if (!last) return;
  save();
  show(Number(last.comparison) - 1, last.question);
}

function next() {
  for (let step = 1; step <= comparisons.length; step++) {
    const i = (at + step) % comparisons.length;
    if (openQuestion(i)) return show(i);
  }
  finish();
}

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    note("This browser keeps no votes for this page: export them before you close it.");
  }
}

function load() {
  try {
    const stored = JSON.parse(localStorage.getItem(STORE));
    if (!stored) return;
    if (typeof stored.voter === "string" && stored.voter) state.voter = stored.voter;
    if (typeof stored.name === "string") state.name = stored.name;
    state.more = stored.more === true;
    add(stored.votes);
  } catch {
    // Nothing stored that could be used.
  }
}

function exportVotes() {
  const name = state.name.trim();
  const content = JSON.stringify({ page: data.page, voter: state.voter, name, votes: state.votes }, null, 1);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  link.download = "votes_" + (name || state.voter).replace(/[^A-Za-z0-9]+/g, "_") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  note(`${counted(state.votes.length)} exported to ${link.download}.`);
}

async function importVotes(file) {
  let content;
  try {
    content = JSON.parse(await file.text());
  } catch {
    return note(`${file.name} is no file of votes.`);
  }
  if (content === null || typeof content !== "object" || !Array.isArray(content.votes)) {
    return note(`${file.name} is no file of votes.`);
  }
  if (content.page !== data.page) return note(`${file.name} holds votes of another page.`);
  const fine = content.votes.filter(valid);
  add(fine);
  // Whoever goes on elsewhere stays the same voter.
  if (typeof content.voter === "string" && content.voter) state.voter = content.voter.slice(0, 80);
  if (typeof content.name === "string" && content.name) state.name = content.name.slice(0, 80);
  if (fine.some((v) => v.question !== "overall")) state.more = true;
  save();
  byId("name").value = state.name;
  byId("more").checked = state.more;
  begin();
  note(`${counted(fine.length)} imported.`);
}

// --- what is seen ---

function begin() {
  const i = comparisons.findIndex((_, i) => openQuestion(i));
  if (i < 0) finish();
  else show(i);
}

function show(i, q) {
  at = i;
  byId("voting").hidden = false;
  byId("done").hidden = true;
  byId("prompt").textContent = comparisons[i].prompt;
  byId("prompt").scrollTop = 0;
  note("");
  play();
  ask(q || openQuestion(i) || "overall");
}

function ask(q) {
  question = q;
  byId("ask").textContent = QUESTIONS[q];
  update();
}

function finish() {
  round++;
  players.forEach((player) => player.pause());
  byId("voting").hidden = true;
  byId("done").hidden = false;
  update();
}

function update() {
  const done = comparisons.filter((_, i) => !openQuestion(i)).length;
  byId("bar").style.width = (100 * done) / comparisons.length + "%";
  byId("bar").parentElement.setAttribute("aria-valuenow", Math.round((100 * done) / comparisons.length));
  byId("count").textContent = `${done} of ${comparisons.length} done`;
  const given = find(at, question);
  for (const button of document.querySelectorAll("[data-choice]")) {
    button.disabled = ready < 2;
    button.classList.toggle("chosen", given !== undefined && given.choice === button.dataset.choice);
  }
  for (const button of document.querySelectorAll("[data-question]")) {
    button.hidden = asked().length === 1 || !asked().includes(button.dataset.question);
    button.setAttribute("aria-current", button.dataset.question === question);
    const answered = find(at, button.dataset.question) !== undefined;
    button.textContent = button.textContent.replace(/ \u2713$/, "") + (answered ? " \u2713" : "");
  }
  byId("undo").disabled = state.votes.length === 0;
  byId("slow").setAttribute("aria-pressed", slow);
}

// --- videos: both begin together, and again when the longer one has ended ---

function source(value) {
  if (!data.embedded) return value;
  // Some phones do not play data URIs, but all play blobs.
  const bytes = Uint8Array.from(atob(value), (c) => c.charCodeAt(0));
  return URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
}

function play() {
  const mine = ++round;
  ready = 0;
  players.forEach((player, side) => {
    const broken = player.parentElement.querySelector(".broken");
    broken.hidden = true;
    if (player.src.startsWith("blob:")) URL.revokeObjectURL(player.src);
    player.oncanplaythrough = () => {
      player.oncanplaythrough = null;
      ready++;
      byId("videos").classList.toggle("wide", players[0].videoWidth > players[0].videoHeight);
      update();
      if (ready === 2) start(mine);
    };
    player.onended = () => {
      if (mine === round && players.every((p) => p.ended)) setTimeout(() => start(mine), PAUSE);
    };
    player.onerror = () => {
      broken.hidden = false;
      broken.textContent = data.embedded
        ? "This video cannot be played here. Skip it, or try another browser."
        : "This video is missing or cannot be played here; its folder has to lie beside this page.";
    };
    player.src = source(comparisons[at][side === 0 ? "left" : "right"]);
    player.play().catch(() => {}); // some phones load nothing before; start() lets both begin together
  });
}

function start(mine) {
  if (mine !== round || ready < 2) return;
  for (const player of players) {
    player.currentTime = 0;
    player.playbackRate = slow ? SLOW : 1;
  }
  Promise.all(players.map((player) => player.play())).catch(() => {
    if (mine === round) note("Press Replay to start the videos.");
  });
}

function toggleSlow() {
  slow = !slow;
  start(round);
  update();
}

// --- controls ---

const KEYS = {
  ArrowLeft: () => vote("left"),
  ArrowRight: () => vote("right"),
  ArrowDown: () => vote("tie"),
  t: () => vote("tie"),
  u: undo,
  r: () => start(round),
  s: toggleSlow,
};

document.addEventListener("keydown", (event) => {
  if (event.target.matches("input[type=text]") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  if (!event.repeat) action(); // a key held down is one vote
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.onclick = () => vote(button.dataset.choice);
}
for (const button of document.querySelectorAll("[data-question]")) {
  button.onclick = () => ask(button.dataset.question);
}
byId("undo").onclick = undo;
byId("replay").onclick = () => start(round);
byId("slow").onclick = toggleSlow;
byId("skip").onclick = () => show((at + 1) % comparisons.length);
byId("back").onclick = () => show((at + comparisons.length - 1) % comparisons.length);
byId("look").onclick = () => show(0);
byId("export").onclick = exportVotes;
byId("export-done").onclick = exportVotes;
byId("import").onclick = () => byId("file").click();
byId("file").onchange = async (event) => {
  if (event.target.files.length) await importVotes(event.target.files[0]);
  event.target.value = "";
};
byId("name").oninput = (event) => {
  state.name = event.target.value;
  save();
};
byId("more").onchange = (event) => {
  state.more = event.target.checked;
  save();
  if (byId("voting").hidden) return begin();
  ask(openQuestion(at) || "overall");
};

load();
byId("name").value = state.name;
byId("more").checked = state.more;
begin();
