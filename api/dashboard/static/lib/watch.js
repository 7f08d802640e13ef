// Waiting for changes. A page waits for one thing at a time, and only while it is looked at: browsers keep six
// connections to a server, for all pages together.

import { isAborted, pause, request } from "./api.js";

const WAIT_SECONDS = 25;
const AFTER_ERROR_MS = 3000;

/** Call `onChange` with the answer now and after each change, until it returns false or `signal` is aborted. */
export async function watch(url, onChange, { signal, onError = () => {} }) {
  const address = new URL(url, location.origin);
  let tag = null;
  try {
    while (!signal.aborted) {
      await visible(signal);
      try {
        address.searchParams.set("wait", tag === null ? 0 : WAIT_SECONDS);
        const headers = tag === null ? {} : { "If-None-Match": tag };
        const response = await request(address.pathname + address.search, { headers, signal });
        onError(null);
        if (response.status === 304) continue;
        if ((await onChange(await response.json())) === false) return;
        tag = response.headers.get("ETag"); // only now: what could not be shown is asked for again
      } catch (error) {
        if (isAborted(error)) throw error;
        onError(error);
        if (error.status === 404) return;
        await pause(AFTER_ERROR_MS, signal);
      }
    }
  } catch (error) {
    if (!isAborted(error)) throw error;
  }
}

function visible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
  });
}

/** A signal that is aborted when the page is left. */
export function pageSignal() {
  const controller = new AbortController();
  addEventListener("pagehide", () => controller.abort());
  addEventListener("pageshow", (event) => event.persisted && location.reload());
  return controller.signal;
}
