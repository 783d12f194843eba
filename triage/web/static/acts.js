// Claim, release, mark read and verdicts: what [data-act] buttons do to the study of their [data-study].
import {attended} from "/static/touched.js";

const element = id => document.getElementById(id), said = element("said");
const address = (study, what) => `/studies/${encodeURIComponent(study)}/${what}`;
const LONGEST = 300000; // between two renewals of a claim
let forgetting, held = null; // the study that is claimed only because this page is open

document.documentElement.classList.add("with-script");

export async function call(method, path, body, keepalive = false) {
  try {
    const asked = {method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), keepalive};
    const response = await fetch(`/api/v1${path}`, asked);
    if (response.status === 401) location.reload();
    const answer = response.status === 204 ? {} : await response.json();
    return {ok: response.ok, ...answer};
  } catch {
    return {ok: false, error: "There is no connection: nothing was done."};
  }
}

export function say(text, undo) {
  clearTimeout(forgetting);
  said.replaceChildren(text);
  if (undo) {
    const button = document.createElement("button");
    button.textContent = "Undo";
    button.addEventListener("click", undo);
    said.append(" ", button);
  }
  forgetting = setTimeout(() => said.replaceChildren(), 10000);
}

let answered = Promise.resolve(); // a dialog says so a moment after it closed: the next one waits for that

export async function ask(dialog) {
  await answered;
  dialog.returnValue = "";
  dialog.showModal();
  answered = new Promise(done => dialog.addEventListener("close", () => done(dialog.returnValue), {once: true}));
  return answered;
}

// Somebody else reads the study: "take", "look" (where that is a way) or "".
export function warn(person, name, look) {
  element("taken-by").textContent = `${person} reads the study of ${name}. Ask ${person} before you take it over.`;
  element("taken-look").hidden = !look;
  return ask(element("taken"));
}

export async function send(method, study, what, body) {
  const answer = await call(method, address(study, what), body);
  if (!answer.ok && !answer.claim) say(answer.error);
  document.dispatchEvent(new CustomEvent("acted", {detail: study}));
  return answer;
}

// What is marked read is what was seen: not what has come since.
async function claimOrRead(what, shown, take_over = "") {
  const {study, name} = shown, seen = {revision: Number(shown.revision), images: Number(shown.images)};
  const answer = await send("PUT", study, what, {take_over, ...(what === "read" && seen)});
  if (answer.claim) return await warn(answer.claim.person, name) === "take" && claimOrRead(what, shown, answer.claim.person);
  if (!answer.ok) return false;
  held = null;
  if (what === "read") say(`Marked read: ${name}.`, () => unread(shown));
  else say(`You read the study of ${name}.`);
  return true;
}

async function release({study, name}) {
  held = null;
  if ((await send("DELETE", study, "claim")).ok) say(`Released: ${name}.`);
}

async function unread({study, name}) {
  if ((await send("DELETE", study, "read")).ok) say(`Back on the list: ${name}.`);
}

async function verdict({study, name, revision}, opinion) {
  let body = {opinion};
  if (opinion === "other") {
    element("judge-opinion").value = opinion;
    element("judge-grade").value = element("judge-comment").value = "";
    if (await ask(element("judge")) !== "save") return;
    body = {opinion: element("judge-opinion").value, comment: element("judge-comment").value, true_grade: element("judge-grade").value || null};
  }
  body.revision = Number(revision);
  if ((await send("POST", study, "verdicts", body)).ok) say(`Verdict recorded for ${name}.`);
}

export function act(button) {
  const shown = {...button.closest("[data-study]").dataset}, what = button.dataset.act;
  if (what === "verdict") return verdict(shown, button.dataset.opinion);
  return {release, unread}[what]?.(shown) ?? claimOrRead(what, shown);
}

document.addEventListener("click", event => {
  const button = event.target.closest("[data-act]");
  if (button) act(button);
});

// Whoever opens a study reads it, unless somebody else does: then the page says so before anything else. Such a
// claim lasts as long as somebody is here; one that was made knowingly stays when the page is left.
const opened = document.querySelector("[data-opened]"), isMine = () => Boolean(document.querySelector(".reading .claim.mine"));

async function begin({study, name}, take_over = "") {
  const had = isMine(), answer = await call("PUT", address(study, "claim"), {take_over});
  if (answer.claim) {
    const wish = await warn(answer.claim.person, name, true);
    if (wish === "") location.assign("/");
    return wish === "take" && begin({study, name}, answer.claim.person);
  }
  if (!answer.ok) return say(`Not claimed: ${answer.error}`);
  if (!had && !take_over) held = study;
  const length = Date.parse(answer.until) - Date.parse(answer.claimed_at);
  setInterval(() => attended() && isMine() && call("PUT", address(study, "claim"), {}), Math.min(length / 3, LONGEST));
  document.dispatchEvent(new CustomEvent("acted", {detail: study}));
}

if (opened && !["#look", "#delivery"].includes(location.hash)) begin({...opened.dataset});
addEventListener("pagehide", () => {
  if (held) call("DELETE", address(held, "claim"), undefined, true);
});
addEventListener("pageshow", event => {
  if (opened && event.persisted) location.reload();
});
