// The list: pieces of it come and go as they are looked at, follow what changes, and are read with few keys.
import {unattended} from "/static/touched.js";
import {act, ask, call, say, warn} from "/static/acts.js";
import {merge} from "/static/merge.js";

const element = id => document.getElementById(id), live = element("live"), lost = element("lost");
const table = element("worklist"), more = element("more"), form = element("filters");
const RENEW = 30000; // times on the page grow old by themselves
let pieces = [], title = document.title, renewed = Date.now(), busy = Promise.resolve(), wanted = false, last = null;

// --- pieces ------------------------------------------------------------------------------------
// A piece is a range of keys: from the end of the one before to its own. Whatever comes, goes or moves meanwhile,
// each study belongs to one of them. Only those near the window are in the page; of the others their height is.

const seen = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    const piece = pieces.find(one => one.body === target);
    if (piece) isIntersecting ? open(piece) : close(piece);
  }
}, {rootMargin: "150% 0px"});

function add(body, after, following, at = pieces.length) {
  const piece = {body, after, following, open: true};
  body.id = "";
  pieces.splice(at, 0, piece);
  if (!body.parentNode) at ? pieces[at - 1].body.after(body) : table.append(body);
  seen.observe(body);
  return piece;
}

function close(piece) {
  if (!piece.open || piece.body.contains(document.activeElement)) return;
  const height = piece.body.offsetHeight, gap = document.createElement("td");
  gap.colSpan = 8;
  gap.style.height = `${height}px`;
  const row = document.createElement("tr");
  row.className = "gap";
  row.append(gap);
  piece.body.replaceChildren(row);
  piece.open = false;
}

function open(piece) {
  if (piece.open) return;
  piece.open = true;
  queue(() => renew(piece));
}

const queue = job => (busy = busy.then(() => keep(job)).catch(error => console.warn(error)));

// What had the focus keeps it, wherever it went; where it is gone, the study after it has it.
async function keep(job) {
  const focused = document.activeElement, row = focused.closest("tr[data-study]"), before = rows();
  await job();
  if (!row || document.activeElement !== document.body) return;
  const same = element(focused.id) ?? element(row.id)?.querySelector("a.open");
  if (same) same.focus({preventScroll: true});
  else select(before.slice(before.indexOf(row)).map(one => element(one.id)).find(Boolean) ?? rows().at(-1));
}

async function get(address) {
  try {
    const response = await fetch(address, {cache: "no-store", headers: unattended(), signal: AbortSignal.timeout(10000)});
    if (response.status === 401) location.reload();
    if (response.status === 409) restart(); // the ordering has changed
    if (!response.ok) throw new Error(response.statusText);
    return response;
  } catch (error) {
    missed();
    throw error;
  }
}

const filters = () => {
  const given = new URLSearchParams(new FormData(form));
  return new URLSearchParams([...given].filter(([, value]) => value.trim()));
};

async function renew(piece) {
  if (!pieces.includes(piece)) return;
  const query = new URLSearchParams(applied), place = pieces.indexOf(piece);
  if (piece.after) query.set("after", piece.after);
  if (piece.following) query.set("until", piece.following);
  const fresh = new DOMParser().parseFromString(await (await get(`/list?${query}`)).text(), "text/html");
  if (!pieces.includes(piece) || !piece.open) return;
  const body = fresh.getElementById("piece"), following = body.dataset.following || piece.following;
  if (following && piece.following && following !== piece.following)
    add(document.createElement("tbody"), following, piece.following, place + 1).open = false;
  piece.following = following;
  show(piece, body);
  const bar = fresh.getElementById("bar"), troubles = [...fresh.querySelectorAll(".trouble")];
  merge(element("bar"), bar);
  const shown = [...live.querySelectorAll(".trouble")];
  if (shown.map(one => one.textContent).join() !== troubles.map(one => one.textContent).join()) {
    for (const one of shown) one.remove();
    live.prepend(...troubles);
  }
  title = fresh.title;
  const end = pieces.at(-1);
  more.hidden = !end.following;
  element("none").hidden = Boolean(table.querySelector("tbody tr"));
}

function show(piece, body) {
  for (const one of body.rows) {
    const here = element(one.id);
    if (here && here.parentNode !== piece.body) piece.body.append(here);
  }
  body.id = piece.body.id;
  merge(piece.body, body);
}

async function renewAll() {
  wanted = false;
  renewed = Date.now();
  for (const piece of pieces.filter(one => one.open)) await renew(piece);
  await fill();
  found();
}

function changed() {
  if (!wanted) queue(renewAll);
  wanted = true;
}

const isShort = () => !more.hidden && more.getBoundingClientRect().top < 2.5 * innerHeight;

async function fill() {
  while (pieces.at(-1).following && isShort()) {
    const piece = add(document.createElement("tbody"), pieces.at(-1).following, "");
    await renew(piece);
  }
}

let applied = filters();

function restart() {
  applied = filters();
  history.replaceState(null, "", `/?${applied}`.replace(/\?$/, ""));
  element("csv").href = `/list.csv?${applied}`;
  for (const link of document.querySelectorAll("#views a"))
    sorted(new URL(link.href).searchParams) === sorted(applied) ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  queue(async () => {
    for (const piece of pieces.splice(1)) {
      seen.unobserve(piece.body);
      piece.body.remove();
    }
    Object.assign(pieces[0], {after: "", following: "", open: true});
    await renew(pieces[0]);
    await fill();
  });
}

const sorted = query => [...query].map(pair => pair.join("=")).sort().join("&");

// --- what changes ------------------------------------------------------------------------------

let version = 0, stream = null;
const critical = new Set();

function told(changes, first) {
  const fresh = changes.critical.filter(one => !critical.has(one.study_instance_uid));
  for (const one of fresh) critical.add(one.study_instance_uid);
  if (changes.version === version) return;
  version = changes.version;
  if (first) return;
  if (fresh.length) announce(fresh);
  changed();
}

function listen() {
  stream = new EventSource(`/api/v1/worklist/events?since=${version}`);
  stream.addEventListener("message", event => told(JSON.parse(event.data)));
}

// While there is no stream, it is asked for changes instead.
async function tick() {
  if (stream.readyState !== EventSource.OPEN)
    await get(`/api/v1/worklist/changes?since=${version}`).then(response => response.json()).then(changes => told(changes)).catch(() => {});
  if (stream.readyState === EventSource.CLOSED && lost.hidden) listen();
  if (Date.now() - renewed > RENEW || !lost.hidden) changed();
  setTimeout(tick, live.dataset.refresh * 1000);
}

function found() {
  lost.hidden = true;
  document.title = title;
}

function missed() {
  lost.textContent = `Connection lost since ${element("as-of").textContent}. This page may be out of date.`;
  lost.hidden = false;
  document.title = "⚠ Connection lost";
}

// --- a new critical study ------------------------------------------------------------------------

const news = element("news"), switches = {sound: element("sound"), notify: element("notify")};
const isOn = name => switches[name].getAttribute("aria-pressed") === "true";

function announce(fresh) {
  const many = fresh.length > 1, what = many ? `${fresh.length} new critical studies` : `New critical study: ${fresh[0].reason}`;
  const show = document.createElement("button"), hide = document.createElement("button");
  [show.textContent, hide.textContent] = ["Show", "Dismiss"];
  show.addEventListener("click", () => {
    news.hidden = true;
    const row = element(`row-${fresh[0].study_instance_uid}`);
    row ? select(row) : scrollTo(0, 0);
  });
  hide.addEventListener("click", () => { news.hidden = true; });
  news.replaceChildren(`▲▲ ${what} `, show, " ", hide);
  news.hidden = false;
  if (isOn("sound")) beep();
  if (isOn("notify") && Notification.permission === "granted") new Notification("Chest CT worklist", {body: what, tag: "critical"});
}

function beep() {
  const context = new AudioContext();
  for (const [pitch, at] of [[660, 0], [880, 0.18]]) {
    const tone = new OscillatorNode(context, {frequency: pitch}), loud = new GainNode(context, {gain: 0.15});
    tone.connect(loud).connect(context.destination);
    tone.start(context.currentTime + at);
    tone.stop(context.currentTime + at + 0.15);
  }
}

function turn(name, on) {
  switches[name].setAttribute("aria-pressed", on);
  localStorage.setItem(name, on);
}

for (const [name, button] of Object.entries(switches)) {
  turn(name, localStorage.getItem(name) === "true" && (name === "sound" || Notification.permission === "granted"));
  button.addEventListener("click", async () => {
    if (name === "notify" && !isOn(name) && await Notification.requestPermission() !== "granted")
      return say("This browser does not allow notifications of this page.");
    turn(name, !isOn(name));
    if (name === "sound" && isOn(name)) beep();
  });
}

// --- keys ------------------------------------------------------------------------------------------

const rows = () => [...table.querySelectorAll("tr[data-study]")];
const current = () => document.activeElement.closest("tr[data-study]") ?? (last?.isConnected ? last : null);

function select(row) {
  if (!row) return;
  row.querySelector("a.open").focus({preventScroll: true});
  row.scrollIntoView({block: "nearest"});
}

function step(by) {
  const all = rows(), at = all.indexOf(current());
  select(at < 0 ? all[0] : all[Math.min(Math.max(at + by, 0), all.length - 1)]);
}

function press(what) {
  const button = current()?.querySelector(what);
  if (button) act(button);
}

const help = element("help"), keysOn = element("keys-on");
keysOn.checked = localStorage.getItem("keys") !== "false";
keysOn.addEventListener("change", () => localStorage.setItem("keys", keysOn.checked));
const keys = {
  j: () => step(1),
  k: () => step(-1),
  c: () => press("[data-act=claim], [data-act=release]"),
  r: () => press("[data-act=read]"),
  f: () => form.elements.text.focus(),
  "?": () => help.showModal(),
};

document.addEventListener("keydown", event => {
  const typed = event.target.closest("input:not([type=checkbox]), select, textarea, dialog");
  if (typed && event.key === "Escape" && !typed.matches("dialog")) return typed.blur();
  if (typed || event.ctrlKey || event.altKey || event.metaKey || !keysOn.checked || !keys[event.key]) return;
  event.preventDefault();
  keys[event.key]();
});
element("help-button").addEventListener("click", () => help.showModal());
table.addEventListener("focusin", event => { last = event.target.closest("tr[data-study]"); });

table.addEventListener("click", async event => {
  const link = event.target.closest("a.open"), row = link?.closest("tr");
  const claim = row?.querySelector(".claim:not(.mine)");
  if (!claim) return;
  event.preventDefault();
  const {study, name} = row.dataset, answer = await warn(claim.dataset.person, name, true);
  if (answer === "take" && !(await call("PUT", `/studies/${encodeURIComponent(study)}/claim`, {take_over: true})).ok) return changed();
  if (answer) location.href = answer === "look" ? `${link.href}#look` : link.href;
});

// --- filters and views -----------------------------------------------------------------------------

let typing;
form.addEventListener("input", event => {
  clearTimeout(typing);
  typing = setTimeout(restart, event.target.type === "search" ? 300 : 0);
});
form.addEventListener("submit", event => {
  event.preventDefault();
  restart();
});

function asked() {
  const query = filters(), one = name => query.get(name) ?? undefined;
  return {
    band: query.getAll("band"), status: query.getAll("status"), claimed: one("claimed"), text: one("text"),
    description: one("description"), scanner: one("scanner"), hours: query.has("hours") ? Number(query.get("hours")) : undefined, overdue: query.has("overdue"),
  };
}

element("save-view").addEventListener("click", async () => {
  if (await ask(element("view-dialog")) !== "save") return;
  const answer = await call("PUT", `/views/${encodeURIComponent(element("view-name").value.trim())}`, {filters: asked()});
  answer.ok ? location.assign(`/?${answer.query}`) : say(answer.error);
});
element("views").addEventListener("click", async event => {
  const name = event.target.closest("[data-forget]")?.dataset.forget;
  if (name && (await call("DELETE", `/views/${encodeURIComponent(name)}`)).ok) event.target.closest(".view").remove();
});

// --- begin -------------------------------------------------------------------------------------------

const first = table.tBodies[0], asOfAddress = new URLSearchParams(location.search).get("after") ?? "";
add(first, asOfAddress, first.dataset.following);
document.addEventListener("acted", changed);
addEventListener("scroll", () => isShort() && queue(fill), {passive: true});
more.addEventListener("click", event => event.preventDefault());
queue(fill);
await get("/api/v1/worklist/changes").then(response => response.json()).then(changes => told(changes, true)).catch(() => {});
listen();
changed();
setTimeout(tick, live.dataset.refresh * 1000);
