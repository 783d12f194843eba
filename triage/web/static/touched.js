// What the page asks by itself must not keep its reader logged in: only who touches it stays.
const RECENT = 60000;
let touched = -Infinity;
for (const kind of ["pointerdown", "keydown", "wheel"])
  addEventListener(kind, () => touched = performance.now(), {capture: true, passive: true});

export const attended = () => performance.now() - touched <= RECENT;
export const unattended = () => attended() ? {} : {"X-Background": "1"};
