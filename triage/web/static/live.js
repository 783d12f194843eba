"use strict";
// The page fetches itself and takes over what changed: scroll, focus, selection and pictures stay as they are.
const live = document.getElementById("live"), lost = document.getElementById("lost");
let etag = "", title = document.title;

function merge(shown, fresh) {
  if (shown.isEqualNode(fresh)) return;
  if (shown.tagName !== fresh.tagName || !["MAIN", "DIV", "TABLE", "TBODY", "TR"].includes(fresh.tagName))
    return shown.replaceWith(fresh);
  shown.className = fresh.className;
  const keyed = parent => new Map([...parent.children].map((child, place) => [child.id || place, child]));
  const known = keyed(shown), wanted = keyed(fresh);
  for (const [key, child] of known) if (!wanted.has(key)) child.remove();
  [...wanted].forEach(([key, child], place) => {
    const here = shown.children[place] ?? null, kept = known.get(key) ?? child;
    if (kept !== here) shown.insertBefore(kept, here);
    if (kept !== child) merge(kept, child);
  });
}

async function refresh() {
  try {
    const ask = {cache: "no-store", headers: {"If-None-Match": etag}, signal: AbortSignal.timeout(10000)};
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
    lost.textContent = `Connection lost since ${document.getElementById("as-of").textContent}. This page may be out of date.`;
    lost.hidden = false;
  }
  document.title = lost.hidden ? title : "⚠ Connection lost";
  setTimeout(refresh, live.dataset.refresh * 1000);
}

setTimeout(refresh, live.dataset.refresh * 1000);
