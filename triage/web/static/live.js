import {merge} from "/static/merge.js";
import {unattended} from "/static/touched.js";

// The page fetches itself and takes over what changed: scroll, focus, selection and pictures stay as they are.
const live = document.getElementById("live"), lost = document.getElementById("lost");
let etag = "", title = document.title, timer;

async function refresh() {
  clearTimeout(timer);
  try {
    const ask = {cache: "no-store", headers: {"If-None-Match": etag, ...unattended()}, signal: AbortSignal.timeout(10000)};
    const response = await fetch(location.href, ask);
    if (response.status === 401) return location.reload();
    if (!response.ok && response.status !== 304) throw new Error(response.statusText);
    if (response.ok) {
      const fresh = new DOMParser().parseFromString(await response.text(), "text/html"), focused = document.activeElement.id;
      merge(live, fresh.getElementById("live"));
      if (focused && document.activeElement.id !== focused) document.getElementById(focused)?.focus({preventScroll: true});
      [title, etag] = [fresh.title, response.headers.get("ETag")];
    }
    lost.hidden = true;
  } catch {
    if (lost.hidden) lost.textContent = `Connection lost since ${document.getElementById("as-of").textContent}. This page may be out of date.`;
    lost.hidden = false;
  }
  document.title = lost.hidden ? title : "⚠ Connection lost";
  timer = setTimeout(refresh, live.dataset.refresh * 1000);
}

document.addEventListener("acted", refresh);
timer = setTimeout(refresh, live.dataset.refresh * 1000);
