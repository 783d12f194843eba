// The list: pieces of it come and go as they are looked at, follow what changes, and are read with few keys.
import {unattended} from "/static/touched.js";
import {act, ask, call, say, send, warn} from "/static/acts.js";
import {merge} from "/static/merge.js";

const element = id => document.getElementById(id), live = element("live"), lost = element("lost");
const table = element("worklist"), more = element("more"), form = element("filters");
const RENEW = 30000; // times on the page grow old by themselves
const PAUSE = 3000; // a busy list changes all the time
const SURPRISE = 1500; // so long no key does anything to a study that nobody chose
let pieces = [], title = document.title, renewed = 0, busy = Promise.resolve(), wanted = false, later = 0;
let last = null, acted = "", moved = {row: null, at: 0};

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
  if (same) return same.focus({preventScroll: true});
  moved = {row: before.slice(before.indexOf(row)).map(one => element(one.id)).find(Boolean) ?? rows().at(-1), at: performance.now()};
  select(moved.row);
  if (row.dataset.study !== acted) say(`No longer here: ${row.dataset.name}.`);
}

async function get(address) {
  try {
    const response = await fetch(address, {cache: "no-store", headers: unattended(), signal: AbortSignal.timeout(10000)});
    if (response.status === 401) {
      location.reload();
      await new Promise(() => {}); // the page goes: nothing more is asked, or complained of
    }
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
  if (!piece.body.rows.length && pieces.length > 1) drop(piece);
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
  element("none-like-this").hidden = !applied.size;
  element("none-at-all").hidden = applied.size;
}

// Its range is the next one's then, or that of the one before where none follows.
function drop(piece) {
  const at = pieces.indexOf(piece), next = pieces[at + 1];
  next ? next.after = piece.after : pieces[at - 1].following = "";
  remove(...pieces.splice(at, 1));
}

function remove({body}) {
  seen.unobserve(body);
  body.remove();
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
  if (Date.now() - recalled > RENEW) await recall();
}

function changed(now = false) {
  clearTimeout(later);
  const wait = renewed + PAUSE - Date.now();
  if (!now && wait > 0) return later = setTimeout(changed, wait, true);
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
    pieces.splice(1).forEach(remove);
    Object.assign(pieces[0], {after: "", following: "", open: true});
    await renew(pieces[0]);
    await fill();
  });
}

const sorted = query => [...query].map(pair => pair.join("=")).sort().join("&");

// --- what changes ------------------------------------------------------------------------------

let version = 0, stream = null, critical = null, recalled = Date.now();

// What is critical already when the page begins is no news.
function told(changes) {
  const fresh = changes.critical.filter(uid => critical && !critical.has(uid));
  critical = new Set([...critical ?? [], ...changes.critical]);
  if (changes.version === version) return;
  version = changes.version;
  changed(fresh.length > 0);
  if (fresh.length) alarm(fresh);
}

// A study that has left is news when it comes back.
async function recall() {
  recalled = Date.now();
  const open = new Set((await (await get("/api/v1/worklist/changes")).json()).critical);
  critical = new Set([...critical ?? open].filter(uid => open.has(uid)));
}

// A browser holds six connections to a host (HTTP/1.1): pages that nobody looks at ask now and then.
function listen() {
  stream?.close();
  if (document.hidden) return;
  stream = new EventSource(`/api/v1/worklist/events?since=${version}`);
  stream.addEventListener("message", event => told(JSON.parse(event.data)));
}

// While there is no stream, it is asked for changes instead.
async function tick() {
  if (stream?.readyState !== EventSource.OPEN)
    await get(`/api/v1/worklist/changes?since=${version}`).then(response => response.json()).then(told).catch(() => {});
  if (stream?.readyState === EventSource.CLOSED && lost.hidden) listen();
  if (Date.now() - renewed > RENEW || !lost.hidden) changed();
  setTimeout(tick, live.dataset.refresh * 1000);
}

function found() {
  lost.hidden = true;
  document.title = title;
}

function missed() {
  if (!lost.hidden) return;
  lost.textContent = `Connection lost since ${element("as-of").textContent}. This page may be out of date.`;
  lost.hidden = false;
  document.title = "⚠ Connection lost";
}

// --- a new critical study ------------------------------------------------------------------------

const news = element("news"), switches = {sound: element("sound"), notify: element("notify")};
const isOn = name => switches[name].getAttribute("aria-pressed") === "true";

function alarm(fresh) {
  queue(() => announce(fresh)); // once the list has them: it says why they are critical
  try {
    if (isOn("sound")) beep();
    if (isOn("notify")) new Notification("Chest CT worklist", {body: count(fresh), tag: "critical", renotify: true});
  } catch (error) {
    console.warn(error);
  }
}

const count = fresh => fresh.length > 1 ? `${fresh.length} new critical studies` : "New critical study";

function announce(fresh) {
  const why = fresh.length === 1 && element(`row-${fresh[0]}`)?.querySelector(".why").firstChild.textContent.trim();
  const show = document.createElement("button"), hide = document.createElement("button");
  [show.textContent, hide.textContent] = ["Show", "Dismiss"];
  show.addEventListener("click", () => {
    news.hidden = true;
    const row = element(`row-${fresh[0]}`);
    row ? select(row) : scrollTo(0, 0);
  });
  hide.addEventListener("click", () => { news.hidden = true; });
  news.replaceChildren(`▲▲ ${count(fresh)}${why ? `: ${why}` : ""} `, show, " ", hide);
  news.hidden = false;
}

// Browsers play nothing in a page that nobody has touched yet.
let audio = null;

async function wake() {
  if (isOn("sound")) {
    audio ??= Object.assign(new AudioContext(), {onstatechange: tell});
    await audio.resume();
  }
  tell();
}

function tell() {
  switches.sound.textContent = isOn("sound") && audio?.state !== "running" ? "Sound (click once)" : "Sound";
}

function beep() {
  if (audio?.state !== "running") return;
  for (const [pitch, at] of [[660, 0], [880, 0.18]]) {
    const tone = new OscillatorNode(audio, {frequency: pitch}), loud = new GainNode(audio, {gain: 0.15});
    tone.connect(loud).connect(audio.destination);
    tone.start(audio.currentTime + at);
    tone.stop(audio.currentTime + at + 0.15);
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
    if (name === "sound") await wake();
    if (name === "sound" && isOn(name)) beep();
  });
}
tell();
for (const kind of ["pointerup", "keydown"]) addEventListener(kind, wake, {capture: true});

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
  const row = document.activeElement.closest("tr[data-study]"), button = row?.querySelector(what);
  if (button && (row !== moved.row || performance.now() - moved.at > SURPRISE)) act(button);
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
  const typed = event.target.closest("input:not([type=checkbox]), select, textarea, dialog[open]");
  if (typed && event.key === "Escape" && !typed.matches("dialog")) return typed.blur();
  if (typed || event.ctrlKey || event.altKey || event.metaKey || !keysOn.checked || !keys[event.key]) return;
  if (event.repeat && !"jk".includes(event.key)) return;
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
  const {study, name} = row.dataset, take_over = claim.dataset.person, answer = await warn(take_over, name, true);
  const taken = answer === "take" && await send("PUT", study, "claim", {take_over});
  if (taken && !taken.ok) return say(taken.error);
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
document.addEventListener("acted", event => {
  acted = event.detail;
  changed(true);
});
document.addEventListener("visibilitychange", () => document.hidden ? stream?.close() : listen());
addEventListener("scroll", () => isShort() && queue(fill), {passive: true});
more.addEventListener("click", event => event.preventDefault());
queue(fill);
await get("/api/v1/worklist/changes").then(response => response.json()).then(told).catch(() => {});
listen();
setTimeout(tick, live.dataset.refresh * 1000);
