// Sends what is dropped or chosen, some files at a time. What became of it is shown by the page, which renews itself.
import {call} from "/static/acts.js";

const BATCH = 16 * 2 ** 20, MOST_FILES = 50, AT_ONCE = 2;
const element = id => document.getElementById(id), box = element("upload-box"), largest = Number(box.dataset.largest);
let upload = box.dataset.upload, waiting = [], missing = [], total = 0, arrived = 0, isSending = false;
const underway = new Map(); // batch → bytes of it that are sent

// --- what to send --------------------------------------------------------------------------------

function entriesOf(reader) {
  return new Promise((done, failed) => reader.readEntries(done, failed));
}

async function* filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    yield {file, name: entry.fullPath.slice(1)};
    return;
  }
  const reader = entry.createReader();
  for (let some = await entriesOf(reader); some.length; some = await entriesOf(reader))
    for (const one of some) yield* filesOf(one);
}

async function dropped(transfer) {
  const entries = [...transfer.items].map(item => item.webkitGetAsEntry()).filter(Boolean), found = [];
  for (const entry of entries) for await (const one of filesOf(entry)) found.push(one);
  return found;
}

const chosen = input => [...input.files].map(file => ({file, name: file.webkitRelativePath || file.name}));

function nextBatch() {
  const batch = [];
  let size = 0;
  while (waiting.length && batch.length < MOST_FILES && (!batch.length || size + waiting[0].file.size <= BATCH)) {
    batch.push(waiting.shift());
    size += batch.at(-1).file.size;
  }
  return {batch, size};
}

// --- sending -------------------------------------------------------------------------------------

function post(body, progressed) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much has been sent
    request.open("POST", `/api/v1/uploads/${upload}/files`);
    request.responseType = "json";
    request.upload.addEventListener("progress", event => progressed(event.loaded));
    request.addEventListener("load", () => request.status === 200 ? done() : failed(new Error(request.response?.error ?? request.statusText)));
    request.addEventListener("error", () => failed(new Error("There is no connection.")));
    request.send(body);
  });
}

async function work() {
  for (let {batch, size} = nextBatch(); batch.length; {batch, size} = nextBatch()) {
    const body = new FormData();
    for (const {file, name} of batch) body.append("files", file, name);
    try {
      await post(body, loaded => {
        underway.set(batch, Math.min(loaded, size));
        show();
      });
      arrived += size;
    } catch (error) {
      missing.push(...batch);
      complain(error.message);
    }
    underway.delete(batch);
    show();
    document.dispatchEvent(new Event("acted"));
  }
}

async function ask(method, path) {
  const answer = await call(method, path).catch(() => ({error: "There is no connection."}));
  if (!answer.ok) throw new Error(answer.error);
  return answer;
}

async function run() {
  isSending = true;
  try {
    if (!upload) {
      upload = (await ask("POST", "/uploads")).upload_id;
      history.replaceState(null, "", `/uploads/${upload}`);
      listen();
    }
    await Promise.all(Array.from({length: AT_ONCE}, work));
    if (!missing.length) await ask("PUT", `/uploads/${upload}/complete`);
  } catch (error) {
    missing.push(...waiting.splice(0));
    complain(error.message);
  }
  isSending = false;
  show();
  document.dispatchEvent(new Event("acted"));
}

function send(files) {
  const fitting = files.filter(({file}) => file.size <= largest), tooLarge = files.filter(({file}) => file.size > largest);
  if (!isSending) total = arrived = 0;
  total += fitting.reduce((sum, {file}) => sum + file.size, 0);
  waiting.push(...fitting);
  element("wrong").hidden = true;
  if (tooLarge.length)
    complain(`${tooLarge.map(({name}) => name).join(", ")}: more than ${amount(largest)} (web.upload_gb). Send it in parts.`);
  if (fitting.length && !isSending) run();
}

// --- what is said --------------------------------------------------------------------------------

const amount = bytes => bytes < 2 ** 30 ? `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MB` : `${(bytes / 2 ** 30).toFixed(1)} GB`;

function show() {
  const sent = arrived + [...underway.values()].reduce((sum, bytes) => sum + bytes, 0), bar = element("sent");
  element("sending").hidden = false;
  element("again").hidden = isSending || !missing.length;
  bar.hidden = !isSending;
  bar.max = total || 1;
  bar.value = sent;
  if (isSending && sent < total) say(`Sending: ${amount(sent)} of ${amount(total)}`);
  else if (isSending) say("Sent. Images are being read in.");
  else if (missing.length) say(`${missing.length} ${missing.length === 1 ? "file" : "files"} did not arrive. What came stays.`);
  else say("All has come.");
}

function say(text) {
  if (element("told").textContent !== text) element("told").textContent = text;
}

function complain(text) {
  element("sending").hidden = element("wrong").hidden = false;
  element("wrong").textContent = `⚠ ${text}`;
}

// What becomes of the studies is shown as it happens; without this, when the page renews itself.
function listen() {
  new EventSource("/api/v1/worklist/events").addEventListener("message", () => document.dispatchEvent(new Event("acted")));
}

// --- begin ---------------------------------------------------------------------------------------

for (const kind of ["files", "folder"]) {
  const input = element(kind);
  element(`pick-${kind}`).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    send(chosen(input));
    input.value = "";
  });
}
element("again").addEventListener("click", () => send(missing.splice(0)));
addEventListener("dragover", event => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  box.classList.add("over");
});
addEventListener("dragleave", event => event.relatedTarget ?? box.classList.remove("over"));
addEventListener("drop", async event => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  box.classList.remove("over");
  send(await dropped(event.dataTransfer));
});
addEventListener("beforeunload", event => isSending && event.preventDefault());
if (upload) listen();
