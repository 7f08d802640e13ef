// The service's own API, as every other client uses it; the session's cookie takes the place of the key.

const token = document.querySelector('meta[name="csrf-token"]').content;

/** An error of the API: its words, the parameter at fault and its code. */
export class ApiError extends Error {
  constructor(status, { message, param = null, code = null }) {
    super(message);
    this.status = status;
    this.param = param;
    this.code = code;
  }
}

/** Whether a request was given up by ourselves. */
export const isAborted = (error) => error.name === "AbortError";

/** For what is asked again in a moment: an error that ends the session or the page is no news. */
export function quietly(error) {
  if (!isAborted(error) && ![0, 401].includes(error.status)) console.warn(error);
}

/** The response to a request, 304 included; raises ApiError. `body` is JSON or FormData. */
export async function request(path, { method = "GET", body, headers = {}, signal } = {}) {
  const options = { method, signal, headers: { ...headers } };
  if (method !== "GET") options.headers["X-CSRF-Token"] = token;
  if (body instanceof FormData) options.body = body;
  else if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (isAborted(error)) throw error;
    throw new ApiError(0, { message: "The service does not answer; is it running?", code: "unreachable" });
  }
  if (response.ok || response.status === 304) return response;
  if (response.status === 401) {
    const next = encodeURIComponent(location.pathname + location.search);
    location.assign(`/dashboard/sign-in?next=${next}`);
  }
  throw await errorOf(response);
}

async function errorOf(response) {
  const body = await response.json().catch(() => null);
  const message = `The service answered ${response.status}.`;
  return new ApiError(response.status, body?.error ?? { message });
}

/** The JSON of an answer. */
export async function api(path, options) {
  return (await request(path, options)).json();
}

/** Every row of a list that comes in pages, `most` at most. */
export async function all(path, { signal, most = 5000 } = {}) {
  const rows = [];
  const url = new URL(path, location.origin);
  for (;;) {
    const page = await api(url.pathname + url.search, { signal });
    rows.push(...page.data);
    if (!page.has_more || rows.length >= most) return rows;
    url.searchParams.set("after", page.last_id);
  }
}

/** Ask until the answer is complete: 202 says that a worker is at it. */
export async function settled(path, options = {}) {
  for (;;) {
    const response = await request(path, options);
    if (response.status !== 202) return response.json();
    await pause(1000 * Number(response.headers.get("Retry-After") ?? 1), options.signal);
  }
}

/** Sleep; raises AbortError when it is over before. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(new DOMException("given up", "AbortError"));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    if (signal?.aborted) stop();
    else signal?.addEventListener("abort", stop, { once: true });
  });
}

export const path = (strings, ...values) => String.raw({ raw: strings }, ...values.map(encodeURIComponent));
