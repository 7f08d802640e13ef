// What pages say about jobs.

import { h } from "./dom.js";
import { ago, date } from "./format.js";

export const ENDED = new Set(["succeeded", "failed", "cancelled"]);
export const METHODS = { uora: "UORA", vera: "VeRA", lora: "LoRA", olora: "OLoRA", osora: "OSoRA" };

/** "reviews" of ft:base:project:reviews:abcdefgh; null for a model without a suffix. */
export const suffixOf = (model) => model?.split(":").at(3) || null;

/** How people call it: what they named, else the end of its id. */
export const shortName = (job) => suffixOf(job.fine_tuned_model) ?? job.metadata?.name ?? `…${job.id.slice(-8)}`;

export const methodOf = (job) => `${METHODS[job.adapter.method] ?? job.adapter.method} r=${job.adapter.r}`;

export const when = (epoch) => h("time", { datetime: new Date(epoch * 1000).toISOString(), title: date(epoch) }, ago(epoch));

export const statusWords = (status) => (status === "validating_files" ? "validating files" : status);

/** Seconds until a running job should end, as of now. */
export function secondsLeft(job) {
  if (job.status !== "running" || !job.estimated_finish) return null;
  return Math.max(0, job.estimated_finish - Date.now() / 1000);
}

/** Losses of a job's metrics events: of steps, and of evaluations. */
export function curves(events) {
  const train = new Map();
  const valid = new Map();
  for (const { data } of events) {
    if (!data) continue;
    if (data.trained_tokens !== undefined && data.train_loss != null) train.set(data.step, data.train_loss);
    const evaluated = data.full_valid_loss ?? data.valid_loss;
    if (evaluated != null) valid.set(data.step, evaluated);
  }
  const sorted = (found) => [...found].sort((a, b) => a[0] - b[0]);
  return { train: sorted(train), valid: sorted(valid) };
}
