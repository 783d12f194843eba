// Takes over what changed in a part of the page: focus, selection and pictures stay as they are.
// A viewer draws itself, and goes on while what it shows is the same.
const isOwn = (shown, fresh) => fresh.localName.includes("-") && shown.localName === fresh.localName && shown.getAttribute("src") === fresh.getAttribute("src");

export function merge(shown, fresh) {
  if (shown.isEqualNode(fresh) || isOwn(shown, fresh)) return;
  if (shown.tagName !== fresh.tagName || !["MAIN", "SECTION", "DIV", "TABLE", "TBODY", "TR"].includes(fresh.tagName))
    return shown.replaceWith(fresh);
  for (const {name} of [...shown.attributes]) if (!fresh.hasAttribute(name)) shown.removeAttribute(name);
  for (const {name, value} of fresh.attributes) if (shown.getAttribute(name) !== value) shown.setAttribute(name, value);
  const keyed = parent => new Map([...parent.children].map((child, place) => [child.id || place, child]));
  const known = keyed(shown), wanted = keyed(fresh);
  for (const [key, child] of known) if (!wanted.has(key)) child.remove();
  [...wanted].forEach(([key, child], place) => {
    const here = shown.children[place] ?? null, kept = known.get(key) ?? child;
    if (kept !== here) shown.insertBefore(kept, here);
    if (kept !== child) merge(kept, child);
  });
}
