// Claim, release, mark read and verdicts: what [data-act] buttons do to the study of their [data-study].
const element = id => document.getElementById(id), said = element("said");
let forgetting;

document.documentElement.classList.add("with-script");

export async function call(method, path, body) {
  const response = await fetch(`/api/v1${path}`, {method, headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
  if (response.status === 401) location.reload();
  const answer = response.status === 204 ? {} : await response.json();
  return {ok: response.ok, ...answer};
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
  said.hidden = false;
  forgetting = setTimeout(() => { said.hidden = true; }, 10000);
}

export function ask(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise(answered => dialog.addEventListener("close", () => answered(dialog.returnValue), {once: true}));
}

// Somebody else reads the study: "take", "look" (where that is a way) or "".
export function warn(person, name, look) {
  element("taken-by").textContent = `${person} reads the study of ${name}. Ask ${person} before you take it over.`;
  element("taken-look").hidden = !look;
  return ask(element("taken"));
}

async function send(method, path, body) {
  const answer = await call(method, path, body).catch(() => ({ok: false, error: "There is no connection: nothing was done."}));
  if (!answer.ok && !answer.claim) say(answer.error);
  document.dispatchEvent(new Event("acted"));
  return answer;
}

async function claimOrRead(what, study, name, take_over = false) {
  const path = `/studies/${encodeURIComponent(study)}`;
  const answer = await send("PUT", `${path}/${what}`, {take_over});
  if (answer.claim) return await warn(answer.claim.person, name) === "take" && claimOrRead(what, study, name, true);
  if (!answer.ok) return false;
  if (what === "read") say(`Marked read: ${name}.`, () => unread(study, name));
  else say(`You read the study of ${name}.`);
  return true;
}

async function release(study, name) {
  if ((await send("DELETE", `/studies/${encodeURIComponent(study)}/claim`)).ok) say(`Released: ${name}.`);
}

async function unread(study, name) {
  if ((await send("DELETE", `/studies/${encodeURIComponent(study)}/read`)).ok) say(`Back on the list: ${name}.`);
}

async function verdict(study, name, opinion) {
  let body = {opinion};
  if (opinion === "other") {
    element("judge-opinion").value = opinion;
    element("judge-grade").value = element("judge-comment").value = "";
    if (await ask(element("judge")) !== "save") return;
    body = {opinion: element("judge-opinion").value, comment: element("judge-comment").value, true_grade: element("judge-grade").value || null};
  }
  if ((await send("POST", `/studies/${encodeURIComponent(study)}/verdicts`, body)).ok) say(`Verdict recorded for ${name}.`);
}

export function act(button) {
  const {study, name} = button.closest("[data-study]").dataset, what = button.dataset.act;
  if (what === "verdict") return verdict(study, name, button.dataset.opinion);
  return {release, unread}[what]?.(study, name) ?? claimOrRead(what, study, name);
}

document.addEventListener("click", event => {
  const button = event.target.closest("[data-act]");
  if (button) act(button);
});

// Whoever opens a study reads it, unless somebody else does: then the page says so before anything else.
async function begin({study, name}) {
  const path = `/studies/${encodeURIComponent(study)}/claim`, answer = await call("PUT", path, {take_over: false});
  const wish = answer.claim && await warn(answer.claim.person, name, true);
  if (wish === "") return location.assign("/");
  if (wish === "take") await call("PUT", path, {take_over: true});
  document.dispatchEvent(new Event("acted"));
}

const opened = document.querySelector("[data-opened]");
if (opened && location.hash !== "#look") begin(opened.dataset);
